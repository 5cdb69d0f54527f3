"""Reads preference rows from a local file, a `save_to_disk` folder or the Hub, and renames columns on request.

It may import datasets and this folder's errors and columns. It never changes a row: recognising formats is
`schema.py`'s work, judging rows is `validate.py`'s.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, IterableDataset

from prefopt.data.columns import rename_columns
from prefopt.data.errors import DataError, did_you_mean

# File ending -> the builder of `datasets` that reads it; each may be followed by a compression ending.
BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
MAX_ENTRIES = 10_000
"""Most files below a folder that is taken for a data set; large sets have hundreds."""

COMPRESSIONS = (".gz", ".zst")


def load_preferences(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Rows of `name`: a JSON, JSONL, CSV or Parquet file (plain, .gz or .zst), a `save_to_disk` folder or a Hub name.

    A path that exists always wins over a Hub name. `columns` maps our name to the dataset's own, as in
    `{"prompt": "question"}`. A single file holds one split, `train`; slices such as `train[:100]` work.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # a name on the Hub, or a slip that is told of below
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise DataError(
            f"{name[:200]!a} cannot be opened: {reason}. Check the name, and that it may be read."
        ) from error
    if path.is_dir() and _is_saved_folder(path):
        dataset = _load_saved(path, split, streaming)
    elif path.is_file():
        dataset = _load_file(path, split, streaming)
    elif not path.exists() and _means_a_file(name):
        raise DataError(f"No file at {name!r} (looked in {path.parent.resolve()}).{_near_files(path)}")
    else:
        if path.is_dir():
            _refuse_vast(path)
        dataset = _load_hub(name, config, split, streaming)
    _check_readable(dataset, name)
    return rename_columns(dataset, columns) if columns else dataset


def _refuse_vast(folder: Path) -> None:
    """`datasets` lists all that lies below a folder, which for `/` or a home would take it hours."""
    seen = 0
    for _, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > MAX_ENTRIES:
            raise DataError(
                f"{folder}: more than {MAX_ENTRIES} files and folders lie below this folder. Name the folder of the "
                "data set itself, or one of its files."
            )


def _check_readable(dataset: Dataset | IterableDataset, name: str) -> None:
    """Some names of fields (empty ones, twice the same) can be stored but not read again.

    And binary formats are taken at their word that what they call text is text; one pass over the memory tells.
    """
    if isinstance(dataset, Dataset):
        for column in dataset.column_names:
            try:
                dataset.data.column(column).validate(full=True)
            except pa.ArrowInvalid as error:
                raise DataError(
                    f"{name}, column {column!r}: damaged ({_first_line(error)}). Write or fetch the file again."
                ) from error
    try:
        next(iter(dataset), None)
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise DataError(
            f"{name}: its rows cannot be read ({reason}). Look for fields without a name, or twice of one name."
        ) from error


def parse_columns(pairs: Sequence[str] | str | None) -> dict[str, str]:
    """`["prompt=question", "chosen=answer_a"]` -> `{"prompt": "question", "chosen": "answer_a"}`."""
    mapping: dict[str, str] = {}
    for pair in pairs.split() if isinstance(pairs, str) else pairs or ():
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and equals and theirs):
            raise DataError(
                f"--columns: {pair!r} is not of the form OURS=THEIRS. "
                "Write our name first and the dataset's own second, for example --columns prompt=question."
            )
        if ours in mapping:
            raise DataError(f"--columns: {ours!r} is given twice, as {mapping[ours]!r} and as {theirs!r}. Keep one.")
        mapping[ours] = theirs
    return mapping


def _file_kind(path: Path) -> tuple[str | None, str | None]:
    """The builder for a file name and its compression ending, either None where unknown."""
    endings = [ending.lower() for ending in path.suffixes]
    compression = endings.pop() if endings and endings[-1] in COMPRESSIONS else None
    return (BUILDERS.get(endings[-1]) if endings else None), compression


def _means_a_file(name: str) -> bool:
    """Whether a name that does not exist was meant as a path: a data file's ending, or more than `owner/name`."""
    builder, compression = _file_kind(Path(name))
    return builder is not None or compression is not None or name.startswith((".", "/", "~")) or name.count("/") > 1


def _near_files(path: Path) -> str:
    """Suggestions for a missing path: near names in its folder, or the nearest ancestor that does exist."""
    if not path.parent.is_dir():
        ancestor = path.parent
        while not ancestor.is_dir():
            ancestor = ancestor.parent
        return f" The folder {str(path.parent)!r} does not exist; the nearest that does is {str(ancestor)!r}."
    names = sorted(entry.name for entry in path.parent.iterdir())
    hint = did_you_mean(path.name, names)
    if hint:
        return hint
    usable = [entry for entry in names if _file_kind(Path(entry))[0]]
    if usable:
        return f" Data files there: {', '.join(usable[:8])}{' ...' if len(usable) > 8 else ''}."
    return " There is no data file in that folder."


def _is_saved_folder(path: Path) -> bool:
    return any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json"))


def _load_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path}: could not be read as a save_to_disk folder: {_first_line(error)}. Check that it was written or "
            "copied to the end, or save it again."
        ) from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{path}: there is no split {split!r}; this folder holds {', '.join(map(repr, loaded))}."
                f"{did_you_mean(split, loaded)} Choose one of them as the split."
            )
        loaded = loaded[split]
    elif split != "train" and str(loaded.split or "train") != split:
        raise DataError(
            f"{path}: this folder holds a single dataset, not a split {split!r}. Ask for the split 'train', "
            "or give the folder of the other split as its own dataset."
        )
    return loaded.to_iterable_dataset() if streaming else loaded


