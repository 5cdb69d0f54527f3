"""Pairs out of groups, rows with several completions of one prompt and their scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefopt.data.groups import COMPLETIONS, SCORES
from prefopt.online.builders import PairBuilder
from prefopt.online.pairing import FOR_THE_TEMPLATE, SCHEMA, PairCounts
from prefopt.online.pairs import Candidate
from prefopt.safety.errors import UsageError

NOT_FOR_GROUPS = ("against_gold", "top_k", "groups")
"""Builders that need more than completions and scores, or that make no pairs."""


def pairs_of_groups(
    rows: Iterable[Mapping[str, Any]], builder: PairBuilder, counts: PairCounts, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """The pairs that a builder makes of the completions of each row; they keep their scores.

    Args:
        rows: checked groups. Without scores the completions are in order, the best first, and pairs get no scores.
        builder: chooses the pairs.
        counts: changed in place.
        seed: of what the builder draws at random.

    Raises:
        UsageError: for a builder that makes no pairs of groups.
    """
    if builder.name in NOT_FOR_GROUPS:
        raise UsageError(f"--builder {builder} does not make pairs of groups: use best_worst, all_pairs or adjacent")
    for number, row in enumerate(rows):
        texts = row[COMPLETIONS]
        scores = row[SCORES] if row.get(SCORES) is not None else range(len(texts), 0, -1)
        candidates = [
            Candidate(place, json.dumps(text, sort_keys=True), float(score))
            for place, (text, score) in enumerate(zip(texts, scores, strict=True))
        ]
        choice = builder(candidates, f"{seed}/{number}")
        counts.add(len(texts), choice)
        shared = {name: row[name] for name in (*FOR_THE_TEMPLATE, "weight") if row.get(name) is not None}
        for pair in choice.pairs:
            assert pair.rejected is not None
            best, worst = pair.chosen, pair.rejected
            line = {"schema": SCHEMA, "prompt": row["prompt"], "chosen": texts[best.index]}
            line |= {"rejected": texts[worst.index]}
            if row.get(SCORES) is not None:
                line |= {"chosen_score": best.score, "rejected_score": worst.score, "margin": pair.margin}
            yield {**line, "chosen_index": best.index, "rejected_index": worst.index, "why": pair.why, **shared}
