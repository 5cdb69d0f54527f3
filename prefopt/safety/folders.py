"""Which files of a folder belong to the model that was saved there, so that a folder holds one model.

transformers loads the whole weights of a folder and then applies the adapter that lies beside them, no matter
which was trained last. So saving removes the files of the earlier model, and loading refuses a folder with both.
Handles only files: no trainer, no model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prefopt.safety.errors import UsageError
from prefopt.safety.files import is_file, to_disk, write_text

ASIDE = ".unfinished-model"
"""Where a model is written before it moves to the folder above."""
REFERENCE_ADAPTER = "ref"
"""The folder of TRL's copy of an adapter that is trained further, its reference."""
_WHOLE = "whole.json"
"""The last file of `ASIDE`, with the names of the others: the model in it is complete."""
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = re.compile(r"adapter_model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|adapter_config\.json")
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
_OF_THE_MODEL = (
    "config.json", "generation_config.json", "objective*.safetensors", "reference.safetensors",
    "ref/adapter_config.json", "ref/adapter_model.safetensors", "ref/adapter_model.bin", "ref/README.md",
)  # fmt: skip
_CHECKPOINT = "prefopt.json"


@dataclass(frozen=True)
class Contents:
    """The files in a folder of a model and of the run that made it.

    Attributes:
        weights: files of whole weights.
        adapter: files of an adapter.
        results: files of a recipe's results; other programs may use the names too.
        checkpoints: folders of checkpoints.
    """

    weights: tuple[str, ...] = ()
    adapter: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.weights or self.adapter or self.results or self.checkpoints)

    def __str__(self) -> str:
        """In words: `an adapter (adapter_config.json, ...) and results (results.json)`."""
        names = ("whole weights", "an adapter", "results", "checkpoints")
        files = (self.weights, self.adapter, self.results, self.checkpoints)
        words = [f"{name} ({_some(some)})" for name, some in zip(names, files, strict=True) if some]
        return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def what_is_there(folder: str | os.PathLike[str]) -> Contents:
    """What an earlier run left in an output folder; false if it left no finished model."""
    path = Path(folder)
    try:
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    except (OSError, ValueError):
        names = []
    return Contents(
        tuple(name for name in names if _WEIGHTS.fullmatch(name)),
        tuple(name for name in names if _ADAPTER.fullmatch(name)),
        tuple(name for name in names if name in ("results.json", "before.json") and "before" in _read(path / name)),
        tuple(name for name in names if re.fullmatch(r"checkpoint-\d+", name)),
    )


def check_one_model(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder from which two models, or neither, would be loaded; other paths pass.

    Raises:
        ValueError: naming the files of both, and what to do.
    """
    path = Path(folder)
    if is_whole(path / ASIDE):
        raise UsageError(
            f"the last model was not moved to its place in {path} before its run ended: it is complete in "
            f"{path / ASIDE}. Load that folder, or move its files to where you want them and delete it"
        )
    if not is_file(path / _ADAPTER_CONFIG):
        return
    held = what_is_there(path)
    if held.weights:
        adapter, weights = _some(held.adapter), _some(held.weights)
        raise UsageError(
            f"{path} holds two models: whole weights ({weights}) and an adapter ({adapter}). transformers would apply "
            f"the adapter on top of the weights, whichever of them was trained last. Move {adapter} out of the folder "
            f"to use the whole weights, or {weights} to use the adapter"
        )


# ---- saving ------------------------------------------------------------------------------------------------------


def is_whole(aside: Path) -> bool:
    """Whether the model in a folder `ASIDE` is complete."""
    return is_file(aside / _WHOLE)


def move_into(aside: Path, folder: Path) -> None:
    """Replace the model in one folder by the complete model in another.

    Files that belong to no known model stay. If the process is killed meanwhile, the folder holds the old model, the
    new one, or none: then the new one is complete in `aside`, and `recover` finishes the move.
    """
    files = [path for path in aside.rglob("*") if path.is_file()]
    for path in files:
        to_disk(path)
    names = sorted(path.relative_to(aside).as_posix() for path in files)
    write_text(aside / _WHOLE, json.dumps(names))
    to_disk(aside)
    recover(folder, aside)


def recover(folder: Path, aside: Path | None = None) -> bool:
    """Finish what `move_into` began, if it did.

    Returns:
        Whether there was anything to finish.
    """
    aside = folder / ASIDE if aside is None else aside
    if not is_whole(aside):
        return False
    names: list[str] = json.loads((aside / _WHOLE).read_text(encoding="utf-8"))
    new = {name for name in names if _is_weights(name)}
    if new:
        # Never have parts of two models that would load together: old files without a successor of the same name go
        # first, and files that list them go before them. A single file is replaced at once.
        held = what_is_there(folder)
        old = [name for name in (*held.adapter, *held.weights) if name not in new or name.endswith(".index.json")]
        for name in sorted(old, key=_loads_last, reverse=True):
            if name not in new or (aside / name).exists():
                (folder / name).unlink()
    for name in sorted(names, key=lambda name: (name in new, _loads_last(name), name)):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (aside / name).exists():
            os.replace(aside / name, target)
    if new:
        for path in _left_over(folder, set(names)):
            path.unlink()
            if path.parent != folder and not any(path.parent.iterdir()):
                path.parent.rmdir()
    to_disk(folder)
    shutil.rmtree(aside)
    return True


def earlier_results(folder: Path) -> list[Path]:
    """The results of a run before this one, if its model is there; this run's own files are newer than that model.

    Call it before the first save of a run that was not resumed.
    """
    held = what_is_there(folder)
    times = [(folder / name).stat().st_mtime_ns for name in (*held.weights, *held.adapter)]
    if not times:
        return []
    results = [folder / name for name in held.results] + list(folder.glob("dropped_*_rows.jsonl"))
    return [path for path in results if path.name == "results.json" or path.stat().st_mtime_ns < max(times)]


def _left_over(folder: Path, names: set[str]) -> Iterable[Path]:
    """Files of an earlier model that the files in `names` do not replace."""
    of_model = () if (folder / _CHECKPOINT).exists() else _OF_THE_MODEL
    patterns = [*of_model, *(_TOKENIZER if "tokenizer_config.json" in names else ())]
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        mine = path.name == "config.json" and not _is_model_config(path)
        if path.is_file() and path.relative_to(folder).as_posix() not in names and not mine:
            yield path


def _is_weights(name: str) -> bool:
    return bool(_WEIGHTS.fullmatch(name) or _ADAPTER.fullmatch(name))


def _loads_last(name: str) -> bool:
    """Whether other files of weights are not loaded without this one."""
    return name.endswith(".index.json") or name == _ADAPTER_CONFIG


def _is_model_config(path: Path) -> bool:
    return bool({"model_type", "architectures"} & set(_read(path)))


def _read(path: Path) -> dict[str, object]:
    """A JSON object; empty where the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
