"""What saves work in a run, and gives the same numbers: a compiled model."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.runs import make_trainer


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tmp_path):
    """What is compiled is left as it is: trees under a plain mask, whole logits. (Backend "eager" traces, no more.)"""
    plain = make_trainer(tmp_path, loss="dpo", max_steps=2)
    compiled = make_trainer(tmp_path, loss="dpo", max_steps=2, torch_compile=True, torch_compile_backend="eager")
    for trainer in (plain, compiled):
        trainer.train()
    assert (plain._scorer.layout.masks, plain._scorer.layout.call.chunked_head) == ("packed", True)
    assert (compiled._scorer.layout.masks, compiled._scorer.layout.call.chunked_head) == (torch.bool, False)
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    for mine, theirs in zip(compiled.state.log_history[:2], plain.state.log_history[:2], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_trained_model_has_its_own_attention_again(tmp_path):
    trainer = make_trainer(tmp_path, loss="dpo", max_steps=1)
    trainer.train()
    assert trainer._scorer.layout.masks == "packed"
    assert trainer.model.config._attn_implementation == "sdpa"
    assert trainer.ref_model.config._attn_implementation == "sdpa"
