"""The head on scored tokens, a chunk at a time, against the model's own logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prefopt.scoring import score_rows
from tests.gpu.steps import relative


@pytest.mark.parametrize("trained", [True, False], ids=["head trains", "head is frozen"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_chunks_give_what_whole_logits_give(device, note, precision, trained):
    # More positions than one chunk holds: 256 MB of logits on a GPU, 16 MB on a CPU.
    vocabulary, rows, length = (32768, 8, 400) if device == "cuda" else (8192, 4, 200)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        )
    ).to(device)  # fmt: skip
    model.get_output_embeddings().requires_grad_(trained)
    ids = torch.randint(3, vocabulary, (rows, length), device=device)
    mask = torch.ones_like(ids)
    mask[:, :40] = 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def gradient() -> torch.Tensor:
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        scores, _ = score_rows(model, inputs, mask)
    scores.logps.sum().backward()
    mine = gradient()
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(**inputs).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    logps.sum().backward()
    theirs = gradient()
    gaps = {"logps": relative(scores.logps.detach(), logps.detach()), "gradient": relative(mine, theirs)}
    note("gaps", gaps)
    assert len(mine) == len(theirs)
    if precision == "float32":
        assert max(gaps.values()) < 1e-4
    else:
        assert gaps["logps"] < 1e-3
        assert gaps["gradient"] < 0.03
