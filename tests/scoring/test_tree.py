"""The tree layout against the padded one: the same log-probabilities, the same gradients, on every architecture."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt.losses import Need
from prefopt.losses.divergences import named
from prefopt.scoring import Extras, score_rows
from prefopt.scoring.call import Call
from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.layout import Layout
from prefopt.scoring.model import is_checkpointed
from prefopt.scoring.rows import RowBatch
from prefopt.scoring.tree import group, plant, score_trees
from tests.losses.test_divergences import EVERY
from tests.tiny import make_model

EXAMPLES = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2]},
    {
        "prompt_ids": [5],
        "chosen_ids": [2],
        "rejected_ids": [30, 31, 32, 33, 34, 2],
    },  # a one-token prompt and completion
    {"prompt_ids": list(range(20, 60)), "chosen_ids": [40, 41, 2], "rejected_ids": [40, 41, 2]},  # equal completions
    {"prompt_ids": [], "chosen_ids": [12, 13, 2], "rejected_ids": [14, 2]},  # no prompt at all
]
NEEDS = (
    Need.TOP_K | Need.COLLISION | Need.OTHERS | Need.PEAK | Need.FORWARD_KL | Need.REVERSE_KL | Need.DIVERGENCE
    | Need.HIDDEN
)  # fmt: skip
EXTRAS = Extras(NEEDS, top_k=3, divergences=tuple(map(named, EVERY)))
QUANTITIES = (
    "token_collision", "token_others", "token_peak", "token_forward_kl", "token_reverse_kl", "ref_token_entropy",
    "top_logps", "token_divergences", "hidden", "prompt_hidden",
)  # fmt: skip


def collate(examples: Any = EXAMPLES, **options: Any) -> dict[str, Any]:
    return PreferenceCollator(pad_token_id=0, **options)(examples)


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def gradient(model: torch.nn.Module, scores: Any) -> torch.Tensor:
    """Of a sum in which every token counts differently."""
    of = scores.quantities
    weights = torch.linspace(0.5, 1.5, scores.logps.numel()).reshape(scores.logps.shape)
    total = (scores.logps * weights).sum()
    if "token_forward_kl" in of:
        total = total + (of["token_forward_kl"] * weights).sum() - (of["top_logps"].sum(-1) * weights).sum()
        ramp = torch.linspace(-0.5, 1.5, of["hidden"].numel()).reshape(of["hidden"].shape)
        total = total + (of["token_divergences"] * weights.unsqueeze(-1)).sum()
        total = total + (of["hidden"] * ramp).sum() + (of["prompt_hidden"].square() * ramp).sum()
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat(
        [part.flatten() for part in torch.autograd.grad(total, leaves, allow_unused=True) if part is not None]
    )


def close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((mine - theirs).norm() / theirs.norm()) < 1e-5


MASKS: dict[str, Any] = {"sdpa": torch.bool, "eager": torch.float32, "tree_sdpa": "packed"}
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi", "phi3", "gpt2", "neox", "moe"]


@pytest.mark.parametrize(
    ("architecture", "attention"),
    # Gemma 2 caps its attention scores, which SDPA cannot.
    [*((name, kind) for name in ARCHITECTURES for kind in MASKS), ("gemma2", "eager")],
)
@pytest.mark.parametrize("tokens", [None, 1])
def test_equals_the_padded_layout(architecture, attention, tokens):
    model = make_model(architecture).eval()
    model.set_attn_implementation(attention)
    batch = collate(mismatched=True)
    inputs, mask = model_inputs(batch), batch["completion_mask"]
    options = {"output_router_logits": False} if architecture == "moe" else {}
    padded, _ = score_rows(model, {**inputs, **options}, mask)
    trees, _ = score_trees(model, inputs, mask, tokens=tokens, model_options=options, masks=MASKS[attention])
    assert torch.equal(trees.mask, padded.mask)
    torch.testing.assert_close(trees.logps, padded.logps, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(trees.entropy, padded.entropy, rtol=1e-5, atol=2e-5)
    assert torch.equal(trees.is_top1, padded.is_top1)
    assert close(gradient(model, trees), gradient(model, padded))


def test_extras_equal_those_of_the_padded_layout():
    policy, reference = make_model(seed=0).eval(), make_model(seed=1).eval()
    batch = collate()
    inputs, mask = model_inputs(batch), batch["completion_mask"]
    results = []
    for score in (score_rows, score_trees):
        with torch.no_grad():
            frozen, _ = score(reference, inputs, mask, keep_logits=True)
        results.append(score(policy, inputs, mask, extras=EXTRAS, reference=frozen)[0])
    padded, trees = results
    for name in ("logps", "entropy"):
        torch.testing.assert_close(getattr(trees, name), getattr(padded, name), rtol=1e-4, atol=2e-5, msg=name)
    for name in QUANTITIES:
        mine, theirs = trees.quantities[name], padded.quantities[name]
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5, msg=name)
    assert torch.equal(trees.quantities["top_ids"], padded.quantities["top_ids"])
    assert close(gradient(policy, trees), gradient(policy, padded))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_and_checkpointing(checkpointing):
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_model(), config)
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = collate()
    inputs, mask = model_inputs(batch), batch["completion_mask"]
    padded, trees = (score(model, inputs, mask)[0] for score in (score_rows, score_trees))
    torch.testing.assert_close(trees.logps, padded.logps, rtol=1e-5, atol=2e-5)
    assert close(gradient(model, trees), gradient(model, padded))


def test_a_prompt_is_computed_once_for_all_its_completions():
    batch = collate(EXAMPLES[:1], mismatched=False)
    (tree,) = plant(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    assert tree.tokens == [5, 6, 7, 8, 9, 10, 8, 11]
    assert tree.positions == [0, 1, 2, 3, 4, 5, 3, 4]
    assert tree.branches == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [token for _, _, token in tree.targets] == [9, 10, 2, 11, 2]


def test_moved_completions_join_the_tree_of_the_prompt_they_are_moved_to():
    batch = collate(EXAMPLES[:2], mismatched=True)
    trees = plant(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    assert len(trees) == 2
    assert all(max(tree.branches) == 4 for tree in trees)


def test_trees_that_go_together_are_alike_and_few():
    lengths = [100, 98, 95, 40, 39, 8]
    trees = []
    for length in lengths:
        batch = collate([{"prompt_ids": list(range(5, 3 + length)), "chosen_ids": [1, 2], "rejected_ids": [3]}])
        trees += plant(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    groups = group(trees, tokens=250)
    assert sorted(len(tree.tokens) for together in groups for tree in together) == sorted(lengths)
    assert [len(together) for together in groups] == [2, 1, 2, 1]
    assert group(trees, tokens=None) == [trees]
    assert group([], tokens=None) == []


def test_rows_without_a_completion_score_nothing():
    batch = collate([{"prompt_ids": [5, 6, 7], "chosen_ids": [], "rejected_ids": []}])
    scores, _ = score_trees(make_model(), model_inputs(batch), batch["completion_mask"])
    assert not scores.mask.any()
    assert float(scores.logps.sum()) == 0


# ---- which layout --------------------------------------------------------------------------------------------------


def chosen_layout(model: torch.nn.Module, name: Any = "auto", **options: Any) -> tuple[Any, Layout]:
    layout = Layout(name, **options)
    batch = collate()
    return layout.score(model, RowBatch.of(batch))[0], layout


def test_auto_takes_the_tree_layout_where_it_holds():
    scores, layout = chosen_layout(make_model().eval())
    assert layout.masks == "packed"
    batch = collate()
    expected, _ = score_rows(make_model().eval(), model_inputs(batch), batch["completion_mask"])
    torch.testing.assert_close(scores.logps, expected.logps, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("mamba", "does not take position_ids"), ("jamba", "gives other log-probabilities|fails on it|does not take")],
)
def test_models_with_a_state_fall_back_and_say_why(architecture, why, caplog):
    model = make_model(architecture).eval()
    with caplog.at_level(logging.WARNING):
        scores, layout = chosen_layout(model)
    assert layout.masks is None
    assert "padded layout" in caplog.text
    batch = collate()
    expected, _ = score_rows(model, model_inputs(batch), batch["completion_mask"])
    torch.testing.assert_close(scores.logps, expected.logps)
    with pytest.raises(ValueError, match=f"layout='tree' cannot be used here: .*({why})"):
        chosen_layout(model, "tree")


def test_a_model_that_ignores_its_mask_is_found_out():
    class Forgetful(torch.nn.Module):
        """Passes everything on but the mask."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model().eval()
            self.config, self.dtype = self.inner.config, torch.float32

        def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, use_cache=False):
            return self.inner(input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep)

    _, layout = chosen_layout(Forgetful())
    assert "gives other log-probabilities" in layout.reason


