"""Judgements: what judges say of samples, as they are stored, one a line.

A `Score` is about one sample, a `Preference` about two samples of one prompt. A sample that could not be judged has a
line too, with the reason. Another program can write the same lines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import read_flag, read_jsonl

SCHEMA = "prefopt.judgements/1"

ABSTAINED = "abstained"
"""The reason of a judge that declines to judge."""


@dataclass(frozen=True)
class Score:
    """A judge's number for one sample; more is better.

    Attributes:
        prompt_id: of the sample.
        index: of the sample among those of its prompt.
        judge: the judge's name.
        score: a finite number; None if there is none, and `reason` says why.
        abstain: the judge declined; otherwise a missing score is a failure of the judge.
        reason: why there is no score: "abstained", "unparsable", "not a number: nan", "raised: ...".
        raw: what the judge wrote, if it writes.
        judge_hash: of the judge's settings.
        text_hash: of the completion, so that judgements of other samples are noticed.
        round: of the sample.
    """

    prompt_id: str
    index: int
    judge: str
    score: float | None
    abstain: bool = False
    reason: str = ""
    raw: str = ""
    judge_hash: str = ""
    text_hash: str = ""
    round: int = 0

    def line(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": "score", **asdict(self)}

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two lines of a file share."""
        return (self.round, self.prompt_id, self.judge, self.index)


