"""The checks before any training."""

from __future__ import annotations

import pytest

from prefopt.discovery import read
from prefopt.discovery.checks import fault, signature
from prefopt.discovery.search import LRML, SEEDS

PUSH_UP = ("dpo", "hinge", "ipo", "exponential", "squared", "savage", "focal", "tangent", "pseudo_huber")


@pytest.mark.parametrize("name", PUSH_UP)
def test_usual_losses_pass(name):
    assert fault(read(SEEDS[name])) is None


FAULTS = [
    (
        f"{'square(' * 9}x{')' * 9} - x",
        "value is not finite at x = -1000",
    ),
    ("softplus(-x) + x / 0", "value is not finite"),
    ("0 * x", "its slope at x = 0 is 0"),
    ("softplus(x)", "it does not push the chosen answer up"),
    ("square(x)", "it does not push the chosen answer up"),
    ("softplus(-x * 1e-9 * 1e-9)", "its slope at x = 0"),
    (LRML, "its slope at x = 0 is 0.784"),
    ("softplus(-x) + batch_mean(x)", "statistics of the batch"),
    ("where(x > 0.61803, -x - 1, -x)", "gradcheck"),
]


@pytest.mark.parametrize(("text", "reason"), FAULTS)
def test_faults_are_named(text, reason):
    said = fault(read(text))
    assert said is not None
    assert reason in said


def test_batch_statistics_pass_where_they_are_declared():
    node = read("sigmoid(batch_var(x)) * softplus(-x) + exp(-x)")
    assert fault(node, batchwise=True) is None
    assert "does not allow" in str(fault(node))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("softplus(-x)", "-logsigmoid(x)"),
        ("softplus(-x)", "3 * softplus(-x) + 7"),
        ("softplus(-x)", "logistic(x)"),
        ("square(x / beta - 1 / (2 * beta))", "square(x - 0.5)"),
    ],
)
def test_what_trains_alike_has_one_signature(text, same):
    assert signature(read(text)) == signature(read(same))


def test_other_losses_have_other_signatures():
    others = ["softplus(-1.1 * x)", "softplus(-x) + 0.1 * relu(x)", "softplus(-x / beta)"]
    texts = [SEEDS[name] for name in PUSH_UP] + others
    assert len({signature(read(text)) for text in texts}) == len(texts)
