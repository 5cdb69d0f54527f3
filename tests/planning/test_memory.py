"""The memory estimate: counts against real models, kept tensors against autograd, states against worked numbers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks

from prefopt.losses import parse
from prefopt.planning.activations import Rows, activations, causal_model, made_up_rows
from prefopt.planning.engines import ENGINES, LIVE_PARAMETERS, REDUCE_BUCKET
from prefopt.planning.memory import estimate
from prefopt.planning.setting import FOUR_BIT, Setting, Sizes, count, of_terms
from prefopt.scoring.adapters import fuse_lora
from prefopt.scoring.attention import NAME as TREE_ATTENTION
from prefopt.scoring.tree import plant, score_trees
from tests.tiny import make_config, make_model

PROMPT, COMPLETION = 40, 12


def lora() -> LoraConfig:
    """A new one each time: PEFT writes the layers' names into it."""
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def real_batch(examples: int = 3) -> dict[str, torch.Tensor]:
    """Pairs of different completions to prompts of 40 tokens, as rows."""
    torch.manual_seed(0)
    prompts = torch.randint(3, 400, (examples, PROMPT)).repeat(2, 1)
    ids = torch.cat([prompts, torch.randint(3, 400, (2 * examples, COMPLETION))], dim=1)
    mask = torch.zeros_like(ids)
    mask[:, PROMPT:] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


def really_kept(model: torch.nn.Module, autocast: bool) -> int:
    """Bytes of what a real scoring of the batch keeps for its backward pass, beside the model's own weights."""
    batch = real_batch()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    model.train()
    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext(),
    ):
        scores, _ = score_trees(model, batch, batch["completion_mask"], masks="packed")
    assert bool(scores.mask.any())
    return sum(seen.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_what_is_counted_on_fake_tensors_is_what_autograd_keeps(architecture, adapted, autocast):
    model = make_model(architecture)
    model.config._attn_implementation = TREE_ATTENTION
    if adapted:
        model = get_peft_model(model, lora())
        fuse_lora(model)
    rows = made_up_rows(3, PROMPT, COMPLETION, 2, padded=False)
    trees = plant(*real_batch().values())
    assert rows.tokens == sum(len(tree.tokens) for tree in trees)
    said = activations(
        make_config(architecture), rows, dtype=torch.float32, autocast=autocast, adapter=lora() if adapted else None
    )
    assert said.counted
    # The head keeps its input, the labels' gradients or the logits, and whatever precision they are cast to.
    head = rows.scored * (400 + 2 * 32) * 4 + 400 * 32 * 4
    kept = said.kept(2, checkpointed=False)
    assert 0.97 * kept <= really_kept(model, autocast) <= 1.03 * kept + head


def test_checkpointed_layers_keep_what_enters_them():
    rows = made_up_rows(3, PROMPT, COMPLETION, 2, padded=False)
    said = activations(make_config(), rows, dtype=torch.float32, autocast=False)
    model = make_model()
    model.config._attn_implementation = TREE_ATTENTION
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = said.kept(2, checkpointed=True)
    head = rows.scored * (400 + 2 * 32) * 4
    assert said.entering == rows.tokens * 32 * 4
    assert 0.9 * kept <= really_kept(model, False) <= 1.1 * kept + head


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "neox", "moe"])
@pytest.mark.parametrize("adapted", [False, True])
def test_parameters_are_those_of_the_real_model(architecture, adapted):
    adapter = lora() if adapted else None
    with torch.device("meta"):
        sizes = count(causal_model(make_config(architecture)), adapter)
    model = make_model(architecture)
    if adapted:
        model = get_peft_model(model, lora())
    assert sizes.total == sum(p.numel() for p in model.parameters())
    assert sizes.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.layers == 2
    assert sizes.tied
    assert 2 * sizes.layer + sizes.outside == sizes.total


def test_a_model_that_takes_no_trees_is_counted_padded_and_one_that_cannot_be_called_by_a_rule(monkeypatch):
    rows = made_up_rows(2, 20, 5, 2, padded=False)
    padded = activations(make_config("gemma2"), rows, dtype=torch.float32, autocast=False)
    assert padded.counted
    assert padded.rows.tokens == 4 * 25
    rule = activations(make_config("jamba"), rows, dtype=torch.float32, autocast=False)
    assert not rule.counted
    llama = make_config("llama")
    counted = activations(llama, rows, dtype=torch.float32, autocast=False)

    def fail(*_):
        raise RuntimeError("no values")

    monkeypatch.setattr("prefopt.planning.activations._kept", fail)
    ruled = activations(llama, rows, dtype=torch.float32, autocast=False)
    assert 0.6 < ruled.layer / counted.layer < 1.5


