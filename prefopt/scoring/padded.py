"""The plain layout: one padded row per completion, its prompt included.

It serves every architecture, adapter and modality, because it is what a model expects. The model is always called
through the wrapper it is given (DDP, DeepSpeed, PEFT); nothing reaches around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from prefopt.scoring.call import Call, Pool, Request
from prefopt.scoring.logprobs import TokenScores, spread
from prefopt.scoring.measure import NOTHING, Extras
from prefopt.scoring.model import takes_logits_to_keep


class Targets(NamedTuple):
    """The M scored tokens of padded rows.

    Attributes:
        rows, columns: (M,) row of each, and column of the position that predicts it.
        first: the first of these columns.
    """

    rows: Tensor
    columns: Tensor
    first: int


def targets_of(completion_mask: Tensor) -> Targets:
    """The scored tokens of an (R, T) mask that is true at completion tokens."""
    rows, columns = completion_mask[:, 1:].nonzero(as_tuple=True)
    return Targets(rows, columns, int(columns.min()) if len(columns) else max(completion_mask.shape[1] - 2, 0))


def score_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    completion_mask: Tensor,
    *,
    extras: Extras = NOTHING,
    reference: TokenScores | None = None,
    keep_logits: bool = False,
    all_logits: bool = False,
    call: Call | None = None,
    targets: Targets | None = None,
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
        call: how the model is called; the default computes the head on completion tokens only.
        targets: what `targets_of` found, where that is known.

    Returns:
        Token scores of shape (R, T - 1), position t standing for token t + 1, and the model's output.
    """
    labels, mask = inputs["input_ids"][:, 1:], completion_mask[:, 1:].bool()
    kwargs = {**inputs, "use_cache": False}
    # The head of a small model with a large vocabulary is a fifth of the work: skip the positions before the first
    # completion token of the batch.
    rows, columns, first = targets or targets_of(completion_mask)
    first = 0 if extras.hidden else first
    window = mask.shape[1] - first
    if not all_logits and takes_logits_to_keep(model):
        kwargs["logits_to_keep"] = window + 1
    # From the right: prompt-learning adapters put virtual tokens before the row. The last position predicts nothing.
    request = Request(
        pad(labels[:, first:], (0, 1)), pad(mask[:, first:], (0, 1)), rows * (window + 1) + columns - first, extras,
        reference=None if reference is None or reference.logits is None else reference.logits[0], keep=keep_logits,
        pool=_pool(mask, inputs.get("attention_mask")) if extras.hidden else None,
    )  # fmt: skip
    measured, outputs = (call or Call())(model, kwargs, request, whole_logits=all_logits)
    scores = spread(measured, mask, labels, (rows, columns))
    if request.pooled is not None:
        hidden, prompt_hidden = request.pooled.chunk(2)
        scores = replace(scores, quantities={**scores.quantities, "hidden": hidden, "prompt_hidden": prompt_hidden})
    return replace(scores, logits=[request.kept]) if keep_logits else scores, outputs


def _pool(mask: Tensor, attention_mask: Tensor | None) -> Pool:
    """Averages over the positions that predict each of R completions, then over each of their R prompts.

    Args:
        mask: (R, T - 1), true at the positions that predict completion tokens.
        attention_mask: (R, T), true at real tokens; all of them if None.
    """
    count = mask.shape[0]
    # The first position that predicts one is the prompt's last token.
    before = mask.int().cumsum(-1) - mask.int()
    prompt = pad((before == 0) & mask.any(-1, keepdim=True), (0, 1))
    if attention_mask is not None:
        prompt &= attention_mask.bool()
    rows = torch.cat([pad(mask, (0, 1)), prompt])
    vectors, places = rows.nonzero().unbind(-1)
    return Pool(places + (vectors % count) * rows.shape[1], vectors, 2 * count)
