"""Expressions: what can be read, that it prints back, and that it computes what prefopt's own losses compute."""

from __future__ import annotations

import random

import pytest
import torch

from prefopt.discovery import ExpressionError, ExpressionLoss, read
from prefopt.discovery.evolve import Member, propose, simpler
from prefopt.discovery.grammar import evaluate
from prefopt.discovery.search import LRML, SEEDS
from prefopt.losses import DPO, GPO, IPO, DiscoPOP, Hinge, Loss, PreferenceBatch, Scores
from prefopt.losses.discovered import AQL, CELL, DBAQL, PADLL
from prefopt.losses.shapes import SHAPES


def pairs(d: torch.Tensor) -> PreferenceBatch:
    """Pairs with these margins before scaling."""
    zero, one = torch.zeros_like(d), torch.ones(d.shape, dtype=torch.long)
    return PreferenceBatch(chosen=Scores(d, one, zero), rejected=Scores(zero, one, zero))


def value_and_slope(loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    d = torch.linspace(-30, 30, 121, dtype=torch.float64).requires_grad_()
    values = loss.per_example(pairs(d))
    (slope,) = torch.autograd.grad(values.sum(), d)
    return values.detach(), slope


LOSSES = [
    (SEEDS["dpo"], DPO),
    ("-logsigmoid(x)", DPO),
    (SEEDS["hinge"], Hinge),
    (SEEDS["ipo"], lambda beta: IPO(beta, average=False)),
    ("exp(-x)", lambda beta: GPO(beta, "exponential")),
    (LRML, DiscoPOP),
    ("0.5 * exp(-x) + 0.5 * softplus(-x)", CELL),
    ("where(x < 0, 0.45, 0.9) * softplus(-x)", PADLL),
    (
        "sigmoid(batch_var(x / 0.05)) * softplus(-x / 0.9) + (1 - sigmoid(batch_var(x / 0.05))) * exp(-0.9 * x)",
        DBAQL,
    ),
    (
        "relu(1 - x) + (softplus(-x) - relu(1 - x)) "
        "* sigmoid(0.5 + 0.01 * (sigmoid(batch_mean(x / 0.05)) - 0.5) - x / 0.05)",
        AQL,
    ),
    *[(f"{name}(x)", lambda beta, name=name: GPO(beta, name)) for name in SHAPES],
]


@pytest.mark.parametrize(("text", "make"), LOSSES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_expression_equals_the_loss_of_prefopt(text, make):
    class Own(ExpressionLoss):
        expression = text

    # x stays below 20, from where torch's softplus is a straight line.
    for beta in (0.05, 0.6):
        for ours, theirs in zip(value_and_slope(Own(beta)), value_and_slope(make(beta)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert Own().batchwise == ("batch_" in text)
    assert Own().separable != Own().batchwise


REFUSED = [
    ("", "is empty"),
    ("   ", "is empty"),
    ("__import__('os').system('true')", "column 12"),
    ("import os", "nothing is named 'import'"),
    ("(lambda: 0)()", "column 8"),
    ("x.__class__", "column 2"),
    ("open(x)", "nothing is named 'open'"),
    ("inf * x", "nothing is named 'inf'"),
    ("nan", "nothing is named 'nan'"),
    ("1e999 * x", "the constant 1e999 is above"),
    ("x / x", "column 3: what divides must hold no x"),
    ("softplus", "'(' is missing at the end"),
    ("softplus(x, x)", "expected ')', got ','"),
    ("softpluss(x)", "Did you mean 'softplus'"),
    ("x > 0", "does not continue"),
    ("where(x, x, x)", "where needs a comparison"),
    ("x x", "'x' does not continue"),
    ("beta + 1", "does not hold x"),
    ("x +", "ends too early"),
    ("x **2", "'*' cannot stand here"),
    ("x\0", "column 2"),
    ("é", "column 1"),
    ("((((((((((((((((((x))))))))))))))))))", "nested too deep"),
    ("-" * 100 + "x", "too many minus signs"),
    ("+".join(["x"] * 40), "nested 40 deep"),
    ("x" * 10_000, "has 10000 characters; at most 400"),
    ("(" * 10_000, "has 10000 characters; at most 400"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=lambda text: text[:20])
def test_what_is_no_expression_is_refused_with_its_place(text, message):
    with pytest.raises(ExpressionError) as error:
        read(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 200


def test_what_evolution_proposes_prints_and_reads_back_the_same():
    members = [Member(n, read(text), n) for n, (text, _) in enumerate(LOSSES[:6])]
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    beta = torch.tensor(0.1, dtype=torch.float64)
    texts = set()
    for number in range(300):
        proposal = propose(members, texts, 0, number)
        assert proposal == propose(members, set(texts), 0, number)
        node = read(proposal.text)
        assert str(node) == proposal.text
        assert read(str(node)) == node
        values, plain = evaluate(node, x, beta), evaluate(simpler(node), x, beta)
        # Numbers are rounded to three digits.
        assert plain.shape == values.shape
        texts.add(proposal.text)
    assert len(texts) > 290
    assert propose(members, set(), 1, 0) != propose(members, set(), 0, 0)


def test_minus_signs_and_parentheses_survive():
    draw = random.Random(0)
    x, beta = torch.tensor([0.7, -1.3], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    for _ in range(300):
        text = "x"
        for _ in range(6):
            sign = draw.choice("+-*")
            text = draw.choice([f"-({text})", f"({text}) {sign} (-2)", f"-3 {sign} ({text})", f"x {sign} -({text})"])
        node = read(text)
        assert read(str(node)) == node
        expected = eval(text, {"x": x})
        torch.testing.assert_close(evaluate(node, x, beta), expected, rtol=1e-12, atol=1e-12)
