"""Reference log-probabilities that are computed once and kept on disk: over epochs, runs, losses and sweeps.

An entry is one completion under one prompt, found by its token ids, so a cache serves any order, subset or mixture of
the data. A folder belongs to one reference: its name is a fingerprint of the reference's weights. Entries are written
many at a time, each file atomically, and entries of an interrupted run are reused. Entries of a file that cannot be
read are computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefopt.safety.files import UNFINISHED, cache_folder, write_text, write_whole
from prefopt.scoring.rows import RowBatch

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
WRITE_AFTER = 256
"""Entries that are gathered before a file is written."""
STALE_AFTER = 86400.0
"""Seconds after which an unfinished file counts as abandoned."""
_UNREADABLE = (OSError, SafetensorError, KeyError, ValueError)


def cache_root() -> Path:
    """Where references are kept: `reference` in the cache folder (`prefopt.safety.files.cache_home`)."""
    return cache_folder("reference")


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
        self._about = dict(about or {})
        self._places: dict[bytes, Place] = {}
        self._new: dict[bytes, Tensor] = {}
        self._read: set[str] = set()
        self._write_at = 0  # entries; more than WRITE_AFTER only after a write that failed
        self._make_folder()
        _remove_stale(folder)
        self.read_new_files()

    def __len__(self) -> int:
        return len(self._places.keys() | self._new.keys())

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        card = self.folder / "reference.json"
        if not card.exists():
            write_text(card, json.dumps(self._about, indent=1) + "\n")

    def read_new_files(self) -> None:
        """Read the files that other processes have written since."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            self._read.add(path.name)
            try:
                keys, stops, values = _read_file(path)
            except FileNotFoundError:  # deleted since it was listed
                continue
            except _UNREADABLE as error:
                logger.warning(
                    "%s cannot be read (%s): it is skipped and its entries are computed again; delete it", path, error
                )
                continue
            start = 0
            for key, stop in zip(keys, stops, strict=True):
                self._places[key] = Place(values, start, stop)
                start = stop

    def scores(
        self,
        rows: RowBatch,
        compute: Callable[[Tensor], Tensor],
        any_missing: Callable[[bool], bool] = bool,
    ) -> Tensor:
        """(R, T - 1) log-probabilities of a batch's completion tokens, zero elsewhere.

        Args:
            rows: R rows of T tokens.
            compute: from (R,) bool, the rows that are missing, to their (M, T - 1) log-probabilities.
            any_missing: whether any process misses a row; then every process computes, as sharded models need all.
                Called once per batch, as is `compute` if it says so: no process makes more calls than another.
        """
        keys = list(row_keys(rows))
        missing = torch.tensor([key not in self._places and key not in self._new for key in keys], dtype=torch.bool)
        self.hits += int((~missing).sum())
        self.misses += int(missing.sum())
        logps = torch.zeros_like(rows.ids[:, 1:], dtype=torch.float32, device="cpu")
        scored = rows.completion.bool()[:, 1:].cpu()
        if any_missing(bool(missing.any())):
            wanted = missing if bool(missing.any()) else _one_row(scored)
            values = compute(wanted.to(rows.ids.device)).float().cpu()
            for row, line in zip(wanted.nonzero().flatten().tolist(), values, strict=True):
                if missing[row]:
                    line = torch.nn.functional.pad(line, (0, logps.shape[1] - len(line)))
                    self._new.setdefault(keys[row], line[scored[row]].clone())
        for row, key in enumerate(keys):
            logps[row, scored[row]] = self._entry(key)
        if len(self._new) >= max(WRITE_AFTER, self._write_at):
            self.write()
        return logps.to(rows.ids.device)

    def _entry(self, key: bytes) -> Tensor:
        if key in self._new:
            return self._new[key]
        place = self._places[key]
        values: Tensor = place.values[place.start : place.stop]
        return values

    def write(self) -> None:
        """Write new entries into their own file, and read files that other processes have written.

        If writing fails (for example on a full disk), a warning is logged, the entries stay in memory, and the next
        write tries again.
        """
        if self._new:
            tensors = {
                "keys": torch.tensor([list(key) for key in self._new], dtype=torch.uint8),
                "stops": torch.tensor([len(values) for values in self._new.values()]).cumsum(0),
                "logps": torch.cat(list(self._new.values())),
            }
            try:
                self._make_folder()  # it may have been pruned meanwhile
                write_whole(self.folder / f"{uuid.uuid4().hex}.safetensors", lambda path: save_file(tensors, path))
            except (OSError, SafetensorError) as error:
                logger.warning(
                    "%d new entries of the reference cache stay in memory: %s cannot be written to (%s)",
                    *(len(self._new), self.folder, error),
                )
                self._write_at = len(self._new) + WRITE_AFTER
            else:
                self._new, self._write_at = {}, 0
        self.read_new_files()


