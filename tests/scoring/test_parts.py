"""Batches cut into parts of at most so many tokens."""

from __future__ import annotations

import pytest
import torch

from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.parts import cut
from prefopt.scoring.rows import RowBatch


def make_example(prompt: int, chosen: int, rejected: int, start: int = 5) -> dict:
    return {
        "prompt_ids": list(range(start, start + prompt)),
        "chosen_ids": list(range(100, 100 + chosen)),
        "rejected_ids": list(range(200, 200 + rejected)),
    }


EXAMPLES = [make_example(10, 3, 4), make_example(4, 2, 2, 30), make_example(40, 9, 1, 50), make_example(10, 5, 6)]


def collate(examples=EXAMPLES, **options) -> RowBatch:
    return RowBatch.of(PreferenceCollator(pad_token_id=0, **options)(examples))


def test_examples_with_one_prompt_stay_together():
    # Trees: 9 + 3 + 4 + 5 + 6 (the first and the last example), 3 + 4, 39 + 10.
    assert cut(collate(), 27, in_trees=True) == [[2], [0, 3], [1]]
    assert cut(collate(), 34, in_trees=True) == [[2], [0, 3, 1]]
    assert cut(collate(), 83, in_trees=True) == [[2, 0, 3, 1]]


def test_an_example_beyond_the_budget_is_a_part_of_its_own():
    assert cut(collate(), 1, in_trees=True) == [[2], [0, 3], [1]]
    assert cut(collate(), 1, in_trees=False) == [[2], [3], [0], [1]]


def test_padded_rows_count_as_long_as_the_longest():
    # Two rows an example, filled up to the longest: 49, 16, 14 and 6 tokens.
    assert cut(collate(), 2 * 49, in_trees=False) == [[2], [3, 0, 1]]
    assert cut(collate(), 4 * 16, in_trees=False) == [[2], [3, 0], [1]]
    assert cut(collate(), 8 * 49, in_trees=False) == [[2, 3, 0, 1]]


def test_truncation_can_part_a_prompt_but_no_example():
    batch = collate([make_example(12, 8, 2), make_example(12, 1, 1, 60)], max_length=13, truncation_mode="keep_end")
    parts = cut(batch, 1, in_trees=True)
    assert sorted(parts) == [[0], [1]]


def test_single_completions():
    examples = [
        {"prompt_ids": [5, 6, 7], "completion_ids": [9] * n, "label": n % 2 == 0, "weight": float(n)}
        for n in (1, 4, 6)
    ]
    assert cut(collate(examples), 9, in_trees=True) == [[0, 1, 2]]
    assert cut(collate(examples), 9, in_trees=False) == [[2], [1], [0]]


@pytest.mark.parametrize("wanted", [[1, 2], [3], [0, 1, 2, 3]])
def test_some_examples_are_what_they_were(wanted):
    examples = [{**example, "weight": float(i), "ref_chosen_logps": -float(i), "ref_rejected_logps": -2.0 * i}
                for i, example in enumerate(EXAMPLES)]  # fmt: skip
    got = collate(examples).select_examples(wanted[::-1]).inputs()
    expected = collate([examples[i] for i in wanted]).inputs()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(value)), name
