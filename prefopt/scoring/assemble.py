"""From scored rows to what a loss sees: the quantities that it needs, grouped by role."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prefopt.losses import Loss, Need, PreferenceBatch, Scores
from prefopt.losses.base import PER_TOKEN
from prefopt.losses.divergences import named
from prefopt.losses.scores import Role
from prefopt.scoring.logprobs import Extras, TokenScores
from prefopt.scoring.rows import RowGroups


def extras_for(loss: Loss) -> Extras:
    """What a loss asks of the logits besides log-probabilities."""
    return Extras(
        top_k=loss.top_k if Need.TOP_K in loss.needs else 0,
        collision=Need.COLLISION in loss.needs,
        forward_kl=Need.FORWARD_KL in loss.needs,
        reverse_kl=Need.REVERSE_KL in loss.needs,
        divergences=tuple(map(named, loss.divergences)) if Need.DIVERGENCE in loss.needs else (),
        hidden=Need.HIDDEN in loss.needs,
    )


def assemble_batch(
    groups: RowGroups,
    policy: TokenScores,
    loss: Loss,
    ref_token_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    prev_logps: Tensor | None = None,
) -> PreferenceBatch:
    """Group scored rows by role.

    Args:
        groups: the role and example of each of R rows.
        policy: token scores of the R rows.
        loss: whose needs say what is filled in.
        ref_token_logps: (R, T) per-token log-probabilities of the reference, zero outside the completions.
        ref_logps: (R,) their sums, where only these are known (computed ahead of training).
        prev_logps: (R,) sums under the previous iterate.
    """
    if ref_logps is None and ref_token_logps is not None:
        ref_logps = ref_token_logps.sum(-1)
    always = {"logps": policy.logps.sum(-1), "lengths": policy.mask.sum(-1)}
    tokens = {
        "token_logps": policy.logps,
        "token_mask": policy.mask,
        "token_ids": policy.tokens,
        "top_logps": policy.top_logps,
        "top_ids": policy.top_ids,
        "token_collision": policy.collision,
        "token_forward_kl": policy.forward_kl,
        "token_reverse_kl": policy.reverse_kl,
        "ref_token_entropy": policy.ref_entropy,
        "token_divergences": policy.divergences,
    }
    roles: dict[str, Any] = {}
    for role in Role:
        needs = loss.needs_of(role.field)
        unwanted = role is Role.MISMATCHED and Need.MISMATCHED not in loss.needs
        # Unpaired feedback can lack a role by chance; of pairs one is missing only where it was not scored.
        may_lack = role is Role.MISMATCHED or (role is not Role.SAMPLED and not groups.paired)
        if unwanted or not (may_lack or bool((groups.roles == role).any())):
            continue
        rows = groups.rows_of(role)
        fields: dict[str, Tensor | None] = dict(always)
        if needs.compares:
            fields["ref_logps"] = ref_logps
        if Need.PREVIOUS in needs:
            fields["prev_logps"] = prev_logps
        if needs & PER_TOKEN:
            fields |= tokens
            fields["ref_token_logps"] = ref_token_logps if needs.compares else None
        if Need.HIDDEN in needs:
            fields |= {"hidden": policy.hidden, "prompt_hidden": policy.prompt_hidden}
        values: dict[str, Any] = {name: value[rows] for name, value in fields.items() if value is not None}
        if Need.EMBEDDINGS in needs:
            given = {"embedding": f"{role.field}_embedding", "prompt_embedding": "prompt_embedding"}
            of_rows = groups.examples[rows]
            values |= {n: groups.embeddings[c][of_rows] for n, c in given.items() if c in groups.embeddings}
        if "token_divergences" in values:
            values["divergences"] = loss.divergences
        columns = {name: column[groups.examples[rows]] for name, column in groups.columns.items()}
        roles[role.field] = Scores(**values, columns=columns)
    return PreferenceBatch(**roles, paired=groups.paired, sizes=groups.sizes)
