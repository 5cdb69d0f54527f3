import itertools
import math

import numpy as np
import pytest

from prefopt.evaluation import (
    distinct_n,
    length_controlled_win_rate,
    majority_vote,
    meteor,
    pass_at_k,
    repetition,
    sampled_kl,
    similarity,
    win_rate,
)
from prefopt.evaluation.intervals import share
from prefopt.safety.errors import UsageError


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < correct for i in range(n)], k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_at_its_ends():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(10, 3, 10) == 1
    assert pass_at_k(10, 0, 10) == 0
    # The binomials have 6000 digits.
    assert pass_at_k(20_000, 1, 10_000) == pytest.approx(0.5)
    for n, correct, k in [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)]:
        with pytest.raises(UsageError):
            pass_at_k(n, correct, k)


def test_majority_vote():
    assert majority_vote([3, 5, 5, None, None, None]) == 5
    assert majority_vote([7, 2, 2, 7]) == 7
    assert majority_vote([None]) is majority_vote([]) is None


def test_distinct_and_repeated_grams():
    # a b, b a, a b: two of three distinct; the other text adds b c.
    assert distinct_n(["abab", "bc"], 2) == pytest.approx(3 / 4)
    assert distinct_n(["a"], 2) == 0
    assert repetition("abab", 2) == pytest.approx(1 / 3)
    assert repetition("ab", 4) == 0
    with pytest.raises(UsageError, match="n must be at least 1"):
        distinct_n(["ab"], 0)


def test_sampled_kl_is_the_kl_on_average():
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    exact = float(np.sum(policy * np.log(policy / reference)))
    drawn = np.repeat([0, 1, 2], [500, 300, 200])
    estimates = sampled_kl(np.log(policy)[drawn], np.log(reference)[drawn])
    assert estimates.mean() == pytest.approx(exact)
    assert estimates.min() < 0
    with pytest.raises(UsageError, match="different lengths"):
        sampled_kl([-1.0, -2.0], [-1.0])


@pytest.mark.parametrize(("values", "low", "high"), [([0] * 20, 0, 0.168), ([1] * 5, 0.478, 1), ([1, 1, 0, 0], 0, 1)])
def test_rows_that_are_all_right_or_all_wrong_are_not_certain(values, low, high):
    interval = share(np.array(values))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-3)


def test_win_rate_counts_ties_as_half():
    rate = win_rate([1, 1, 0, 0.5] * 50)
    assert rate.value == 0.625
    # Standard error sqrt(var / N), here 0.0293.
    half = 1.96 * math.sqrt(np.var([1, 1, 0, 0.5]) / 200)
    assert (rate.low, rate.high) == (
        pytest.approx(0.625 - half, abs=0.012),
        pytest.approx(0.625 + half, abs=0.012),
    )
    assert win_rate([1, 1, 0, 0.5] * 50) == rate
    with pytest.raises(UsageError, match="wins must be in"):
        win_rate([1.5, 0])


def drawn(intercept, slope, count=400):
    """Wins whose expectation is the regression's own, so that its fit is exact."""
    difference = np.linspace(-900, 1500, count)
    wins = 1 / (1 + np.exp(-(intercept + slope * np.tanh(difference / difference.std(ddof=1)))))
    return wins, difference + 2000, np.full(count, 2000.0)


def test_the_length_controlled_win_rate_is_that_without_a_difference():
    wins, ours, theirs = drawn(intercept=-0.4, slope=1.5)
    controlled = length_controlled_win_rate(wins, ours, theirs, resamples=20)
    assert controlled.value == pytest.approx(1 / (1 + math.exp(0.4)), abs=1e-4)
    # The model's answers are longer and length wins: the raw rate is higher.
    assert win_rate(wins, resamples=20).value > controlled.value + 0.05
    assert controlled.low <= controlled.value <= controlled.high


def test_length_control_is_the_raw_rate_where_lengths_are_equal():
    wins = [1, 0, 1, 1]
    assert length_controlled_win_rate(wins, [5] * 4, [5] * 4, resamples=5).value == pytest.approx(0.75, abs=1e-3)


def test_length_control_agrees_with_scikit_learn():
    models = pytest.importorskip("sklearn.linear_model")
    generator = np.random.default_rng(0)
    difference = generator.normal(200, 700, 300)
    wins = generator.random(300).round(2)
    feature = np.tanh(difference / difference.std(ddof=1))
    design = np.stack([np.ones(300), feature], axis=1)
    fit = models.LogisticRegression(C=1e3, fit_intercept=False, tol=1e-10).fit(
        np.vstack([design, design]), [1] * 300 + [0] * 300, sample_weight=np.concatenate([wins, 1 - wins])
    )
    expected = 1 / (1 + math.exp(-fit.coef_[0][0]))
    controlled = length_controlled_win_rate(wins, difference + 1000, np.full(300, 1000.0), resamples=5)
    assert controlled.value == pytest.approx(expected, abs=1e-5)


def test_a_model_that_always_wins_has_a_finite_fit():
    always = length_controlled_win_rate([1.0] * 20, range(100, 120), [50] * 20, resamples=20)
    assert 0.95 < always.value < 1
    # Wins exactly where longer: the fit would be infinite without its penalty.
    split = length_controlled_win_rate([0, 0, 1, 1] * 5, [1, 2, 8, 9] * 5, [5] * 20, resamples=20)
    assert split.value == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [  # nltk 3.10's single_meteor_score with neither stems nor synonyms, the second text as its reference
        (
            "on to the it a it to it on to sat cat cat the",
            "sat it it to it on ran to dog a cat a dog",
            0.5852417302798982,
        ),
        ("it a to sat", "it it the to ran ran dog dog to on ran ran the", 0.08264462809917356),
        ("sat to cat mat the it to it a on", "ran mat to mat it", 0.2727272727272727),
        ("mat sat the ran on sat cat to the it", "a the ran to it", 0.36363636363636365),
        ("the cat sat", "the cat sat", 1 - 0.5 / 27),
        ("the cat", "a dog", 0.0),
        ("", "a dog", 0.0),
    ],
)
def test_meteor_by_equal_words(first, second, value):
    assert meteor(first.split(), second.split()) == pytest.approx(value, abs=1e-12)


def test_similarity_rises_as_answers_to_all_prompts_become_alike():
    varied = {str(number): f"answer {number} has words of its own {number * 7}" for number in range(8)}
    alike = dict.fromkeys(varied, "I cannot help with that")
    assert similarity(varied) < 0.8 < similarity(alike) < 1
    pair = {"a": "the cat sat", "b": "the cat ran"}
    assert similarity(pair) == pytest.approx(2 / 3 * (1 - 0.5 / 8))  # both directions are alike here
    assert similarity(varied, seed=1) != similarity(varied, seed=2)
    assert similarity({"a": "one"}) is None
