"""Micro-batches of single completions that lack a role: every objective that takes them has a value and a gradient."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from prefopt.losses import Loss, PreferenceBatch, parse, presets
from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.layout import Layout
from prefopt.scoring.rows import RowBatch
from prefopt.scoring.scorer import Scorer
from tests.losses.cases import CASES, make_batch, random_rows
from tests.losses.test_contract import leaves, some_of
from tests.tiny import make_model

SUMS = (
    "npo + sft",
    "undial + kl_retain",
    "ce_u + kl_retain",
    "flatten + dual(sft(nll='token'), limit=0.5)",
    "0.5*kto + npo",
    "cringe + ga",
    "wpo(npo)",
    "wpo(undial) + wpo(sft(nll='token'))",
    "length_normalized(npo)",
    "reweighted(npo)",
    "reweighted(kto)",
    "conflict_free(npo + sft)",
    "conflict_free(undial + kl_retain)",
)
PRESETS = [*(presets().keys() - {"rmu_paper"}), "rmu_paper(layer=0)"]  # tiny models have two layers
EVERY = dict.fromkeys([*(case.expression for case in CASES), *sorted(PRESETS), *SUMS])
UNPAIRED = [e for e in EVERY if not parse(e).paired and "candidate" not in parse(e).roles]  # groups have one role
OFFLINE = [e for e in UNPAIRED if "sampled" not in parse(e).roles and not parse(e).columns]
every_unpaired = pytest.mark.parametrize("expression", UNPAIRED)
every_offline = pytest.mark.parametrize("expression", OFFLINE)


def with_rows(chosen: int, rejected: int, weight: bool = False) -> PreferenceBatch:
    """Single completions, some of each role or none; `weight` gives the first of each role the weight 0."""
    n = max(chosen, rejected, 2)
    whole = make_batch(random_rows(n), weight=[0.0, *[1.5] * (n - 1)] if weight else None, requires_grad=True)
    good, bad = (some_of(whole, list(range(count))) for count in (chosen, rejected))
    return replace(whole, chosen=good.chosen, rejected=bad.rejected, paired=False)


@every_unpaired
@pytest.mark.parametrize("weight", [False, True])
def test_a_role_without_rows_gives_a_finite_loss_that_has_a_gradient(expression, weight):
    for chosen, rejected in [(3, 0), (0, 3), (1, 0), (0, 1), (0, 0)]:
        check_finite(expression, chosen, rejected, weight)


def check_finite(expression: str, chosen: int, rejected: int, weight: bool) -> None:
    loss, batch = parse(expression).double(), with_rows(chosen, rejected, weight)
    output = loss(batch)
    assert bool(torch.isfinite(output.loss))
    # DDP waits for the gradient of every parameter, be it 0.
    assert output.loss.requires_grad
    output.loss.backward()
    gradients = [leaf.grad for leaf in leaves(batch).values() if leaf.is_leaf and leaf.grad is not None]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert all(bool(torch.isfinite(value).all()) for value in output.metrics.values())
    assert all(value == value for value in output.mean_metrics().values())
    counts = {"chosen": chosen, "rejected": rejected, "sampled": 3}
    if not any(counts[role] for role in loss.roles):
        assert float(output.loss.detach()) == 0
        assert not any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("wrapper", ["wpo", "length_normalized", "reweighted"])
def test_a_wrapper_around_terms_of_different_roles_is_refused_before_training(wrapper):
    with pytest.raises(ValueError, match=rf"about different completions: put each of them into a {wrapper}"):
        parse(f"{wrapper}(npo + sft)")


# ---- scored by a model ---------------------------------------------------------------------------------------------


def labelled_rows(labels: list[bool]) -> dict[str, torch.Tensor]:
    """A collated batch of single completions of unequal lengths."""
    draw = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, 300, (n,), generator=draw).tolist()

    rows = [
        {"prompt_ids": tokens(3 + i), "completion_ids": tokens(2 + 2 * i), "label": label}
        for i, label in enumerate(labels)
    ]
    return PreferenceCollator(pad_token_id=0, mismatched=True)(rows)


def scored(loss: Loss, inputs: dict[str, torch.Tensor], model: torch.nn.Module) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient of a batch, under a reference of other weights; no call may be without rows."""

    class Called(Layout):
        def score(self, model, rows, **options):
            assert len(rows.ids) > 0
            return super().score(model, rows, **options)

    scorer = Scorer(loss, model, make_model(seed=1), layout=Called("padded"))
    batch = scorer.score(model, RowBatch.of(inputs), every_role=False).batch
    value = loss(batch).loss
    model.zero_grad()
    value.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return float(value.detach()), [parameter.grad.clone() for parameter in model.parameters()]


@every_offline
def test_models_are_called_with_rows_and_every_weight_gets_a_gradient(expression):
    model, loss = make_model(), parse(expression)
    for label in (True, False):
        value, gradients = scored(copy.deepcopy(loss), labelled_rows([label] * 3), model)
        role = "chosen" if label else "rejected"
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        if role not in loss.roles:
            assert value == 0
            assert not any(bool(gradient.any()) for gradient in gradients)
        else:
            assert any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("expression", [e for e in OFFLINE if len(parse(e).roles) == 1])
def test_rows_of_a_role_are_worth_the_same_alone_and_among_others(expression):
    """A loss on one role is a mean over its rows, so rows of the other role change neither value nor gradient."""
    loss = parse(expression)
    label, model = loss.roles == ("chosen",), make_model()
    alone, gradients = scored(copy.deepcopy(loss), labelled_rows([label, label]), model)
    joined, others = scored(copy.deepcopy(loss), labelled_rows([label, label, not label, not label]), model)
    assert joined == pytest.approx(alone, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-3, atol=1e-5)
