"""The archive of a search: one SQLite file with every proposal, what became of it, and what it scored.

A proposal is one row, whatever it was. Rows are written as they come, so a search that was killed continues from them.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.safety.errors import UsageError, retold

FILE = "archive.sqlite"
STORED_TEXT = 2000
"""Longest part of a proposal's text that is stored, in characters."""

_TABLES = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS candidates (
    id INTEGER PRIMARY KEY, generation INTEGER NOT NULL, proposer TEXT NOT NULL, parents TEXT NOT NULL,
    text TEXT NOT NULL, expression TEXT, signature TEXT, level TEXT NOT NULL, reason TEXT NOT NULL,
    seed TEXT NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS results (
    candidate INTEGER NOT NULL, level TEXT NOT NULL, beta REAL NOT NULL, seed INTEGER NOT NULL,
    reward REAL, kl REAL, length REAL, value REAL, details TEXT NOT NULL, PRIMARY KEY (candidate, level, beta, seed));
CREATE INDEX IF NOT EXISTS by_signature ON candidates (signature);
CREATE INDEX IF NOT EXISTS by_generation ON candidates (generation);
"""


@dataclass(frozen=True)
class Candidate:
    """A proposal.

    Attributes:
        id: its number, from 0 in the order of proposals.
        generation: which one it belongs to.
        proposer: who proposed it and how.
        parents: numbers of the candidates it comes from.
        text: as it was proposed, shortened to `STORED_TEXT` characters.
        expression: as it was read; None if it could not be.
        signature: of its values; None if it was refused before.
        level: the last level that it reached: "text", "static", or one that trains.
        reason: why it went no further; "" if it did not stop.
        seed: of the random generator that made it, as "search's seed:number".
        seconds: of processor time spent on it.
    """

    id: int
    generation: int
    proposer: str
    parents: tuple[int, ...]
    text: str
    expression: str | None
    signature: str | None
    level: str
    reason: str
    seed: str
    seconds: float


@dataclass(frozen=True)
class Result:
    """What one training scored.

    Attributes:
        candidate: its number.
        level: where it was trained.
        beta: of the loss.
        seed: of the problem or the run.
        reward: higher is better; None if training became NaN or infinite.
        kl: from the reference, in nats.
        length: of the answers, minus the reference's.
        value: of the toy, what the loss is for, as a share of what the best policy has; see `toy.Outcome`.
        details: other numbers of the run.
    """

    candidate: int
    level: str
    beta: float
    seed: int
    reward: float | None
    kl: float | None
    length: float | None
    value: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


class Archive:
    """The file, open. What a method has written stays if the process is killed.

    Args:
        folder: with the file; both are made if they do not exist.
        make: False to refuse a folder without an archive.
    """

    def __init__(self, folder: Path, make: bool = True):
        file = folder / FILE
        if not make and not file.is_file():
            raise UsageError(f"{folder} holds no {FILE}: name the folder of a search, --out of `prefopt discover`")
        with retold(UsageError, f"{folder} cannot be the folder of a search"):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(file)
            self._database.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{file} cannot be read as an archive ({error}): name another folder") from None

    def close(self) -> None:
        self._database.close()

    def settings(self) -> dict[str, Any]:
        rows = self._database.execute("SELECT name, value FROM settings")
        return {name: json.loads(value) for name, value in rows}

    def store_setting(self, name: str, value: Any) -> None:
        with self._database:
            self._database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value)))

    def add(self, candidate: Candidate) -> None:
        """Store a new candidate."""
        row = candidate
        with self._database:
            self._database.execute(
                "INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (row.id, row.generation, row.proposer, json.dumps(row.parents), row.text[:STORED_TEXT],
                 row.expression, row.signature, row.level, row.reason, row.seed, row.seconds, time.time()),
            )  # fmt: skip

    def reached(
        self, number: int, level: str, reason: str = "", results: Iterable[Result] = (), seconds: float = 0.0
    ) -> None:
        """Store what a level gave, and that a candidate got there."""
        rows = [
            (r.candidate, r.level, r.beta, r.seed, r.reward, r.kl, r.length, r.value, json.dumps(r.details))
            for r in results
        ]
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self._database.execute(
                "UPDATE candidates SET level = ?, reason = ?, seconds = seconds + ? WHERE id = ?",
                (level, reason, seconds, number),
            )

    def candidates(self, where: str = "1", values: Sequence[Any] = ()) -> list[Candidate]:
        """Candidates in the order of their numbers; `where` is SQL of this module's callers, `values` fill its `?`."""
        rows = self._database.execute(
            "SELECT id, generation, proposer, parents, text, expression, signature, level, reason, seed, seconds "
            f"FROM candidates WHERE {where} ORDER BY id",
            tuple(values),
        )
        return [_candidate(*row) for row in rows]

    def results(self, level: str, numbers: Sequence[int] | None = None) -> list[Result]:
        """What a level scored, by candidate, beta and seed: everything, or from the first to the last of `numbers`."""
        first, last = (0, 2**62) if numbers is None else (min(numbers), max(numbers))
        rows = self._database.execute(
            "SELECT candidate, level, beta, seed, reward, kl, length, value, details FROM results WHERE level = ? "
            "AND candidate BETWEEN ? AND ? ORDER BY candidate, beta, seed",
            (level, first, last),
        )
        return [_result(*row) for row in rows]


def _candidate(number: int, generation: int, proposer: str, parents: str, *rest: Any) -> Candidate:
    return Candidate(number, generation, proposer, tuple(json.loads(parents)), *rest)


def _result(
    candidate: int, level: str, beta: float, seed: int, reward: float | None, kl: float | None, length: float | None,
    value: float | None, details: str,
) -> Result:  # fmt: skip
    return Result(candidate, level, beta, seed, reward, kl, length, value, json.loads(details))
