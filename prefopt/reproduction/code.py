"""Hashes of what an experiment depends on: its code with all that it imports of prefopt, its rows, its environment."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
"""The runner's own files, which change no number."""

PACKAGE = HERE.parent
LIBRARIES = ("torch", "numpy", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets")


@cache
def sources(module: str) -> tuple[Path, ...]:
    """The Python files of prefopt that a module imports, directly or through others, its own included.

    Imports inside functions and type-checking blocks count. So do texts that name a module, as in tables of lazy
    imports.
    """
    waiting, files = [module], dict[Path, None]()
    while waiting:
        name = waiting.pop()
        for part in _with_parents(name):
            file = _file(part)
            if file is not None and file not in files and file.parent != HERE:
                files[file] = None
                waiting += _imported(part, file)
    return tuple(sorted(files))


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


@cache
def _file(module: str) -> Path | None:
    """The file of a module of prefopt, or None."""
    first, *rest = module.split(".")
    if first != PACKAGE.name or not all(part.isidentifier() for part in rest):
        return None
    path = PACKAGE.joinpath(*rest)
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if rest and file.is_file()), None)


def _imported(module: str, file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            # `from prefopt import PreferenceTrainer` reaches the trainer through the package's `__getattr__`.
            names += [start, *(f"{start}.{alias.name}" for alias in node.names)]
            if start == PACKAGE.name and any(alias.name[0].isupper() for alias in node.names):
                names.append(f"{PACKAGE.name}.trainer")
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith(f"{PACKAGE.name}.")
        ):
            names.append(node.value)
    return [name for name in names if _file(name) is not None]


def code_hash(module: str) -> str:
    return _hash_of(sources(module))


def row_hashes(module: str) -> dict[str, str]:
    """SHA-256 of each file of rows that ships with a room that the module imports, by its name."""
    rooms = {PACKAGE / file.relative_to(PACKAGE).parts[0] for file in sources(module)}
    files = sorted(file for room in rooms if room.is_dir() for file in room.rglob("*.jsonl"))
    return {file.relative_to(PACKAGE).as_posix(): _digest(file.read_bytes()) for file in files}


def uses_bundled_model(module: str) -> bool:
    return PACKAGE / "models" / "bundled.py" in sources(module)


def model_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of a model's weights, tokenizer and chat template."""
    config = folder / "tokenizer_config.json"
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    if text is None and config.is_file():
        text = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    hashes = {} if text is None else {"template": _digest(text.encode())}
    if (tokenizer := folder / "tokenizer.json").is_file():
        hashes["tokenizer"] = _digest(tokenizer.read_bytes())
    if weights := sorted(folder.glob("*.safetensors")):
        hashes["weights"] = _hash_of(weights)
    return hashes


def environment() -> dict[str, str]:
    """Versions and processor that may change a number."""
    import torch

    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        **versions,
        "system": platform.system(),
        "machine": platform.machine(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def key_of(parts: Any) -> str:
    """One hash of anything that JSON can hold."""
    return _digest(json.dumps(parts, sort_keys=True).encode())


def _hash_of(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