def test_the_first_batch_too_is_scored_as_the_trial_found_right(monkeypatch):
    model = make_model().eval()
    forward = model.forward

    def scaled(*arguments, **keywords):
        """What follows the head is no part of it, so its values cannot be read off there."""
        output = forward(*arguments, **keywords)
        return type(output)(logits=2 * output.logits)

    monkeypatch.setattr(model, "forward", functools.wraps(forward)(scaled))
    scores, layout = chosen_layout(model)
    assert not layout.call.chunked_head
    batch = collate()
    expected, _ = score_rows(model, model_inputs(batch), batch["completion_mask"], call=Call(chunked_head=False))
    torch.testing.assert_close(scores.logps, expected.logps, rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_padded_layout_asks_transformers_for_nothing_that_it_is_about_to_drop():
    scores, _ = chosen_layout(make_model().eval(), "padded")
    assert bool(scores.mask.any())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_computes_layers_again_is_known():
    model = make_model()
    assert not is_checkpointed(model)
    model.gradient_checkpointing_enable()
    assert is_checkpointed(model)


def test_rows_beyond_a_sliding_window_are_padded():
    model = make_model("mistral").eval()
    window = model.config.sliding_window
    layout = Layout("auto")
    long = [{"prompt_ids": [5 + i % 300 for i in range(window + 5)], "chosen_ids": [9, 2], "rejected_ids": [11, 2]}]
    for examples in ([*long, *EXAMPLES[:2]], EXAMPLES[:2], long):
        batch = collate(examples)
        scores, _ = layout.score(model, RowBatch.of(batch))
        expected, _ = score_rows(model, model_inputs(batch), batch["completion_mask"])
        torch.testing.assert_close(scores.logps, expected.logps, rtol=1e-5, atol=2e-5)
        # Some models ask for their attention by name; what it is in trees is not left behind.
        assert model.config._attn_implementation == ("tree_sdpa" if len(examples) == 2 else "sdpa")
    assert layout.masks == "packed"


def test_every_process_takes_the_layout_that_all_can():
    _, layout = chosen_layout(make_model().eval(), gather=lambda found: [found, "another process cannot"])
    assert layout.masks is None
    assert layout.reason == "another process cannot"
    assert not layout.call.chunked_head
