"""Limits of the losses over groups: with two completions they are losses on pairs, and where their minima are."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.losses import LossError, PreferenceBatch, Scores, parse

LISTWISE = ["plackett_luce(beta=1.0)", "infonca(beta=1.0)", "nca_scores(beta=1.0)", "lipo_lambda(beta=1.0)",
            "gvpo(beta=1.0)", "a_star_po(beta=1.0)"]  # fmt: skip


def groups(ratios, scores, **columns):
    """A batch of groups of log-ratios, reference sums 0."""
    flat = torch.tensor([value for group in ratios for value in group], dtype=torch.float64, requires_grad=True)
    given = torch.tensor([value for group in scores for value in group], dtype=torch.float64)
    sizes = tuple(len(group) for group in ratios)
    zero = torch.zeros_like(flat).detach()
    candidates = Scores(flat, torch.ones_like(zero), zero, score=given, group_sizes=sizes, columns=columns)
    return PreferenceBatch(candidate=candidates)


def pairs(ratios, scores):
    """The same as pairs, for groups of two whose first completion is the better one."""
    sides = [torch.tensor([group[side] for group in ratios], dtype=torch.float64) for side in (0, 1)]
    columns = {
        f"{name}_score": torch.tensor([group[side] for group in scores], dtype=torch.float64)
        for side, name in enumerate(("chosen", "rejected"))
    }
    chosen, rejected = (Scores(s, torch.ones_like(s), torch.zeros_like(s), columns=columns) for s in sides)
    return PreferenceBatch(chosen, rejected)


SWAP = 1 / math.log(2) - 1 / math.log(3)
RATIOS, TWO = [[1.5, -0.5], [-2.0, 0.3], [0.0, 0.0]], [[2.0, 1.0], [0.7, 0.1], [3.0, -1.0]]


@pytest.mark.parametrize(
    ("listwise", "pairwise", "factor"),
    [
        ("plackett_luce(beta=0.3)", "dpo(beta=0.3)", None),
        ("infonca(beta=0.3, alpha=1e-3)", "dpo(beta=0.3)", None),
        ("nca_scores(beta=0.3, alpha=1e-3)", "nca(beta=0.3)", None),
        ("gvpo(beta=0.3)", f"rebel(eta={1 / 0.3})", lambda best, worst: 0.3**2 / 4),
        ("lipo_lambda(beta=0.3)", "dpo(beta=0.3)", lambda best, worst: (2**best - 2**worst) * SWAP),
    ],
)
def test_two_completions_are_a_pair(listwise, pairwise, factor):
    ours = parse(listwise)(groups(RATIOS, TWO)).per_example
    theirs = parse(pairwise)(pairs(RATIOS, TWO)).per_example
    if factor is not None:
        theirs = theirs * torch.tensor([factor(*scores) for scores in TWO], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_infonca_of_two_has_dpos_soft_label():
    label = 1 / (1 + math.exp(-(2.0 - 1.0) / 0.7))
    ours = parse("infonca(beta=0.3, alpha=0.7)")(groups(RATIOS[:1], TWO[:1])).loss
    theirs = parse(f"dpo(beta=0.3, label_smoothing={1 - label!r})")(pairs(RATIOS[:1], TWO[:1])).loss
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("expression", LISTWISE)
def test_the_order_within_a_group_does_not_matter(expression):
    ratios, scores = [[1.0, -0.5, 0.2, 0.7]], [[1.0, 3.0, 2.0, 2.0]]
    turned = [[group[place] for place in (2, 0, 3, 1)] for group in (ratios[0], scores[0])]
    one, other = parse(expression)(groups(ratios, scores)), parse(expression)(groups([turned[0]], [turned[1]]))
    torch.testing.assert_close(one.per_example, other.per_example)
    for name, value in one.metrics.items():
        torch.testing.assert_close(value, other.metrics[name])


@pytest.mark.parametrize("expression", LISTWISE)
def test_a_group_counts_the_same_beside_a_larger_one(expression):
    alone = parse(expression)(groups([[1.0, -0.5]], [[1.0, 3.0]])).per_example
    beside = parse(expression)(groups([[0.1, 0.2, 0.3], [1.0, -0.5]], [[1.0, 2.0, 0.0], [1.0, 3.0]])).per_example
    torch.testing.assert_close(beside[1:], alone)


@pytest.mark.parametrize("expression", LISTWISE)
def test_every_one_orders_the_completions_from_equal_rewards(expression):
    batch = groups([[0.0] * 4], [[0.4, 0.9, 0.1, 0.6]])
    parse(expression)(batch).loss.backward()
    push = -batch.candidate.logps.grad
    assert push[1] > 0 > push[2]
    assert push.argsort().tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize("expression", ["plackett_luce", "lipo_lambda"])
def test_equal_scores_are_not_compared(expression):
    batch = groups([[0.3, -0.2, 1.0]], [[1.0, 1.0, 1.0]])
    output = parse(expression)(batch)
    output.loss.backward()
    assert float(output.loss.detach()) == 0
    assert not batch.candidate.logps.grad.any()
    assert "rewards/accuracies" in output.metrics
    assert output.metrics["rewards/accuracies"].numel() == 0


@pytest.mark.parametrize(
    ("expression", "minimum"),
    [
        ("gvpo(beta=0.5)", lambda s: [2 * x for x in s]),
        ("infonca(beta=0.5, alpha=0.4)", lambda s: [x / 0.4 / 0.5 for x in s]),
        (
            "nca_scores(beta=0.5, alpha=0.4)",
            lambda s: [math.log(3 * math.exp(x / 0.4) / sum(math.exp(y / 0.4) for y in s)) / 0.5 for x in s],
        ),
        (
            "a_star_po(beta=0.5, value_beta=0.5)",
            lambda s: [2 * x - math.log(sum(math.exp(2 * y) for y in s) / 3) for x in s],
        ),
    ],
)
def test_the_documented_minimum_has_no_gradient(expression, minimum):
    scores = [0.2, 1.0, 0.5]
    batch = groups([minimum(scores)], [scores])
    parse(expression)(batch).loss.backward()
    assert float(batch.candidate.logps.grad.abs().max()) < 1e-12


def test_metrics_of_a_group():
    metrics = parse("gvpo(beta=0.5)")(groups([[1.0, 3.0, 2.0], [1.0, 0.0]], [[0.0, 1.0, 1.0], [1.0, 2.0]])).metrics
    assert metrics["rewards/best"].tolist() == [1.25, 0.0]
    assert metrics["rewards/worst"].tolist() == [0.5, 0.5]
    assert metrics["rewards/margins"].tolist() == [0.75, -0.5]
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0]


def test_a_batch_without_groups_is_named():
    scores = pairs(RATIOS, TWO).chosen
    with pytest.raises(LossError, match="no candidate ones"):
        parse("gvpo")(PreferenceBatch(scores, scores))
    with pytest.raises(LossError, match="group_sizes"):
        parse("gvpo")(PreferenceBatch(candidate=scores))
    with pytest.raises(LossError, match="add up to 3"):
        Scores(scores.logps, scores.lengths, group_sizes=(2, 2))
    with pytest.raises(LossError, match="one a group"):
        parse("wpo(gvpo)")


def test_sums_and_weights():
    weight = torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    batch = groups([[0.1, 0.2, 0.3], [1.0, -0.5]], [[1.0, 2.0, 0.0], [1.0, 3.0]], weight=weight)
    both = parse("plackett_luce + 0.5*gvpo")(batch)
    parts = [parse(one)(batch) for one in ("plackett_luce", "gvpo")]
    torch.testing.assert_close(both.loss, parts[0].loss + 0.5 * parts[1].loss)
    torch.testing.assert_close(both.loss, both.per_example[0])  # (2 a + 0 b) / 2


def triple(logps, scores):
    """One group; lengths 2, 3, 4 and so on."""
    sums = torch.tensor(logps, dtype=torch.float64)
    lengths = torch.arange(2, 2 + len(logps))
    given = torch.tensor(scores, dtype=torch.float64)
    return PreferenceBatch(candidate=Scores(sums, lengths, score=given, group_sizes=(len(logps),)))


def test_tpo_of_two_completions_is_cpo_with_the_chosen_ones_likelihood():
    chosen, rejected = (Scores(torch.tensor([p]), torch.tensor([n])) for p, n in ((-3.0, 2), (-5.0, 3)))
    theirs = parse("cpo(beta=0.3) + 0.5*sft(nll='mean')")(PreferenceBatch(chosen, rejected)).loss
    ours = parse("tpo(beta=0.3, alpha=0.5, nll='mean')")(triple([-3.0, -5.0], [2.0, 1.0])).loss
    torch.testing.assert_close(ours, theirs.double())


def test_tpo_takes_the_second_best_for_chosen_whatever_the_order():
    ordered = triple([-3.0, -4.0, -9.0, -5.0], [4.0, 3.0, 2.0, 1.0])
    value = parse("tpo(beta=0.3, nll='sum')")(ordered).loss
    assert float(value) == pytest.approx(3.0 + math.log1p(math.exp(-0.3)))
    turned = triple([-5.0, -3.0, -9.0, -4.0], [1.0, 4.0, 2.0, 3.0])
    assert float(parse("tpo(beta=0.3, nll='sum')")(turned).loss) == pytest.approx(float(value))
    assert parse("tpo").needs.words == parse("simpo").needs.words
