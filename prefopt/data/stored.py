"""Token ids and verdicts of a set, kept on disk under what they depend on: the rows, the tokenizer, the settings.

They are in the cache of `datasets` (`HF_DATASETS_CACHE`), follow `datasets.disable_caching()`, and appear whole or not
at all. It imports transformers only when a tokenizer is there already.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets import Dataset
from datasets.fingerprint import get_temporary_cache_files_directory

from prefopt.data.parts import tables
from prefopt.safety.files import UNFINISHED, to_disk

if TYPE_CHECKING:
    from prefopt.data.conversation import Processing
    from prefopt.data.row_check import RowCheck

IDS, FACTS = "ids.arrow", "facts.json"


@dataclass(frozen=True)
class Stored:
    """A folder with a pass's results.

    Attributes:
        folder: holds `ids.arrow` and `facts.json`.
        key: what it is called by.
    """

    folder: Path
    key: str

    @property
    def facts(self) -> dict[str, Any] | None:
        """What was found in the rows; None if the results are not there or cannot be read."""
        try:
            facts: dict[str, Any] = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return facts if (self.folder / IDS).is_file() else None

    def ids(self) -> Dataset:
        """The id columns, read from the disk as they are needed."""
        rows = Dataset.from_file(str(self.folder / IDS))
        rows._fingerprint = self.key[:16]
        return rows


def place_for(key: str | None) -> Stored:
    """Where results are looked for and kept; without a key, or with caching disabled, until the process ends."""
    if key is None or not datasets.is_caching_enabled():
        key = uuid.uuid4().hex
        return Stored(Path(get_temporary_cache_files_directory()) / f"prefopt-{key}", key)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "prefopt" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            return Stored(folder, key)
    except OSError:  # a cache that others share and only they may write
        return Stored(folder, key) if folder.is_dir() else place_for(None)


class Unfinished:
    """A folder that gets its final name once it is complete; its files are written by the `with` block."""

    def __init__(self, place: Stored) -> None:
        self._place = place
        self.folder = place.folder.with_name(f"{place.folder.name}.{uuid.uuid4().hex}{UNFINISHED}")

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                for file in self.folder.iterdir():
                    to_disk(file)
                if self._place.folder.exists():
                    # Another process was faster, or what is there cannot be read.
                    os.replace(self._place.folder, self.folder.with_suffix(f"{UNFINISHED}-old"))
                os.replace(self.folder, self._place.folder)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.folder.with_suffix(f"{UNFINISHED}-old"), ignore_errors=True)


# ---- keys --------------------------------------------------------------------------------------------------------


def key_of(dataset: Dataset, columns: Iterable[str], check: RowCheck) -> str | None:
    """What the results of `check` on these columns depend on; None if a tokenizer cannot be told from others."""
    assert check.processing_class is not None
    tokenizer = tokenizer_key(check.processing_class)
    if tokenizer is None:
        return None
    columns = sorted(columns)
    settings = check.sides, columns, check.max_length, check.truncation_mode, check.vocabulary
    digest = hashlib.blake2b(digest_size=16)
    for text in (tokenizer, json.dumps(settings), code_key()):
        digest.update(text.encode())
    _add_rows(digest, dataset.select_columns(columns))
    return digest.hexdigest()


def _add_rows(digest: Any, dataset: Dataset) -> None:
    """The content of rows, whatever file they come from: as Arrow writes them, a thousand at a time."""
    for table in tables(dataset, dataset.column_names):
        whole = table.replace_schema_metadata(None).combine_chunks()
        digest.update(whole.schema.serialize())
        for batch in whole.to_batches():
            digest.update(batch.serialize())


def tokenizer_key(processing_class: Processing) -> str | None:
    """Equal for tokenizers that give equal ids; None for those whose code is not in transformers, and processors."""
    from transformers import PreTrainedTokenizerFast

    kind = type(processing_class)
    if not isinstance(processing_class, PreTrainedTokenizerFast) or not kind.__module__.startswith("transformers."):
        return None
    # Version, truncation and padding come first, and `encode` without options ignores them. A vocabulary takes a tenth
    # of a second to parse, so the text is not parsed; no string of JSON contains an unescaped quotation mark.
    head, mark, rest = processing_class.backend_tokenizer.to_str().partition('"added_tokens":')
    template = str(getattr(processing_class, "chat_template", None))
    special = {name: str(token) for name, token in processing_class.special_tokens_map.items() if name != "pad_token"}
    parts = [kind.__qualname__, rest if mark else head, template, special, processing_class.eos_token_id]
    parts += [getattr(processing_class, "split_special_tokens", False)]
    if "strftime_now" in template:
        parts.append(datetime.date.today().isoformat())
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


@functools.cache
def code_key() -> str:
    """The code that makes ids and verdicts: this folder's, and the releases of the libraries below it."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for package in ("transformers", "tokenizers", "jinja2"):
        digest.update(f"{package} {metadata.version(package)}".encode())
    return digest.hexdigest()
