"""The numbers of a round."""

import json

import pytest
from rich.console import Console

from prefopt.evaluation.judgements import Preference, Score
from prefopt.generation.samples import PromptRow, Sample
from prefopt.online.best import BestRound, best_round, measured_by, name_in_card
from prefopt.online.heldout import against, answers_of, heldout_numbers, interval
from prefopt.online.summary import judge_lines, judge_numbers, rounds_table


def test_heldout_numbers_by_hand():
    samples = [Sample(name, name, 0, text, 2, name != "c") for name, text in (("a", "x y"), ("b", "x y"), ("c", "z"))]
    judgements = [Score("a", 0, "exact", 1.0), Score("b", 0, "exact", 0.0), Score("c", 0, "exact", None, reason="x")]
    numbers = heldout_numbers(answers_of(samples, judgements, None))
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


def test_the_table_fits_in_80_columns():
    heldout = {"mean_score": 0.012345, "interval": [0.00012345, 0.012345], "mean_tokens": 123.456}
    heldout["against_start"] = {"win_rate": {"value": 0.4567, "low": 0.1, "high": 0.9}}
    pairs = {"pairs": 12345, "prompts_without_pair": {"a": 1234}, "pairs_left_out": {"tie": 12345}}
    samples = {"mean_score": -0.012345, "unfinished": 1234}
    summary = {"round": 10, "pairs": pairs, "samples": samples, "heldout": heldout, "kl": {"mean": 0.012345}}
    console = Console(width=80, record=True)
    console.print(rounds_table([{"round": 0}, summary]))
    row = next(line for line in console.export_text().splitlines() if line.split()[:1] == ["10"])
    assert row.split() == [
        "10", "12345", "1234", "12345", "1234", "-0.0123", "0.0123", "[0.00012,", "0.012]", "0.46", "0.012", "123",
    ]  # fmt: skip


def test_a_model_that_never_wins_has_its_column():
    lost = {"against_start": {"win_rate": {"value": 0.0, "low": 0.0, "high": 0.0}}}
    console = Console(width=80, record=True)
    console.print(rounds_table([{"round": 0}, {"round": 1, "heldout": lost}]))
    assert "win" in console.export_text()


def answers(name: str, completions: dict[str, list[str]], right: dict[str, str]):
    """A model's answers with their scores: 1 for the right text."""
    samples = [
        Sample(p, p, i, text, 1, True, model=name) for p, own in completions.items() for i, text in enumerate(own)
    ]
    return answers_of(
        samples, [Score(s.prompt_id, s.index, "j", float(s.completion == right[s.prompt_id])) for s in samples], None
    )


def test_several_answers_give_pass_at_k_and_a_majority_vote():
    right = {"a": "1", "b": "2"}
    numbers = heldout_numbers(
        answers("m", {"a": ["1", "1", "3"], "b": ["2", "4", "4"]}, right),
        [PromptRow("a", {"solution": "1"}), PromptRow("b", {"solution": "#### 2"})],
        "solution",
    )
    # One of two samples is right with probability 1 in a, and in b unless both are of the two wrong ones: 2/3.
    assert {k: one["value"] for k, one in numbers["pass_at_k"].items()} == pytest.approx(
        {"1": 0.5, "2": 5 / 6, "3": 1}
    )
    assert numbers["majority_vote"]["value"] == 0.5
    assert numbers["accuracy"]["value"] == numbers["mean_score"] == 0.5
    assert measured_by({"round": 1, "heldout": numbers}, "pass_at_k")["value"] == 1


def test_one_answer_or_other_scores_give_neither():
    one = heldout_numbers(answers("m", {"a": ["1"], "b": ["1"]}, {"a": "1", "b": "2"}))
    assert "pass_at_k" not in one
    assert "majority_vote" not in one
    samples = [Sample(p, p, 0, "x", 1, True) for p in ("a", "b")]
    assert "accuracy" not in heldout_numbers(answers_of(samples, [Score(p, 0, "j", 0.5) for p in ("a", "b")], None))


