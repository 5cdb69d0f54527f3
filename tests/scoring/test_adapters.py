"""LoRA layers that compute in one go, against PEFT's own."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt.scoring.adapters import fuse_lora
from tests.tiny import make_model
from tests.tolerance import rounding


def make_policy(**options):
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return get_peft_model(make_model("qwen2"), config)  # its projections have biases


def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(5, 29).reshape(2, 12)
    logits = model(input_ids=ids).logits
    loss = (logits * torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)).sum()
    leaves = [p for p in model.parameters() if p.requires_grad]
    return logits.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])


OPTIONS = [{}, {"use_rslora": True, "r": 3}, {"lora_dropout": 0.5}, {"use_dora": True}, {"bias": "lora_only"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_numbers(options):
    model = make_policy(**options)
    torch.manual_seed(1)
    expected = outputs(model)
    assert fuse_lora(model) == 14
    torch.manual_seed(1)
    for mine, theirs in zip(outputs(model), expected, strict=True):
        # The products of fourteen layers follow one another, and gradients of a hundred are among them.
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=rounding(float(theirs.abs().max()), terms=14))


def test_what_it_does_not_apply_to_is_left_to_peft():
    model = make_policy()
    ids = torch.arange(5, 17).reshape(1, 12)
    fuse_lora(model)
    with model.disable_adapter(), torch.no_grad():
        off = model(input_ids=ids).logits
    torch.testing.assert_close(off, make_model("qwen2")(input_ids=ids).logits)
    with torch.no_grad():
        on = model(input_ids=ids).logits
        assert float((on - off).abs().max()) > 1e-3
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids).logits, on, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=ids).logits.sum().backward()


def test_a_fused_layer_is_used(monkeypatch):
    model = make_policy()
    fuse_lora(model)
    ids = torch.arange(5, 17).reshape(1, 12)
    names = []
    node = model(input_ids=ids).logits.grad_fn
    todo, done = [node], set()
    while todo:
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        names.append(type(node).__name__)
        todo += [inner for inner, _ in node.next_functions]
    assert sum("LoraProduct" in name for name in names) == 14


def test_a_layer_in_somebody_elses_care_is_left_alone():
    model = make_policy()
    layer = next(m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A"))
    own = layer.forward = lambda x: layer.base_layer(x)
    assert fuse_lora(model) == 13
    assert layer.forward is own
