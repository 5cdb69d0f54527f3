"""Hidden states after chosen layers: what the model's own output holds, in every layout, with gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prefopt.losses import Need, parse
from prefopt.scoring import Extras, score_rows
from prefopt.scoring.rows import RowBatch
from prefopt.scoring.scorer import Scorer
from prefopt.scoring.tree import score_trees
from tests.scoring.test_hidden import LAYOUTS, every_layout, gradient, score
from tests.scoring.test_tree import ARCHITECTURES, MASKS, close, collate, model_inputs
from tests.tiny import make_model

LAYERS = (1, 0)
STATES = Extras(Need.STATES, layers=LAYERS)


def by_hand(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """(R, T - 1, 2, H) states of the model's own output at the positions that predict completion tokens."""
    rows = []
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row : row + 1, :length]
        every = model(input_ids=ids, output_hidden_states=True).hidden_states  # the embeddings come first
        if LAYERS[0] == len(every) - 2:  # the last ones are normalised
            states = [_before_norm(model, ids), every[LAYERS[1] + 1][0]]
        else:
            states = [every[layer + 1][0] for layer in LAYERS]
        mask = batch["completion_mask"][row, 1:length].bool()
        picked = torch.stack(states, 1)[:-1] * mask[:, None, None]
        rows.append(torch.nn.functional.pad(picked, (0, 0, 0, 0, 0, batch["input_ids"].shape[1] - length)))
    return torch.stack(rows)


def _before_norm(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(input_ids=ids)
    handle.remove()
    return seen[0][0]


def weighed(states: torch.Tensor) -> torch.Tensor:
    return (states * torch.linspace(-0.5, 1.5, states.numel()).reshape(states.shape)).sum()


@every_layout
def test_equals_the_models_own_output(layout):
    model, batch = make_model().eval(), collate()
    states = score(model, batch, layout, STATES).quantities["states"]
    mine = gradient(model, weighed(states))
    model.set_attn_implementation("sdpa")
    expected = by_hand(model, batch)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad(weighed(expected), list(model.parameters()), allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), theirs, strict=True)]
    assert close(mine, torch.cat([g.flatten() for g in flat]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", MASKS)
def test_layouts_agree_on_every_architecture(architecture, attention):
    model, batch = make_model(architecture).eval(), collate(mismatched=True)
    model.set_attn_implementation(attention)
    options = {"output_router_logits": False} if architecture == "moe" else {}
    inputs, mask = model_inputs(batch), batch["completion_mask"]
    padded, _ = score_rows(model, {**inputs, **options}, mask, extras=STATES)
    trees, _ = score_trees(model, inputs, mask, extras=STATES, masks=MASKS[attention], model_options=options)
    one, two = trees.quantities["states"], padded.quantities["states"]
    torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-5)
    assert close(gradient(model, weighed(one)), gradient(model, weighed(two)))


@every_layout
def test_adapters_and_checkpointed_layers(layout):
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_model(), config).train()
    plain = score(model, collate(), "padded", STATES).quantities["states"]
    expected = gradient(model, weighed(plain))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    states = score(model, collate(), layout, STATES).quantities["states"]
    assert close(gradient(model, weighed(states)), expected)


@every_layout
def test_every_parameter_gets_a_gradient(layout):
    """Wrappers of several processes wait for all of them."""
    model = make_model()
    states = score(model, collate(), layout, Extras(Need.STATES, layers=(0,))).quantities["states"]
    assert all(
        g is not None for g in torch.autograd.grad(weighed(states), list(model.parameters()), allow_unused=True)
    )


def test_a_scorer_gives_the_reference_states_of_the_role_that_needs_them():
    policy, reference = make_model(seed=0).eval(), make_model(seed=1).eval()
    rows = RowBatch.of(collate())
    loss = parse("rmu(layer=0) + 2.0*rmu_retain(layer=1)")
    batch = Scorer(loss, policy, reference).score(policy, rows, every_role=True).batch
    assert batch.chosen.layers == (0, 1)
    assert batch.rejected.ref_states is None
    extras = Extras(Need.STATES, layers=(0, 1))
    with torch.no_grad():
        expected = score_rows(reference, model_inputs(collate()), collate()["completion_mask"], extras=extras)[0]
    chosen = rows.rows_of(0)
    torch.testing.assert_close(batch.chosen.ref_states, expected.quantities["states"][chosen], rtol=1e-5, atol=1e-5)
    assert float(loss(batch).loss.detach()) > 0
    same = Scorer(parse("rmu_retain(layer=1)"), policy, make_model(seed=0).eval())
    assert float(same.loss(same.score(policy, rows, every_role=False).batch).loss.detach()) < 1e-10


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"layer 7 is asked for, but model.layers has 2, numbered from 0"):
        score(make_model(), collate(), "padded", replace(STATES, layers=(7,)))


def test_nothing_is_kept_unless_asked_for():
    assert all("states" not in score(make_model(), collate(), layout).quantities for layout in LAYOUTS)
