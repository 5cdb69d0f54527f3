"""Runs of models that trees suit in short rows only, or not at all: they learn what the padded layout learns."""

from __future__ import annotations

import pytest

from tests.architectures import tiny_model
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_trainer


@pytest.mark.parametrize(
    ("architecture", "half"), [("gpt_neo", False), ("llama4_text", False), ("granitemoehybrid", True)]
)
def test_the_run_is_that_of_the_padded_layout(tmp_path, architecture, half):
    path = tmp_path / architecture
    tiny_model(architecture).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    runs = []
    for layout in ("padded", "auto"):
        trainer = make_trainer(
            tmp_path, loss="dpo", model=str(path), layout=layout, max_steps=2, bf16=half, router_aux_loss_coef=0.0
        )
        trainer.train()
        runs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    assert "gives other log-probabilities" in trainer._scorer.layout.reason
    for mine, theirs in zip(*runs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
