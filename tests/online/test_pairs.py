"""Pair builders on small cases worked by hand, and their properties on any scores."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt.online.builders import BUILDERS, parse_builder
from prefopt.online.pairs import (
    Candidate,
    Limits,
    against_gold,
    best_worst,
    correct_incorrect,
    random_pair,
    round_robin,
    top_k,
    tournament,
)
from prefopt.safety.errors import UsageError


def candidates(*scores, lengths=None):
    lengths = lengths or [5] * len(scores)
    return [Candidate(i, f"text {i}", s, n) for i, (s, n) in enumerate(zip(scores, lengths, strict=True))]


GOLD = Candidate(-1, "gold", None, 5, gold=True)


def indices(choice):
    return [(pair.chosen.index, None if pair.rejected is None else pair.rejected.index) for pair in choice.pairs]


# ---- best against worst ------------------------------------------------------------------------------------------


def test_best_against_worst():
    choice = best_worst(candidates(1, 4, 2, -3, 4))
    assert (indices(choice), choice.pairs[0].margin) == ([(1, 3)], 7)


@pytest.mark.parametrize("scores", [(2, 2, 2), (2, 2), (2, None, 2)])
def test_equal_scores_make_no_pair_whatever_their_order(scores):
    choice = best_worst(candidates(*scores))
    assert (choice.pairs, choice.reason, choice.left_out) == ([], "all scores are equal", Counter(tie=1))


def test_without_two_scores_there_is_no_pair():
    assert best_worst(candidates(2, None)).reason == "fewer than two scored completions"
    assert best_worst([]).reason == "fewer than two scored completions"


def test_a_margin_that_is_too_small_is_no_pair():
    choice = best_worst(candidates(1, 1.5), Limits(min_margin=1))
    assert (choice.reason, choice.left_out) == ("no pair within the limits", Counter({"margin below 1": 1}))


def test_the_largest_margin_among_like_lengths_takes_the_place_of_best_and_worst():
    # 0 against 3 has margin 6 and lengths 4 : 9; 0 against 2 has margin 5 and 4 : 5, and comes before 1 against 3.
    choice = best_worst(candidates(6, 5, 1, 0, lengths=[4, 8, 5, 9]), Limits(max_length_ratio=1.5))
    assert (indices(choice), choice.pairs[0].margin) == ([(0, 2)], 5)
    assert choice.left_out == Counter({"ratio of lengths above 1.5": 1})


def test_a_ratio_of_scores():
    assert indices(best_worst(candidates(6, 2), Limits(min_ratio=3))) == [(0, 1)]
    assert best_worst(candidates(6, 2), Limits(min_ratio=3.1)).left_out == Counter({"ratio of scores below 3.1": 1})
    with pytest.raises(UsageError, match="use min_margin"):
        best_worst(candidates(6, -2), Limits(min_ratio=3))


def test_the_same_text_is_never_a_pair():
    twins = [Candidate(0, "a", 1.0), Candidate(1, "a", 0.0)]
    assert best_worst(twins).left_out == Counter({"same text": 1})


# ---- correct and incorrect ---------------------------------------------------------------------------------------


def test_every_correct_against_every_incorrect():
    assert indices(correct_incorrect(candidates(1, 0, 1, 0))) == [(0, 1), (0, 3), (2, 1), (2, 3)]


@pytest.mark.parametrize("builder", [correct_incorrect, round_robin])
@pytest.mark.parametrize(
    ("scores", "reason"),
    [((1, 1), "all are correct"), ((0, 0), "none is correct"), ((None,), "no scored completion")],
)
def test_one_sided_prompts_say_which_side_is_missing(builder, scores, reason):
    assert builder(candidates(*scores)).reason == reason


def test_a_threshold_of_ones_own():
    assert indices(correct_incorrect(candidates(7, 8, 2), correct_at=8)) == [(1, 0), (1, 2)]


def test_round_robin_walks_both_lists_and_restarts_the_shorter():
    # Correct: 0, 2, 5. Incorrect: 1, 3, 4, 6, 7.
    choice = round_robin(candidates(1, 0, 1, 0, 0, 1, 0, 0), pairs=5)
    assert indices(choice) == [(0, 1), (2, 3), (5, 4), (0, 6), (2, 7)]
    assert not choice.left_out


def test_round_robin_comes_back_to_the_same_pair_as_in_the_paper():
    choice = round_robin(candidates(1, 0), pairs=3)
    assert indices(choice) == [(0, 1)] * 3
    assert choice.left_out == Counter({"repeated pairs (used)": 2})
    choice = round_robin(candidates(1, 0), pairs=3, repeat=False)
    assert (indices(choice), choice.left_out) == ([(0, 1)], Counter({"repeated pairs": 2}))


def test_gold_answers_join_the_winners():
    assert indices(round_robin([*candidates(0, 0, 0), GOLD], pairs=3)) == [(-1, 0), (-1, 1), (-1, 2)]
    assert indices(correct_incorrect([*candidates(1, 0), GOLD])) == [(0, 1), (-1, 1)]
    assert best_worst([*candidates(1), GOLD]).pairs == []


# ---- tournament --------------------------------------------------------------------------------------------------


class Asked:
    """A judge that counts its comparisons and prefers the larger number in a list."""

    def __init__(self, values):
        self.values, self.pairs = values, []

    def __call__(self, first, second):
        self.pairs.append((first.index, second.index))
        a, b = self.values[first.index], self.values[second.index]
        return 0.5 if a == b else float(a > b)


def test_the_tournament_of_eight_takes_eleven_comparisons():
    judge = Asked([3, 1, 4, 1.5, 5, 9, 2, 6])
    choice = tournament(candidates(*[None] * 8), compare=judge)
    assert indices(choice) == [(5, 1)]
    assert judge.pairs == [
        (0, 1), (2, 3), (4, 5), (6, 7),  # winners 0 2 5 7, losers 1 3 4 6
        (0, 2), (5, 7), (2, 5),  # the best: 5
        (1, 3), (4, 6), (1, 6),  # the worst: 1
        (5, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("count", range(2, 17))
def test_the_tournament_finds_best_and_worst_of_any_number(count):
    scores = list(range(count))
    random.Random(count).shuffle(scores)
    judge = Asked(scores)
    choice = tournament(candidates(*scores), compare=judge)
    assert indices(choice) == [(scores.index(count - 1), scores.index(0))]
    if count & (count - 1) == 0:
        assert len(judge.pairs) == 3 * count // 2 - 1


def test_ties_decide_who_goes_on_but_never_make_a_pair():
    choice = tournament(candidates(1, 1, 1, 1))
    assert (choice.pairs, choice.reason) == ([], "the best did not win against the worst")
    assert choice.left_out == Counter({"comparison that is a tie": 5})


def test_a_best_that_loses_against_the_worst_is_no_pair():
    # Stone, paper and scissors: 0 beats 1, 2 beats 3, 0 beats 2, 1 beats 3 ... but 3 beats 0.
    wins = {(0, 1), (2, 3), (0, 2), (1, 3), (3, 0)}
    choice = tournament(candidates(*[None] * 4), compare=lambda a, b: float((a.index, b.index) in wins))
    assert choice.reason == "the best did not win against the worst"


def test_comparisons_without_an_answer_are_counted():
    choice = tournament(candidates(None, None), compare=lambda a, b: None)
    assert (choice.pairs, choice.left_out) == ([], Counter({"comparison without an answer": 2}))


# ---- others ------------------------------------------------------------------------------------------------------


def test_random_two_are_ordered_by_score_and_depend_on_the_seed():
    drawn = {indices(random_pair(candidates(0, 1, 2), rng=random.Random(seed)))[0] for seed in range(40)}
    assert drawn == {(1, 0), (2, 0), (2, 1)}
    tie = random_pair(candidates(1, 1))
    assert (tie.pairs, tie.reason, tie.left_out) == ([], "the two drawn have equal scores", Counter(tie=1))


def test_the_best_k_are_rows_of_supervised_training():
    choice = top_k(candidates(1, 3, None, 2), k=2)
    assert indices(choice) == [(1, None), (3, None)]
    assert choice.pairs[0].margin is None


def test_equal_scores_choose_nothing_among_more_than_k():
    assert top_k(candidates(1, 1, 1), k=1).reason == "all scores are equal"
    assert indices(top_k(candidates(1, 1, 1), k=3)) == [(0, None), (1, None), (2, None)]
    edge = top_k(candidates(0, 1, 1), k=1)
    assert (indices(edge), edge.left_out) == ([(1, None)], Counter({"tie at the edge": 1}))
    assert not top_k(candidates(0, 2, 1), k=1).left_out


def test_a_gold_answer_against_samples():
    assert indices(against_gold([*candidates(None, None), GOLD], pairs=2)) == [(-1, 0), (-1, 1)]
    assert against_gold(candidates(None)).reason == "no gold answer"
    same = against_gold([Candidate(0, "gold", None), GOLD])
    assert (same.pairs, same.left_out) == ([], Counter({"same text": 1}))


# ---- on any scores -----------------------------------------------------------------------------------------------

SCORES = st.lists(st.one_of(st.none(), st.integers(-2, 2).map(float)), max_size=9)
EXPRESSIONS = ("best_worst", "correct_incorrect", "round_robin(pairs=4)", "tournament", "random_pair")


@pytest.mark.parametrize("text", EXPRESSIONS)
@given(scores=SCORES, margin=st.sampled_from([0.0, 2.0]))
def test_no_builder_ever_makes_a_pair_of_a_tie_or_of_an_unscored_completion(text, scores, margin):
    builder = parse_builder(text)
    choice = BUILDERS[builder.name](candidates(*scores), Limits(min_margin=margin), **builder.options)
    for pair in choice.pairs:
        assert pair.margin > 0
        assert pair.margin >= margin
    assert bool(choice.pairs) != bool(choice.reason)


@given(scores=SCORES)
def test_best_against_worst_has_the_largest_margin(scores):
    present = [score for score in scores if score is not None]
    choice = best_worst(candidates(*scores))
    spread = max(present) - min(present) if len(present) > 1 else 0
    assert (choice.pairs[0].margin if choice.pairs else 0) == spread


@given(scores=SCORES)
def test_correct_against_incorrect_makes_the_product_of_both_numbers(scores):
    correct = sum(score is not None and score >= 0.5 for score in scores)
    incorrect = sum(score is not None and score < 0.5 for score in scores)
    assert len(correct_incorrect(candidates(*scores)).pairs) == correct * incorrect


@given(scores=SCORES, pairs=st.integers(1, 30))
def test_round_robin_uses_each_of_a_side_as_often_as_any_other(scores, pairs):
    choice = round_robin(candidates(*scores), pairs=pairs)
    for side in ("chosen", "rejected"):
        uses = Counter(getattr(pair, side).index for pair in choice.pairs)
        assert max(uses.values(), default=0) - min(uses.values(), default=0) <= 1
    assert len(choice.pairs) in (0, pairs)


@given(scores=st.lists(st.integers(-2, 2).map(float), min_size=2, max_size=12))
def test_the_tournament_on_scores_is_best_against_worst(scores):
    ours, best = tournament(candidates(*scores)), best_worst(candidates(*scores))
    assert [pair.margin for pair in ours.pairs] == [pair.margin for pair in best.pairs]


# ---- as text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "best_worst",
        "round_robin(pairs=3, min_margin=0.5)",
        "top_k(k=2)",
        "correct_incorrect(max_length_ratio=2)",
        "groups(equal=False)",
    ],
)
def test_a_builder_is_written_as_it_is_read(text):
    assert str(parse_builder(text)) == text
    assert parse_builder(str(parse_builder(text))) == parse_builder(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("best_wurst", "no pair builder 'best_wurst'. Did you mean 'best_worst'"),
        ("round_robin(k=3)", "round_robin has no option 'k'.* It has: pairs, correct_at"),
        ("round_robin(3)", "write it as"),
        ("round_robin(pairs=0)", "pairs must be a whole number of 1 or more, got 0"),
        ("round_robin(pairs=True)", "pairs must be like 10, got True"),
        ("round_robin(pairs=open('x'))", "must be a number"),
        ("top_k(min_margin=1)", "top_k has no option 'min_margin'"),
        ("groups(min_margin=1)", "groups has no option 'min_margin'. It has: equal"),
        ("groups(equal=2)", "equal must be like True, got 2"),
        ("best_worst(max_length_ratio=0.5)", "1 or more, or 0 for any; got 0.5"),
        ("best_worst(min_margin=-1)", "min_margin must be 0 or more"),
        ("best_worst(", "write it as"),
        ("__import__('os').remove", "write it as"),
    ],
)
def test_what_is_no_builder_is_refused(text, what):
    with pytest.raises(UsageError, match=what):
        parse_builder(text)


def test_random_two_of_a_prompt_depend_on_its_seed_alone():
    builder = parse_builder("random_pair")
    drawn = [str(indices(builder(candidates(0, 1, 2, 3), seed=f"7/{name}"))) for name in "abcdabcd"]
    assert drawn[:4] == drawn[4:]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("score", [float("nan"), float("-inf"), "2", [1.0]])
def test_a_score_that_is_no_finite_number_is_refused(score):
    with pytest.raises(UsageError, match="a score must be a finite number, or None"):
        Candidate(0, "a", score)


@pytest.mark.parametrize("score", [True, np.float32(1), torch.tensor(1.0)])
def test_scores_of_any_kind_become_numbers(score):
    assert best_worst([Candidate(0, "a", score), Candidate(1, "b", 0)]).pairs[0].margin == 1.0
    assert json.dumps(Candidate(0, "a", score).score) == "1.0"


@pytest.mark.parametrize("answer", [float("nan"), 2, "first"])
def test_a_comparison_that_is_no_share_is_refused(answer):
    candidates = [Candidate(number, str(number), None) for number in range(4)]
    with pytest.raises(UsageError, match="a comparison must give a number from 0 to 1"):
        tournament(candidates, compare=lambda first, second: answer)
