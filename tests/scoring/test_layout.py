"""The trial of the tree layout: what it finds out, and that it leaves everything as it was."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prefopt.scoring.exact import awake, in_float32, like_others, undisturbed
from prefopt.scoring.layout import Layout
from prefopt.scoring.reach import Reach
from prefopt.scoring.trial import trial_rows
from tests.architectures import SHORT_THEN_LONG, follow, pairs, tiny_model
from tests.tiny import make_model

IN_TREES = ("llama", "qwen2", "qwen3", "gemma", "gpt2", "opt", "olmoe")
WITHIN_WINDOWS = ("gpt_neo", "gemma2", "gemma3_text", "llama4_text", "mistral", "gpt_oss", "phi3")
PADDED = ("deepseek_v4", "granitemoehybrid", "jamba", "lfm2", "bamba", "falcon_h1", "qwen3_next", "mamba")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("architecture", [*IN_TREES, *WITHIN_WINDOWS, *PADDED])
def test_trees_are_used_as_far_as_they_give_the_model_s_own_numbers(architecture, precision):
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = tiny_model(architecture, dtype).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        seen = follow(model, Layout("auto", half=precision != "float32"), SHORT_THEN_LONG)
    rounding = 1e-4 if precision == "float32" else 0.3
    assert all(gap < (rounding if in_trees else 1e-4) for in_trees, gap in seen)
    taken = [in_trees for in_trees, _ in seen]
    if architecture in IN_TREES:
        assert taken == [True, True, True]
    elif architecture in WITHIN_WINDOWS:
        assert taken == [True, False, True]
    else:
        assert taken == [False, False, False]


class HiddenWindow(nn.Module):
    """A model whose tokens see the last places of the row only, which nothing in its configuration says."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.inner, self.window = make_model().eval(), window
        self.inner.set_attn_implementation("eager")
        self.config, self.dtype = self.inner.config, torch.float32

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, use_cache=False):
        length = input_ids.shape[1]
        near = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - self.window)
        mask = torch.zeros(1, 1, length, length).masked_fill(~near, torch.finfo(torch.float32).min)
        if attention_mask.dim() == 4:
            mask = torch.minimum(mask, attention_mask.float())
        return self.inner(
            input_ids, attention_mask=mask, position_ids=position_ids, logits_to_keep=logits_to_keep, use_cache=False
        )


def test_a_window_that_is_named_nowhere_is_found_at_the_rows_that_pass_it(caplog):
    layout = Layout("auto")
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        seen = follow(HiddenWindow(40), layout, SHORT_THEN_LONG)
    assert [in_trees for in_trees, _ in seen] == [True, False, True]
    assert max(gap for _, gap in seen) < 1e-4
    assert caplog.text.count("padded layout for some batches (rows of 100 tokens)") == 1
    with pytest.raises(ValueError, match="layout='tree' cannot be used for rows of 100 tokens"):
        follow(HiddenWindow(40), Layout("tree"), [pairs(6, 8, 100)])


def test_a_threshold_on_places_is_found_by_rows_that_are_short_but_many():
    model = tiny_model("llama4_text", attention_chunk_size=512, attn_temperature_tuning=True, floor_scale=128)
    layout = Layout("auto")
    with torch.no_grad():
        seen = follow(model.eval(), layout, [pairs(20, 21), pairs(*range(30, 44))])
    assert max(gap for _, gap in seen) < 1e-4
    assert seen[0][0]
    assert not seen[1][0]


