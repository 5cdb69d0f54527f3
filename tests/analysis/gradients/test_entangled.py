"""Predicted changes of the two answers of a pair against those of a real step, and what cannot be measured."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt.analysis import entanglement, pushes
from prefopt.analysis.gradients.entangled import Entanglement
from prefopt.analysis.gradients.push import refuse_unpushable
from prefopt.losses import Need, parse
from prefopt.losses.needs import PER_TOKEN
from prefopt.safety.errors import UsageError
from prefopt.scoring import Layout, PreferenceCollator, RowBatch, Scorer
from tests.losses.cases import make_batch, random_rows
from tests.losses.test_contract import EXPRESSIONS
from tests.tiny import make_model

PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 2], "rejected_ids": [11, 9, 10, 12, 2]},
    {"prompt_ids": [20, 21], "chosen_ids": [30, 31, 2], "rejected_ids": [40, 41, 2]},
    {"prompt_ids": [50], "chosen_ids": [60, 2], "rejected_ids": [61, 2]},
]
LOSSES = [
    "dpo(beta=0.1)", "simpo(beta=2.0, gamma=1.0)", "ipo(beta=0.1)", "orpo", "dpop(beta=0.1)", "kto(beta=0.1)",
    "dpo(beta=0.1) + 0.2*sft", "npo(beta=0.1)", "sft(nll='token')", "sppo(beta=0.1)", "pair_normalized(dpo(beta=0.1))",
]  # fmt: skip


def collated(loss):
    return RowBatch.of(PreferenceCollator.for_loss(loss, 0)(PAIRS))


def policy_and_reference():
    return make_model("llama", 0).double(), make_model("llama", 1).double().requires_grad_(False)


@pytest.mark.parametrize("expression", LOSSES)
def test_a_small_step_on_a_pair_changes_it_as_predicted(expression):
    loss, (model, reference) = parse(expression), policy_and_reference()
    rows = collated(loss)
    predicted = entanglement(model, rows, loss, reference=reference)
    score = Scorer(loss, model, reference, layout=Layout("padded"))
    for pair in range(len(PAIRS)):
        batch = score(rows, every_role=True)
        # The loss's gradient through this pair's numbers, with the statistics of the whole batch.
        d_w, d_l = (float(push[pair]) for push in (predicted.d_w, predicted.d_l))
        target = d_w * batch.chosen.logps[pair] - d_l * batch.rejected.logps[pair]
        gradient = torch.autograd.grad(target, list(model.parameters()))
        size = 3e-3 / float(torch.cat([part.flatten() for part in gradient]).norm())
        ahead, behind = (_logps(score, rows, model, gradient, sign * size) for sign in (1, -1))
        for role, change in (("chosen", predicted.chosen_change), ("rejected", predicted.rejected_change)):
            moved = float(ahead[role][pair] - behind[role][pair]) / (2 * size)
            assert moved == pytest.approx(float(change[pair]), rel=0.01, abs=0.01 * float(change.abs().max()))


def _logps(score, rows, model, direction, size):
    """The log-probabilities after a step, which is taken back."""
    parameters = list(model.parameters())
    with torch.no_grad():
        torch._foreach_add_(parameters, direction, alpha=size)
        batch = score(rows, every_role=True)
        torch._foreach_add_(parameters, direction, alpha=-size)
    return {"chosen": batch.chosen.logps, "rejected": batch.rejected.logps}


@pytest.mark.parametrize(
    "expression", ["dpo(beta=0.1)", "simpo", "ipo(beta=0.1)", "dpo(beta=0.1) + 0.2*sft", "ld_dpo"]
)
def test_pushes_give_the_gradient_of_the_loss_itself(expression):
    """One pair: descending the loss is ascending d_w log pi(w) - d_l log pi(l), where all tokens weigh the same."""
    loss, (model, reference) = parse(expression), policy_and_reference()
    rows = RowBatch.of(PreferenceCollator.for_loss(loss, 0)(PAIRS[1:2]))  # answers of the same length
    batch = Scorer(loss, model, reference, layout=Layout("padded"))(rows, every_role=True)
    loss(batch).loss.backward(retain_graph=True)
    own = [-parameter.grad.clone() for parameter in model.parameters()]
    d_w, d_l = pushes(loss, batch)
    model.zero_grad()
    (d_w[0] * batch.chosen.logps[0] - d_l[0] * batch.rejected.logps[0]).backward()
    for parameter, gradient in zip(model.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def test_pushes_are_those_of_the_paper():
    """Table 1 of 2410.13828 at z = beta d: the pushes of DPO are equal, SimPO's are per token, NPO has one."""
    batch = make_batch(rows := random_rows(4))
    d = [row.pw - row.rw - row.pl + row.rl for row in rows]
    d_w, d_l = pushes(parse("dpo(beta=0.1)"), batch)
    assert d_w.tolist() == pytest.approx([0.1 / (1 + math.exp(0.1 * x)) for x in d], rel=1e-5)
    assert d_l.tolist() == pytest.approx(d_w.tolist())
    d_w, d_l = pushes(parse("simpo(beta=2.0, gamma=1.0)"), batch)
    assert (d_w / d_l).tolist() == pytest.approx([row.nl / row.nw for row in rows], rel=1e-5)
    d_w, d_l = pushes(parse("npo(beta=0.1)"), batch)
    assert d_w.tolist() == [0.0] * 4
    assert min(d_l.tolist()) > 0


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_loss_has_pushes_or_says_why_not(expression):
    loss, batch = parse(expression), make_batch(random_rows(3))
    state = copy.deepcopy(loss.state_dict())
    try:
        refuse_unpushable(loss)
    except UsageError:
        assert loss.grouped or loss.outermost or "sampled" in loss.roles or loss.needs & (PER_TOKEN | Need.HIDDEN)
        return
    d_w, d_l = pushes(loss, batch)
    assert d_w.shape == d_l.shape == (3,)
    assert bool(torch.isfinite(d_w).all() and torch.isfinite(d_l).all())
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(value, state[name])