def test_wins_are_counted_prompt_by_prompt_where_both_have_scores():
    right = dict.fromkeys("abcd", "1")
    ours = answers("m", {"a": ["1"], "b": ["1"], "c": ["0"], "d": ["1"]}, right)
    other = answers("n", {"a": ["0"], "b": ["1"], "c": ["1"], "d": ["0"]}, right)
    won = against(ours, other)
    assert (won["prompts"], won["win_rate"]["value"]) == (4, (1 + 0.5 + 0 + 1) / 4)
    assert won["length_controlled_win_rate"]["value"] == pytest.approx(0.625, abs=1e-3)  # lengths are equal
    assert against(ours, other) == won
    samples = [Sample(p, p, 0, "x", 1, True) for p in "abcd"]
    assert against(ours, answers_of(samples, [Score("a", 0, "j", 0.0)], None)) == {}


def test_what_a_round_says_of_its_judges():
    samples = [Sample("p", "p", index, "x" * length, length, True) for index, length in enumerate((1, 2, 3))]
    judgements = [
        *(Score("p", index, "x", score) for index, score in enumerate((1.0, 2.0, 0.0))),
        *(Preference("p", pair, "llm", pair[0], order=order) for order, pair in enumerate(((0, 1), (1, 0)))),
        Preference("p", (1, 2), "llm", None, reason="unparsable"),
    ]
    numbers = judge_numbers(judgements, samples)
    assert json.loads(json.dumps(numbers)) == numbers
    score, llm = numbers["judges"]
    # Pairs 0-1, 0-2, 1-2: the longer one wins in the first alone.
    assert (score["longer_wins"], llm["first_wins"], llm["consistent"]) == (pytest.approx(1 / 3), 1, 0)
    assert list(judge_lines(numbers)) == [
        "Judge x: 3 judged, ties 0%, the longer wins 33%",
        "Judge llm: 2 judged, 1 unparsable, ties 0%, the first shown wins 100%, both orders agree 0%",
        "Judges x and llm order 0% of 1 pairs alike (kappa 0.00)",
    ]


def test_the_best_round_is_the_earliest_of_equals_and_may_be_the_start():
    def of(number, score, win=None):
        heldout = {"mean_score": score, "interval": [0.0, 1.0]}
        if win is not None:
            heldout["against_start"] = {"win_rate": {"value": win, "low": 0.2, "high": 0.8}}
        return {"round": number, "heldout": heldout}

    rounds = [of(0, 0.4), of(1, 0.6, 0.45), of(2, 0.6, 0.4), of(3, None)]
    best = best_round(rounds, "mean_score", "the/start")
    assert (best.round, best.value, best.model) == (1, 0.6, "round-1/model")
    assert str(best) == "Best by mean_score: round 1, round-1/model (0.6 [0, 1])"
    start = best_round(rounds, "win_rate", "the/start")
    assert (start.round, start.value, start.model) == (0, 0.5, "the/start")
    assert best_round([{"round": 0}, {"round": 1}], "mean_score", "x") is None


def test_the_card_names_the_best_round_once(tmp_path):
    card = tmp_path / "README.md"
    name_in_card(card, 2, BestRound(1, "accuracy", 0.5, 0.25, 0.75, "round-1/model"))
    assert not card.exists()
    card.write_text("# A model\n")
    for _ in range(2):
        name_in_card(card, 2, BestRound(1, "accuracy", 0.5, 0.25, 0.75, "round-1/model"))
    best = "`accuracy` is that of round 1 (`../../round-1/model`): 0.5 [0.25, 0.75]."
    expected = f"This is the model after round 2. The best by held-out {best}"
    assert card.read_text() == f"# A model\n\n## Rounds\n\n{expected}\n"
    name_in_card(card, 2, BestRound(0, "win_rate", 0.5, None, None, "/home/someone/llama"))
    assert card.read_text().endswith("is that of the start (`llama`): 0.5.\n")
