"""Losses of one's own from a Python file that is named: `--loss_file mine.py`.

The file is run as Python runs a script, so name only files that you trust. Imports torch's neighbours alone.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

from prefopt.losses.errors import LossError
from prefopt.losses.registry import makers


@dataclass(frozen=True)
class LossFile:
    """A file whose losses are registered.

    Attributes:
        path: as it was named.
        names: the losses and presets that it registers.
        text: the file's content when it was run.
    """

    path: Path
    names: tuple[str, ...]
    text: str


_FILES: dict[Path, LossFile] = {}


def register_file(path: str | Path) -> LossFile:
    """Run a Python file, so that `parse` knows the losses that it registers. Once per process; then what it gave.

    Args:
        path: of a file with at least one class under `@register("name")`, or function under `@preset("name")`.

    Raises:
        LossError: if there is no such file, if it registers nothing, uses a name that is taken, or fails; with the
            file and the line.
    """
    path = Path(path).expanduser()
    place = path.resolve()
    if place in _FILES:
        return _FILES[place]
    if place.is_dir() or not place.exists():
        raise LossError(f"{path}: {'is a folder: name a file in it' if place.is_dir() else 'there is no such file'}")
    if place.suffix != ".py":
        raise LossError(f"{path}: losses are read from a Python file, whose name ends in .py")
    before = set(makers())
    try:
        text = place.read_text(encoding="utf-8")
        _run(place)
    except LossError as error:
        raise LossError(f"{_where(path, place, error)}: {error}") from error
    except (Exception, SystemExit) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise LossError(f"{_where(path, place, error)}: {type(error).__name__}: {reason}") from error
    names = tuple(sorted(set(makers()) - before))
    if not names:
        raise LossError(f'{path} registers no loss: write @register("name") above the class of yours')
    _FILES[place] = LossFile(path, names, text)
    return _FILES[place]


def _run(place: Path) -> ModuleType:
    """The file as a module, under a name that no other module has."""
    name = f"loss_file_{place.stem}"
    while name in sys.modules:
        name += "_"
    spec = spec_from_loader(name, SourceFileLoader(name, str(place)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Before it runs: types of a loss's arguments are looked up in its module.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _where(path: Path, place: Path, error: BaseException) -> str:
    """The file, and the line of it that the error comes from."""
    if isinstance(error, SyntaxError) and error.filename == str(place):
        return f"{path}, line {error.lineno}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(place)]
    return f"{path}, line {lines[-1]}" if lines else str(path)
