"""Every measure against values worked by hand, at its edges, and on input that it must refuse."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from prefopt.evaluation import pass_at_k
from prefopt.safety.errors import UsageError
from prefopt.unlearning import metrics

KINDS = {
    "list": lambda values: np.asarray(values).tolist(),
    "numpy float32": lambda values: np.asarray(values, dtype=np.float32),
    "numpy float64": lambda values: np.asarray(values, dtype=np.float64),
    "torch float32": lambda values: torch.tensor(values, dtype=torch.float32, requires_grad=True),
    "torch float64": lambda values: torch.tensor(values, dtype=torch.float64),
    "torch bfloat16": lambda values: torch.tensor(values, dtype=torch.bfloat16),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    """One of the types in which numbers may come. The values below are exact in all of them."""
    return request.param


def log(values):
    return np.log(np.asarray(values, dtype=np.float64))


def needs(module):
    return pytest.mark.skipif(not _importable(module), reason=f"needs {module}")


def _importable(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


class TestLeakAtK:
    def test_by_hand(self, kind):
        scores = kind([[0.5, 1.0, 0.0]])
        # Pairs: (0, 0.5), (0, 1), (0.5, 1).
        best = [metrics.leak_at_k(scores, k)[0] for k in (1, 2, 3)]
        assert best == pytest.approx([0.5, (0.5 + 1 + 1) / 3, 1])

    def test_is_the_mean_of_the_maximum_of_all_subsets(self):
        scores = np.random.default_rng(0).random((3, 7))
        for k in range(1, 8):
            subsets = [list(subset) for subset in itertools.combinations(range(7), k)]
            expected = np.mean([scores[:, subset].max(axis=1) for subset in subsets], axis=0)
            assert metrics.leak_at_k(scores, k) == pytest.approx(expected)

    def test_of_right_and_wrong_answers_it_is_pass_at_k(self):
        n, right = 10, 3
        scores = [[1.0] * right + [0.0] * (n - right)]
        for k in (1, 4, 8):
            assert metrics.leak_at_k(scores, k)[0] == pytest.approx(1 - math.comb(n - right, k) / math.comb(n, k))

    def test_is_unbiased(self):
        generator = np.random.default_rng(0)
        estimates = metrics.leak_at_k(generator.random((20000, 6)), 3)
        # The largest of three uniform numbers is 3/4 on average.
        assert estimates.mean() == pytest.approx(3 / 4, abs=0.005)

    @pytest.mark.parametrize("k", [0, 4])
    def test_k_outside_of_the_answers(self, k):
        with pytest.raises(UsageError, match=r"k must be from 1 to the number of answers to a question \(3\)"):
            metrics.leak_at_k([[0.1, 0.2, 0.3]], k)


class TestProbability:
    def test_is_exp_of_the_average(self, kind):
        assert metrics.probability(kind([0.0, -1.0, -2.5])) == pytest.approx([1, math.exp(-1), math.exp(-2.5)])

    def test_among_wrong_answers(self):
        right, wrong = log([0.5, 0.3]), log([[0.25, 0.25], [0.5, 0.2]])
        assert metrics.normalized_probability(right, wrong) == pytest.approx([0.5, 0.3])

    def test_among_wrong_answers_where_all_are_too_small_for_float64(self, kind):
        shares = metrics.normalized_probability(kind([-1000.0]), kind([[-1000.0, -1000.0, -1000.0]]))
        assert shares == pytest.approx([1 / 4])


class TestTruthRatio:
    def test_geometric_mean(self, kind):
        # exp(-1 - (-2 - 4) / 2) and exp(-3 - (-1 - 1) / 2)
        ratios = metrics.truth_ratio(kind([-1.0, -3.0]), kind([[-2.0, -4.0], [-1.0, -1.0]]))
        assert ratios.dtype == np.float64
        assert ratios == pytest.approx([math.exp(2), math.exp(-2)])

    def test_arithmetic_mean(self):
        ratios = metrics.truth_ratio(log([0.5, 0.1]), log([[0.1, 0.4], [0.2, 0.2]]), mean="arithmetic")
        assert ratios == pytest.approx([0.5 / 0.25, 0.1 / 0.2])

    def test_means_agree_on_one_wrong_answer(self):
        arguments = log([0.5, 0.1]), log([[0.1], [0.2]])
        assert metrics.truth_ratio(*arguments) == pytest.approx(metrics.truth_ratio(*arguments, mean="arithmetic"))

    def test_probabilities_that_underflow(self):
        assert metrics.truth_ratio([-900.0], [[-900.0, -900.0]], mean="arithmetic") == pytest.approx([1])
        assert metrics.truth_ratio([-1.0, -900.0], [[-900.0], [-1.0]]).tolist() == [math.inf, 0.0]

    def test_on_the_forget_set(self, kind):
        assert metrics.forget_truth_ratio(kind([0.5, 2.0, 1.0, 4.0])) == pytest.approx((0.5 + 0.5 + 1 + 0.25) / 4)
        assert metrics.forget_truth_ratio(kind([0.0, math.inf])) == 0

    def test_elsewhere(self, kind):
        assert metrics.utility_truth_ratio(kind([0.5, 2.0, 1.0, 4.0])) == pytest.approx((0 + 0.5 + 0 + 0.75) / 4)
        assert metrics.utility_truth_ratio(kind([0.0, math.inf])) == 0.5


class TestForgetQuality:
    pytestmark = needs("scipy")

    def test_alike(self, kind):
        quality = metrics.forget_quality(kind([1.0, 2.0, 3.0]), kind([1.0, 2.0, 3.0]))
        assert quality == metrics.ForgetQuality(p=1, log10_p=0, statistic=0, samples=3, gold_samples=3)

    def test_disjoint(self):
        # Of the C(5, 2) orders of the merged sample, the two that keep both apart reach the distance 1.
        quality = metrics.forget_quality([1.0, 2.0], [3.0, 4.0, 5.0])
        assert (quality.p, quality.statistic) == pytest.approx((2 / 10, 1))
        assert (quality.log10_p, quality.samples, quality.gold_samples) == (pytest.approx(math.log10(0.2)), 2, 3)

    def test_overlapping(self):
        # The distance stays below 2/3 only if each next two of the merged sample are one of either: 8 of 20 orders.
        assert metrics.forget_quality([1.0, 2.0, 4.0], [3.0, 5.0, 6.0]).p == pytest.approx(12 / 20)

    def test_ties(self):
        assert metrics.forget_quality([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0]).statistic == pytest.approx(1 / 4)

    @pytest.mark.parametrize("transformed", [np.log, np.reciprocal])
    def test_direction_and_scale_do_not_matter(self, transformed):
        generator = np.random.default_rng(0)
        ours, gold = generator.gamma(2, size=40), generator.gamma(3, size=30)
        same = metrics.forget_quality(transformed(ours), transformed(gold))
        assert same.log10_p == pytest.approx(metrics.forget_quality(ours, gold).log10_p)

    @pytest.mark.parametrize("rows", [40, 200, 400, 1000])
    def test_complete_separation(self, rows):
        """Of all orders of the merged sample two keep both apart. 400 rows: the 1e-239 of published tables."""
        quality = metrics.forget_quality(np.zeros(rows), np.ones(rows))
        assert quality.log10_p == pytest.approx(math.log10(2) - math.log10(math.comb(2 * rows, rows)))
        assert quality.p == pytest.approx(2 / math.comb(2 * rows, rows) if rows < 1000 else 0)

    def test_logarithm_where_p_is_zero_counts_exactly(self):
        def exact(n, m, distance):
            """Probability, as a fraction, that a random merged sample reaches the distance; in whole numbers."""
            paths = {0: 1}
            for total in range(1, n + m + 1):
                inside = {}
                for i in range(max(0, total - m), min(n, total) + 1):
                    if abs(i * m - (total - i) * n) < distance:
                        inside[i] = paths.get(i, 0) + paths.get(i - 1, 0)
                paths = inside
            return math.comb(n + m, n) - paths.get(n, 0), math.comb(n + m, n)

        # 1100 of ours against 900 of the gold model's, 60 of ours among them.
        ours = np.concatenate([np.arange(1040.0), 5000 + np.arange(60)])
        quality = metrics.forget_quality(ours, np.linspace(2000, 4000, 900))
        reached, total = exact(1100, 900, round(quality.statistic * 1100 * 900))
        assert quality.p == 0
        assert quality.log10_p == pytest.approx(math.log10(reached) - math.log10(total), rel=1e-9)

    def test_logarithm_continues_where_scipy_still_can(self):
        from prefopt.unlearning.metrics.quality import _log_p

        generator = np.random.default_rng(1)
        for n, m, shift in itertools.product((5, 40, 60), (7, 40), (0.0, 0.7, 3.0)):
            quality = metrics.forget_quality(generator.normal(size=n) + shift, generator.normal(size=m))
            counted = _log_p(n, m, quality.statistic) / math.log(10)
            assert counted == pytest.approx(quality.log10_p, rel=1e-9, abs=1e-12)

    def test_more_rows_than_are_counted_exactly(self):
        quality = metrics.forget_quality(np.zeros(20_000), np.ones(4_000))
        assert (quality.p, quality.statistic) == (0, 1)
        assert quality.log10_p == pytest.approx((math.log(2) - 2 * 20_000 * 4_000 / 24_000) / math.log(10))

    def test_infinite_ratios_have_an_order_too(self):
        assert metrics.forget_quality([0.0, math.inf], [0.0, math.inf]).p == 1

    def test_without_a_gold_model(self):
        with pytest.raises(UsageError, match="gold model, one trained without the forget set, and there is none"):
            metrics.forget_quality([1.0, 2.0], None)


class TestModelUtility:
    def test_harmonic_mean(self):
        assert metrics.model_utility({"a": 0.5, "b": 0.25, "c": 1.0}) == pytest.approx(3 / (2 + 4 + 1))

    def test_one_zero_makes_it_zero(self):
        assert metrics.model_utility({"retain probability": 0.0, "retain rouge": 1.0}) == 0

    def test_all_alike(self):
        assert metrics.model_utility({str(i): 0.75 for i in range(9)}) == pytest.approx(0.75)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
    def test_refuses(self, value):
        with pytest.raises(UsageError, match=r"retain rouge must be a number of at least 0"):
            metrics.model_utility({"retain rouge": value})

    def test_refuses_nothing(self):
        with pytest.raises(UsageError, match="at least one value"):
            metrics.model_utility({})


class TestRelativeDifference:
    def test_percent(self):
        assert metrics.rel_diff(0.6, 0.5) == pytest.approx(20)
        assert metrics.rel_diff(0.5, 0.5) == 0
        assert metrics.rel_diff(torch.tensor(0.25), np.float32(0.5)) == -50

    def test_refuses_a_gold_value_of_zero(self):
        with pytest.raises(UsageError, match="gold model's value is 0"):
            metrics.rel_diff(0.5, 0.0)


IDS = {"list": list, "numpy": np.array, "torch": torch.tensor, "torch int32": lambda ids: torch.tensor(ids).int()}


class TestMemorization:
    CASES = pytest.mark.parametrize(
        ("predicted", "labels", "strength", "exact"),
        [
            ([5, 6, 7, 8], [5, 6, 7, 8], 1.0, 1.0),  # all match
            ([1, 1, 1, 1], [5, 6, 7, 8], 0.0, 0.0),  # nothing matches
            ([5, 6, 7, 1], [5, 6, 7, 8], 0.0, 0.75),  # all but the last
            ([1, 6, 7, 8], [5, 6, 7, 8], 0.75, 0.75),  # all but the first
            ([5, 1, 7, 8], [5, 6, 7, 8], 0.5, 0.75),
            ([1, 6, 1, 8], [5, 6, 7, 8], 0.25, 0.5),
            ([7], [7], 1.0, 1.0),  # an answer of one token
            ([1], [7], 0.0, 0.0),
        ],
    )

    @CASES
    @pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
    def test_extraction_strength(self, predicted, labels, strength, exact, ids):
        assert metrics.extraction_strength(ids(predicted), ids(labels)) == strength

    @CASES
    @pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
    def test_exact_memorization(self, predicted, labels, strength, exact, ids):
        assert metrics.exact_memorization(ids(predicted), ids(labels)) == exact

    @pytest.mark.parametrize("metric", [metrics.extraction_strength, metrics.exact_memorization])
    def test_refuses(self, metric):
        with pytest.raises(UsageError, match="predicted_ids is empty"):
            metric([], [])
        with pytest.raises(UsageError, match="predicted_ids 1, label_ids 2"):
            metric([1], [1, 2])
        with pytest.raises(UsageError, match="label_ids holds -100"):
            metric([1, 2], [-100, 2])
        with pytest.raises(UsageError, match=r"predicted_ids must hold token ids \(integers\)"):
            metric([1.0, 2.0], [1, 2])
        with pytest.raises(UsageError, match=r"label_ids must have shape \(T,\), got \(1, 2\)"):
            metric([1, 2], [[1, 2]])


class TestMembershipScores:
    LOGPS = (-1.0, -5.0, -2.0, -4.0, -3.0)

    def test_loss(self, kind):
        assert metrics.loss_score(kind(self.LOGPS)) == 3

    def test_reference(self, kind):
        assert metrics.reference_score(kind([-1.0, -3.0]), kind([-0.5, -0.5])) == 1.5

    def test_zlib(self, kind):
        size = len(zlib.compress(b"Who is she?"))
        assert metrics.zlib_score(kind(self.LOGPS), "Who is she?") == pytest.approx(3 / size)
        assert metrics.zlib_score(-3.0, "Who is she?") == pytest.approx(3 / size)
        assert metrics.zlib_score(torch.tensor(-3.0), "Who is she?") == pytest.approx(3 / size)

    @pytest.mark.parametrize(
        ("share", "score"), [(0.4, 4.5), (0.2, 5), (0.01, 5), (0.5, 4.5), (0.59, 4.5), (0.6, 4), (1, 3)]
    )
    def test_min_k(self, kind, share, score):
        assert metrics.min_k(kind(self.LOGPS), share) == pytest.approx(score)
        assert metrics.min_k(kind(self.LOGPS)) == pytest.approx(4.5)

    def test_min_k_of_one_token_and_of_ties(self):
        assert metrics.min_k([-2.0]) == 2
        assert metrics.min_k([-3.0, -3.0, -3.0, -1.0, -1.0]) == 3

    def test_min_k_plus_plus(self, kind):
        # (log p - mean) / deviation: 2, -2, 0, -1, -3
        means, deviations = kind([-2.0, -4.0, -2.0, -3.5, -1.5]), kind([0.5, 0.5, 1.0, 0.5, 0.5])
        assert metrics.min_k_plus_plus(kind(self.LOGPS), means, deviations, 0.4) == pytest.approx((2 + 3) / 2)
        assert metrics.min_k_plus_plus(kind(self.LOGPS), means, deviations, 0.1) == pytest.approx(3)

    def test_min_k_plus_plus_where_the_model_is_certain(self):
        assert metrics.min_k_plus_plus([0.0], [0.0], [0.0]) == 0
        assert metrics.min_k_plus_plus([-1.0], [0.0], [0.0]) == pytest.approx(1 / 0.001)

    def test_unknown_text_scores_higher(self):
        known, unknown = [-0.1, -0.2, -0.1], [-3.0, -2.0, -6.0]
        for score in (
            metrics.loss_score,
            metrics.min_k,
            lambda logps: metrics.zlib_score(logps, "text"),
            lambda logps: metrics.reference_score(logps, [-1.0, -1.0, -1.0]),
            lambda logps: metrics.min_k_plus_plus(logps, [-1.0] * 3, [0.5] * 3),
        ):
            assert score(unknown) > score(known)

    @pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
    def test_refuses_a_share(self, share):
        with pytest.raises(UsageError, match=r"share must be in \(0, 1\]"):
            metrics.min_k([-1.0], share)

    def test_refuses(self):
        with pytest.raises(UsageError, match="deviations are at least 0, got -1"):
            metrics.min_k_plus_plus([-1.0], [-1.0], [-1.0])
        with pytest.raises(UsageError, match="token_logps 2, means 1, deviations 2"):
            metrics.min_k_plus_plus([-1.0, -1.0], [-1.0], [1.0, 1.0])
        with pytest.raises(UsageError, match="token_logps 1, ref_token_logps 2"):
            metrics.reference_score([-1.0], [-1.0, -1.0])
        with pytest.raises(UsageError, match="non-empty string, got ''"):
            metrics.zlib_score([-1.0], "")


class TestMembershipAUC:
    pytestmark = needs("sklearn")

    def test_forget_set_remembered(self, kind):
        assert metrics.membership_auc(kind([0.5, 1.0]), kind([2.0, 3.0])) == 1
        assert metrics.membership_auc(kind([2.0, 3.0]), kind([0.5, 1.0])) == 0

    def test_pairs_in_order_over_all_pairs_with_ties_half(self):
        # 1 < 2 and 4, 2 = 2, 2 < 4, 3 > 2, 3 < 4: 4 in order and 1 tie of 6
        assert metrics.membership_auc([1.0, 2.0, 3.0], [2.0, 4.0]) == pytest.approx(4.5 / 6)
        assert metrics.membership_auc([1.0, 1.0], [1.0]) == 0.5

    def test_refuses(self):
        with pytest.raises(UsageError, match="holdout_scores is empty"):
            metrics.membership_auc([1.0], [])
        with pytest.raises(UsageError, match="forget_scores at 1 is nan"):
            metrics.membership_auc([1.0, math.nan], [1.0])


class TestPrivLeak:
    def test_percent_of_the_reversed_auc(self):
        # MUSE's: ((1 - 0.9) - (1 - 0.5)) / (1 - 0.5)
        assert metrics.privleak(0.9, 0.5) == pytest.approx(-80)
        assert metrics.privleak(0.2, 0.5) == pytest.approx(60)
        assert metrics.privleak(0.5, 0.5) == 0

    def test_refuses(self):
        with pytest.raises(UsageError, match="gold_auc is 1"):
            metrics.privleak(0.5, 1.0)
        with pytest.raises(UsageError, match=r"auc must be in \[0, 1\], got nan"):
            metrics.privleak(math.nan, 0.5)
        with pytest.raises(UsageError, match=r"gold_auc must be in \[0, 1\], got 50"):
            metrics.privleak(0.5, 50)


class TestRouge:
    pytestmark = needs("rouge_score")

    def test_recall_and_f1(self):
        # Common subsequence "the cat sat": 3 of the reference's 4 words, 3 of the answer's 6.
        score = metrics.rouge_l(["the fat cat sat down again"], ["the black cat sat"])
        assert (score.recall, score.f1) == (pytest.approx([3 / 4]), pytest.approx([2 * 0.75 * 0.5 / 1.25]))

    def test_stems(self):
        assert metrics.rouge_l(["walking"], ["walked"]).recall == pytest.approx([1])

    def test_all_nothing_and_empty(self):
        score = metrics.rouge_l(["one two", "three", ""], ["one two", "four", "five"])
        assert score.recall.tolist() == [1, 0, 0]
        assert score.f1.tolist() == [1, 0, 0]

    def test_refuses(self):
        with pytest.raises(UsageError, match="got 1 and 2"):
            metrics.rouge_l(["a"], ["a", "b"])
        with pytest.raises(UsageError, match="got 0 and 0"):
            metrics.rouge_l([], [])
        with pytest.raises(
            UsageError, match=r"reference 1 \('我不知道'\) has no word that ROUGE reads.*any_script=True"
        ):
            metrics.rouge_l(["a", "b"], ["a", "我不知道"])
        with pytest.raises(UsageError, match=r"reference 0 \('—!'\) has no word$"):
            metrics.rouge_l(["a"], ["—!"], any_script=True)

    @pytest.mark.parametrize(
        ("answer", "reference", "recall"),
        [
            ("她生于北京。", "她生于上海", 3 / 5),  # 她生于 of five letters
            ("она родилась в Омске", "Она родилась в Москве!", 3 / 4),
            ("वह लखनऊ में रहती है", "वह दिल्ली में रहती है", 4 / 5),
            ("née à Orléans", "Née à Nantes", 2 / 3),
            ("she walks", "she walked", 1 / 2),  # unstemmed
        ],
    )
    def test_other_scripts(self, answer, reference, recall):
        assert metrics.rouge_l([answer], [reference], any_script=True).recall == pytest.approx([recall])


class TestDegeneration:
    KNOWN = ("She was born in Lima.", "She writes novels, doesn't she?")

    def test_repetition(self):
        # Seven 2-grams, of which ab, ba and c? are: ab ba ab ba ac cc cc -> ab, ba, ac, cc
        assert metrics.repetition(list("ababaccc"), 2) == pytest.approx(3 / 7)
        assert metrics.repetition([7, 7, 7, 7], 1) == pytest.approx(3 / 4)
        assert metrics.repetition([1, 2, 3], 4) == 0
        assert metrics.repetition([], 4) == 0

    def test_known_text(self):
        found = metrics.degeneration(["She WRITES in Lima, 1984."], self.KNOWN)
        assert (found.repetition[0], found.non_words[0], found.gibberish[0], found.empty[0]) == (0, 0, 0, False)

    def test_new_words(self):
        # ^bo bor orn rna na$ against known ^bo bor orn: "borna" is no word here, 2 of 5 triples are new.
        found = metrics.degeneration(["borna she"], self.KNOWN)
        assert found.non_words == pytest.approx([1 / 2])
        assert found.gibberish == pytest.approx([2 / (5 + 3)])

    def test_noise_repeats_and_nothing(self):
        found = metrics.degeneration(["xqzk vvvw", "she she she she she she", "", "!?"], self.KNOWN)
        assert found.non_words.tolist() == [1, 0, 0, 0]
        assert found.gibberish.tolist() == [1, 0, 0, 0]
        assert found.repetition == pytest.approx([0, 2 / 3, 0, 0])
        assert found.empty.tolist() == [False, False, True, True]

    def test_refuses(self):
        with pytest.raises(UsageError, match="no texts"):
            metrics.degeneration([], self.KNOWN)
        with pytest.raises(UsageError, match="known texts hold no words"):
            metrics.degeneration(["she"], ["..."])
        with pytest.raises(UsageError, match="n must be at least 1"):
            metrics.repetition([1], 0)


class TestKLToStart:
    MODEL, START = log([[0.5, 0.5], [0.25, 0.75]]), log([[0.25, 0.75], [0.25, 0.75]])

    def test_both_directions(self):
        forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
        reverse = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
        assert metrics.kl_to_start(self.MODEL, self.START) == pytest.approx(forward / 2)
        assert metrics.kl_to_start(self.MODEL, self.START, direction="reverse") == pytest.approx(reverse / 2)
        assert metrics.kl_to_start(self.START, self.START) == 0

    def test_completion_positions_only(self):
        inputs = torch.tensor(self.MODEL)[None], torch.tensor(self.START)[None]
        assert metrics.kl_to_start(*inputs, torch.tensor([[False, True]])) == 0
        # NaN on padding does not matter.
        nowhere = torch.full((1, 1, 2), math.nan)
        padded = torch.cat([inputs[0], nowhere], 1), torch.cat([inputs[1], inputs[1][:, :1]], 1)
        masked = metrics.kl_to_start(*padded, [[1, 1, 0]])
        assert masked == pytest.approx(metrics.kl_to_start(self.MODEL, self.START))

    def test_impossible_tokens(self):
        certain = torch.tensor([[0.0, -math.inf]])
        assert metrics.kl_to_start(log([[0.5, 0.5]]), certain) == pytest.approx(math.log(2))
        assert metrics.kl_to_start(certain, certain) == 0
        assert metrics.kl_to_start(certain, log([[0.5, 0.5]])) == math.inf

    def test_refuses(self):
        with pytest.raises(UsageError, match="apply log_softmax to logits first"):
            metrics.kl_to_start([[1.0, 2.0]], [[1.0, 2.0]])
        with pytest.raises(UsageError, match="start_logps holds NaN"):
            metrics.kl_to_start(self.MODEL, self.START * math.nan)
        with pytest.raises(UsageError, match="no completion token"):
            metrics.kl_to_start(self.MODEL, self.START, [0, 0])
        with pytest.raises(
            UsageError, match=r"must both have shape \(T, V\) or \(N, T, V\), got \(2, 2\) and \(1, 2\)"
        ):
            metrics.kl_to_start(self.MODEL, self.START[:1])
        with pytest.raises(UsageError, match=r"completion_mask must have shape \(2,\), got \(3,\)"):
            metrics.kl_to_start(self.MODEL, self.START, [1, 1, 1])
        with pytest.raises(UsageError, match="direction must be 'forward' or 'reverse'"):
            metrics.kl_to_start(self.MODEL, self.START, direction="backward")


class TestBootstrap:
    def test_all_rows_alike(self):
        assert metrics.bootstrap(np.mean, [0.5, 0.5, 0.5]) == metrics.Interval(0.5, 0.5, 0.5, 0.95)

    def test_mean_of_many_rows_is_near_the_normal_interval(self):
        values = np.random.default_rng(0).normal(size=900)
        interval = metrics.bootstrap(np.mean, torch.tensor(values), level=0.9, resamples=4000)
        # 1.645 standard errors of 1 / 30 each way; the ends' own error is about 3 % of a standard error.
        assert interval.value == pytest.approx(values.mean())
        assert interval.low == pytest.approx(values.mean() - 1.645 * values.std() / 30, abs=0.006)
        assert interval.high == pytest.approx(values.mean() + 1.645 * values.std() / 30, abs=0.006)

    def test_seeds(self):
        values = np.arange(30.0)
        first, again, other = (metrics.bootstrap(np.median, values, seed=seed, resamples=99) for seed in (3, 3, 4))
        assert first == again != other

    def test_rows_stay_whole_and_samples_apart(self):
        rows = np.stack([np.arange(20.0), -np.arange(20.0)], axis=1)

        def checked(sample, other):
            assert (sample.sum(axis=1) == 0).all()
            assert set(sample[:, 0]) <= set(range(20))
            assert set(other) <= {100.0, 101.0}
            return sample[:, 0].mean() + other.mean()

        interval = metrics.bootstrap(checked, rows, [100.0, 101.0], resamples=50)
        assert interval.low < interval.value == 110 < interval.high

    def test_refuses(self):
        with pytest.raises(UsageError, match="sample 1 has one"):
            metrics.bootstrap(np.mean, [1.0, 2.0], [1.0])
        with pytest.raises(UsageError, match="sample 0 is empty"):
            metrics.bootstrap(np.mean, [])
        with pytest.raises(UsageError, match="sample 0 at 1 is nan"):
            metrics.bootstrap(np.mean, [1.0, math.nan])
        with pytest.raises(UsageError, match="the statistic of a resample is NaN"):
            metrics.bootstrap(lambda values: math.nan, [1.0, 2.0])
        with pytest.raises(UsageError, match=r"level must be in \(0, 1\), got 95"):
            metrics.bootstrap(np.mean, [1.0, 2.0], level=95)
        with pytest.raises(UsageError, match="at least one sample"):
            metrics.bootstrap(np.mean)
        with pytest.raises(UsageError, match="resamples must be at least 1"):
            metrics.bootstrap(np.mean, [1.0, 2.0], resamples=0)


class TestInput:
    """What every function that takes log-probabilities refuses, in the words of one of them."""

    @pytest.mark.parametrize(
        ("paraphrased", "perturbed", "message"),
        [
            ([], [[-1.0]], r"paraphrased is empty; it must have shape \(N,\)"),
            ([-1.0], [[]], r"perturbed is empty; it must have shape \(N, K\)"),
            ([-1.0, math.nan], [[-1.0], [-1.0]], "paraphrased at 1 is nan"),
            ([-1.0, -1.0], [[-1.0, -1.0], [-1.0, -math.inf]], "perturbed at 1, 1 is -inf"),
            ([-1.0], [-1.0], r"perturbed must have shape \(N, K\), got \(1,\)"),
            ([[-1.0]], [[-1.0]], r"paraphrased must have shape \(N,\), got \(1, 1\)"),
            ([-1.0, -1.0], [[-1.0]], "different lengths: paraphrased 2, perturbed 1"),
            ([-1.0, -1.0], [[-1.0, -2.0], [-1.0]], "perturbed must be a rectangular array"),
            ([2.0], [[3.0]], "paraphrased at 0 is 2, but log-probabilities are at most 0: negate losses"),
            (["a"], [[-1.0]], "paraphrased must hold numbers"),
            ([None], [[-1.0]], "paraphrased must hold numbers"),
        ],
    )
    def test_refuses(self, paraphrased, perturbed, message):
        with pytest.raises(UsageError, match=message):
            metrics.truth_ratio(paraphrased, perturbed)

    @pytest.mark.parametrize(
        "call",
        [
            metrics.probability,
            metrics.forget_truth_ratio,
            metrics.utility_truth_ratio,
            metrics.loss_score,
            metrics.min_k,
            lambda bad: metrics.normalized_probability(bad, [[-1.0]]),
            lambda bad: metrics.forget_quality(bad, [1.0]),
            lambda bad: metrics.forget_quality([1.0], bad),
            lambda bad: metrics.reference_score([-1.0], bad),
            lambda bad: metrics.zlib_score(bad, "text"),
            lambda bad: metrics.min_k_plus_plus([-1.0], bad, [1.0]),
            lambda bad: metrics.min_k_plus_plus([-1.0], [-1.0], bad),
            lambda bad: metrics.membership_auc([1.0], bad),
            lambda bad: metrics.bootstrap(np.mean, bad),
        ],
    )
    @pytest.mark.parametrize(("bad", "message"), [([], "is empty"), ([math.nan], "at 0 is nan")])
    def test_every_function_refuses_nothing_and_nan(self, call, bad, message):
        for kind in (list, np.array, torch.tensor):
            with pytest.raises(UsageError, match=message):
                call(kind(bad))

    def test_another_mean(self):
        with pytest.raises(UsageError, match="mean must be 'geometric' or 'arithmetic', got 'harmonic'"):
            metrics.truth_ratio([-1.0], [[-1.0]], mean="harmonic")

    def test_ratios_as_logarithms(self):
        with pytest.raises(UsageError, match="truth ratios are at least 0, got -1; pass ratios, not their logarithms"):
            metrics.forget_truth_ratio([-1.0, 2.0])

    def test_list_of_tensors(self):
        ratios = metrics.truth_ratio([torch.tensor(-1.0)], [torch.tensor([-2.0, -4.0])])
        assert ratios == pytest.approx([math.exp(2)])

    def test_zero_that_rounding_made_positive(self):
        assert metrics.probability([1e-6]).tolist() == [1]

    def test_arguments_are_not_changed(self):
        logps = np.array([-3.0, -1.0, -2.0])
        metrics.min_k(logps)
        assert logps.tolist() == [-3, -1, -2]


class TestImports:
    @pytest.mark.parametrize(
        ("module", "call"),
        [
            ("scipy.stats", lambda: metrics.forget_quality([1.0], [1.0])),
            ("sklearn.metrics", lambda: metrics.membership_auc([1.0], [1.0])),
            ("rouge_score.rouge_scorer", lambda: metrics.rouge_l(["a"], ["a"])),
        ],
    )
    def test_a_missing_library(self, monkeypatch, module, call):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UsageError, match=r"needs .* \(import .*\): pip install 'prefopt-trainer\[unlearning\]'"):
            call()

    def test_definitions_need_no_trainer(self):
        code = (
            "import sys, prefopt.unlearning.metrics\n"
            "heavy = {'transformers', 'trl', 'datasets', 'peft', 'accelerate', 'scipy', 'sklearn', 'rouge_score'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestWhatPeoplePass:
    def test_numbers_of_every_kind(self):
        values = {"a": torch.tensor(0.5, requires_grad=True), "b": np.float32(0.5), "c": 1}
        assert metrics.model_utility(values) == pytest.approx(0.6)
        assert metrics.leak_at_k([[0.0, 1.0]], torch.tensor(2)).tolist() == [1.0]
        assert pass_at_k(torch.tensor(4), np.int64(2), 2.0) == pytest.approx(5 / 6)
        assert metrics.model_utility({"a": 1e-320, "b": 0.5}) < 1e-300

    @pytest.mark.parametrize(
        ("call", "what"),
        [
            (lambda: metrics.model_utility([0.1, 0.2]), "as a mapping of names to numbers"),
            (lambda: metrics.model_utility({"a": None}), "model utility: a must be a number of at least 0, got None"),
            (lambda: pass_at_k(10, 3.5, 1), "correct must be a whole number, got 3.5"),
            (lambda: pass_at_k(np.array([10, 10]), np.array([1, 2]), 1), "n must have shape"),
            (lambda: metrics.leak_at_k([[0.1, 0.2]], 1.5), "k must be a whole number"),
            (lambda: metrics.rouge_l("one text", "one text"), "answers must be a list of texts, not one text"),
            (lambda: metrics.rouge_l([None], ["a"]), "answers, number 0, must be a text, not a NoneType"),
            (lambda: metrics.degeneration("one text", ["a"]), "texts must be a list of texts"),
            (lambda: metrics.degeneration(["a"], "one text"), "known_texts must be a list of texts"),
        ],
    )
    def test_what_has_no_value_is_refused(self, call, what):
        with pytest.raises(UsageError, match=what):
            call()
