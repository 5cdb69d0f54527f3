"""Cringe (2211.05826, 2312.16682): a character model that goes round in circles is trained on its own circles."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from prefopt.demo.data import read_rows
from prefopt.losses import SFT, Cringe, Loss, Need, PairwiseCringe, PreferenceBatch
from prefopt.losses.numerics import log1mexp
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import numbers
from prefopt.reproduction.experiments.tiny_lm import Pairs, Rows, TinyLM, batch_of, scores, sums, train, with_reference

PROMPT, LENGTH = 30, 100
"""Characters of text that a continuation starts from, and of the continuation."""


class Unlikelihood(Loss):
    """Likelihood of the chosen and -log(1 - p) of every rejected token: what Cringe is compared with."""

    needs = Need.TOKENS

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.chosen is not None
        assert batch.rejected is not None
        assert batch.rejected.token_logps is not None
        assert batch.rejected.token_mask is not None
        against = -(log1mexp(batch.rejected.token_logps) * batch.rejected.token_mask).sum(-1)
        return torch.cat([-batch.chosen.mean_logps, self.weight * against / batch.rejected.lengths])


class Text:
    """The bundled answers as characters: one long training text and one of held-out answers."""

    def __init__(self) -> None:
        texts = {
            split: "\n".join(row["rejected"][0]["content"] for row in read_rows(split))
            for split in ("train", "heldout")
        }
        self.symbols = sorted(set("".join(texts.values())))
        number = {symbol: at for at, symbol in enumerate(self.symbols)}
        self.train, self.heldout = (torch.tensor([number[c] for c in texts[split]]) for split in ("train", "heldout"))

    def windows(self, text: Tensor, count: int, generator: torch.Generator) -> Rows:
        """`count` stretches of text, of which all but the first PROMPT characters are scored."""
        starts = torch.randint(len(text) - PROMPT - LENGTH, (count, 1), generator=generator)
        return masked(text[starts + torch.arange(PROMPT + LENGTH)])

    def decode(self, tokens: Tensor) -> list[str]:
        return ["".join(self.symbols[at] for at in row) for row in tokens.tolist()]


def masked(tokens: Tensor) -> Rows:
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, PROMPT:] = True
    return Rows(tokens, mask)


def repetition(text: str) -> float:
    """The share of a text's word 3-grams that occurred in it before."""
    words = text.split()
    grams = [tuple(words[at : at + 3]) for at in range(len(words) - 2)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def continuations(model: TinyLM, prompts: Tensor) -> Rows:
    return masked(torch.cat([prompts, model.continue_rows(prompts, LENGTH)], 1))


@cache
def read_text() -> Text:
    return Text()


@cache
def base_model(steps: int, seed: int) -> TinyLM:
    text = read_text()
    model = TinyLM(len(text.symbols), hidden=96, seed=seed)
    rows = text.windows(text.train, 4000, torch.Generator().manual_seed(seed))
    # Every character counts here, not only those after the prompt.
    whole = Rows(rows.tokens, torch.ones_like(rows.mask))
    return train(model, with_reference(model, whole, whole), SFT(), lr=2e-3, steps=steps, size=16, seed=seed)


@torch.no_grad()
def state(model: TinyLM, text: Text) -> tuple[float, float]:
    """3-gram repetition of greedy continuations of held-out text, and perplexity per character of that text."""
    rows = text.windows(text.heldout, 64, torch.Generator().manual_seed(99))
    said = continuations(model, rows.tokens[:, :PROMPT]).tokens[:, PROMPT:]
    repeated = [repetition(line) for line in text.decode(said)]
    return sum(repeated) / len(repeated), math.exp(float(-sums(model, rows).sum() / rows.mask.sum()))


def tune(base: TinyLM, text: Text, loss: Loss, rounds: int, seed: int) -> list[tuple[float, float]]:
    """Rounds of: continue training text, keep what repeats a 3-gram as rejected, take 20 steps. Returns the states."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    path = [state(model, text)]
    for _ in range(rounds):
        said = continuations(model, text.windows(text.train, 96, generator).tokens[:, :PROMPT])
        repeats = torch.tensor([repetition(line) > 0 for line in text.decode(said.tokens[:, PROMPT:])])
        bad = said[repeats]
        if len(bad) < 2:
            break
        for _ in range(20):
            good = text.windows(text.train, 16, generator)
            chosen = scores(model, good, loss)
            rejected = scores(model, bad[torch.randint(len(bad), (16,), generator=generator)], loss)
            optimizer.zero_grad()
            loss(PreferenceBatch(chosen, rejected, paired=False)).loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        path.append(state(model, text))
    return path


def perplexity_at(path: list[tuple[float, float]], level: float) -> float:
    """Perplexity where repetition first falls to `level`, between the two nearest states; NaN if it never does."""
    for (r0, p0), (r1, p1) in pairwise(path):
        if r1 <= level < r0:
            return p0 + (p1 - p0) * (r0 - level) / (r0 - r1)
    return math.nan


LOSSES: tuple[tuple[str, Callable[[], Loss]], ...] = (
    ("Cringe k=1", Cringe),  # ParlAI's default
    ("Cringe k=5", lambda: Cringe(k=5)),  # the paper's, from memory
    ("unlikelihood", Unlikelihood),
    ("likelihood alone", lambda: Cringe(weight=0.0)),
)


def repetition_falls(seeds: int = 3, base_steps: int = 1000, rounds: int = 15) -> list[Outcome]:
    text = read_text()
    bases = [base_model(base_steps, seed) for seed in range(seeds)]
    paths = {
        name: [tune(base, text, make(), rounds, seed) for seed, base in enumerate(bases)] for name, make in LOSSES
    }
    starts = [path[0] for path in paths["unlikelihood"]]
    ends = {name: [path[-1] for path in found] for name, found in paths.items()}
    shown = "; ".join(
        f"{name} {numbers([r for r, _ in found], '.2f')} (perplexity {numbers([p for _, p in found], '.2f')})"
        for name, found in {"start": starts, **ends}.items()
    )
    alone = [end[0] for end in ends["likelihood alone"]]
    at_half = {name: [perplexity_at(path, path[0][0] / 2) for path in found] for name, found in paths.items()}
    settings = (
        "a GRU of 96 units on the characters of the bundled answers; repetition: share of word 3-grams of a 100 "
        f"character greedy continuation that occurred before; weight 1, {rounds} rounds of 20 steps on fresh "
        f"continuations, Adam, lr 3e-4, {len(bases)} seeds"
    )
    claims = []
    for name in ("Cringe k=1", "Cringe k=5"):
        falls = [
            end[0] < 0.5 * start[0] and end[0] < value
            for start, end, value in zip(starts, ends[name], alone, strict=True)
        ]
        cheaper = [c < u for c, u in zip(at_half[name], at_half["unlikelihood"], strict=True)]
        claims += [
            Outcome(
                f"repetition-{name.partition(' ')[2].replace('=', '')}",
                f"repetition by seed: {shown}" if name == "Cringe k=1" else "same runs",
                all(falls),
                f"{settings}; lowers: by half or more, and further than training on the positives alone",
            ),
            Outcome(
                f"perplexity-{name.partition(' ')[2].replace('=', '')}",
                "perplexity by seed where repetition is half of the start's (nan: never reached): start "
                f"{numbers([p for _, p in starts], '.3f')}; {name} {numbers(at_half[name], '.3f')}; unlikelihood "
                f"{numbers(at_half['unlikelihood'], '.3f')}",
                all(cheaper),
                settings,
            ),
        ]
    return claims


# ------------------------------------------------------------------------------------------------ the gate of the pair


def make_pairs(text: Text, model: TinyLM, count: int, seed: int) -> Pairs:
    """Text against the model's own greedy continuation of its beginning."""
    good = text.windows(text.train, count, torch.Generator().manual_seed(seed))
    return with_reference(model, good, continuations(model, good.tokens[:, :PROMPT]))


def gate(base_steps: int = 1000) -> list[Outcome]:
    text, base = read_text(), base_model(base_steps, 0)
    return [gate_and_gradient(text, base), gate_closes(text, base)]


def gate_and_gradient(text: Text, model: TinyLM) -> Outcome:
    """One pair at growing margins M: only the sum log pi(w) is moved, nothing else about the pair."""
    loss = PairwiseCringe(k=1)
    pairs = make_pairs(text, model, 1, seed=0)
    batch = batch_of(model, pairs, loss)
    assert batch.chosen is not None
    assert batch.rejected is not None
    margins = torch.linspace(-40, 60, 11)
    norms = []
    for margin in margins:
        shift = (margin - (batch.chosen.logps - batch.rejected.logps)).detach()
        # A constant added to the sum moves the gate and the values, but no other part of the gradient.
        lifted = batch.chosen.logps + shift
        moved = PreferenceBatch(type(batch.chosen)(lifted, batch.chosen.lengths), batch.rejected)
        gradients = torch.autograd.grad(loss.per_example(moved).sum(), list(model.parameters()), retain_graph=True)
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    return Outcome(
        "gradient-by-margin",
        f"gradient norm at margins {numbers(margins, '.0f')}: {numbers(norms, '.3g')}",
        norms == sorted(norms, reverse=True) and len(set(norms)) == len(norms),
        picture=Picture(
            "gradient of one pair", "margin, nats", "norm", {"k = 1": list(zip(margins.tolist(), norms, strict=True))}
        ),
    )


def gate_closes(text: Text, base: TinyLM, steps: int = 100) -> Outcome:
    model, loss = copy.deepcopy(base), PairwiseCringe(k=1)
    pairs = make_pairs(text, model, 64, seed=1)
    generator, gates = torch.Generator().manual_seed(0), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for _ in range(steps):
        with torch.no_grad():
            margin = sums(model, pairs.chosen) - sums(model, pairs.rejected)
        gates.append(float(torch.sigmoid((loss.margin - margin) / loss.temperature).mean()))
        here = pairs[torch.randint(len(pairs), (16,), generator=generator)]
        optimizer.zero_grad()
        loss(batch_of(model, here, loss)).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    averaged = torch.tensor(gates).unfold(0, 10, 10).mean(-1)
    return Outcome(
        "gate-falls",
        f"mean gate of 64 pairs, averaged over stretches of 10 steps: {numbers(averaged, '.3f')}",
        bool((averaged.diff() < 0).all()) and float(averaged[-1]) < float(averaged[0]) / 2,
        f"margin 10, temperature 10 (prefopt's defaults), k = 1, Adam, lr 3e-4, {steps} steps of 16 pairs",
        picture=Picture("mean gate of 64 pairs", "step", "gate", {"k = 1": list(enumerate(gates))}),
    )
