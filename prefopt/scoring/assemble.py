"""From scored rows to the batch of a loss: the quantities that it needs, grouped by role."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prefopt.losses import Loss, Need, PreferenceBatch, Scores
from prefopt.losses.divergences import named
from prefopt.losses.needs import NEED_OF, PER_TOKEN
from prefopt.losses.scores import Role
from prefopt.scoring.logprobs import TokenScores
from prefopt.scoring.measure import Extras
from prefopt.scoring.rows import RowGroups


def extras_for(loss: Loss) -> Extras:
    """The quantities that a loss needs from a model's output besides log-probabilities."""
    kinds = tuple(map(named, loss.divergences)) if Need.DIVERGENCE in loss.needs else ()
    layers = loss.layers if Need.STATES in loss.needs else ()
    return Extras(loss.needs, loss.top_k if Need.TOP_K in loss.needs else 0, kinds, layers)


def assemble_batch(
    groups: RowGroups,
    policy: TokenScores,
    loss: Loss,
    ref_token_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    prev_logps: Tensor | None = None,
    ref_states: Tensor | None = None,
) -> PreferenceBatch:
    """Group scored rows by role.

    Args:
        groups: the role and example of each of R rows.
        policy: token scores of the R rows.
        loss: whose needs say what is filled in.
        ref_token_logps: (R, T) per-token log-probabilities of the reference, zero outside the completions.
        ref_logps: (R,) their sums, where only these are known (computed ahead of training).
        prev_logps: (R,) sums under the previous iterate.
        ref_states: (R, T, L, H) hidden states of the reference.
    """
    if ref_logps is None and ref_token_logps is not None:
        ref_logps = ref_token_logps.sum(-1)
    of_rows: dict[str, Tensor | None] = {
        "logps": policy.logps.sum(-1),
        "lengths": policy.mask.sum(-1),
        "ref_logps": ref_logps,
        "prev_logps": prev_logps,
        "score": groups.scores,
        "token_logps": policy.logps,
        "token_mask": policy.mask,
        "token_ids": policy.tokens,
        "ref_token_logps": ref_token_logps,
        "ref_states": ref_states,
        **policy.quantities,
    }
    roles: dict[str, Any] = {}
    for role in Role:
        needs = loss.needs_of(role.field)
        unwanted = role is Role.MISMATCHED and Need.MISMATCHED not in loss.needs
        # Unpaired feedback can lack a role by chance; pairs lack one only if it was not scored.
        may_lack = role is Role.MISMATCHED or (role in (Role.CHOSEN, Role.REJECTED) and not groups.paired)
        if unwanted or not (may_lack or any(groups.playing([role]))):
            continue
        rows = groups.rows_of(role)
        examples = groups.examples[rows]
        values: dict[str, Any] = {
            name: value[rows] for name, value in of_rows.items() if value is not None and _is_needed(name, needs)
        }
        if Need.EMBEDDINGS in needs:
            columns = {"embedding": f"{role.field}_embedding", "prompt_embedding": "prompt_embedding"}
            embeddings = {name: groups.embeddings[c] for name, c in columns.items() if c in groups.embeddings}
            values |= {name: vectors[examples] for name, vectors in embeddings.items()}
        if "token_divergences" in values:
            values["divergences"] = loss.divergences
        if role is Role.CANDIDATE:
            values["group_sizes"] = groups.group_sizes()
        else:
            values.pop("score", None)
        if "states" in values:
            values["layers"] = loss.layers
        roles[role.field] = Scores(**values, columns={name: c[examples] for name, c in groups.columns.items()})
    return PreferenceBatch(**roles, paired=groups.paired, sizes=groups.sizes)


def _is_needed(name: str, needs: Need) -> bool:
    """Whether a loss with these needs of a role gets that field of `Scores`."""
    if name in ("logps", "lengths", "score"):
        return True
    if name in ("token_logps", "token_mask", "token_ids", "ref_token_logps"):
        return bool(needs & PER_TOKEN) and (name != "ref_token_logps" or needs.compares)
    if name == "ref_states":
        return Need.STATES in needs and needs.compares
    # Divergences from the reference come with its sums.
    return needs.compares if name == "ref_logps" else NEED_OF[name] in needs
