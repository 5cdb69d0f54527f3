"""The input of a loss: scored completions, grouped by role.

Lives here: the tensors that travel from the scorer to a loss. Imports only torch, never a model, a tokenizer or a
trainer, so that any training loop can fill these in. Shapes use N for examples and T for tokens; log-probabilities are
in nats.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from prefopt.losses.errors import LossError

REFERENCE_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
PREVIOUS_LOGPS = ("prev_chosen_logps", "prev_rejected_logps")
GIVEN_LOGPS = (*REFERENCE_LOGPS, *PREVIOUS_LOGPS)
"""Columns of log-probabilities under a reference and under a previous iterate, where they come with the data."""
FORGET = "forget"
"""Column that is 1 (true) for examples to forget and 0 for those to retain, where labels or roles do not say it."""
EMBEDDINGS = ("prompt_embedding", "chosen_embedding", "rejected_embedding")
"""Vectors, all of one width, for objectives that compare embeddings."""


class Role(enum.IntEnum):
    """What a completion is to its example. The names in lower case are fields of `PreferenceBatch`."""

    CHOSEN = 0
    REJECTED = 1
    MISMATCHED = 2
    SAMPLED = 3
    CANDIDATE = 4

    @property
    def field(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Scores:
    """N completions in one role.

    Attributes:
        logps: (N,) sum over completion tokens of log pi(y_t | x, y_<t), end-of-sequence token included.
        lengths: (N,) number of completion tokens that `logps` sums over.
        ref_logps: (N,) the same sums under the frozen reference; filled in where a loss declares `Need.REFERENCE`.
        prev_logps: (N,) the same sums under the previous iterate of the policy; with `Need.PREVIOUS`.
        token_logps: (N, T) per-token log-probabilities, zero outside `token_mask`; with any need below.
        token_mask: (N, T) bool, True at completion tokens.
        ref_token_logps: (N, T) per-token log-probabilities of the reference; with `Need.TOKENS | Need.REFERENCE`.
        token_ids: (N, T) the completion tokens; with `Need.TOP_K`.
        top_logps: (N, T, K) the K largest log-probabilities at each position, with gradient; with `Need.TOP_K`.
        top_ids: (N, T, K) the tokens they belong to.
        token_collision: (N, T) log sum_v pi(v)^2 over the vocabulary, no gradient; with `Need.COLLISION`.
        token_others: (N, T) log(1 - pi(y_t)), the log-probability of every other token, with gradient; with
            `Need.OTHERS`.
        token_peak: (N, T) the largest logit less the mean logit over the vocabulary, with gradient; with `Need.PEAK`.
        token_forward_kl: (N, T) KL(reference || policy) of the next-token distributions; with `Need.FORWARD_KL`.
        ref_token_entropy: (N, T) entropy of the reference's next-token distribution; with `Need.FORWARD_KL`.
        token_reverse_kl: (N, T) KL(policy || reference) of the next-token distributions; with `Need.REVERSE_KL`.
        token_divergences: (N, T, D) divergences between the next-token distributions of policy and reference, with
            gradient; with `Need.DIVERGENCE`.
        divergences: names of the D divergences, as `prefopt.losses.divergences` writes them.
        hidden: (N, H) the policy's last hidden states, averaged over the positions that the completion's tokens are
            predicted from, with gradient; with `Need.HIDDEN`.
        prompt_hidden: (N, H) the same over the prompt's tokens.
        states: (N, T, L, H) hidden states after each of L layers at the positions that the completion's tokens are
            predicted from, zero outside `token_mask`, with gradient; with `Need.STATES`.
        layers: numbers of the L layers, the first one is 0.
        ref_states: (N, T, L, H) those of the reference; with `Need.STATES | Need.REFERENCE`.
        embedding: (N, H) of the completion, as it came with the data; with `Need.EMBEDDINGS`.
        prompt_embedding: (N, H) of its prompt.
        score: (N,) of each completion, from the data, the highest is the best; in the role `candidate`.
        group_sizes: how many of the N completions answer each of G prompts, one prompt's after the other's; in the
            role `candidate`.
        columns: further per-example columns of the data set, (N,) each. `weight` scales every loss per example.
    """

    logps: Tensor
    lengths: Tensor
    ref_logps: Tensor | None = None
    prev_logps: Tensor | None = None
    token_logps: Tensor | None = None
    token_mask: Tensor | None = None
    ref_token_logps: Tensor | None = None
    token_ids: Tensor | None = None
    top_logps: Tensor | None = None
    top_ids: Tensor | None = None
    token_collision: Tensor | None = None
    token_others: Tensor | None = None
    token_peak: Tensor | None = None
    token_forward_kl: Tensor | None = None
    ref_token_entropy: Tensor | None = None
    token_reverse_kl: Tensor | None = None
    token_divergences: Tensor | None = None
    divergences: tuple[str, ...] | None = None
    hidden: Tensor | None = None
    prompt_hidden: Tensor | None = None
    states: Tensor | None = None
    layers: tuple[int, ...] | None = None
    ref_states: Tensor | None = None
    embedding: Tensor | None = None
    prompt_embedding: Tensor | None = None
    score: Tensor | None = None
    group_sizes: tuple[int, ...] | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("logps", "lengths"):
            if not isinstance(value := getattr(self, name), Tensor):
                raise LossError(f"Scores.{name} must be a tensor of shape (N,), got {type(value).__name__}")
        if self.logps.dim() != 1:
            raise LossError(f"Scores.logps must have shape (N,), got {tuple(self.logps.shape)}")
        n = self.logps.shape[0]
        for name, value in [*((f.name, getattr(self, f.name)) for f in fields(self)), *self.columns.items()]:
            if isinstance(value, Tensor) and (value.dim() == 0 or value.shape[0] != n):
                raise LossError(f"Scores.{name} must have {n} rows like logps, got shape {tuple(value.shape)}")

        if self.group_sizes is not None and sum(self.group_sizes) != n:
            raise LossError(f"Scores.group_sizes must add up to {n}, the completions, got {self.group_sizes}")

    def __len__(self) -> int:
        return self.logps.shape[0]

    @property
    def groups(self) -> Tensor:
        """(N,) the number of each completion's group, from 0."""
        sizes = torch.tensor(self.group_sizes or (), dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(self.logps.device)

    @property
    def ratios(self) -> Tensor:
        """(N,) log pi(y|x) - log ref(y|x)."""
        if self.ref_logps is None:
            raise LossError(
                "this loss compares with a reference, but the scores hold no ref_logps: score the completions under "
                "the frozen reference too (the trainer does so for losses that declare Need.REFERENCE)"
            )
        return self.logps - self.ref_logps

    @property
    def mean_logps(self) -> Tensor:
        """(N,) log-probability per completion token."""
        return self.logps / self.lengths.clamp(min=1)

    @property
    def weight(self) -> Tensor | None:
        """(N,) example weights, or None where the data set has no `weight` column."""
        return self.columns.get("weight")

    def token_divergence(self, name: str) -> Tensor:
        """(N, T) the divergence of that name."""
        if self.token_divergences is None or name not in (self.divergences or ()):
            raise LossError(
                f"this loss needs the divergence {name!r}, but the scores hold {self.divergences or 'none'}"
            )
        assert self.divergences is not None
        return self.token_divergences[..., self.divergences.index(name)]

    def states_after(self, layer: int, of_reference: bool = False) -> Tensor:
        """(N, T, H) hidden states after a layer."""
        states = self.ref_states if of_reference else self.states
        if states is None or layer not in (self.layers or ()):
            name = "ref_states" if of_reference else "states"
            raise LossError(f"this loss needs {name} after layer {layer}, but the scores hold {self.layers or 'none'}")
        assert self.layers is not None
        return states[:, :, self.layers.index(layer)]

    def at_least_float32(self) -> Scores:
        """The same scores with half-precision tensors raised to float32; float64 is kept for gradient checks."""
        raised: dict[str, Any] = {
            f.name: value.float()
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        }
        return replace(self, **raised) if raised else self


@dataclass(frozen=True)
class PreferenceBatch:
    """The scored completions of one batch.

    A pair is `chosen` and `rejected` with equal N, row i of both answering the same prompt. Binary feedback is the
    same two roles with unequal N. Groups are `candidate` alone. In unlearning `rejected` is the forget set and
    `chosen` the retain set.

    Attributes:
        chosen: preferred, desirable or retained completions.
        rejected: dispreferred, undesirable or to-be-forgotten completions.
        mismatched: completions scored under another example's prompt, for losses that estimate how far the policy has
            moved from the reference (`Need.MISMATCHED`).
        paired: whether row i of `chosen` and row i of `rejected` belong together.
        sampled: completions drawn from the current policy, one an example, for objectives that learn online.
        candidate: several completions of each prompt with a score each, for objectives over groups.
        sizes: mean number of completions of each role in the accumulated batches of a step, so that a loss is a mean
            over the step's completions however they fall into batches. None where the batch is the whole step. Without
            effect on pairs.
    """

    chosen: Scores | None = None
    rejected: Scores | None = None
    mismatched: Scores | None = None
    paired: bool = True
    sampled: Scores | None = None
    sizes: Mapping[str, Tensor] | None = None
    candidate: Scores | None = None

    def __post_init__(self) -> None:
        if not self.paired or self.chosen is None or self.rejected is None:
            return
        if len(self.chosen) != len(self.rejected):
            raise LossError(
                f"a paired batch needs as many chosen as rejected completions, got {len(self.chosen)} and "
                f"{len(self.rejected)}; pass paired=False for binary feedback"
            )

    def role(self, name: str) -> Scores | None:
        """The scores of the role `name`: "chosen", "rejected", "sampled", "candidate" or "mismatched"."""
        scores: Scores | None = getattr(self, name)
        return scores

    def at_least_float32(self) -> PreferenceBatch:
        raised: dict[str, Any] = {
            role.field: scores.at_least_float32() for role in Role if (scores := self.role(role.field)) is not None
        }
        return replace(self, **raised)