def test_a_token_budget_lets_the_largest_part_through():
    rows = made_up_rows(8, PROMPT, COMPLETION, 2, padded=False)
    each = PROMPT - 1 + 2 * COMPLETION
    assert rows.within(None) is rows
    part = rows.within(3 * each + 5)
    assert (part.tokens, part.scored) == (3 * each, 3 * 2 * COMPLETION)
    # One tree that is larger goes alone.
    assert rows.within(10).tokens == each
    padded = Rows(None, 16, 52, 16 * COMPLETION).within(4 * 52 + 1)
    assert (padded.tokens, padded.scored) == (4 * 52, 4 * COMPLETION)


# ---- what engines keep ----------------------------------------------------------------------------------------------

FULL = Sizes(
    total=10_000, trainable=10_000, linear=8_000, largest_linear=1_000, layer=2_000, layer_trainable=2_000,
    outside=2_000, outside_trainable=2_000, head=1_500, tied=True, layers=4, vocabulary=100, adapters=False,
)  # fmt: skip
ADAPTED = Sizes(
    total=10_400, trainable=400, linear=8_000, largest_linear=1_000, layer=2_100, layer_trainable=100, outside=2_000,
    outside_trainable=0, head=1_500, tied=True, layers=4, vocabulary=100, adapters=True,
)  # fmt: skip


def parts(sizes: Sizes, engine: str, **setting) -> dict[str, int]:
    rows = made_up_rows(1, 4, 2, 2, padded=False)
    said = activations(make_config(), rows, dtype=torch.float32, autocast=False)
    return estimate(sizes, said, rows.scored, Setting(**setting), engine).parts


@pytest.mark.parametrize(("engine", "weights", "reference", "gradients", "optimizer", "buffers"), [
    ("ddp", 40_000, 40_000, 40_000, 80_000, 40_000),
    ("zero1", 20_000, 20_000, 20_000 + 10_000, 30_000, 2 * REDUCE_BUCKET),
    ("zero2", 20_000, 20_000, 15_000, 30_000, 2 * REDUCE_BUCKET),
    ("zero3", 5_000, 5_000, 15_000, 30_000, 2 * REDUCE_BUCKET + 20_000),
    # float32 shards; two layers and what is outside them gathered in bfloat16, their gradients twice.
    ("fsdp2", 10_000, 10_000, 10_000, 20_000, 8_000 + 4_000 + 16_000),
])  # fmt: skip
def test_full_fine_tuning_in_mixed_precision_on_four(engine, weights, reference, gradients, optimizer, buffers):
    found = parts(FULL, engine, half=True, processes=4)
    assert found["weights"] == weights
    assert found["reference model"] == reference
    assert found["gradients"] == gradients
    assert found["optimizer (AdamW)"] == optimizer
    assert found["buffers"] == buffers


@pytest.mark.parametrize("stage", [2, 3])
def test_the_sum_of_deepspeed_s_states_is_its_own_estimate(stage):
    if stage == 2:
        module = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
        _, theirs = module.estimate_zero2_model_states_mem_needs(FULL.total, 4, cpu_offload=False)
        theirs -= 2 * FULL.total
    else:
        module = pytest.importorskip("deepspeed.runtime.zero.stage3")
        _, theirs, largest = module.estimate_zero3_model_states_mem_needs(FULL.total, 0, 4, cpu_offload=False)
        theirs -= largest
    found = parts(FULL, f"zero{stage}", half=True, processes=4)
    # Theirs are gradients and optimizer; bfloat16 weights come on top.
    assert found["gradients"] + found["optimizer (AdamW)"] == theirs


def test_offloading_leaves_gathered_layers_on_the_device_and_the_rest_in_main_memory():
    rows = made_up_rows(1, 4, 2, 2, padded=False)
    said = activations(make_config(), rows, dtype=torch.float32, autocast=False)
    need = estimate(FULL, said, rows.scored, Setting(half=True, processes=8, nodes=2), "zero3_offload")
    assert not {"weights", "gradients", "optimizer (AdamW)", "reference model"} & set(need.parts)
    # 20 bytes a parameter and 2 of the reference, over two machines.
    assert need.host == 22 * FULL.total // 2


