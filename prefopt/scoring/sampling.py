"""Completions sampled from the policy during training, for objectives with a `sampled` role.

Plain sampling at temperature 1 from the whole distribution, as the estimates of such objectives are valid only for
that. Imports torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from prefopt.losses.scores import Role
from prefopt.scoring.rows import RowBatch


def prompts_of(rows: RowBatch) -> list[Tensor]:
    """The prompt of each example, token ids without padding."""
    in_prompt = rows.attention.bool() & ~rows.completion.bool()
    own = rows.roles != Role.MISMATCHED
    prompts = []
    for example in range(int(rows.examples.max()) + 1):
        row = int((own & (rows.examples == example)).nonzero()[0])
        prompts.append(rows.ids[row][in_prompt[row]])
    return prompts


@torch.no_grad()
def with_samples(
    rows: RowBatch, model: Any, max_new_tokens: int, pad_token_id: int, eos_token_id: int | list[int]
) -> RowBatch:
    """The batch with one completion per example drawn from the model, as rows of the `sampled` role.

    Args:
        rows: a batch of `PreferenceCollator`.
        model: with a `generate` method, in its training state of weights; dropout is off while it draws.
        max_new_tokens: maximum length of a completion.
        pad_token_id: fills rows up.
        eos_token_id: ends a completion and is part of it.
    """
    prompts = prompts_of(rows)
    longest = max(len(prompt) for prompt in prompts)
    pad = torch.nn.functional.pad
    ids = torch.stack([pad(prompt, (longest - len(prompt), 0), value=pad_token_id) for prompt in prompts])
    attended = torch.stack([pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts])
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    was_training = model.training
    model.eval()
    try:
        drawn = model.generate(input_ids=ids, attention_mask=attended, generation_config=config)[:, longest:]
    finally:
        model.train(was_training)
    ends = torch.isin(drawn, torch.tensor(eos_token_id, device=drawn.device))
    completions = []
    for completion, end in zip(drawn, ends, strict=True):
        length = int(end.nonzero()[0]) + 1 if bool(end.any()) else len(completion)
        completions.append(completion[:length])
    return rows.append(prompts, completions, pad_token_id)
