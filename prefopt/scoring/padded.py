"""The plain layout: one padded row per completion, its prompt included.

It serves every architecture, adapter and modality, because it is what a model expects. The model is always called
through the wrapper it is given (DDP, DeepSpeed, PEFT); nothing reaches around it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from prefopt.scoring.logprobs import NOTHING, Extras, TokenScores, token_scores


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DeepSpeed and PEFT wrappers, for looking at; it is called through them."""
    while isinstance(getattr(model, "module", None), nn.Module):  # DDP, DeepSpeed
        model = model.module  # type: ignore[assignment]
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()  # type: ignore[operator]
    return model


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model can be told to compute logits for the last positions only."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


def score_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    completion_mask: Tensor,
    *,
    extras: Extras = NOTHING,
    reference: TokenScores | None = None,
    keep_logits: bool = False,
    all_logits: bool = False,
) -> tuple[TokenScores, Any]:
    """Score the completion tokens of padded rows.

    Args:
        model: a causal language model, wrapped or not.
        inputs: its keyword arguments, `input_ids` (R, T) among them.
        completion_mask: (R, T), true at completion tokens.
        extras: what to compute besides log-probabilities.
        reference: the reference's scores of the same rows with their logits, for extras that compare distributions.
        keep_logits: hand the logits of the scored window on with the scores.
        all_logits: keep the logits of every position in the model's output (an evaluation metric may want them).

    Returns:
        Token scores of shape (R, T - 1), position t standing for token t + 1, and the model's output.
    """
    labels, mask = inputs["input_ids"][:, 1:], completion_mask[:, 1:].bool()
    kwargs = {**inputs, "use_cache": False}
    # The head of a small model with a large vocabulary is a fifth of the work: skip the positions before the first
    # completion token of the batch.
    first = int(mask.any(dim=0).float().argmax()) if bool(mask.any()) else max(mask.shape[1] - 1, 0)
    window = mask.shape[1] - first
    if not all_logits and takes_logits_to_keep(model):
        kwargs["logits_to_keep"] = window + 1
    outputs = model(**kwargs)
    # From the right: prompt-learning adapters put virtual tokens before the row.
    logits = outputs.logits[:, -(window + 1) : -1]
    ref_logits = None if reference is None else reference.logits
    scores = _pad_left(token_scores(logits, labels[:, first:], mask[:, first:], extras, ref_logits), first)
    return replace(scores, mask=mask, tokens=labels, logits=logits if keep_logits else None), outputs


def _pad_left(scores: TokenScores, count: int) -> TokenScores:
    """The same scores with `count` unscored positions before them."""
    padded: dict[str, Any] = {}
    for part in fields(scores):
        value = getattr(scores, part.name)
        if isinstance(value, Tensor):
            padded[part.name] = pad(value, (*(0, 0) * (value.dim() - 2), count, 0))
    return replace(scores, **padded)
