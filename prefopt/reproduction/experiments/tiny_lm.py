"""A language model small enough to train in seconds, and its scores in the form that losses read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefopt.losses import Loss, PreferenceBatch, Scores
from prefopt.losses.needs import PER_TOKEN
from prefopt.scoring import extras_for, token_scores


class TinyLM(nn.Module):
    """Embedding, one GRU layer, a linear layer: (R, T) tokens -> (R, T, V) logits of the next one."""

    def __init__(self, vocabulary: int, hidden: int = 128, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, hidden)
        self.recur = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.recur(self.embed(tokens))[0])
        return logits

    @torch.no_grad()
    def continue_rows(
        self, prompts: Tensor, length: int, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """(R, length) tokens after (R, P) prompts: greedy, or sampled where a generator is given."""
        states, hidden = self.recur(self.embed(prompts))
        last, tokens = states[:, -1:], []
        for _ in range(length):
            logits = self.head(last[:, 0])
            if generator is None:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
            tokens.append(token)
            last, hidden = self.recur(self.embed(token), hidden)
        return torch.cat(tokens, 1)


@dataclass(frozen=True)
class Rows:
    """(R, T) tokens, and a (R, T) mask that is true at those of the completion."""

    tokens: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor) -> Rows:
        return Rows(self.tokens[rows], self.mask[rows])


def sums(model: TinyLM, rows: Rows) -> Tensor:
    """(R,) log-probability of each completion."""
    logps = torch.log_softmax(model(rows.tokens[:, :-1]), -1)
    picked = logps.gather(-1, rows.tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (picked * rows.mask[:, 1:]).sum(-1)


def scores(model: TinyLM, rows: Rows, loss: Loss, ref_logps: Tensor | None = None) -> Scores:
    """What a loss sees of the rows: sums and lengths, and per-token values where it asks for them."""
    lengths = rows.mask[:, 1:].sum(-1)
    if not loss.needs & PER_TOKEN:
        return Scores(sums(model, rows), lengths, ref_logps)
    labels = rows.tokens[:, 1:]
    tokens = token_scores(model(rows.tokens[:, :-1]), labels, rows.mask[:, 1:], extras_for(loss))
    return Scores(
        logps=tokens.logps.sum(-1),
        lengths=lengths,
        ref_logps=ref_logps,
        token_logps=tokens.logps,
        token_mask=tokens.mask,
        token_ids=labels,
        top_logps=tokens.quantities.get("top_logps"),
        top_ids=tokens.quantities.get("top_ids"),
    )


@dataclass(frozen=True)
class Pairs:
    """Chosen and rejected rows of the same prompts, and their sums under the reference."""

    chosen: Rows
    rejected: Rows
    ref_chosen: Tensor
    ref_rejected: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows: Tensor) -> Pairs:
        return Pairs(self.chosen[rows], self.rejected[rows], self.ref_chosen[rows], self.ref_rejected[rows])


def with_reference(reference: TinyLM, chosen: Rows, rejected: Rows) -> Pairs:
    with torch.no_grad():
        return Pairs(chosen, rejected, sums(reference, chosen), sums(reference, rejected))


def batch_of(model: TinyLM, pairs: Pairs, loss: Loss) -> PreferenceBatch:
    return PreferenceBatch(
        scores(model, pairs.chosen, loss, pairs.ref_chosen), scores(model, pairs.rejected, loss, pairs.ref_rejected)
    )


def train(model: TinyLM, pairs: Pairs, loss: Loss, lr: float, steps: int, size: int = 64, seed: int = 0) -> TinyLM:
    """Adam on shuffled batches of `size` pairs; the model is changed and returned."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(pairs), generator=generator)
        here, order = order[:size], order[size:]
        optimizer.zero_grad()
        loss(batch_of(model, pairs[here], loss)).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


@torch.no_grad()
def log_ratios(model: TinyLM, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(N,) u of the chosen and of the rejected completions."""
    return sums(model, pairs.chosen) - pairs.ref_chosen, sums(model, pairs.rejected) - pairs.ref_rejected