def test_adapters_need_no_reference_and_are_float32_beside_bfloat16_weights():
    found = parts(ADAPTED, "ddp", half=True, dtype=torch.bfloat16)
    assert "reference model" not in found
    assert found["weights"] == 10_000 * 2 + 400 * 4
    assert found["gradients"] == 400 * 4
    assert found["optimizer (AdamW)"] == 2 * 400 * 4
    assert "buffers" not in found


def test_four_bit_weights_are_the_linear_layers():
    found = parts(ADAPTED, "ddp", half=True, dtype=torch.bfloat16, quantized=FOUR_BIT)
    assert found["weights"] == round(8_000 * FOUR_BIT + 2_000 * 2 + 400 * 2)
    assert parts(ADAPTED, "fsdp2", half=True, dtype=torch.bfloat16, quantized=FOUR_BIT, processes=4)[
        "weights"
    ] == pytest.approx(found["weights"] / 4, abs=1)


def test_head_and_layer_take_turns():
    found = parts(FULL, "ddp")
    layer, head = found["a layer going backward"], found["logits, a chunk at a time"]
    assert found["head and layer take turns"] == -min(layer, head)
    # 4 tokens, 100 words: kept logits and two chunks of them; a gradient in float32 and a product of its size.
    assert head == 3 * 4 * 100 * 4 + 2 * 1_500 * 4
    # A tied head's gradient waits while the layers go backward; an untied one's does not.
    untied = parts(Sizes(**{**vars(FULL), "tied": False}), "ddp")
    assert layer - untied["a layer going backward"] == 1_500 * 4
    assert parts(FULL, "ddp", checkpointed=False)["a layer going backward"] == 1_500 * 4 + (layer - 1_500 * 4) / 2


def test_without_a_reference_none_is_counted():
    assert "reference model" not in parts(FULL, "ddp", reference=False)


def test_autocast_holds_its_copies_of_both_models_until_the_forward_pass_ends():
    wide = Sizes(**{**vars(FULL), "linear": 10**7})
    rows = made_up_rows(1, 4, 2, 2, padded=False)
    layer = activations(make_config(), rows, dtype=torch.float32, autocast=False).layer
    name = "autocast's copies of weights"
    assert parts(wide, "ddp", half=True)[name] == 2 * 2 * 10**7 - 2 * layer
    assert parts(wide, "ddp", half=True, checkpointed=False)[name] == 2 * 10**7 - layer
    for other in ({"half": False}, {"half": True, "dtype": torch.bfloat16}):
        assert name not in parts(wide, "ddp", **other)
    assert name not in parts(wide, "zero2", half=True)


def test_activations_go_as_gradients_come_unless_those_are_accumulated():
    kept, once = parts(FULL, "ddp"), parts(FULL, "ddp", accumulates=False)
    assert "freed as gradients come" not in kept
    # All but the head's own, which comes when every activation is still there.
    expected = min(kept["activations"], kept["gradients"] * (1 - 0.15))
    assert once["freed as gradients come"] == pytest.approx(-expected, abs=1)


@pytest.mark.parametrize(("loss", "expected"), [
    ("dpo + sft", 0),
    ("conflict_free(dpo + sft + orpo)", 3 * 400 * 4),
])  # fmt: skip
def test_terms_whose_gradients_are_combined_are_kept_apart(loss, expected):
    setting = of_terms(parse(loss))
    found = parts(ADAPTED, "ddp", half=True, dtype=torch.bfloat16, accumulates=False, **setting)
    assert found.get("terms' gradients", 0) == expected
    # Activations are needed again by the next term's backward pass.
    assert ("freed as gradients come" in found) == ("term_gradients" not in setting)
    whole = parts(FULL, "ddp", dtype=torch.bfloat16, **setting)
    assert whole.get("terms' gradients", 0) == len(setting) * 3 * 10_000 * 2


def test_stage_3_gathers_at_most_what_deepspeed_allows():
    large = Sizes(**{**vars(FULL), "total": 10**10, "trainable": 10**10})
    assert parts(large, "zero3", half=True, processes=4)["buffers"] == 2 * (REDUCE_BUCKET + LIVE_PARAMETERS)


def test_the_engines_are_in_the_order_in_which_they_are_tried():
    assert list(ENGINES) == ["ddp", "zero1", "zero2", "fsdp2", "zero3", "zero3_offload"]
