"""A user's documents, read and cut into passages. Imports no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import read_jsonl

SUFFIXES = (".txt", ".md", ".jsonl")

_BREAKS = (re.compile(r"\n[ \t]*\n"), re.compile(r"[.!?][\"')\]]*\s|[。！？]|\n"), re.compile(r"\s"))
"""Where a text may be cut, the best place first: after a paragraph, a sentence or a line, a word."""

_LONGEST_TITLE = 100


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: its file, from the folder that was named on, and the row in it.
        title: its first heading, a row's `title`, or the file's name without its ending.
        text: the whole text.
    """

    name: str
    title: str
    text: str


@dataclass(frozen=True)
class Passage:
    """A part of a document.

    Attributes:
        document: the document's name.
        number: of the passage in it, from 1.
        title: the document's.
        text: the part.
    """

    document: str
    number: int
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.document}, passage {self.number}"


def read_documents(paths: Sequence[Path], text_column: str = "text") -> tuple[list[Document], list[Path]]:
    """The documents in files and folders, and the files of folders that are of another kind.

    Args:
        paths: files, or folders, which are read with all their folders in the order of names. Hidden files and folders
            in them are left out.
        text_column: the column of JSONL files that holds the text.

    Raises:
        UsageError: naming the file, and the row and column, that cannot be read.
    """
    documents: list[Document] = []
    others: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist: name files ({', '.join(SUFFIXES)}) or folders with such files")
        for file, name in _files(path):
            if file.suffix.lower() in SUFFIXES:
                documents += _read(file, name, text_column)
            elif path.is_dir():
                others.append(file)
            else:
                raise UsageError(f"{file} is not one of {', '.join(SUFFIXES)}: convert it to plain text first")
    return documents, others


def passages_of(documents: Iterable[Document], longest: int) -> tuple[list[Passage], int]:
    """The passages of all documents, each text once, and how many repeated an earlier one.

    Args:
        documents: an empty one has no passages.
        longest: characters of a passage at most.
    """
    passages: dict[str, Passage] = {}
    count = 0
    for document in documents:
        for number, text in enumerate(cut(document.text, longest), start=1):
            count += 1
            words = " ".join(text.split())
            passages.setdefault(words, Passage(document.name, number, document.title, text))
    return list(passages.values()), count - len(passages)


def cut(text: str, longest: int) -> Iterator[str]:
    """Parts of at most `longest` characters.

    A part ends with a paragraph if one ends in its last two thirds, else with a sentence, else with a word.
    """
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= longest else _end(text, start, longest)
        if part := text[start:end].strip():
            yield part
        start = end


def _end(text: str, start: int, longest: int) -> int:
    limit = start + longest
    for pattern in _BREAKS:
        ends = [match.end() for match in pattern.finditer(text, start + longest // 3, limit)]
        if ends:
            return ends[-1]
    return limit


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Each file and its name from the folder on."""
    if not path.is_dir():
        yield path, path.name
        return
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.is_file() and not any(part.startswith(".") for part in parts):
            yield file, "/".join(parts)


def _read(path: Path, name: str, text_column: str) -> Iterator[Document]:
    if path.suffix.lower() != ".jsonl":
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
        yield Document(name, _title(text) or path.stem, text)
        return
    for row, columns in enumerate(read_jsonl(path)):
        words = columns.get(text_column)
        if not isinstance(words, str):
            raise UsageError(
                f"{path}, row {row} (from 0): the column {text_column} must hold a text; the row has "
                f"{', '.join(columns)}. Name the column with --text-column"
            )
        title = columns.get("title")
        yield Document(f"{name}, row {row}", title if isinstance(title, str) and title else path.stem, words)


def _title(text: str) -> str:
    """The first line if it is a Markdown heading, or short and alone in its paragraph; else nothing."""
    first, _, rest = text.lstrip().partition("\n")
    heading = first.lstrip("#").strip() if first.startswith("#") else ""
    alone = len(first) <= _LONGEST_TITLE and rest.startswith("\n") and not first.rstrip().endswith((".", "!", "?"))
    return heading or (first.strip() if alone else "")
