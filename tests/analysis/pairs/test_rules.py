"""Rules about pairs: each fires on a table made for it and is silent on three healthy ones."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.analysis.pairs.rules import RULES, examine_pairs
from prefopt.analysis.pairs.table import PairTable


def table(margins, push=0.05, lengths=None, loss="dpo(beta=0.1)"):
    count = len(margins)
    chosen, rejected = lengths or ([20 + 7 * i % 13 for i in range(count)], [20 + 5 * i % 11 for i in range(count)])
    return PairTable(
        loss, *(torch.tensor(values, dtype=torch.float64) for values in (margins, chosen, rejected)),
        torch.full((count,), push, dtype=torch.float64), torch.full((count,), 0.1, dtype=torch.float64),
    )  # fmt: skip


def calibrated(count=200, scale=1.5, seed=0):
    """Margins whose signs are right as often as their sizes say."""
    generator = torch.Generator().manual_seed(seed)
    size = scale * torch.randn(count, generator=generator, dtype=torch.float64).abs()
    right = torch.rand(count, generator=generator, dtype=torch.float64) < size.sigmoid()
    return torch.where(right, size, -size).tolist()


LENGTHS = ([10 + i for i in range(60)], [40] * 60)
FAILING = {
    "overconfident": (table([3.0] * 60 + [-3.0] * 40 + [1.0] * 40), "mean confidence of 0.89 where 71%"),
    "doubtful_labels": (table([3.0] * 80 + [-3.0] * 20), "20 of the 100 pairs that the model ranks"),
    "spent_pairs": (table(calibrated(), push=1e-4), "200 of 200 pairs have almost no gradient left"),
    "margin_follows_length": (
        table([0.02 * i + 0.3 for i in range(60)], lengths=LENGTHS), "explains 100% of the variance",
    ),
}  # fmt: skip
FOLLOWS = {"overconfident": {"doubtful_labels"}, "doubtful_labels": {"overconfident"}}
"""Other findings that the same table has: a sure model that is often wrong contradicts labels."""


def test_there_is_a_failing_table_for_every_rule():
    assert set(FAILING) == set(RULES)


@pytest.mark.parametrize("rule", FAILING)
def test_a_rule_fires_on_the_table_made_for_it(rule):
    pairs, evidence = FAILING[rule]
    findings = {finding.rule: finding for finding in examine_pairs(pairs, step=7)}
    assert rule in findings, list(findings)
    assert evidence in findings[rule].text
    assert findings[rule].step == 7
    assert set(findings) - {rule} <= FOLLOWS.get(rule, set())


def test_rows_are_named():
    (finding,) = (f for f in examine_pairs(FAILING["doubtful_labels"][0]) if f.rule == "doubtful_labels")
    assert finding.rows == tuple(range(80, 100))
    assert (
        "where its confidence allows 5: about 15% of the labels may be wrong: rows 80, 81, 82, 83, 84 and 15 more"
        in finding.text
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale", [0.3, 1.5, 3.0])
def test_rules_are_silent_on_calibrated_models(seed, scale):
    assert [str(finding) for finding in examine_pairs(table(calibrated(scale=scale, seed=seed)))] == []


def test_few_pairs_are_not_judged():
    assert examine_pairs(table([3.0] * 20 + [-3.0] * 5)) == []


def test_measures_by_hand():
    pairs = table([math.log(9), math.log(9), -math.log(4)])
    assert pairs.accuracy == pytest.approx(2 / 3)
    assert pairs.confidence.tolist() == pytest.approx([0.9, 0.9, 0.8])
    assert pairs.brier == pytest.approx((0.01 + 0.01 + 0.64) / 3)
    assert pairs.calibration_error == pytest.approx((abs(0.9 - 1) * 2 + 0.8) / 3)
