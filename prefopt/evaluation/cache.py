"""Verdicts and choices kept in an SQLite file, by the judge's settings and the texts it saw.

Several processes may use one file. What failed is not kept, so it is asked again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from prefopt.evaluation.judges.base import Candidate, Choice, Contest, Verdict
from prefopt.safety.errors import UsageError
from prefopt.safety.files import cache_folder

_WAIT_S = 60.0
_AT_ONCE = 500  # older SQLite takes 999 values in a statement


def cache_file() -> Path:
    """Where judgements are cached unless one says otherwise."""
    return cache_folder("judgements") / "judgements.sqlite"


def cache_key(judge_hash: str, asked: Candidate | Contest) -> str:
    """A digest of a judge's settings and all that it is shown."""
    words = json.dumps([judge_hash, asdict(asked)], ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


class JudgementCache:
    """Reads and stores answers of judges.

    Args:
        path: the file; its folder is made.

    Raises:
        UsageError: for a file that is not a cache.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
        try:
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID")
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise self._error(error) from error

    def get(self, keys: Sequence[str]) -> dict[str, Verdict | Choice]:
        """What is stored under these keys."""
        answers: dict[str, Verdict | Choice] = {}
        try:
            for at in range(0, len(keys), _AT_ONCE):
                part = keys[at : at + _AT_ONCE]
                marks = ",".join("?" * len(part))
                rows = self._file.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part)
                answers.update((key, _read(json.loads(answer))) for key, answer in rows)
        except (sqlite3.DatabaseError, ValueError, TypeError, KeyError) as error:
            raise self._error(error) from error
        return answers

    def put(self, answers: Mapping[str, Verdict | Choice]) -> None:
        """Store all of these in one step; failures are left out."""
        rows = [
            (key, json.dumps({"kind": type(answer).__name__, **asdict(answer)}, ensure_ascii=False))
            for key, answer in answers.items()
            if answer.abstain or not answer.reason
        ]
        try:
            self._file.execute("BEGIN IMMEDIATE")
            self._file.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)
            self._file.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JudgementCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _error(self, error: Exception) -> UsageError:
        return UsageError(
            f"the cache of judgements {self._path} cannot be used ({error}). Delete it: judges are then asked again"
        )


def _read(answer: dict[str, Any]) -> Verdict | Choice:
    return Choice(**answer) if answer.pop("kind") == "Choice" else Verdict(**answer)
