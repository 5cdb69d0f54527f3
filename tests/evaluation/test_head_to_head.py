"""Two models' answers before judges that compare."""

from __future__ import annotations

import numpy as np
import pytest

from prefopt.evaluation.head_to_head import compare_models, compare_once, preferred
from prefopt.evaluation.judgements import read_judgements
from prefopt.evaluation.judges.function import function_judge
from prefopt.generation.samples import PromptRow, Sample
from tests.evaluation import my_judges

PROMPTS = [PromptRow(name) for name in ("a", "b", "c")]
OURS = [["1", "22"], ["333", "4"], ["5", "6"]]
THEIRS = [["11", "22"], ["3", "44"], ["x", "y"]]


def groups(texts: list[list[str]], number: int) -> list[list[Sample]]:
    return [
        [Sample(row.id, str(row.prompt), index, text, 1, True, number) for index, text in enumerate(of_prompt)]
        for row, of_prompt in zip(PROMPTS, texts, strict=True)
    ]


def shorter(**options):
    return function_judge("tests.evaluation.my_judges:shorter", **options)


def test_each_answer_is_compared_with_the_other_model_s_of_the_same_number(tmp_path):
    path = tmp_path / "judgements.jsonl"
    ours, theirs = groups(OURS, 2), groups(THEIRS, 1)
    compare_models(ours, theirs, [shorter()], path)
    judgements = list(read_judgements(path))
    # Two answers of each prompt, in both orders; the other model's have the indices 2 and 3.
    assert sorted({tuple(sorted(one.indices)) for one in judgements}) == [(0, 2), (1, 3)]
    assert (len(judgements), {one.round for one in judgements}) == (12, {2})
    # a: shorter, and the same text; b: longer, then shorter; c: two ties
    assert preferred(ours, judgements).tolist() == [0.75, 0.5, 0.5]
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    compare_models(ours, theirs, [shorter()], path)
    assert path.read_bytes() == before


def test_weights_choose_among_judges_and_failures_do_not_count(tmp_path, monkeypatch):
    def never(first: str, second: str) -> float | None:
        return None if "x" in first + second or "y" in first + second else 0.0

    monkeypatch.setattr(my_judges, "never", never, raising=False)
    path = tmp_path / "judgements.jsonl"
    judges = [shorter(), function_judge("tests.evaluation.my_judges:never", both_orders=False)]
    ours = groups(OURS, 1)
    compare_models(ours, groups(THEIRS, 0), judges, path)
    shares = preferred(ours, read_judgements(path), {"never": 1.0})
    assert shares[1] == 0
    assert np.isnan(shares[2])
    both = preferred(ours, read_judgements(path), {"shorter": 3.0, "never": 1.0})
    assert both[1:].tolist() == pytest.approx([0.75 * 0.5, 0.5])


def test_without_a_file_that_stays():
    assert compare_once(groups(OURS, 0), groups(THEIRS, 0), shorter(), PROMPTS).tolist() == [0.75, 0.5, 0.5]
