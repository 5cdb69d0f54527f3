"""What saves work in a run, and gives the same numbers: frozen layers that are computed once, a compiled model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from tests.tiny import make_model
from tests.trainer.runs import make_trainer


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tmp_path):
    """What is compiled is left as it is: trees under a plain mask, whole logits. (Backend "eager" traces, no more.)"""
    plain = make_trainer(tmp_path, loss="dpo", max_steps=2)
    compiled = make_trainer(tmp_path, loss="dpo", max_steps=2, torch_compile=True, torch_compile_backend="eager")
    for trainer in (plain, compiled):
        trainer.train()
    assert (plain._layout.masks, plain._layout.call.chunked_head) == ("packed", True)
    assert (compiled._layout.masks, compiled._layout.call.chunked_head) == (torch.bool, False)
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    for mine, theirs in zip(compiled.state.log_history[:2], plain.state.log_history[:2], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_adapters_on_upper_layers_share_the_lower_ones_with_the_reference(tmp_path):
    runs = []
    for layout in ("tree", "padded"):
        adapter = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", layers_to_transform=[1])
        trainer = make_trainer(
            tmp_path, loss="dpo", max_steps=3, seed=1, layout=layout, trainer_options={"peft_config": adapter}
        )
        shared = trainer._layout.call.frozen
        assert shared.depth == 1
        if layout == "padded":
            trainer._layout.call.frozen = None
        trainer.train()
        assert shared.reused == (3 if layout == "tree" else 0)
        runs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    for mine, theirs in zip(*runs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_previous_model_shares_nothing(tmp_path):
    """Its lower layers are its own, whatever policy and reference have in common."""
    previous = make_model(seed=5)
    runs = []
    for layout in ("tree", "padded"):
        adapter = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", layers_to_transform=[1])
        options = {"peft_config": adapter, "previous_model": previous}
        trainer = make_trainer(tmp_path, loss="inpo", max_steps=2, layout=layout, trainer_options=options)
        if layout == "padded":
            trainer._layout.call.frozen = None
        trainer.train()
        runs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    for mine, theirs in zip(*runs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_trained_model_has_its_own_attention_again(tmp_path):
    trainer = make_trainer(tmp_path, loss="dpo", max_steps=1)
    trainer.train()
    assert trainer._layout.masks == "packed"
    assert trainer.model.config._attn_implementation == "sdpa"
    assert trainer.ref_model.config._attn_implementation == "sdpa"
