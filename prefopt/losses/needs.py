"""What a loss can need from the scorer, and which fields of `Scores` each need fills. Imports nothing of ours."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Need(enum.Flag):
    """What a loss needs from the scorer besides summed log-probabilities and lengths."""

    NONE = 0
    REFERENCE = enum.auto()
    """Log-probabilities under the frozen reference."""
    TOKENS = enum.auto()
    """Per-token log-probabilities (of the reference too, together with REFERENCE)."""
    MISMATCHED = enum.auto()
    """Completions scored under another example's prompt."""
    PREVIOUS = enum.auto()
    """Log-probabilities under the previous iterate of the policy."""
    TOP_K = enum.auto()
    """The loss's `top_k` largest log-probabilities at every completion position."""
    COLLISION = enum.auto()
    """The sum of squared probabilities over the vocabulary at every completion position."""
    OTHERS = enum.auto()
    """The log-probability of all tokens but the completion's at every completion position."""
    PEAK = enum.auto()
    """The largest logit less the mean logit over the vocabulary at every completion position."""
    FORWARD_KL = enum.auto()
    """KL(reference || policy) over the vocabulary at every completion position."""
    REVERSE_KL = enum.auto()
    """KL(policy || reference) over the vocabulary at every completion position."""
    DIVERGENCE = enum.auto()
    """The loss's `divergences` between policy and reference over the vocabulary at every completion position."""
    HIDDEN = enum.auto()
    """The policy's hidden states, averaged over each completion and over its prompt."""
    STATES = enum.auto()
    """Hidden states after the loss's `layers` at every completion position (the reference's too, with REFERENCE)."""
    EMBEDDINGS = enum.auto()
    """Embeddings of prompts and completions that come with the data."""

    @property
    def compares(self) -> bool:
        """Whether the reference model has to be run."""
        return bool(self & (Need.REFERENCE | Need.FORWARD_KL | Need.REVERSE_KL | Need.DIVERGENCE))

    @property
    def frozen(self) -> bool:
        """Whether a second model is needed: the reference or the previous iterate."""
        return self.compares or Need.PREVIOUS in self

    @property
    def words(self) -> str:
        """The needs as text: `reference, tokens`."""
        return ", ".join(str(need.name).lower() for need in self) or "sums and lengths only"


PER_TOKEN = (
    Need.TOKENS | Need.TOP_K | Need.COLLISION | Need.OTHERS | Need.PEAK | Need.FORWARD_KL | Need.REVERSE_KL
    | Need.DIVERGENCE | Need.STATES
)  # fmt: skip
"""Needs that come with `token_logps` and `token_mask`."""


@dataclass(frozen=True)
class Quantity:
    """What a need puts into `Scores`.

    Attributes:
        fields: of `Scores` that a loss with the need must find.
        remedy: what to do where one is missing.
        gradient: those of the fields that have a gradient.
        besides: further fields that come with them.
    """

    fields: tuple[str, ...]
    remedy: str
    gradient: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()


QUANTITIES = {
    Need.REFERENCE: Quantity(("ref_logps",), "score the completions under the frozen reference too"),
    Need.PREVIOUS: Quantity(("prev_logps",), "score the completions under the previous iterate of the policy too"),
    Need.TOKENS: Quantity(
        ("token_logps", "token_mask"), "keep the per-token log-probabilities and their token_mask", ("token_logps",)
    ),
    Need.TOP_K: Quantity(
        ("top_logps", "top_ids", "token_ids"), "keep the largest log-probabilities of every position", ("top_logps",)
    ),
    Need.COLLISION: Quantity(("token_collision",), "compute log sum_v pi(v)^2 at every completion position"),
    Need.OTHERS: Quantity(
        ("token_others",), "compute log(1 - p(y_t)) at every completion position", ("token_others",)
    ),
    Need.PEAK: Quantity(
        ("token_peak",), "compute the largest logit less the mean logit at every completion position", ("token_peak",)
    ),
    Need.FORWARD_KL: Quantity(
        ("token_forward_kl",), "compute KL(reference || policy) at every completion position", ("token_forward_kl",),
        besides=("ref_token_entropy",),
    ),
    Need.REVERSE_KL: Quantity(
        ("token_reverse_kl",), "compute KL(policy || reference) at every completion position", ("token_reverse_kl",)
    ),
    Need.DIVERGENCE: Quantity(
        ("token_divergences", "divergences"), "compute them at every completion position and name them",
        ("token_divergences",),
    ),
    Need.HIDDEN: Quantity(
        ("hidden", "prompt_hidden"), "average the policy's hidden states over completions and prompts",
        ("hidden", "prompt_hidden"),
    ),
    Need.STATES: Quantity(
        ("states", "layers"), "keep the hidden states after these layers and number them", ("states",)
    ),
    Need.EMBEDDINGS: Quantity(("embedding", "prompt_embedding"), "give the data columns of embeddings"),
}  # fmt: skip
"""A new need is a member of `Need` with its row here and its fields in `Scores`, and what computes them in the scorer
(`prefopt.scoring.measure` for what is read off logits)."""
NEED_OF = {name: need for need, quantity in QUANTITIES.items() for name in (*quantity.fields, *quantity.besides)}
"""By field of `Scores`."""
