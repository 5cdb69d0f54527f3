"""Greedy answers of a model in memory to a list of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.data.tokenize import tokenize_row
from prefopt.safety.errors import UsageError

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
    """Answer each prompt greedily, in left-padded batches of similar length; returns them in order.

    Args:
        model: in memory, with a `generate` method.
        tokenizer: the model's.
        prompts: messages, or a text: what a user says, or the text to continue if the tokenizer has no chat template.
        max_new_tokens: maximum length of an answer.
        batch_size: prompts at once.
    """
    texts = _texts(prompts, tokenizer)
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    answers: list[Answer | None] = [None] * len(texts)
    side, training = tokenizer.padding_side, model.training
    tokenizer.padding_side = "left"
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            inputs = _inputs([texts[i] for i in rows], tokenizer).to(model.device)
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


def _has_template(tokenizer: Any) -> bool:
    # What has only the method has a template of its own.
    return bool(getattr(tokenizer, "chat_template", True))


def _texts(prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    if not _has_template(tokenizer):
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts):
            raise UsageError("the tokenizer has no chat template, so prompts must be texts, not messages")
        return texts
    chats = [
        [{"role": "user", "content": p}] if isinstance(p, str) else [dict(message) for message in p] for p in prompts
    ]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]


def _inputs(texts: list[str], tokenizer: Any) -> Any:
    if _has_template(tokenizer):
        # The template already has the special tokens.
        return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    # As in training: some tokenizers end every text, which is not part of a prompt.
    rows = [tokenize_row({"prompt": text, "completion": ""}, tokenizer)["prompt_ids"] for text in texts]
    return tokenizer.pad({"input_ids": rows}, return_tensors="pt")


def _read_answer(tokenizer: Any, tokens: list[int]) -> Answer:
    ended = tokenizer.eos_token_id in tokens
    if ended:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return Answer(tokenizer.decode(tokens, skip_special_tokens=True).strip(), ended)
