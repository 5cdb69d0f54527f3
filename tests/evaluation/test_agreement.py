import pytest

from prefopt.evaluation.agreement import agreements, cohen_kappa, summarize, tau_b
from prefopt.evaluation.judgements import Preference, Score
from prefopt.generation.samples import Sample


def scored(judge, scores, prompt="p"):
    return [Score(prompt, i, judge, score) for i, score in enumerate(scores)]


def test_two_judges_by_hand():
    # Pairs (0,1) (0,2) (1,2): x says -, -, 0; y says -, +, +.
    (one,) = agreements([*scored("x", [1, 2, 2]), *scored("y", [2, 3, 1])])
    assert (one.judges, one.pairs) == (("x", "y"), 3)
    assert one.same == pytest.approx(1 / 3)
    # By chance: both say "-": 2/3 * 1/3; so kappa = (1/3 - 2/9) / (7/9).
    assert one.kappa == pytest.approx(1 / 7)
    # One concordant, one discordant, one tied by x.
    assert one.tau == 0


def test_tau_is_that_of_scipy():
    kendalltau = pytest.importorskip("scipy.stats").kendalltau
    x, y = [1, 2, 2, 5, 4, 4, 0], [2, 1, 3, 5, 5, 1, 0]
    (one,) = agreements([*scored("x", x), *scored("y", y)])
    assert one.tau == pytest.approx(kendalltau(x, y).statistic)


def test_kappa_is_that_of_scikit_learn():
    kappa = pytest.importorskip("sklearn.metrics").cohen_kappa_score
    left, right = [1, 0, -1, 1, 1, 0, -1], [1, 1, -1, 0, 1, 0, 1]
    assert cohen_kappa(left, right) == pytest.approx(kappa(left, right))


def test_where_agreement_says_nothing():
    assert cohen_kappa([0, 0], [0, 0]) is None
    assert tau_b({(0, "p", 0, 1): 0}, {(0, "p", 0, 1): 1}) is None
    assert agreements([*scored("x", [1, 2]), *scored("y", [1, 2], prompt="q")]) == []


def test_scores_and_preferences_are_compared_as_orders():
    chosen = [Preference("p", (0, 1), "llm", 1), Preference("p", (2, 1), "llm", 1), Preference("p", (0, 2), "llm", 0)]
    (one,) = agreements([*scored("x", [1, 3, 2]), *chosen])
    assert (one.pairs, one.same) == (3, pytest.approx(2 / 3))


def test_position_bias_and_consistency():
    both = [
        Preference("p", (0, 1), "llm", 0), Preference("p", (1, 0), "llm", 1, order=1),  # the first one each time
        Preference("p", (0, 2), "llm", 2), Preference("p", (2, 0), "llm", 2, order=1),
        Preference("p", (1, 2), "llm", None, tie=True), Preference("p", (2, 1), "llm", None, reason="unparsable"),
    ]  # fmt: skip
    (one,) = summarize(both)
    assert (one.kind, one.judged, one.missing) == ("preference", 5, {"unparsable": 1})
    assert (one.first_wins, one.consistent, one.ties) == (0.75, 0.5, 0.2)
    assert one.tied_pairs == pytest.approx(2 / 3)


def test_length_bias_and_missing_scores():
    samples = [Sample("p", "p", i, "", tokens, True) for i, tokens in enumerate([3, 9, 5, 5])]
    lines = [*scored("x", [1, 4, 2]), Score("p", 3, "x", None, reason="raised: KeyError: 'a'")]
    lines += [Score("q", 0, "x", None, reason="raised: KeyError: 'b'"), Score("q", 1, "x", None, reason="")]
    (one,) = summarize(lines, samples)
    assert (one.judged, one.mean_score, one.length_tau, one.tied_pairs) == (3, pytest.approx(7 / 3), 1, 0)
    assert one.missing == {"raised: KeyError": 2, "no reason": 1}
    assert summarize(lines)[0].length_tau is None


def test_characters_where_tokens_are_not_counted():
    samples = [Sample("p", "p", 0, "long text", 0, True), Sample("p", "p", 1, "short", 0, True)]
    assert summarize(scored("x", [1, 2]), samples)[0].length_tau == -1


def test_rounds_are_apart():
    lines = [Score("p", i, "x", s, round=r) for r, scores in ((1, [1, 2]), (2, [2, 1])) for i, s in enumerate(scores)]
    samples = [Sample("p", "p", i, "", 1 + i, True, round=r) for r in (1, 2) for i in (0, 1)]
    assert summarize(lines, samples)[0].length_tau == 0
