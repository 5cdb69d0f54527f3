"""Reads preference rows from a local file, a `save_to_disk` folder or the Hub, and renames columns on request.

It may import datasets and this folder's errors and columns. It never changes a row: `schema.py` recognises formats,
`validate.py` checks rows.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, IterableDataset

from prefopt.data.columns import column_names, rename_columns
from prefopt.data.columns import text_columns as _text_columns
from prefopt.data.errors import DataError
from prefopt.data.json_files import holds_dates, is_one_value, open_binary, raise_for_broken_json, read_by_rows
from prefopt.data.parts import parts
from prefopt.safety.errors import did_you_mean
from prefopt.safety.noise import errors_told_by_us

# File ending -> the builder of `datasets` that reads it; each may be followed by a compression ending.
BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".parquet": "parquet",
}
MAX_ENTRIES = 10_000
"""Maximum files below a folder that is read as a data set; large sets have hundreds."""

COMPRESSIONS = (".gz", ".zst")

TEXT_COLUMNS = _text_columns()

_MISSING = ["", "NA", "N/A", "n/a", "<NA>", "#N/A", "#NA", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "None"]
"""Cells without a value, in columns other than text."""

_INDEX = "__index_level_0__"
_CELLS = "Put texts that hold what separates the columns, or a quotation mark, in quotation marks."

_FIRST_BLOCK = 1 << 20
"""Files of fewer bytes are one block, decompressed as well, to the reader that takes types from the first block."""


def load_preferences(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    text_columns: Collection[str] = TEXT_COLUMNS,
) -> Dataset | IterableDataset:
    """Rows of `name`: a JSON, JSONL, CSV or Parquet file (plain, .gz or .zst), a `save_to_disk` folder or a Hub name.

    A path that exists always wins over a Hub name. `columns` maps our name to the dataset's own, as in
    `{"prompt": "question"}`. In a CSV file the columns `text_columns` are always read as text: `42`, `true` and `NA`
    stay as written. A single file holds one split, `train`; slices such as `train[:100]` work.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # a name on the Hub, or a mistake that is reported below
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise DataError(
            f"{name[:200]!a} cannot be opened: {reason}. Check the name, and that it can be read."
        ) from error
    if path.is_dir() and _is_saved_folder(path):
        dataset = _load_saved(path, split, streaming)
    elif path.is_file():
        dataset = _load_file(path, split, streaming, text_columns)
    elif not path.exists() and _means_a_file(name):
        raise DataError(f"No file at {name!r} (looked in {path.parent.resolve()}).{_near_files(path)}")
    else:
        if path.is_dir():
            _refuse_vast(path)
        dataset = _load_hub(name, config, split, streaming)
    _check_readable(dataset, name)
    return rename_columns(dataset, columns) if columns else dataset


def _refuse_vast(folder: Path) -> None:
    """Refuse folders with too many files: `datasets` lists them all, which takes hours for `/` or a home folder."""
    seen = 0
    for _, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > MAX_ENTRIES:
            raise DataError(
                f"{folder}: more than {MAX_ENTRIES} files and folders lie below this folder. Name the folder of the "
                "data set itself, or one of its files."
            )


def _check_readable(dataset: Dataset | IterableDataset, name: str) -> None:
    """Refuse rows that can be stored but not read again, and text that is not valid UTF-8.

    Empty or repeated field names cannot be read again. Binary formats do not check their text; one pass over it does.
    """
    if isinstance(dataset, Dataset):
        whole = len(dataset.data) == len(dataset)  # else its rows are chosen from a table by their numbers
        for part in parts(dataset) if whole else (dataset,):
            _check_columns(part, name)
    try:
        next(iter(dataset), None)
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise DataError(
            f"{name}: its rows cannot be read ({reason}). Look for fields without a name, or with the same name twice."
        ) from error


def _check_columns(dataset: Dataset, name: str) -> None:
    for column in dataset.column_names:
        try:
            dataset.data.column(column).validate(full=True)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{name}, column {column!r}: damaged ({_first_line(error)}). Write or fetch the file again."
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
    """Whether a missing name was probably a path: it has a data file's ending, or more parts than `owner/name`."""
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


