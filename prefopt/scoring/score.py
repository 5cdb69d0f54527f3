"""From a collated batch to what a loss sees: exactly the rows, models and quantities that the loss asks for.

How a model is called (wrappers, adapters, autocast) is the caller's business, handed in as `Models`; which rows are
scored under which model is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefopt.losses import Loss, Need, PreferenceBatch
from prefopt.scoring.collate import by_row, groups_of, select_rows
from prefopt.scoring.logprobs import BARE, Extras, TokenScores
from prefopt.scoring.rows import ROLES, RowGroups, assemble_batch, extras_for

MISMATCHED = ROLES.index("mismatched")


@dataclass(frozen=True)
class Models:
    """How to score rows.

    Attributes:
        policy: (inputs, extras, the reference's scores with logits or None) -> scores with gradient.
        reference: (inputs, whether to keep the logits) -> scores without gradient.
        previous: (inputs) -> scores without gradient under the previous iterate; None where that is the reference.
    """

    policy: Callable[[Mapping[str, Any], Extras, TokenScores | None], TokenScores]
    reference: Callable[[Mapping[str, Any], bool], TokenScores]
    previous: Callable[[Mapping[str, Any]], TokenScores] | None = None


def score_batch(
    inputs: Mapping[str, Any], loss: Loss, models: Models, *, every_role: bool
) -> tuple[PreferenceBatch, TokenScores, Mapping[str, Any]]:
    """Score a collated batch for a loss.

    Args:
        inputs: what `PreferenceCollator` (or a collator that puts chosen rows first) makes.
        loss: its needs and roles decide what is computed.
        models: how to call the policy, the reference and the previous iterate.
        every_role: also score chosen and rejected completions that the loss does not ask for, so that they can be
            logged.

    Returns:
        The batch, the policy's token scores, and the inputs of the rows they belong to.
    """
    groups = groups_of(inputs)
    needed = [ROLES.index(role) for role in loss.roles]
    kept = torch.isin(groups.roles, torch.tensor(needed, device=groups.roles.device))
    # Rows of other collators cannot be told apart from what belongs to them (images, say), so they stay together.
    if every_role or not _is_ours(inputs):
        kept = kept | (groups.roles != MISMATCHED)
    scored = inputs if bool(kept.all()) else select_rows(inputs, _one_at_least(kept))
    groups = groups_of(scored)
    extras = extras_for(loss)
    reference, ref_logps = _reference(scored, groups, loss, models, extras)
    policy = models.policy(scored, extras, reference)
    ref_token_logps = None if reference is None else reference.logps
    prev_logps = _previous(scored, groups, loss, models, ref_logps, ref_token_logps)
    batch = assemble_batch(groups, policy, loss, ref_token_logps, ref_logps, prev_logps)
    if Need.MISMATCHED in loss.needs:
        batch = replace(batch, mismatched=_mismatched(inputs, loss, models))
    return batch, policy, scored


def _reference(
    inputs: Mapping[str, Any], groups: RowGroups, loss: Loss, models: Models, extras: Extras
) -> tuple[TokenScores | None, Tensor | None]:
    """Token scores under the reference, or its sums where these came with the data."""
    # Where nothing else says what the previous iterate was, the reference stands for it.
    previous = Need.PREVIOUS if models.previous is None and "prev_chosen_logps" not in inputs else Need.NONE
    if "ref_chosen_logps" in inputs and not extras.full_reference and loss.needs & (Need.REFERENCE | previous):
        return None, by_row(groups, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
    if not loss.needs.compares:
        return None, None
    needs = [loss.needs_of(role) for role in ROLES]
    comparing = [number for number, need in enumerate(needs) if need.compares or need & previous]
    rows = torch.isin(groups.roles, torch.tensor(comparing, device=groups.roles.device))
    # Logits are compared row by row with the policy's, so they are kept for all rows or for none.
    if bool(rows.all()) or extras.full_reference or not _is_ours(inputs):
        return models.reference(inputs, extras.full_reference), None
    rows = _one_at_least(rows)
    some = models.reference(select_rows(inputs, rows), False)
    width = inputs["input_ids"].shape[1] - 1
    logps = some.logps.new_zeros((len(rows), width))
    logps[rows, : some.logps.shape[1]] = some.logps
    return replace(some, logps=logps), None


def _previous(
    inputs: Mapping[str, Any],
    groups: RowGroups,
    loss: Loss,
    models: Models,
    ref_logps: Tensor | None,
    ref_token_logps: Tensor | None,
) -> Tensor | None:
    if Need.PREVIOUS not in loss.needs:
        return None
    if "prev_chosen_logps" in inputs:
        return by_row(groups, inputs["prev_chosen_logps"], inputs["prev_rejected_logps"])
    if models.previous is not None:
        return models.previous(inputs).logps.sum(-1)
    # The first iteration starts from the reference.
    if ref_logps is None and ref_token_logps is None:
        return models.reference(inputs, False).logps.sum(-1)
    return ref_logps if ref_token_logps is None else ref_token_logps.sum(-1)


def _mismatched(inputs: Mapping[str, Any], loss: Loss, models: Models) -> Any:
    """Scores of completions under other prompts: an estimate without gradient, so without a backward pass too."""
    groups = groups_of(inputs)
    rows = groups.roles == MISMATCHED
    if not bool(rows.any()):
        nothing = _nothing(inputs)
        return assemble_batch(groups, nothing, loss, nothing.logps).mismatched
    moved = select_rows(inputs, rows)
    with torch.no_grad():
        policy = models.policy(moved, BARE, None)
    reference = models.reference(moved, False).logps if loss.needs.compares else None
    return assemble_batch(groups_of(moved), policy, loss, reference).mismatched


def _one_at_least(rows: Tensor) -> Tensor:
    """(R,) bool, `rows`, or the first row where they are none.

    A micro-batch of single completions may lack every role that a model is asked about. No model can be called without
    a row, and it must be called all the same: other processes wait for it, in an exchange of shards, gradients or
    cached values. What the row that stands in gives belongs to a role that the loss does not read.
    """
    return rows if bool(rows.any()) else torch.arange(len(rows), device=rows.device) == 0


def _is_ours(inputs: Mapping[str, Any]) -> bool:
    return "roles" in inputs


def _nothing(inputs: Mapping[str, Any]) -> TokenScores:
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    zeros = torch.zeros(mask.shape, device=mask.device)
    return TokenScores(zeros, zeros, mask, mask)
