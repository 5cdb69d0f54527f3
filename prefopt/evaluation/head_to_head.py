"""Two models' answers to the same prompts, shown to judges that compare: how far each prompt's are preferred."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list

from prefopt.evaluation.arrays import Floats
from prefopt.evaluation.cache import JudgementCache
from prefopt.evaluation.judgements import Judgement, Preference, preferences_by_prompt, read_judgements
from prefopt.evaluation.judges.base import PairJudge
from prefopt.evaluation.stage import judge_to_file
from prefopt.generation.samples import PromptRow, Sample

Groups = Sequence[Sequence[Sample]]
"""A model's answers, prompt by prompt; every prompt has as many."""


class HeadToHead:
    """Compare answer i of one model with answer i of the other: the first half of the group with the second."""

    def pairs(self, group: Sequence[Sample], earlier: Sequence[Preference]) -> list[tuple[Sample, Sample]]:
        if earlier:
            return []
        half = len(group) // 2
        return list(zip(group[:half], group[half:], strict=True))


def compare_models(
    ours: Groups,
    theirs: Groups,
    judges: Sequence[PairJudge],
    path: Path,
    *,
    rows: Mapping[str, PromptRow] | None = None,
    cache: JudgementCache | None = None,
) -> None:
    """Write what the judges prefer, as `judge_to_file` does; a file that was begun is continued.

    In the file, the other model's answers have the indices from K on, and the round of ours. Every process must call
    this.

    Args:
        ours: K answers to each prompt.
        theirs: K answers of the other model to the same prompts, in the same order.
        judges: with different names.
        path: of the file.
        rows: the prompts' rows by id.
        cache: of earlier answers.
    """
    answers, both = len(ours[0]), []
    for group, other in zip(ours, theirs, strict=True):
        both += [replace(sample, index=number) for number, sample in enumerate(group)]
        both += [replace(sample, index=answers + number, round=group[0].round) for number, sample in enumerate(other)]
    judge_to_file(both, judges, path, rows=rows, cache=cache, pairing=HeadToHead())


def preferred(ours: Groups, judgements: Iterable[Judgement], weights: Mapping[str, float] | None = None) -> Floats:
    """(N,) how far our answers to each prompt are preferred, in [0, 1]; NaN where no comparison was judged.

    Args:
        ours: the answers that were compared.
        judgements: that `compare_models` wrote.
        weights: of judges by name; all judges equally if left out.
    """
    by_prompt = preferences_by_prompt(judgements, weights)
    shares = [list(by_prompt.get(group[0].prompt_id, {}).values()) for group in ours]
    return np.array([np.mean(one) if one else np.nan for one in shares], dtype=np.float64)


def compare_once(ours: Groups, theirs: Groups, judge: PairJudge, prompts: Sequence[PromptRow]) -> Floats:
    """`preferred`, by one judge and without a file that stays; every process must call this."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "judgements.jsonl"
        compare_models(ours, theirs, [judge], path, rows={row.id: row for row in prompts})
        judgements = list(read_judgements(path)) if path.exists() else []
    return preferred(ours, broadcast_object_list([judgements])[0])