def _load_file(path: Path, split: str, streaming: bool, text_columns: Collection[str]) -> Dataset | IterableDataset:
    builder, compression = _file_kind(path)
    if builder is None:
        raise DataError(
            f"{path}: the file's ending is not a known format. "
            "Use .json, .jsonl, .csv, .tsv, .parquet or .arrow, each optionally followed by .gz or .zst."
        )
    if split.partition("[")[0] != "train":
        raise DataError(
            f"{path}: a single file holds only the split 'train', but {split!r} was requested. "
            "Give the file with the other split as its own dataset, or a slice such as 'train[90%:]'."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty. Check that it was written or downloaded to the end.")
    if compression == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise DataError(f"{path}: reading .zst needs the package zstandard. Run `pip install zstandard`.")
    if builder == "parquet" and compression is not None:
        return _load_compressed_parquet(path, split, streaming)
    if builder == "json":
        return _load_json(path, split, streaming)
    options = _csv_options(path, text_columns) if builder == "csv" else {}
    try:
        with errors_told_by_us("datasets"):
            dataset = datasets.load_dataset(builder, data_files=str(path), split=split, streaming=streaming, **options)
    except Exception as error:
        raise DataError(f"{path}: {_file_trouble(error, str(builder))}") from error
    if builder != "csv":
        return dataset
    if _INDEX in column_names(dataset) and _INDEX not in _header(path)[0]:
        # pandas takes the first cells as names of rows, and every other cell moves to the column before its own.
        raise DataError(f"{path}: its first row has more cells than the header. {_CELLS}")
    spaced = {name: name.strip() for name in column_names(dataset) if name != name.strip()}
    return dataset.rename_columns(spaced) if spaced else dataset


def _load_json(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    """Rows by the reader of `datasets` if it reads them correctly, else row by row.

    Lines are searched for errors only if they could not be read. A file that is one JSON value is checked before: the
    reader would turn half of a surrogate pair into an empty text, and an object that holds all rows into one row. A
    stream would reach a broken line late, so all its rows are read once for their types.
    """
    try:
        if is_one_value(path):
            raise_for_broken_json(path)
        if streaming:
            return read_by_rows(path, split, streaming)
        with errors_told_by_us("datasets"):
            dataset = datasets.load_dataset("json", data_files=str(path), split=split)
        _check_readable(dataset, str(path))
    except Exception as error:
        raise_for_broken_json(path)
        if isinstance(error, DataError):
            raise
        if streaming or path.stat().st_size <= _FIRST_BLOCK:
            raise DataError(f"{path}: {_file_trouble(error, 'json')}") from error
    else:
        if not holds_dates(dataset.features):
            return dataset
    return read_by_rows(path, split, streaming)


def _header(path: Path) -> tuple[list[str], str]:
    """The names of a CSV file's columns, and what separates them; no names if they cannot be read."""
    try:
        with open_binary(path) as stream:
            line = stream.readline().decode("utf-8-sig")
        separator = "," if "," in line else max(";", "\t", key=line.count)
        return next(csv.reader([line], delimiter=separator), []), separator
    except (OSError, EOFError, ValueError, csv.Error):
        return [], ","  # the error is reported when the file is read


def _csv_options(path: Path, text_columns: Collection[str]) -> dict[str, Any]:
    """For pandas: what separates columns, and to leave those of text alone, where `42` and `NA` are answers."""
    header, separator = _header(path)
    if not header:
        return {}
    options = {} if len(header) == 1 else {"sep": separator}
    texts = [name for name in header if name.strip() in text_columns]
    if not texts:
        return options
    missing = {name: _MISSING for name in header if name not in texts}
    return {**options, "converters": dict.fromkeys(texts, str), "keep_default_na": False, "na_values": missing}


def _file_trouble(error: Exception, builder: str) -> str:
    cause = error.__cause__ or error.__context__ or error
    message = _first_line(cause)
    if "corresponds to no data" in message or "BatchSize must be greater than 0" in message:
        return "it holds no rows. Check that it was written or downloaded to the end."
    if builder == "csv" and (cells := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", message)):
        return f"line {cells[2]} has {cells[3]} cells, and those before {cells[1]}. {_CELLS}"
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not UTF-8 text ({message}). Save it as UTF-8."
    if "datasets dtype equivalent" in message:
        return f"a column has a type that cannot be read ({message}). Write the file without it, or as text."
    return (
        f"could not be read as {builder}: {message}. "
        "Check that the file is complete and that its ending names its format."
    )


def _first_line(error: BaseException) -> str:
    """The first line of an error; some libraries add pages."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")


def _load_compressed_parquet(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    # Parquet is read from its end, so `datasets` cannot look through the compression; these files fit in memory.
    try:
        with open_binary(path) as stream:
            dataset = Dataset(pq.read_table(io.BytesIO(stream.read())))
    except Exception as error:
        raise DataError(
            f"{path}: could not be read as compressed parquet: {_first_line(error)}. Fetch it again, or decompress it."
        ) from error
    if "[" in split:
        raise DataError(f"{path}: the slice {split!r} does not work on compressed parquet. Decompress the file first.")
    return dataset.to_iterable_dataset() if streaming else dataset


def _load_hub(name: str, config: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (ConnectionError, OSError) as error:
        path = Path(name).expanduser()
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        near = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(
            f"{name!r} is not a local file or folder, and the Hugging Face Hub did not give it{offline}: {error}."
            f"{near} Check the spelling and the network, log in with `hf auth login` if the set is private, "
            "or give the path of a local copy."
        ) from error
    except ValueError as error:
        # An unknown split or a configuration that has to be chosen: `datasets` already lists the valid ones.
        raise DataError(f"{name!r} (config {config!r}, split {split!r}): {error}") from error
    except Exception as error:
        cause = error.__cause__ or error.__context__ or error
        message = _first_line(cause)
        if message.startswith("Couldn't cast"):  # the types are on the next hundred lines
            message = "they differ in their columns, or in the types of these"
        raise DataError(
            f"{name!r} (config {config!r}, split {split!r}): its files could not be read: {message}. Name one file, "
            "or repair it."
        ) from error
