"""Files that appear whole or not at all, and where they are kept. Imports the standard library alone."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"
"""How the names of files end that are still being written, or that a killed process left behind."""


def cache_home() -> Path:
    """Where caches are: `$PREFOPT_CACHE`, else `$XDG_CACHE_HOME/prefopt`, else `~/.cache/prefopt`."""
    if own := os.environ.get("PREFOPT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base).expanduser() / "prefopt" if base else _usual_home()


def cache_folder(name: str) -> Path:
    """A folder in `cache_home`, or the one of that name in `~/.cache/prefopt` where that is the only one there is.

    Earlier releases kept references there whatever `XDG_CACHE_HOME` said.
    """
    folder, old = cache_home() / name, _usual_home() / name
    return old if not os.environ.get("PREFOPT_CACHE") and old.is_dir() and not folder.exists() else folder


def _usual_home() -> Path:
    return Path.home() / ".cache" / "prefopt"


def is_file(path: Path) -> bool:
    """Whether there is such a file, also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` make a file under another name, and give it its own once it is on the disk.

    A process or a machine that goes down meanwhile leaves the file as it was before.

    Raises:
        Whatever `write` raises; then nothing is left of the attempt.
    """
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        write(unfinished)
        # Else a machine that goes down may leave a file with the final name and nothing in it.
        to_disk(unfinished)
        os.replace(unfinished, path)
    except Exception:
        unfinished.unlink(missing_ok=True)
        raise


def to_disk(path: Path) -> None:
    """Return once what was written to a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems cannot do this for folders.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