def test_of_a_model_with_an_adapter_only_the_adapter_counts_and_nothing_changes():
    model = get_peft_model(make_model("llama", 0), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    measured = entanglement(model, PreferenceCollator.for_loss(None, 0)(PAIRS), "dpo(beta=0.1)")
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = Scorer(parse("dpo(beta=0.1)"), model, layout=Layout("padded"))(collated(None))
    gradient = torch.autograd.grad(batch.chosen.logps[0], adapter)
    assert float(measured.chosen_norm[0]) == pytest.approx(
        float(torch.cat([g.flatten() for g in gradient]).norm()), rel=1e-4
    )
    assert bool((measured.d_w != 0.05).all())  # the reference is the model without the adapter


def test_verdicts_in_words():
    one = torch.ones(5, dtype=torch.float64)
    inner = torch.tensor([-1.0, 2.0, 2.0, 0.5, 0.5], dtype=torch.float64)
    measured = Entanglement(
        "dpo(beta=0.1)", one * torch.tensor([1, 1, 1, -1, 0]), one * torch.tensor([1, 1, 1, -1, 0]),
        torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]).double(), torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0]).double(), inner,
        -one, -one,
    )  # fmt: skip
    assert measured.verdicts == ["as wanted", "both rise", "both fall", "swapped", "no gradient"]
    assert measured.metrics()["entanglement/chosen_rises"] == pytest.approx(0.4)
    assert measured.metrics()["entanglement/inner_positive"] == pytest.approx(0.8)
    assert "lowers both answers in 1, lowers the chosen and raises the rejected answer in 1" in str(measured)


@pytest.mark.parametrize(("expression", "reason"), [
    ("plackett_luce", "groups of answers"),
    ("conflict_free(dpo(beta=0.1) + sft)", "combines the gradients"),
    ("tdpo", "its gradient also comes from"),
])  # fmt: skip
def test_losses_that_read_something_else_are_refused(expression, reason):
    with pytest.raises(UsageError, match=reason):
        entanglement(make_model("llama", 0), {}, expression)


def test_a_frozen_model_is_refused():
    with pytest.raises(UsageError, match="has none"):
        entanglement(make_model("llama", 0).requires_grad_(False), collated(None), "simpo")
