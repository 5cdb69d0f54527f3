"""Groups, rows with several completions of one prompt and their scores: pairs out of them, and they out of samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prefopt.data.groups import COMPLETIONS, SCORES
from prefopt.evaluation.judgements import Judgement
from prefopt.generation.samples import PromptRow, Sample, by_prompt
from prefopt.online.builders import PairBuilder
from prefopt.online.pairing import (
    FOR_THE_TEMPLATE,
    SCHEMA,
    PairCounts,
    PairSettings,
    candidates_of,
    judged,
    side_after,
)
from prefopt.online.pairs import NO_SCORES, Candidate
from prefopt.safety.errors import UsageError

NOT_FOR_GROUPS = ("against_gold", "top_k")
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


def groups_of(
    samples: Sequence[Sample],
    judgements: Sequence[Judgement],
    settings: PairSettings,
    counts: PairCounts,
    prompts: Sequence[PromptRow] = (),
) -> Iterator[dict[str, Any]]:
    """The samples of a round that have a score as groups, one a prompt; the arguments are those of `pairs_of`."""
    ours, rows = judged(judgements, samples, settings.weights), {row.id: row for row in prompts}
    for name, group in by_prompt(samples).items():
        counts.prompts += 1
        counts.samples += len(group)
        scored = [one for one in candidates_of(group, ours, settings, counts) if one.score is not None]
        if len(scored) < 2:
            counts.prompts_without_pair[NO_SCORES] += 1
            continue
        prompt, row = group[0].prompt, rows.get(name)
        more = {key: row.columns[key] for key in FOR_THE_TEMPLATE if row is not None and key in row.columns}
        yield {
            "prompt": prompt,
            COMPLETIONS: [side_after(prompt, one.completion) for one in scored],
            SCORES: [one.score for one in scored],
            "indices": [one.index for one in scored],
            "prompt_id": name,
            "round": group[0].round,
            **more,
        }
