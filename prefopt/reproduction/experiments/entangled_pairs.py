"""Gradient entanglement (2410.13828) of real pairs: inner products on the bundled pairs and the bundled 135M model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.demo.data import read_rows
from prefopt.models.bundled import resolve_demo_model
from prefopt.reproduction.experiments.outcome import Outcome


def gradient(model: Any, tokenizer: Any, prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> Tensor:
    """(P,) gradient of log pi(answer | prompt) in all parameters."""
    options = {"tokenize": True, "return_dict": False}
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([*prompt, *answer], **options)
    tokens = torch.tensor([whole])
    logps = torch.log_softmax(model(tokens[:, :-1]).logits.float(), -1)
    token_logps = logps.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    value = token_logps[:, len(start) - 1 :].sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def bundled_pairs(count: int = 28) -> list[Outcome]:
    folder = resolve_demo_model(say=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    positive, below, cosines = [], [], []
    for row in read_rows("heldout")[:count]:
        w, l = (gradient(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected"))  # noqa: E741
        inner = float(w @ l)
        positive.append(inner > 0)
        below.append(inner < float(l @ l))
        cosines.append(inner / float(w.norm() * l.norm()))
    shares = [sum(values) / len(values) for values in (positive, below)]
    return [
        Outcome(
            "inner-products-positive",
            f"{shares[0]:.1%} of {len(cosines)} held-out pairs; mean cosine {sum(cosines) / len(cosines):.3f}",
            numbers={"share": [shares[0]]},
        ),
        Outcome(
            "below-rejected-norm",
            f"{shares[1]:.1%} of {len(cosines)} held-out pairs",
            numbers={"share": [shares[1]]},
        ),
    ]