class SumsUp(nn.Module):
    """An adapter of all tokens before, at zero until it is trained."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.up = base, nn.Linear(base.in_features, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden):
        return self.base(hidden) + self.up(hidden.cumsum(1))


def test_an_adapter_at_zero_is_tried_with_what_it_will_do():
    model = make_model().eval().requires_grad_(False)
    layer = model.model.layers[1].self_attn
    layer.q_proj = SumsUp(layer.q_proj)
    layer.q_proj.up.requires_grad_(True)
    layout = Layout("auto")
    with torch.no_grad():
        seen = follow(model, layout, SHORT_THEN_LONG)
    assert not any(in_trees for in_trees, _ in seen)
    assert "gives other log-probabilities" in layout.reason
    assert not layer.q_proj.up.weight.any()


def test_adapters_that_are_put_aside_are_tried_too():
    """The reference is scored before the policy, with the adapter off."""

    def build() -> Any:
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(make_model().eval(), config)
        lora = model.base_model.model.model.layers[0].self_attn.q_proj
        lora.lora_A["default"].register_forward_hook(lambda module, given, output: output.cumsum(1))
        return model

    model, layout = build(), Layout("auto")
    with torch.no_grad(), model.disable_adapter():
        follow(model, layout, SHORT_THEN_LONG[:1])
    assert "gives other log-probabilities" in layout.reason


def test_a_reference_of_another_kind_is_tried_as_well():
    layout = Layout("auto")
    with torch.no_grad():
        assert follow(make_model().eval(), layout, SHORT_THEN_LONG)[0][0]
        seen = follow(HiddenWindow(40), layout, SHORT_THEN_LONG)
        # Policy and reference are compared in one layout.
        again = follow(make_model().eval(), layout, SHORT_THEN_LONG)
    assert not any(in_trees for in_trees, _ in (*seen, *again))
    assert "HiddenWindow fails on it" in layout.reason


# ---- nothing is left behind ----------------------------------------------------------------------------------------


def state(model: nn.Module) -> tuple[Any, ...]:
    weights = [(n, t.dtype, t.clone(), t.data_ptr()) for n, t in (*model.named_parameters(), *model.named_buffers())]
    modes = [(module.training, "forward" in vars(module), len(module._forward_hooks)) for module in model.modules()]
    return weights, modes, torch.get_rng_state().clone()


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    weights = all(
        (name, dtype, pointer) == (other, kind, place) and torch.equal(tensor, now)
        for (name, dtype, tensor, pointer), (other, kind, now, place) in zip(before[0], after[0], strict=True)
    )
    return weights and before[1] == after[1] and torch.equal(before[2], after[2])


def with_lora() -> nn.Module:
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
    model = get_peft_model(make_model(dtype=torch.bfloat16), config).train()
    model.base_model.model.model.layers[0].eval()  # somebody's own choice
    return model


@pytest.mark.parametrize("fails", [None, "in rows", "in trees"])
def test_weights_modes_and_random_state_are_as_before(fails, monkeypatch):
    model, batch = with_lora(), pairs(8, 9)
    if fails is not None:
        wanted = 2 if fails == "in rows" else 4
        norm = model.base_model.model.model.norm

        def fail(*_: Any) -> None:
            if fail.calls == wanted:  # type: ignore[attr-defined]
                raise MemoryError("stopped here")
            fail.calls += 1  # type: ignore[attr-defined]

        fail.calls = 0  # type: ignore[attr-defined]
        norm.register_forward_hook(fail)
    before = state(model)
    with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
        assert Layout("auto", half=True).in_trees(model, batch)
    assert same(before, state(model))


def test_new_adapters_have_values_and_half_weights_are_float32_in_a_trial():
    model = with_lora()
    lora = model.base_model.model.model.layers[1].self_attn.q_proj
    with undisturbed(model), awake(model), in_float32(model, []):
        assert lora.lora_B["default"].weight.any()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert not lora.lora_B["default"].weight.any()


@pytest.mark.parametrize(("architecture", "layers", "skipped"), [("llama", 6, 4), ("gpt_neo", 8, 4), ("jamba", 2, 0)])
def test_two_layers_of_each_kind_stand_for_all(architecture, layers, skipped):
    options: dict[str, Any] = {"num_hidden_layers": layers}
    if architecture == "gpt_neo":
        options = {"num_layers": layers, "attention_layers": ["global", "local"] * (layers // 2)}
    model = tiny_model(architecture, **options) if architecture != "jamba" else make_model("jamba")
    others = like_others(model)
    assert len(others) == skipped
    layers_of: Callable[[nn.Module], list[nn.Module]] = lambda m: [x for x in m.modules() if x in others]  # noqa: E731
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), in_float32(model, others):
        for layer in layers_of(model):
            hidden = torch.randn(1, 3, 32)
            output = layer(hidden)
            assert torch.equal(output[0] if isinstance(output, tuple) else output, hidden)
        assert model(input_ids=ids).logits.isfinite().all()


def test_trial_rows_are_as_long_as_asked_and_of_the_batch():
    batch = pairs(6, 8)
    for reach in (Reach(64, 128), Reach(7, 500), Reach(40, 42), Reach(2, 2)):
        rows = trial_rows(batch, reach)
        assert rows.rows.shape == (2, reach.row)
        branches = rows.mask.sum(-1)
        assert reach.places <= int(branches.sum()) + rows.prompt - 1 <= max(reach.places, 1.3 * reach.row)
        assert torch.equal(rows.tree[0, : reach.row], rows.rows[0])
        assert torch.equal(rows.tree[-1, : reach.row], rows.rows[1])
        # Every branch begins with a token of its own.
        assert len(set(rows.tree[:, rows.prompt].tolist())) == len(rows.tree)
