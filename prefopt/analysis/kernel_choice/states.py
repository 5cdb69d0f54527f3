"""A model's last hidden states of a preference set, computed once, for short trainings on them.

Imports scoring and data, never a trainer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from prefopt.losses.numerics import masked_mean
from prefopt.safety.errors import UsageError
from prefopt.scoring.head import Head, head_of, replaced_head

PROMPT_TOKENS = 256
"""Prompt tokens; of a longer prompt the last ones are used."""
COMPLETION_TOKENS = 48
"""Completion tokens; of a longer completion the first ones are used."""
VOCABULARY = 1024
"""Size of the reduced vocabulary: those of the completions, then the likeliest others."""

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected completions of N pairs.

    Attributes:
        hidden: (N, T, H) states from which each completion token is predicted.
        mask: (N, T) bool, where there is a token.
        labels: (N, T) the token's number in the reduced vocabulary; 0 where there is no token.
        ref_log_probs: (N, T, V) the model's own distribution over that vocabulary.
    """

    hidden: Tensor
    mask: Tensor
    labels: Tensor
    ref_log_probs: Tensor

    @property
    def pooled(self) -> Tensor:
        """(N, H) mean state of each completion."""
        return masked_mean(self.hidden.mT, self.mask.unsqueeze(1))


@dataclass(frozen=True)
class Narrow:
    """A model's head for V of its tokens.

    Attributes:
        weight: (V, H).
        bias: (V,), or None.
        softcap: as the model's.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(..., V) log-probabilities of (..., H) states."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits.log_softmax(-1)


@dataclass(frozen=True)
class States:
    """What a trial trains on.

    Attributes:
        prompt: (N, H) mean state of each prompt's tokens.
        chosen: of each pair.
        rejected: of each pair.
        head: for the reduced vocabulary.
        left_out: share of the reference's probability outside the reduced vocabulary.
    """

    prompt: Tensor
    chosen: Side
    rejected: Side
    head: Narrow
    left_out: float

    def __len__(self) -> int:
        return self.prompt.shape[0]


@torch.no_grad()
def states_of(model: Any, rows: Sequence[dict[str, Any]]) -> States:
    """The states of tokenized pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`) under a model in float32.

    Raises:
        ValueError: if the model's head is not a plain linear layer, a row has an empty prompt or completion, or
            the model's adapter puts its own tokens before every row.
    """
    head = head_of(model)
    if head is None:
        raise UsageError(
            f"a trial needs a model whose head is a plain linear layer; that of {type(model).__name__} is not"
        )
    for number, row in enumerate(rows):
        if empty := [name for name in ("prompt", "chosen", "rejected") if not row[f"{name}_ids"]]:
            raise UsageError(f"row {number} has no {empty[0]} tokens")
    jobs = [(row["prompt_ids"][-PROMPT_TOKENS:], row["chosen_ids"][:COMPLETION_TOKENS]) for row in rows]
    jobs += [(row["prompt_ids"][-PROMPT_TOKENS:], row["rejected_ids"][:COMPLETION_TOKENS]) for row in rows]
    prompts, hidden = forward(model.eval(), head, jobs)
    words, left_out = _narrowed(head, hidden, [completion for _, completion in jobs])
    kept = torch.tensor(words)
    # States are on the CPU, also if the model is not.
    weight = head.linear.weight.detach().cpu()[kept].float()
    bias = None if head.linear.bias is None else head.linear.bias.detach().cpu()[kept].float()
    narrow = Narrow(weight, bias, head.softcap)
    place = {word: number for number, word in enumerate(words)}
    labels = [torch.tensor([place[token] for token in completion]) for _, completion in jobs]
    chosen, rejected = (
        _side(narrow, hidden[part], labels[part]) for part in (slice(len(rows)), slice(len(rows), None))
    )
    return States(prompts[: len(rows)], chosen, rejected, narrow, left_out)


def _side(narrow: Narrow, hidden: list[Tensor], labels: list[Tensor]) -> Side:
    pad = torch.nn.utils.rnn.pad_sequence
    states = pad(hidden, batch_first=True)
    mask = pad([torch.ones_like(row) for row in labels], batch_first=True).bool()
    # Row by row: a second copy of all distributions would be the largest thing in memory.
    return Side(states, mask, pad(labels, batch_first=True), torch.stack([narrow.log_probs(row) for row in states]))


def forward(model: Any, head: Head, jobs: list[tuple[list[int], list[int]]]) -> tuple[Tensor, list[Tensor]]:
    """Last hidden states of J prompts with a completion each, on the CPU in float32.

    Args:
        model: in evaluation mode.
        head: its head.
        jobs: token ids of prompt and completion, neither empty.

    Returns:
        (J, H) mean states of the prompts, and of each job the (T, H) states that its completion is predicted from.

    Raises:
        UsageError: if the model's adapter puts its own tokens before every row.
    """
    prompts: list[Tensor] = [torch.empty(0)] * len(jobs)
    completions = list(prompts)
    seen: list[Tensor] = []

    def look(states: Tensor) -> Tensor:
        seen[:] = [states.float()]
        return states[..., :1]

    order = sorted(range(len(jobs)), key=lambda job: len(jobs[job][0]) + len(jobs[job][1]))
    while order:
        longest = len(jobs[order[-1]][0]) + len(jobs[order[-1]][1])
        count = max(_TOKENS_AT_ONCE // longest, 1)
        order, some = order[:-count], order[-count:]
        ids = torch.zeros(len(some), longest, dtype=torch.long)
        for line, job in enumerate(some):
            row = [*jobs[job][0], *jobs[job][1]]
            ids[line, : len(row)] = torch.tensor(row)
        # Padding is on the right: nothing that is used attends to it.
        with replaced_head(model, head, look):
            model(input_ids=ids.to(model.device), use_cache=False)
        (states,) = seen
        if own := states.shape[1] - longest:
            raise UsageError(
                f"the model's adapter adds {own} tokens of its own before every row (prompt learning), whose states "
                "are not read here: name the model without it"
            )
        for line, job in enumerate(some):
            start = len(jobs[job][0])
            prompts[job] = states[line, :start].mean(0).cpu()
            completions[job] = states[line, start - 1 : start - 1 + len(jobs[job][1])].cpu()
    return torch.stack(prompts), completions


def _narrowed(head: Head, hidden: list[Tensor], completions: list[list[int]]) -> tuple[list[int], float]:
    """The tokens of the reduced vocabulary, and the share of probability of the others."""
    states = torch.cat(hidden)
    weight = head.weight_for(states)
    mass = torch.zeros(weight.shape[0])
    for part in head.chunks(states):
        mass += head.logits(states[part].to(weight.device), weight).softmax(-1).sum(0).cpu()
    mass /= len(states)
    words = [word for word, _ in Counter(token for row in completions for token in row).most_common()]
    known = set(words)
    others = (word for word in mass.argsort(descending=True).tolist() if word not in known)
    words += islice(others, max(VOCABULARY - len(words), 0))
    return words, max(1 - float(mass[torch.tensor(words)].sum()), 0.0)
