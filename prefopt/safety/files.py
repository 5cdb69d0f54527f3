"""Files that appear whole or not at all, and where they are kept. Imports the standard library alone."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"
"""Ending of the names of files that are being written, or that a killed process left."""


def cache_home() -> Path:
    """Where caches are: `$PREFOPT_CACHE`, else `$XDG_CACHE_HOME/prefopt`, else `~/.cache/prefopt`."""
    if own := os.environ.get("PREFOPT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base).expanduser() / "prefopt" if base else _usual_home()


def cache_folder(name: str) -> Path:
    """A folder in `cache_home`, or the one of that name in `~/.cache/prefopt` if only that exists.

    Earlier releases stored references there and ignored `XDG_CACHE_HOME`.
    """
    folder, old = cache_home() / name, _usual_home() / name
    return old if not os.environ.get("PREFOPT_CACHE") and old.is_dir() and not folder.exists() else folder


def _usual_home() -> Path:
    return Path.home() / ".cache" / "prefopt"


def is_file(path: Path) -> bool:
    """Whether the file exists; False for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under a temporary name, and rename it once it is on the disk.

    If the process or machine stops meanwhile, the old file stays.

    Raises:
        Whatever `write` raises; then the temporary file is removed.
    """
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        write(unfinished)
        # Otherwise a machine that stops may leave an empty file with the final name.
        to_disk(unfinished)
        os.replace(unfinished, path)
    except Exception:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_whole` of a text, as UTF-8."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def to_disk(path: Path) -> None:
    """Return when the contents of a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems cannot do this for folders.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