def _one_row(scored: Tensor) -> Tensor:
    """The row that a process with nothing to compute scores with the others: with a completion if there is one."""
    first = int(scored.any(-1).float().argmax()) if len(scored) else 0
    return torch.arange(len(scored)) == first


def row_keys(rows: RowBatch) -> Iterable[bytes]:
    """A digest of each row's tokens and of where its completion begins."""
    lengths, masks = rows.attention.sum(-1).tolist(), rows.completion.bool().cpu()
    for row, (ids, length) in enumerate(zip(rows.ids.tolist(), lengths, strict=True)):
        start = int(masks[row].nonzero()[0]) if bool(masks[row].any()) else length
        text = " ".join(map(str, [start, *ids[:length]]))
        yield hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def _read_file(path: Path) -> tuple[list[bytes], list[int], Any]:
    """A file's keys, where the values of each end, and the values: mapped, to be read entry by entry."""
    with safe_open(path, framework="pt") as file:
        keys, stops = file.get_tensor("keys"), file.get_tensor("stops").tolist()
        values = file.get_slice("logps")
        shape = values.get_shape()
    if keys.dtype != torch.uint8 or keys.shape != (len(stops), DIGEST_BYTES):
        raise ValueError(f"{len(stops)} entries, but keys of shape {tuple(keys.shape)}")
    if stops != sorted(stops) or shape != [stops[-1] if stops else 0]:
        raise ValueError(f"its entries do not end where its values do, of shape {shape}")
    joined = keys.numpy().tobytes()
    return [joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)], stops, values


def _rows_in(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        rows: int = file.get_slice("stops").get_shape()[0]
    return rows


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(f"*{UNFINISHED}"):
        with contextlib.suppress(OSError):  # its writer may still finish it, or another process may delete it first
            if time.time() - path.stat().st_mtime > STALE_AFTER:
                path.unlink()


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
    """The references on disk, last written to first. Damaged files count in bytes only."""
    root = cache_root() if root is None else root
    found = []
    for folder in root.glob("*") if root.is_dir() else ():
        card = folder / "reference.json"
        if not card.is_file():
            continue
        rows, sizes, times = 0, [0], [0.0]
        for path in folder.iterdir():
            with contextlib.suppress(*_UNREADABLE):  # a run may be renaming its files
                stat = path.stat()
                sizes.append(stat.st_size)
                times.append(stat.st_mtime)
                rows += _rows_in(path) if path.suffix == ".safetensors" else 0
        about: dict[str, Any] = {}
        with contextlib.suppress(*_UNREADABLE):
            about = json.loads(card.read_text())
        found.append(Entry(folder.name, about, rows, sum(sizes), max(times)))
    return sorted(found, key=lambda entry: -entry.used)


def prune(names: Iterable[str] = (), older_than_days: float | None = None, root: Path | None = None) -> list[Entry]:
    """Delete references by name, or those not written to for some days, and what interrupted runs left unfinished.

    Returns:
        The references that were deleted.
    """
    root = cache_root() if root is None else root
    wanted = set(names)
    limit = None if older_than_days is None else time.time() - older_than_days * 86400
    gone = [e for e in entries(root) if e.name in wanted or (limit is not None and e.used < limit)]
    for entry in gone:
        shutil.rmtree(root / entry.name)
    for folder in root.glob("*/"):
        _remove_stale(folder)
    return gone