@dataclass(frozen=True)
class Preference:
    """A judge's choice between two samples of one prompt.

    Attributes:
        prompt_id: of both samples.
        indices: of the samples, as they were shown: the first one first.
        judge: the judge's name.
        winner: the better one's index; None for a tie, an abstention or a failure.
        tie: the judge calls both equally good.
        probability: that the sample shown first is better, if the judge gives one.
        order: 0 if they were shown in the order of their indices, 1 if swapped.
        repeat: 0 for the first time that the judge is asked this.
        abstain: the judge declined.
        reason: why there is neither a winner nor a tie, as in `Score`.
        raw: what the judge wrote, if it writes.
        judge_hash: of the judge's settings.
        text_hash: of both completions, in the order of their indices.
        round: of the samples.
    """

    prompt_id: str
    indices: tuple[int, int]
    judge: str
    winner: int | None
    tie: bool = False
    probability: float | None = None
    order: int = 0
    repeat: int = 0
    abstain: bool = False
    reason: str = ""
    raw: str = ""
    judge_hash: str = ""
    text_hash: str = ""
    round: int = 0

    def line(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": "preference", **asdict(self), "indices": list(self.indices)}

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two lines of a file share."""
        return (self.round, self.prompt_id, self.judge, min(self.indices), max(self.indices), self.order, self.repeat)

    @property
    def first_share(self) -> float | None:
        """How far the sample shown first is preferred: its probability, or 1, 0.5 for a tie, 0; None if not judged."""
        if self.probability is not None:
            return self.probability
        if self.tie:
            return 0.5
        return None if self.winner is None else float(self.winner == self.indices[0])


Judgement = Score | Preference


def text_hash(*completions: str) -> str:
    """A digest of one completion, or of two."""
    return hashlib.sha256(json.dumps(completions).encode("utf-8")).hexdigest()[:16]


def read_judgements(path: Path) -> Iterator[Judgement]:
    """The judgements of a file. A score needs `prompt_id`, `index`, `score`; a preference `prompt_id`, `indices` and
    `winner` or `tie`; `kind` may be left out.

    Raises:
        UsageError: naming the file, the line and the field; also for two scores of one sample by one judge.
    """
    scores: dict[tuple[Any, ...], float | None] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{path}, object {number}"
        one = read_judgement(row, where)
        if isinstance(one, Score) and scores.setdefault(one.key, one.score) != one.score:
            raise UsageError(
                f"{where}: judge {one.judge!r} scores sample {one.index} of prompt {one.prompt_id} a second time, "
                "with another score. Keep one of them; scores of several people need a `judge` each"
            )
        yield one


def read_judgement(row: Mapping[str, Any], where: str) -> Judgement:
    """The judgement in one line; `where` begins the text of an error."""
    if str(row.get("schema", SCHEMA)) != SCHEMA:
        raise UsageError(f"{where}: schema is {row['schema']!r}; this version of prefopt reads {SCHEMA}")
    kind = row.get("kind", "preference" if "indices" in row else "score")
    if kind not in ("score", "preference"):
        raise UsageError(f"{where}: kind must be score or preference, not {kind!r}")
    needed = ("prompt_id", "index", "score") if kind == "score" else ("prompt_id", "indices")
    for name in needed:
        if name not in row:
            raise UsageError(f"{where} has no {name}; a {kind} needs {', '.join(needed)}")
    shared: dict[str, Any] = {
        "prompt_id": str(row["prompt_id"]),
        "judge": str(row.get("judge", "file")),
        "abstain": read_flag(row, "abstain", where),
        "reason": str(row.get("reason", "")),
        "raw": str(row.get("raw", "")),
        "judge_hash": str(row.get("judge_hash", "")),
        "text_hash": str(row.get("text_hash", "")),
        "round": _whole(row, "round", where),
    }
    if kind == "score":
        return Score(index=_whole(row, "index", where), score=_number(row, "score", where), **shared)
    return _preference(row, where, shared)


def _preference(row: Mapping[str, Any], where: str, shared: dict[str, Any]) -> Preference:
    indices = row["indices"]
    if not isinstance(indices, list) or len(indices) != 2 or not all(map(_is_whole, indices)):
        raise UsageError(f"{where}: indices must be the numbers of two samples, not {indices!r}")
    first, second = indices
    winner, tie = row.get("winner"), read_flag(row, "tie", where)
    if first == second or winner not in (first, second, None) or (tie and winner is not None):
        raise UsageError(
            f"{where}: indices {indices!r}, winner {winner!r}, tie {tie}: the indices must differ, and the winner be "
            "one of them, or null for a tie"
        )
    probability = _number(row, "probability", where)
    if probability is not None and not 0 <= probability <= 1:
        raise UsageError(f"{where}: probability is {probability}; it must be in [0, 1]")
    return Preference(
        indices=(first, second),
        winner=winner,
        tie=tie,
        probability=probability,
        order=_whole(row, "order", where, int(first > second)),
        repeat=_whole(row, "repeat", where),
        **shared,
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(row: Mapping[str, Any], name: str, where: str, usual: int = 0) -> int:
    value = row.get(name, usual)
    if not _is_whole(value):
        raise UsageError(f"{where}: {name} must be a whole number, not {value!r}")
    return int(value)


def _number(row: Mapping[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{where}: {name} must be a finite number or null, not {value!r}")
    return float(value)


def scores_by_prompt(
    judgements: Iterable[Judgement], weights: Mapping[str, float] | None = None
) -> dict[str, dict[int, float]]:
    """The score of each sample, by prompt and index: the weighted mean over judges.

    A sample that one of these judges gave no score is left out, since the mean over the others has another scale.

    Args:
        judgements: of one round; preferences are ignored.
        weights: of judges by name; all judges equally if left out. Judges without a weight do not count.
    """
    by_sample: dict[tuple[str, int], dict[str, float | None]] = {}
    judges: set[str] = set()
    for one in judgements:
        if isinstance(one, Score) and (weights is None or one.judge in weights):
            by_sample.setdefault((one.prompt_id, one.index), {})[one.judge] = one.score
            judges.add(one.judge)
    shares = _shares(judges, weights)
    means: dict[str, dict[int, float]] = {}
    for (prompt, index), scores in by_sample.items():
        present = {judge: score for judge, score in scores.items() if score is not None}
        if len(present) == len(judges):
            means.setdefault(prompt, {})[index] = sum(shares[judge] * present[judge] for judge in sorted(present))
    return means


def preferences_by_prompt(
    judgements: Iterable[Judgement], weights: Mapping[str, float] | None = None
) -> dict[str, dict[tuple[int, int], float]]:
    """How far the sample with the lower index is preferred, in [0, 1], by prompt and pair (lower, higher index).

    The mean over the orders and repeats of a judge, then the weighted mean over the judges that judged the pair. What
    was not judged (abstained, unparsable, raised) does not count.

    Args:
        judgements: of one round; scores are ignored.
        weights: of judges by name; all judges equally if left out. Judges without a weight do not count.
    """
    asked: dict[tuple[str, int, int], dict[str, list[float]]] = {}
    for one in judgements:
        if not isinstance(one, Preference) or (weights is not None and one.judge not in weights):
            continue
        if (share := one.first_share) is not None:
            lower, higher = sorted(one.indices)
            share = share if one.indices[0] == lower else 1 - share
            asked.setdefault((one.prompt_id, lower, higher), {}).setdefault(one.judge, []).append(share)
    preferred: dict[str, dict[tuple[int, int], float]] = {}
    for (prompt, lower, higher), by_judge in asked.items():
        shares = _shares(by_judge, weights)
        mean = sum(shares[judge] * sum(by_judge[judge]) / len(by_judge[judge]) for judge in sorted(by_judge))
        preferred.setdefault(prompt, {})[lower, higher] = mean
    return preferred


def _shares(judges: Iterable[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    by_judge = {judge: 1.0 if weights is None else weights[judge] for judge in judges}
    total = sum(by_judge.values())
    if by_judge and not 0 < total < math.inf:
        raise UsageError(f"the weights of {', '.join(sorted(by_judge))} must sum to a number above 0, got {total}")
    return {judge: weight / total for judge, weight in by_judge.items()}
