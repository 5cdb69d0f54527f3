"""Decompiling: registered losses found again from their values, all structures, and losses that have none."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.logic import decompile
from prefopt.logic.decompile import OVER, NoStructure
from prefopt.logic.structure import name_of
from prefopt.losses import Loss, PairLoss, PreferenceBatch, parse
from tests.logic.test_structure import ALL, LEARNABLE, likely_batch


class Hidden(PairLoss):
    """A loss that does not say what it is made of."""

    batchwise = False

    def __init__(self, inner: Loss):
        super().__init__()
        self.inner = inner
        self.needs = inner.needs

    def per_example(self, batch: PreferenceBatch) -> torch.Tensor:
        return self.inner.per_example(batch)


@pytest.mark.parametrize("structure", ALL, ids=lambda s: f"{s.T}|{s.B}")
def test_compiling_and_decompiling_is_the_identity(structure):
    found = decompile(structure.loss(beta=0.7, gamma=0.2))
    assert found.structure == structure
    assert str(found.loss()) == str(structure.loss(beta=0.7, gamma=0.2))
    assert decompile(parse(str(structure.loss()))).structure == structure


@pytest.mark.parametrize("over", OVER[:2])
def test_every_structure_is_recognised_by_its_values_alone(over):
    """Another structure with the same odds is as good: P/(1-P) is that of two rows against two, or one against one."""
    batch = likely_batch(60, seed=3)
    for structure in LEARNABLE:
        if structure.T == structure.B:
            continue
        loss = type(structure)(structure.T, structure.B, over).loss(beta=0.5, average=False)
        found = decompile(Hidden(loss))
        assert (found.link, found.average) == ("logistic", False)
        assert torch.allclose(found.loss().per_example(batch), loss.per_example(batch), rtol=1e-6, atol=1e-9)
        sizes = [s.count(",") for s in (found.structure.T, found.structure.B, structure.T, structure.B)]
        assert sizes[0] + sizes[1] >= sizes[2] + sizes[3]


FOUND = {
    "dpo(beta=0.1)": ("CPO over policy and reference", "logistic", 0.1, 0.0, False),
    "simpo(beta=2, gamma=1.2)": ("CPO", "logistic", 2.0, 1.2, True),
    "cpo": ("CPO", "logistic", 0.1, 0.0, False),
    "orpo": ("ORPO", "logistic", 1.0, 0.0, True),
    "asft": ("CEUnl", "logistic", 1.0, 0.0, True),
    "sft(nll='mean')": ("CE", "logistic", 1.0, 0.0, True),
    "ipo(beta=0.2)": ("CPO over policy and reference", "squared", 0.2, 0.0, True),
    "hinge": ("CPO over policy and reference", "hinge", 0.1, 0.0, False),
    "slic": ("CPO", "hinge", 1.0, 0.0, False),
    "npo": ("CPO with Ref(l) for M(w) and M(l) for M(l)", "logistic", 0.1, 0.0, False),
    "uncpo(reference=True)": ("unCPO over policy and reference", "logistic", 1.0, 0.0, False),
}


@pytest.mark.parametrize("expression", FOUND)
def test_registered_losses_are_found_and_compile_to_themselves(expression):
    loss = parse(expression)
    found = decompile(loss)
    assert (name_of(found.structure), found.link, found.beta, found.gamma, found.average) == FOUND[expression]
    batch = likely_batch(60, seed=5)
    assert torch.allclose(found.loss().per_example(batch), loss.per_example(batch), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("dpop", "not a logistic, hinge or squared link"),
        ("hdpo(alpha=0.8)", "not a logistic, hinge or squared link"),
        ("nca", "not a logistic, hinge or squared link"),
        ("dpo + 0.1*sft", "a weighted sum"),
        ("kto", "act on one another"),
        ("tdpo", "looks at forward_kl"),
        ("bco_pair", "not a logistic, hinge or squared link"),
    ],
)
def test_losses_without_a_structure_say_why(expression, reason):
    with pytest.raises(NoStructure, match=reason):
        decompile(parse(expression))


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["logic", *words], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_the_command_explains_a_loss():
    code, text = run("orpo")
    assert code == 0
    for part in (
        "M(l) -> M(w)",
        "M(w) xor M(l)",
        "P(w)(1-P(l))/((1-P(w))P(l))",
        "neither: ruled out",
        "unCPO, cCPO, qfUNL",
    ):
        assert part in text, part


def test_the_command_compiles_a_formula():
    code, text = run("--formula", "M(l) -> M(w)", "--given", "M(w) or M(l)")
    assert code == 0
    assert "cCPO" in text
    assert "logic(T='11,10', B='01'" in text


def test_the_command_draws(tmp_path):
    code, text = run("--lattice", str(tmp_path / "order.svg"))
    assert (code, "9 structures" in text) == (0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "exactly one of"),
        (["dpo", "--formula", "M(w)"], "exactly one of"),
        (["dpo", "--given", "M(w)"], "belong to a --formula"),
        (["--formula", "M(w) and"], "at column 9"),
        (["dpop"], "not a logistic"),
        (["dpa"], "did you mean"),
        (["--formula", "true"], "nothing to learn"),
    ],
)
def test_the_command_refuses_with_a_reason(words, message):
    code, text = run(*words)
    assert code == 1
    assert message in " ".join(text.split())
