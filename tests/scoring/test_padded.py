"""The padded layout against the plain forward pass, row by row, and through wrappers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from prefopt.scoring import score_rows
from prefopt.scoring.call import Call
from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.model import takes_logits_to_keep
from tests.tiny import make_model

EXAMPLES = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2]},
    {"prompt_ids": [5], "chosen_ids": [2], "rejected_ids": [30, 31, 32, 33, 34, 2]},
]
MODEL_INPUTS = ("input_ids", "attention_mask")


def one_by_one(model, batch) -> torch.Tensor:
    """Sums from each row alone, unpadded, over full logits."""
    sums = []
    for ids, scored, real in zip(batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True):
        ids, scored = ids[real.bool()], scored[real.bool()]
        logps = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
        sums.append((logps.gather(-1, ids[1:, None]).squeeze(-1) * scored[1:]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "moe", "gpt2"])
def test_equals_each_row_alone(architecture):
    model = make_model(architecture).eval()
    batch = PreferenceCollator(pad_token_id=0)(EXAMPLES)
    scores, _ = score_rows(model, {k: batch[k] for k in MODEL_INPUTS}, batch["completion_mask"])
    expected = one_by_one(model, batch)
    torch.testing.assert_close(scores.logps.sum(-1), expected, atol=2e-5, rtol=1e-5)
    mine = torch.autograd.grad(scores.logps.sum(), model.get_input_embeddings().weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected.sum(), model.get_input_embeddings().weight)[0]
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


def test_logits_are_computed_from_the_first_completion_on():
    model = make_model()
    batch = PreferenceCollator(pad_token_id=0)([{**EXAMPLES[0], "prompt_ids": list(range(5, 45))}])
    inputs = {k: batch[k] for k in MODEL_INPUTS}
    assert takes_logits_to_keep(model)
    _, windowed = score_rows(model, inputs, batch["completion_mask"], call=Call(chunked_head=False))
    _, full = score_rows(model, inputs, batch["completion_mask"], all_logits=True)
    assert windowed.logits.shape[1] == 4
    assert full.logits.shape[1] == 43


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "prompt tuning"],
)
def test_adapters_score_the_same_with_and_without_the_window(adapter):
    model = get_peft_model(make_model(), adapter).eval()
    batch = PreferenceCollator(pad_token_id=0)(EXAMPLES)
    inputs = {k: batch[k] for k in MODEL_INPUTS}
    windowed, _ = score_rows(model, inputs, batch["completion_mask"])
    full, _ = score_rows(model, inputs, batch["completion_mask"], all_logits=True)
    torch.testing.assert_close(windowed.logps, full.logps)
    assert windowed.logps.shape == (4, batch["input_ids"].shape[1] - 1)


def test_rows_without_a_completion_score_zero():
    model = make_model().eval()
    batch = PreferenceCollator(pad_token_id=0, max_length=3)([EXAMPLES[0]])
    scores, _ = score_rows(model, {k: batch[k] for k in MODEL_INPUTS}, batch["completion_mask"])
    assert scores.logps.sum() == 0
    assert not scores.mask.any()
