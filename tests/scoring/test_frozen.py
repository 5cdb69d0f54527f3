"""Layers that policy and reference share, computed once."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import GPTJConfig, GPTJForCausalLM

from prefopt.scoring.frozen import FrozenLayers, frozen_depth, same_below
from prefopt.scoring.layout import Layout
from tests.scoring.test_tree import collate, model_inputs
from tests.tiny import make_model


def with_lora(layers: list[int] | None, **options):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", layers_to_transform=layers, **options)
    return get_peft_model(make_model(), config)


def test_depth_is_that_of_the_lowest_layer_that_differs():
    assert frozen_depth(with_lora([1])) == 1
    assert frozen_depth(with_lora(None)) == 0
    assert frozen_depth(with_lora([0])) == 0
    assert frozen_depth(make_model()) == 0


def test_whatever_is_trained_before_the_layers_counts():
    assert frozen_depth(with_lora([1], modules_to_save=["embed_tokens"])) == 0
    assert frozen_depth(with_lora([1], modules_to_save=["lm_head"])) in (0, 1)
    prompts = get_peft_model(make_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert frozen_depth(prompts) == 0


def test_dropout_makes_two_passes_differ():
    model = with_lora([1])
    model.get_base_model().config.attention_dropout = 0.1
    assert frozen_depth(model) == 0
    assert frozen_depth(with_lora([1], lora_dropout=0.1)) == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "neox", "phi"])
def test_full_models_with_frozen_lower_layers(architecture):
    model = make_model(architecture)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("layers.1.", "h.1.")))
    for module in model.modules():  # as TRL does
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    assert frozen_depth(model) == 1
    other = copy.deepcopy(model)
    assert same_below(model, other, 1)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    assert not same_below(model, other, 1)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_the_second_call_takes_what_the_first_computed(checkpointing):
    model = with_lora([1], init_lora_weights=False)
    model.train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    arguments = {"input_ids": torch.arange(5, 29).reshape(2, 12)}
    inner = model.get_base_model()
    calls = []
    inner.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(0))

    def logits() -> torch.Tensor:
        with shared.around(inner, arguments):
            return model(**arguments).logits

    def gradient(values: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (values * torch.linspace(-1, 1, values.numel()).reshape(values.shape)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    shared = FrozenLayers(1)
    expected = gradient(model(**arguments).logits)
    calls.clear()
    with torch.no_grad(), model.disable_adapter():
        reference = logits()
    assert len(calls) == 1
    assert shared.reused == 0
    policy = logits()
    assert shared.reused == 1
    torch.testing.assert_close(gradient(policy), expected)
    assert len(calls) == 1
    assert float((policy - reference).abs().max()) > 1e-3
    shared.clear()
    with torch.no_grad():
        logits()
    assert len(calls) == 2


def test_layers_that_are_unfrozen_later_are_computed():
    model, shared = with_lora([1], init_lora_weights=False), FrozenLayers(1)
    inner, arguments = model.get_base_model(), {"input_ids": torch.arange(5, 29).reshape(2, 12)}
    with torch.no_grad(), shared.around(inner, arguments):
        model(**arguments)
    inner.model.layers[0].requires_grad_(True)
    with shared.around(inner, arguments):
        model(**arguments).logits.sum().backward()
    assert shared.reused == 0
    assert inner.model.layers[0].mlp.up_proj.weight.grad is not None


def test_layers_that_give_tuples():
    config = GPTJConfig(
        vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTJForCausalLM(config).eval()
    model.requires_grad_(False)
    shared, arguments = FrozenLayers(1), {"input_ids": torch.arange(5, 29).reshape(2, 12)}
    with torch.no_grad():
        expected = model(**arguments).logits
        for _ in range(2):
            with shared.around(model, arguments):
                torch.testing.assert_close(model(**arguments).logits, expected)
    assert shared.reused == 1


class Wrong(FrozenLayers):
    """Hands on something else than was kept."""

    @staticmethod
    def _passing_on(kept, layers):
        return FrozenLayers._passing_on(kept + 1, layers)


@pytest.mark.parametrize(("kind", "holds"), [(FrozenLayers, True), (Wrong, False)])
def test_what_does_not_hold_is_found_out(kind, holds, monkeypatch):
    monkeypatch.setattr("prefopt.scoring.layout.FrozenLayers", kind)
    layout, batch = Layout("auto", frozen=kind(1)), collate()
    layout.score(make_model().eval().requires_grad_(False), batch, model_inputs(batch))
    assert (layout.call.frozen is not None) == holds
