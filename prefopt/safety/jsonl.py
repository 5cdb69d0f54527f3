"""JSON lines: whole files, and files that grow while a job runs and can be read wherever it is killed.

Imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from prefopt.safety.errors import UsageError, did_you_mean
from prefopt.safety.files import to_disk, write_text

if sys.platform != "win32":
    import fcntl

_HALF = re.compile("[\ud800-\udfff]")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one a line; an end without a newline was being written when a process died: left out.

    Raises:
        UsageError: naming the file and the line that is not a JSON object.
    """
    if not path.exists():
        near = did_you_mean(path.name, [one.name for one in path.parent.glob(f"*{path.suffix}")])
        raise UsageError(f"there is no file {path}.{near}")
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            # A file written by hand may lack its last newline.
            if not line.endswith(b"\n") and not _is_whole(line):
                return
            if line.strip():
                yield _parsed(path, number, line)


def read_flag(row: Mapping[str, Any], name: str, where: str, usual: bool = False) -> bool:
    """A yes or no of an object; texts and numbers such as "false", which Python takes for true, are refused.

    Raises:
        UsageError: naming the place and the field.
    """
    value = row.get(name)
    if value not in (None, True, False):
        raise UsageError(f"{where}: {name} must be true or false, not {value!r}")
    return usual if value is None else bool(value)


def _is_whole(line: bytes, kind: type = object) -> bool:
    """Whether a line is JSON of this kind to its end, and was not cut."""
    try:
        return isinstance(json.loads(line), kind)
    except ValueError:
        return False


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}, line {number}: not valid JSON ({error}). Each line must be one JSON object: repair or delete "
            "this line"
        ) from error
    if not isinstance(row, dict):
        raise UsageError(f"{path}, line {number}: a JSON {type(row).__name__}; each line must be an object")
    return row


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Objects as text, one a line."""
    return "".join(_line(row) + "\n" for row in rows)


def _line(row: Mapping[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False)
    # Half of a surrogate pair, which JSON can hold as an escape, has no bytes of its own.
    return json.dumps(row) if _HALF.search(line) else line


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write objects to a file, one a line, whole or not at all; returns how many."""
    text = json_lines(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return text.count("\n")


class JsonlWriter:
    """Appends objects to a file: a group of lines is on the disk when `write` returns.

    A line that a killed process left half-written at the end of the file is removed first. The file is locked while it
    is open, where the system can.

        with JsonlWriter(path) as file:
            file.write([{"prompt": "2 + 2"}])
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        self._stream = open(path, "a+b")  # noqa: SIM115  (closed by __exit__)
        _lock(self._stream, path)
        _end_line(self._stream)
        if is_new:
            to_disk(path.parent)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows as one piece."""
        self._stream.write(json_lines(rows).encode("utf-8"))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(stream: IO[bytes], path: Path) -> None:
    """Refuse a file that another process writes: lines of both would be mixed."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise UsageError(f"another process writes {path} at this moment: wait for it, or name another file") from None
    except OSError:
        pass  # a file system without locks


def _end_line(stream: IO[bytes]) -> None:
    """Let the file end with a newline: after a whole object, else by removing what was begun."""
    at = end = stream.seek(0, os.SEEK_END)
    line = b""
    while at > 0 and b"\n" not in line:
        start = max(0, at - 65536)
        stream.seek(start)
        line = stream.read(at - start) + line
        at = start
    line = line[line.rfind(b"\n") + 1 :]
    if line and _is_whole(line, dict):
        stream.write(b"\n")
    elif line:
        stream.truncate(end - len(line))
    stream.seek(0, os.SEEK_END)
