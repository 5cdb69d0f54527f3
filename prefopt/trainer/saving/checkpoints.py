"""Checkpoint folders on disk: which are complete, what is wrong with the others, and which one a run resumes from.

A checkpoint of this package is complete once it has its manifest, which is written last and lists every file with its
size; an interrupted save is never taken for a checkpoint. Folders written by plain TRL have no manifest: they are
accepted if they can be read. Knows files only, no trainer and no process group.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prefopt.safety.errors import PrefoptError
from prefopt.safety.files import to_disk, write_text
from prefopt.safety.weights import pickled

MANIFEST = "complete.json"
STATE = "prefopt.json"
"""The first file that we write: a folder with it and without a manifest is an unfinished checkpoint of ours."""
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
_INDEX = "model.safetensors.index.json"


class CheckpointError(PrefoptError, RuntimeError):
    """A checkpoint or output folder cannot be read or written. The message says which, why, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder on disk.

    Attributes:
        folder: `.../checkpoint-<step>`.
        step: the optimizer step it was written after.
        written: when, in nanoseconds since the epoch.
        problem: why a run cannot resume from it; "" if it can.
    """

    folder: Path
    step: int
    written: int
    problem: str


# ---- writing -----------------------------------------------------------------------------------------------------


def begin(folder: Path, state: Mapping[str, Any]) -> None:
    """Make an empty checkpoint folder, marked as unfinished.

    Args:
        folder: of the checkpoint; an earlier one of that name is deleted.
        state: what a resumed run needs in addition to transformers' files.
    """
    discard(folder)
    folder.mkdir(parents=True)
    write_text(folder / STATE, json.dumps(state, indent=1) + "\n")


def complete(folder: Path) -> None:
    """Sync every file of a checkpoint to disk, then write the manifest that makes it complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        to_disk(path)
    manifest = {
        "written": time.time_ns(),
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    to_disk(folder)
    to_disk(folder.parent)


def discard(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: if interrupted, the rest does not count as a checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def remove_unfinished(output_dir: Path) -> list[Path]:
    """Delete our checkpoints that have no manifest.

    Returns:
        Their folders.
    """
    gone = [
        folder for folder in _folders(output_dir) if (folder / STATE).exists() and not (folder / MANIFEST).exists()
    ]
    # A kill during `begin` or `discard` may leave an empty folder.
    gone += [folder for folder in _folders(output_dir) if not any(folder.iterdir())]
    for folder in gone:
        discard(folder)
    return gone


def rotate(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints until `limit` are left; damaged ones first, the newest complete and `best` never.

    transformers' own rotation orders folders by modification time, or else by step. It would delete a checkpoint just
    written if an earlier run in the same folder had reached a later step.
    """
    if limit is None or limit <= 0:
        return
    present = find(output_dir)
    newest = next((checkpoint.folder for checkpoint in present if not checkpoint.problem), None)
    spared = {newest, None if best is None else Path(best)}
    excess = len(present) - limit
    for checkpoint in sorted(present, key=lambda one: (not one.problem, one.written, one.step)):
        if excess > 0 and checkpoint.folder not in spared:
            discard(checkpoint.folder)
            excess -= 1


# ---- reading -----------------------------------------------------------------------------------------------------


def find(output_dir: Path) -> list[Checkpoint]:
    """The checkpoints of a folder, the last written first.

    Ordered by time, not by step: an earlier run in the same folder may have reached a later step.
    """
    checkpoints = []
    for folder in _folders(output_dir):
        # Another process may be deleting it.
        with contextlib.suppress(FileNotFoundError):
            match = _NAME.fullmatch(folder.name)
            step = int(match[1]) if match else 0
            checkpoints.append(Checkpoint(folder, step, _written(folder), problem(folder)))
    return sorted(checkpoints, key=lambda checkpoint: (checkpoint.written, checkpoint.step), reverse=True)


def _folders(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    return sorted(path for path in output_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def _written(folder: Path) -> int:
    try:
        return int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["written"])
    except (OSError, ValueError, KeyError, TypeError):
        state = folder / TRAINER_STATE
        return (state if state.exists() else folder).stat().st_mtime_ns


def problem(folder: Path) -> str:
    """Why a run cannot resume from a checkpoint, naming the file; "" if it can.

    Checks sizes, and the headers of safetensors and zip files, not every byte.
    """
    if not folder.is_dir():
        return "there is no such folder"
    manifest = folder / MANIFEST
    if manifest.exists():
        try:
            sizes = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{MANIFEST} cannot be read ({error})"
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes where {size} were written"
    elif (folder / STATE).exists():
        return f"it is incomplete: {MANIFEST}, which is written last, is missing"
    return _missing(folder) or _unreadable(folder)


def _missing(folder: Path) -> str:
    """A file that every checkpoint has and this one lacks."""
    if not (folder / TRAINER_STATE).is_file():
        return f"{TRAINER_STATE} is missing"
    # DeepSpeed and FSDP save weights and optimizer in their own folders.
    if (folder / "latest").is_file() or any(folder.glob("pytorch_model_fsdp*")):
        return ""
    index = folder / _INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return f"{_INDEX} cannot be read ({error})"
        absent = sorted(name for name in shards if not (folder / name).is_file())
        if absent:
            return f"{absent[0]} is missing"
    elif not any((folder / name).is_file() for name in _WEIGHTS):
        names = pickled(folder)
        instead = f"; {names[0]} is pickled, which can run code when it is read, and is not loaded" if names else ""
        return f"{' or '.join(_WEIGHTS)} is missing{instead}"
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (folder / name).is_file():
            return f"{name} is missing (save_only_model=True leaves it out), without which no run can be continued"
    return ""


def _unreadable(folder: Path) -> str:
    """The first file whose header does not match its content, as after an interrupted copy."""
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                zipfile.ZipFile(path).close()
            elif path.name in (TRAINER_STATE, STATE):
                json.loads(path.read_text(encoding="utf-8"))
        except (OSError, SafetensorError, zipfile.BadZipFile, ValueError) as error:
            return f"{path.name} is damaged ({error})"
    return ""


def read_state(folder: Path) -> dict[str, Any]:
    """What we save in a checkpoint in addition to transformers' files; empty for one of plain TRL."""
    path = folder / STATE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


# ---- which one ---------------------------------------------------------------------------------------------------


def choose(asked: str | bool | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and one line about each newer one that was skipped.

    Args:
        asked: None or False to start from the beginning; True for the newest complete one; "auto" for the same, or to
            start from the beginning if there is none; or a folder. "true" and "false" mean True and False.
        output_dir: where to look for checkpoints.

    Raises:
        CheckpointError: if none exists, or the folder that was named is not complete.
    """
    word = str(asked).lower()
    if word in ("none", "false", ""):
        return None, []
    if word not in ("true", "auto"):
        folder = Path(str(asked))
        if trouble := problem(folder):
            raise CheckpointError(
                f"cannot resume from {folder}: {trouble}. Name another checkpoint, or use "
                "resume_from_checkpoint='auto' for the newest complete one of the output folder"
            )
        return folder, []
    passed: list[str] = []
    for checkpoint in find(output_dir):
        if not checkpoint.problem:
            return checkpoint.folder, passed
        passed.append(f"{checkpoint.folder} is skipped: {checkpoint.problem}")
    if word == "true":
        listed = "".join(f"\n  {line}" for line in passed)
        raise CheckpointError(
            f"{output_dir} holds no checkpoint to resume from: start without resume_from_checkpoint, or use 'auto', "
            f"which starts from the beginning if there is none{listed}"
        )
    return None, passed
