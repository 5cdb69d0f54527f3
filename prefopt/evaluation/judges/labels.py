"""A judge that is a file of labels, by people or by another program."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.evaluation.judges.base import Candidate, Verdict, verdict_of
from prefopt.generation.samples import prompt_id
from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import read_jsonl


class LabelsJudge:
    """Scores from JSON lines with `prompt_id` or `prompt`, `completion`, and `score` (a number; null abstains).

    Samples that the file does not have get no score, with the reason "no label". (Preferences by people are
    judgements already: write them as such.)

    Args:
        path: of the file.
        name: of the judge.

    Raises:
        UsageError: naming the line that is not a label, or that contradicts an earlier one.
    """

    cached = False

    def __init__(self, path: Path, name: str = "labels"):
        self.name = name
        self._labels: dict[tuple[str, str], Verdict] = {}
        for number, row in enumerate(read_jsonl(path), start=1):
            where = f"{path}, object {number}"
            key = _key(where, row)
            verdict = verdict_of(row["score"])
            if verdict.score is None and not verdict.abstain:
                raise UsageError(f"{where}: score must be a finite number or null, not {row['score']!r}")
            if self._labels.setdefault(key, verdict) != verdict:
                raise UsageError(f"{where}: another score for a completion that was labelled before; keep one of them")
        self.settings: Mapping[str, Any] = {"labels": hashlib.sha256(path.read_bytes()).hexdigest()}

    def score(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        none = Verdict(None, "no label")
        return [self._labels.get((prompt_id(one.prompt), one.completion), none) for one in candidates]


def _key(where: str, row: Mapping[str, Any]) -> tuple[str, str]:
    for name in ("completion", "score"):
        if name not in row:
            raise UsageError(f"{where} has no {name}; a label needs prompt_id or prompt, completion and score")
    if "prompt_id" not in row and "prompt" not in row:
        raise UsageError(f"{where} has neither prompt_id nor prompt")
    return str(row.get("prompt_id") or prompt_id(row["prompt"])), str(row["completion"])
