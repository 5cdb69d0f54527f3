"""Rows that repeat or contradict an earlier one, found by digests of their texts (16 bytes a row)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prefopt.data.canonical import bytes_of, encoded

_FACTORS = [np.array(pair, np.uint64) for pair in (
    (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F), (0x165667B19E3779F9, 0xD6E8FEB86659FD93),
    (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53),
)]  # fmt: skip
"""Odd numbers of 64 bits, for prompt, first and second: sums of digests that depend on which text is which."""

_NEW = object()


class Repeats:
    """Remembers every row's digest.

    Args:
        sides: the columns of completions.
    """

    def __init__(self, sides: tuple[str, ...]) -> None:
        self._sides = sides
        self._seen: dict[bytes, Any] = {}

    def of_row(self, row: Mapping[str, Any]) -> str | None:
        """The problem of a row, if it has one."""
        origin = (row["source"], row["row"]) if "source" in row and "row" in row else None
        prompt = _digest(encoded(row["prompt"]), encoded(row.get("tools")))
        texts = [_digest(encoded(row[side])) for side in self._sides]
        key, opposite = self._keys([prompt], [[text] for text in texts], [bool(row.get("label"))])
        return self._problem(key, opposite, origin)

    def of_table(self, table: Any, readable: Sequence[bool]) -> Iterator[tuple[str | None, Any]]:
        """The problem of each row of an Arrow table and its source and row; rows not `readable` are not compared."""
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        prompts: list[bytes]
        if "tools" in columns:
            both = zip(bytes_of(columns["prompt"]), bytes_of(columns["tools"]), strict=True)
            prompts = [_digest(prompt, tools) for prompt, tools in both]
        else:
            prompts = [_digest(prompt, _NO_TOOLS) for prompt in bytes_of(columns["prompt"])]
        texts = [[_digest(text) for text in bytes_of(columns[side])] for side in self._sides]
        labels = [bool(label) for label in columns["label"].to_pylist()] if len(texts) == 1 else []
        keys, opposites = (memoryview(keys) for keys in self._keys(prompts, texts, labels))
        origins: Sequence[Any] = [None] * len(prompts)
        if "source" in columns and "row" in columns:
            origins = list(zip(columns["source"].to_pylist(), columns["row"].to_pylist(), strict=True))
        for place, origin in enumerate(origins):
            here = slice(16 * place, 16 * place + 16)
            problem = self._problem(bytes(keys[here]), bytes(opposites[here]), origin) if readable[place] else None
            yield problem, origin

    def _keys(
        self, prompts: Sequence[bytes], texts: Sequence[Sequence[bytes]], labels: Sequence[bool]
    ) -> tuple[bytes, bytes]:
        """The digests of rows, and of their opposites, one after the other."""
        prompt, first, second = _FACTORS
        common, left = _lanes(prompts) * prompt, _lanes(texts[0])
        if len(texts) == 2:
            right = _lanes(texts[1])
            return (common + left * first + right * second).tobytes(), (
                common + right * first + left * second
            ).tobytes()
        label = np.array(labels, np.uint64)[:, None]
        common = common + left * first
        return (common + label * second).tobytes(), (common + (1 - label) * second).tobytes()

    def _problem(self, key: bytes, opposite: bytes, origin: Any) -> str | None:
        earlier = self._seen.setdefault(key, _NEW)
        if earlier is _NEW:
            self._seen[key] = origin
        # A mixture repeats rows of its smaller sources on purpose.
        elif origin is None or earlier != origin:
            return "duplicate row"
        return "contradicts an earlier row" if opposite != key and opposite in self._seen else None


_NO_TOOLS = encoded(None)


def _digest(*texts: Any) -> bytes:
    digest = hashlib.blake2b(texts[0], digest_size=16)
    for text in texts[1:]:
        digest.update(text)
    return digest.digest()


def _lanes(digests: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
