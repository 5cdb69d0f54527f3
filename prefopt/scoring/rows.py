"""From scored rows to what a loss sees: which row plays which role, and for which example.

A batch of R rows holds every completion once; `RowGroups` says that row r plays a role for example e, so rows may come
in any order and roles may have different sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from prefopt.losses import Need, PreferenceBatch, Scores
from prefopt.scoring.logprobs import TokenScores

ROLES = ("chosen", "rejected", "mismatched")
"""Role names by their number in `RowGroups.roles`."""


@dataclass(frozen=True)
class RowGroups:
    """Which row is what.

    Attributes:
        roles: (R,) index into `ROLES`.
        examples: (R,) index of the example (pair, or single labelled completion) that a row belongs to.
        columns: per-example columns of the data set, (E,) each.
        paired: whether every example has one chosen and one rejected row, in the same order.
    """

    roles: Tensor
    examples: Tensor
    columns: Mapping[str, Tensor]
    paired: bool


def assemble_batch(
    groups: RowGroups,
    policy: TokenScores,
    needs: Need,
    ref_token_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
) -> PreferenceBatch:
    """Group scored rows by role.

    Args:
        groups: the role and example of each of R rows.
        policy: token scores of the R rows.
        needs: what the loss asked for; nothing else is filled in.
        ref_token_logps: (R, T) per-token log-probabilities of the reference, zero outside the completions.
        ref_logps: (R,) their sums, where only these are known (computed ahead of training).
    """
    logps, lengths = policy.logps.sum(-1), policy.mask.sum(-1)
    if ref_logps is None and ref_token_logps is not None:
        ref_logps = ref_token_logps.sum(-1)
    roles: dict[str, Scores] = {}
    for number, role in enumerate(ROLES):
        rows = (groups.roles == number).nonzero().squeeze(-1)
        if role == "mismatched" and Need.MISMATCHED not in needs:
            continue
        tokens = Need.TOKENS in needs
        roles[role] = Scores(
            logps=logps[rows],
            lengths=lengths[rows],
            ref_logps=None if ref_logps is None else ref_logps[rows],
            token_logps=policy.logps[rows] if tokens else None,
            token_mask=policy.mask[rows] if tokens else None,
            ref_token_logps=ref_token_logps[rows] if tokens and ref_token_logps is not None else None,
            columns={name: values[groups.examples[rows]] for name, values in groups.columns.items()},
        )
    return PreferenceBatch(**roles, paired=groups.paired)
