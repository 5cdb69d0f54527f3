"""The numbers of a round."""

import pytest
from rich.console import Console

from prefopt.evaluation.judgements import Score
from prefopt.generation.samples import Sample
from prefopt.online.summary import heldout_numbers, interval, rounds_table


def test_heldout_numbers_by_hand():
    samples = [Sample(name, name, 0, text, 2, name != "c") for name, text in (("a", "x y"), ("b", "x y"), ("c", "z"))]
    judgements = [Score("a", 0, "exact", 1.0), Score("b", 0, "exact", 0.0), Score("c", 0, "exact", None, reason="x")]
    numbers = heldout_numbers(samples, judgements, None)
    assert (numbers["scored"], numbers["mean_score"], numbers["unfinished"], numbers["distinct_2"]) == (2, 0.5, 1, 0.5)
    assert numbers["interval"] == [0, 1]


def test_an_interval_is_narrower_with_more_prompts_and_always_the_same():
    few, many = interval([0.0, 1.0] * 5), interval([0.0, 1.0] * 500)
    assert many[1] - many[0] < few[1] - few[0]
    assert many == interval([0.0, 1.0] * 500)
    # 0.5 -+ 1.96 * 0.5 / sqrt(1000)
    assert many == pytest.approx([0.469, 0.531], abs=0.005)
    assert interval([1.0]) is None


def test_the_table_counts_ties_and_prompts_without_a_pair():
    pairs = {"pairs": 3, "prompts_without_pair": {"a": 1, "b": 1}, "pairs_left_out": {"tie": 2, "same text": 4}}
    summary = {"round": 1, "pairs": pairs, "samples": {"mean_score": 0.25, "unfinished": 7}}
    console = Console(width=80, record=True)
    console.print(rounds_table([{"round": 0}, summary]))
    row = next(line for line in console.export_text().splitlines() if line.split()[:1] == ["1"])
    assert row.split() == ["1", "3", "2", "2", "7", "0.25"]
