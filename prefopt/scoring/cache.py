"""Reference log-probabilities that are computed once and kept on disk: over epochs, runs, losses and sweeps.

An entry is one completion under one prompt, found by its token ids, so a cache serves any order, subset or mixture of
the data. A folder belongs to one reference: its name is a fingerprint of the reference's weights. Entries are written
many at a time, in files that appear whole or not at all; what an interrupted run had written, the next one finds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DIGEST_BYTES = 16
WRITE_AFTER = 256
"""Entries that are gathered before a file is written."""


def cache_root() -> Path:
    """Where references are kept: `reference` in `PREFOPT_CACHE`, else in `~/.cache/prefopt`."""
    return Path(os.environ.get("PREFOPT_CACHE") or Path.home() / ".cache" / "prefopt") / "reference"


@dataclass(frozen=True)
class Place:
    """Where an entry is: a file's mapped values, and which of them."""

    values: Any
    start: int
    stop: int


class ReferenceCache:
    """Per-token reference log-probabilities by content.

    Args:
        folder: of one reference; made if it does not exist.
        about: what the reference is, for people who look (`prefopt cache`).

    Attributes:
        hits, misses: rows found and rows computed since the cache was opened.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None = None):
        self.folder = folder
        self.hits = self.misses = 0
        self._places: dict[bytes, Place] = {}
        self._new: dict[bytes, Tensor] = {}
        self._read: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        card = folder / "reference.json"
        if not card.exists():
            _write_whole(card, lambda path: path.write_text(json.dumps(dict(about or {}), indent=1) + "\n"))
        self.read_new_files()

    def __len__(self) -> int:
        return len(self._places.keys() | self._new.keys())

    def read_new_files(self) -> None:
        """Take in what other processes have written since."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            self._read.add(path.name)
            with safe_open(path, framework="pt") as file:
                keys, stops = file.get_tensor("keys"), file.get_tensor("stops").tolist()
                values = file.get_slice("logps")  # mapped; read entry by entry
            start = 0
            for key, stop in zip(keys, stops, strict=True):
                self._places[bytes(key.tolist())] = Place(values, start, stop)
                start = stop

    def scores(
        self,
        inputs: Mapping[str, Any],
        compute: Callable[[Tensor], Tensor],
        any_missing: Callable[[bool], bool] = bool,
    ) -> Tensor:
        """(R, T - 1) log-probabilities of a batch's completion tokens, zero elsewhere.

        Args:
            inputs: `input_ids`, `attention_mask` and `completion_mask` of shape (R, T).
            compute: from (R,) bool, the rows that are missing, to their (M, T - 1) log-probabilities.
            any_missing: whether any process misses a row; then every process computes, as sharded models need all.
        """
        keys = list(row_keys(inputs))
        missing = torch.tensor([key not in self._places and key not in self._new for key in keys])
        self.hits += int((~missing).sum())
        self.misses += int(missing.sum())
        rows, width = inputs["input_ids"].shape
        made = torch.zeros((rows, width - 1))
        scored = inputs["completion_mask"].bool()[:, 1:].cpu()
        if any_missing(bool(missing.any())):
            # A process with nothing to compute takes part with its first row.
            wanted = missing if bool(missing.any()) else torch.arange(rows) == 0
            values = compute(wanted.to(inputs["input_ids"].device)).float().cpu()
            for row, line in zip(wanted.nonzero().flatten().tolist(), values, strict=True):
                line = torch.nn.functional.pad(line, (0, width - 1 - len(line)))
                self._new.setdefault(keys[row], line[scored[row]].clone())
        for row, key in enumerate(keys):
            made[row, scored[row]] = self._entry(key)
        if len(self._new) >= WRITE_AFTER:
            self.write()
        return made.to(inputs["input_ids"].device)

    def _entry(self, key: bytes) -> Tensor:
        if key in self._new:
            return self._new[key]
        place = self._places[key]
        values: Tensor = place.values[place.start : place.stop]
        return values

    def write(self) -> None:
        """Write what is new into a file of its own."""
        if not self._new:
            return
        tensors = {
            "keys": torch.tensor([list(key) for key in self._new], dtype=torch.uint8),
            "stops": torch.tensor([len(values) for values in self._new.values()]).cumsum(0),
            "logps": torch.cat(list(self._new.values())),
        }
        _write_whole(self.folder / f"{uuid.uuid4().hex}.safetensors", lambda path: save_file(tensors, path))
        self._new = {}
        self.read_new_files()


def row_keys(inputs: Mapping[str, Any]) -> Iterable[bytes]:
    """A digest of each row's tokens and of where its completion begins."""
    lengths = inputs["attention_mask"].sum(-1).tolist()
    masks = inputs["completion_mask"].bool()
    for row, (ids, length) in enumerate(zip(inputs["input_ids"].tolist(), lengths, strict=True)):
        start = int(masks[row].nonzero()[0]) if bool(masks[row].any()) else length
        text = " ".join(map(str, [start, *ids[:length]]))
        yield hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
    write(unfinished)
    os.replace(unfinished, path)


# ---- what is on disk -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One reference in the cache folder.

    Attributes:
        name: its folder, the fingerprint.
        about: what it says about itself.
        rows: completions in it.
        size: bytes.
        used: when it was last written to, in seconds since the epoch.
    """

    name: str
    about: dict[str, Any]
    rows: int
    size: int
    used: float


def entries(root: Path | None = None) -> list[Entry]:
    """The references on disk, last used first."""
    root = cache_root() if root is None else root
    found = []
    for folder in root.glob("*") if root.is_dir() else ():
        card = folder / "reference.json"
        if not card.is_file():
            continue
        files = list(folder.glob("*.safetensors"))
        rows = 0
        for path in files:
            with safe_open(path, framework="pt") as file:
                rows += file.get_slice("stops").get_shape()[0]
        size = sum(path.stat().st_size for path in folder.iterdir())
        used = max(path.stat().st_mtime for path in folder.iterdir())
        found.append(Entry(folder.name, json.loads(card.read_text()), rows, size, used))
    return sorted(found, key=lambda entry: -entry.used)


def prune(names: Iterable[str] = (), older_than_days: float | None = None, root: Path | None = None) -> list[Entry]:
    """Delete references by name, or those not used for some days; returns what was deleted."""
    root = cache_root() if root is None else root
    wanted = set(names)
    limit = None if older_than_days is None else time.time() - older_than_days * 86400
    gone = [e for e in entries(root) if e.name in wanted or (limit is not None and e.used < limit)]
    for entry in gone:
        shutil.rmtree(root / entry.name)
    return gone