def _load_file(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    builder, compression = _file_kind(path)
    if builder is None:
        raise DataError(
            f"{path}: the file's ending says no format that can be read. "
            "Use .json, .jsonl, .csv or .parquet, each optionally followed by .gz or .zst."
        )
    if split.partition("[")[0] != "train":
        raise DataError(
            f"{path}: a single file holds only the split 'train', and {split!r} was asked for. "
            "Give the file with the other split as its own dataset, or a slice such as 'train[90%:]'."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty. Check that it was written or downloaded to the end.")
    if compression == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise DataError(f"{path}: reading .zst needs the package zstandard. Run `pip install zstandard`.")
    if builder == "parquet" and compression is not None:
        return _load_compressed_parquet(path, split, streaming)
    if builder == "json":
        # `datasets` does not say which line is broken, reads streams late, and lets text that is not UTF-8 pass.
        _raise_for_broken_json(path)
    try:
        dataset = datasets.load_dataset(builder, data_files=str(path), split=split, streaming=streaming)
    except Exception as error:
        raise DataError(f"{path}: {_file_trouble(error, str(builder))}") from error
    return dataset


def _file_trouble(error: Exception, builder: str) -> str:
    cause = error.__cause__ or error.__context__ or error
    said = _first_line(cause)
    if "corresponds to no data" in said or "BatchSize must be greater than 0" in said:
        return "it holds no rows. Check that it was written or downloaded to the end."
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not UTF-8 text ({said}). Save it in the encoding UTF-8."
    return (
        f"could not be read as {builder}: {said}. "
        "Check that the file is complete and that its ending names its format."
    )


def _first_line(error: BaseException) -> str:
    """What an error says, without the pages that some libraries add."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")


def _load_compressed_parquet(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    # Parquet is read from its end, so `datasets` cannot look through the compression; these files fit in memory.
    try:
        with _open_binary(path) as stream:
            dataset = Dataset(pq.read_table(io.BytesIO(stream.read())))
    except Exception as error:
        raise DataError(
            f"{path}: could not be read as compressed parquet: {_first_line(error)}. Fetch it again, or decompress it."
        ) from error
    if "[" in split:
        raise DataError(f"{path}: the slice {split!r} does not work on compressed parquet. Decompress the file first.")
    return dataset.to_iterable_dataset() if streaming else dataset


def _open_binary(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        zstandard: Any = importlib.import_module("zstandard")
        stream: IO[bytes] = zstandard.open(path, "rb")
        return stream
    return open(path, "rb")


def _raise_for_broken_json(path: Path) -> None:
    """Names the first line that is not a JSON object; returns quietly where every line is one."""
    try:
        _check_json(path)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: the compressed file ends early or is damaged ({error}). Fetch it again.") from error


def _check_json(path: Path) -> None:
    with _open_binary(path) as stream:
        first = _first_byte(stream)
    if first == b"":
        raise DataError(f"{path}: the file is empty. Check that it was written or downloaded to the end.")
    # A .json file is one value, an array of rows or an object; .jsonl is one object a line. Content decides.
    if first == b"[":
        _check_whole_json(path)
        return
    if first in (b"\xff", b"\xfe", b"\0"):
        raise DataError(f"{path}, line 1: not UTF-8 text (it begins as UTF-16 or UTF-32 does). Save it as UTF-8.")
    for number, line in _lines(path):
        try:
            row = _parsed(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and line.strip() in (b"{", b"{}") and isinstance(error, json.JSONDecodeError):
                _check_whole_json(path)
                return
            raise DataError(
                f"{path}, line {number}: not valid JSON ({_json_reason(error)}): {_excerpt(line)}. "
                "Each line must be one complete JSON object; repair or delete this line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: a JSON {type(row).__name__} where an object with named columns is needed: "
                f'{_excerpt(line)}. Write each row as {{"prompt": ..., "chosen": ..., "rejected": ...}}.'
            )


def _first_byte(stream: IO[bytes]) -> bytes:
    while (byte := stream.read(1)).isspace():
        pass
    return byte


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines, numbered from 1 as editors do."""
    with _open_binary(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line


def _parsed(text: bytes) -> Any:
    """What JSON text holds.

    Raises:
        ValueError: for text that is no JSON, also where Python would let it pass: halves of characters.
        RecursionError: where it is nested beyond reading.
    """
    value = json.loads(text.decode("utf-8-sig"))
    if b"\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _check_whole_json(path: Path) -> None:
    with _open_binary(path) as stream:
        text = stream.read()
    try:
        rows = _parsed(text)
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{where}: not valid JSON ({_json_reason(error)}). Repair the file there.") from error
    for number, row in enumerate(rows if isinstance(rows, list) else ()):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number} (from 0): a JSON {type(row).__name__} where an object with named columns is "
                'needed. Write each row as {"prompt": ..., "chosen": ..., "rejected": ...}.'
            )


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text at byte {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return f"half of a character, {error.object[error.start]!a}, stands alone"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _excerpt(line: bytes, limit: int = 80) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= limit else text[:limit] + "...")


def _load_hub(name: str, config: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (ConnectionError, OSError) as error:
        path = Path(name).expanduser()
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        near = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(
            f"{name!r} is no local file or folder, and the Hugging Face Hub did not give it{offline}: {error}.{near} "
            "Check the spelling and the network, log in with `hf auth login` if the set is private, "
            "or give the path of a local copy."
        ) from error
    except ValueError as error:
        # An unknown split or a configuration that has to be chosen: `datasets` already lists the valid ones.
        raise DataError(f"{name!r} (config {config!r}, split {split!r}): {error}") from error
    except Exception as error:
        cause = error.__cause__ or error.__context__ or error
        raise DataError(
            f"{name!r} (config {config!r}, split {split!r}): its files could not be read: {_first_line(cause)}. Name "
            "one file, or repair it."
        ) from error
