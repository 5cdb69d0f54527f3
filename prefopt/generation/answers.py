"""Greedy answers of a model in memory to a list of prompts. Imports torch alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Answer:
    """One greedy answer; `ended` is False if it reached the token limit."""

    text: str
    ended: bool


@torch.inference_mode()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int = 48, batch_size: int = 24
) -> list[Answer]:
    """Answer each prompt greedily, in left-padded batches of similar length; returns them in order."""
    chats = [
        [{"role": "user", "content": p}] if isinstance(p, str) else [dict(message) for message in p] for p in prompts
    ]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    answers: list[Answer | None] = [None] * len(texts)
    side, training = tokenizer.padding_side, model.training
    tokenizer.padding_side = "left"
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            batch = [texts[i] for i in rows]
            # The template already has the special tokens.
            inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
            out = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = out[:, inputs["input_ids"].shape[1] :].tolist()
            for i, tokens in zip(rows, new, strict=True):
                answers[i] = _read_answer(tokenizer, tokens)
    finally:
        tokenizer.padding_side = side
        model.train(training)
    return [answer for answer in answers if answer is not None]


def _read_answer(tokenizer: Any, tokens: list[int]) -> Answer:
    ended = tokenizer.eos_token_id in tokens
    if ended:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return Answer(tokenizer.decode(tokens, skip_special_tokens=True).strip(), ended)
