"""Attention cut along the branches of packed trees, against a mask over the whole row."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import flex_attention

from prefopt.scoring import score_rows
from prefopt.scoring.attention import NAME, Plan, block_mask, decode, encode, is_code, tree_attention
from prefopt.scoring.tree import score_trees
from tests.scoring.test_tree import close, collate, gradient, model_inputs
from tests.tiny import make_model

PLANS = {
    "a pair": Plan(((0, 4),), (((4, 7), (7, 9)),)),
    "two trees": Plan(((0, 4), (9, 11)), (((4, 7), (7, 9)), ((11, 12), (12, 15), (15, 19)))),
    "no trunk": Plan(((0, 0), (5, 6)), (((0, 3), (3, 5)), ((6, 8),))),
}


def seen(plan: Plan) -> torch.Tensor:
    """(T, T) bool, what each token attends to, written out."""
    length = plan.branches[-1][-1][1]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for trunk, branches in zip(plan.trunks, plan.branches, strict=True):
        for span in (trunk, *branches):
            for query in range(*span):
                mask[query, trunk[0] : min(trunk[1], query + 1)] = True
                mask[query, span[0] : query + 1] = True
    return mask


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("groups", [1, 3])
def test_equals_a_mask_over_the_row(plan, groups):
    torch.manual_seed(0)
    mask = seen(plan)
    module = nn.Module()
    module.num_key_value_groups = groups
    query = torch.randn(1, 6, len(mask), 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 6 // groups, len(mask), 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    wide = [x.repeat_interleave(groups, dim=1) for x in (key, value)]
    expected = scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=0.3).transpose(1, 2)
    got, _ = tree_attention(module, query, key, value, encode(plan, torch.device("cpu")), scaling=0.3)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(expected)
    mine = torch.autograd.grad((got * weights).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_survives_as_plain_numbers(plan):
    code = encode(plan, torch.device("cpu"))
    assert is_code(code)
    assert decode(code) is plan
    assert decode(code.clone()) == plan  # a copy has no attributes


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_block_masks_say_the_same(plan):
    mask = seen(plan)
    made = block_mask(plan, torch.device("cpu"))
    index = torch.arange(len(mask))
    got = made.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
    assert torch.equal(got, mask)


def test_ordinary_masks_are_plain_attention():
    for mask in (None, torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(), torch.zeros(2, 1, 5, 5)):
        assert not is_code(mask)
    model = make_model().eval()
    ids = torch.randint(5, 300, (2, 9))
    padded = torch.ones_like(ids)
    padded[1, 6:] = 0
    before = model(input_ids=ids, attention_mask=padded).logits
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=padded).logits, before)
    drawn = [model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)]
    model.set_attn_implementation("sdpa")
    drawn.append(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
    assert torch.equal(*drawn)


def test_models_with_it_are_saved_and_copied_as_before(tmp_path):
    model = make_model()
    model.set_attn_implementation(NAME)
    copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_flex_attention_scores_packed_rows(monkeypatch):
    # Uncompiled, so that the test needs no compiler.
    monkeypatch.setattr(
        flex_attention, "compile_friendly_flex_attention",
        lambda query, key, value, training, **options: torch_flex_attention(query, key, value, **options),
    )  # fmt: skip
    model = make_model().eval()
    batch = collate()
    inputs, mask = model_inputs(batch), batch["completion_mask"]
    expected, _ = score_rows(model, inputs, mask)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():  # it has no backward pass on a CPU
        scores, _ = score_trees(model, inputs, mask, masks="block")
    torch.testing.assert_close(scores.logps, expected.logps, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_find_their_plan_again(reentrant):
    model = make_model()
    model.train()
    batch = collate()
    inputs, mask = model_inputs(batch), batch["completion_mask"]
    expected, _ = score_rows(model, inputs, mask)
    expected_gradient = gradient(model, expected)
    model.set_attn_implementation(NAME)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    scores, _ = score_trees(model, inputs, mask, masks="packed")
    weights = torch.linspace(0.5, 1.5, scores.logps.numel()).reshape(scores.logps.shape)
    (scores.logps * weights).sum().backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert close(got, expected_gradient)
