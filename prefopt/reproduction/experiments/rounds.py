"""Rounds on a game without a best answer, by the shipped pair builder and losses; HyPO's KL on a whole vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from prefopt.evaluation.judgements import Preference
from prefopt.generation.samples import Sample
from prefopt.losses import DPO, INPO, KLOnline, Loss, PreferenceBatch, Scores
from prefopt.online.builders import parse_builder
from prefopt.online.pairing import PairCounts, PairSettings, pairs_of
from prefopt.reproduction.experiments import inpo
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import minimise, numbers, tabular_pairs, total_variation
from prefopt.reproduction.experiments.tiny_lm import Rows, TinyLM, sums

ANSWERS = ("1", "2", "3")
TOURNAMENT = PairSettings(parse_builder("tournament"))
ETA, TAU = 1.0, 0.3


def drawn_pairs(policy: Tensor, number: int, prompts: int) -> tuple[Tensor, Tensor]:
    """A round's pairs: two samples of each prompt, a judge that knows the game, the builder of INPO's rounds."""
    generator = torch.Generator().manual_seed(number)
    answers = torch.multinomial(policy.exp(), 2 * prompts, replacement=True, generator=generator).reshape(-1, 2)
    samples, judgements = [], []
    for prompt, pair in enumerate(answers.tolist()):
        name = str(prompt)
        samples += [Sample(name, name, index, ANSWERS[answer], 1, True, number) for index, answer in enumerate(pair)]
        wins = float(inpo.WINS[pair[0], pair[1]])
        winner = None if wins == 0.5 else int(wins < 0.5)
        judgements.append(Preference(name, (0, 1), "game", winner, tie=winner is None, round=number))
    rows = list(pairs_of(samples, judgements, TOURNAMENT, PairCounts()))
    chosen, rejected = (torch.tensor([ANSWERS.index(row[side]) for row in rows]) for side in ("chosen", "rejected"))
    return chosen, rejected


def rounds(loss: Loss, reference: Callable[[Tensor], Tensor], count: int, prompts: int) -> Tensor:
    """(count + 1, 3) log-probabilities: sample, judge, pair, train from the last round's policy, again."""
    path = [inpo.REFERENCE]
    for number in range(1, count + 1):
        previous = path[-1]
        pairs = drawn_pairs(previous, number, prompts)

        def objective(logits: Tensor, previous: Tensor = previous, pairs: tuple[Tensor, Tensor] = pairs) -> Tensor:
            logps = torch.log_softmax(logits, -1)
            value: Tensor = loss(tabular_pairs(logps, reference(previous), *pairs, prev_logps=previous)).loss
            return value

        path.append(torch.log_softmax(minimise(objective, previous, rounds=3), -1))
        if float(path[-1].exp().min()) < 1 / prompts:  # an answer has died out: it is no longer drawn
            break
    return torch.stack(path)


def game(count: int = 25, prompts: int = 2000) -> list[Outcome]:
    nash = inpo.iterate(ETA, TAU, 2000)[-1]
    settled = rounds(INPO(ETA, TAU), lambda previous: inpo.REFERENCE, count, prompts)
    last = [total_variation(policy, nash) for policy in settled[-5:]]
    iterated = {beta: rounds(DPO(beta), lambda previous: previous, count, prompts) for beta in (0.5, 1.0, 2.0)}
    gaps = {beta: max(total_variation(policy, nash) for policy in path[-5:]) for beta, path in iterated.items()}
    shown = "; ".join(
        f"beta {beta:g}: {gap:.2f} after {len(iterated[beta]) - 1}, last {numbers(iterated[beta][-1].exp(), '.2f')}"
        for beta, gap in gaps.items()
    )
    settings = f"{prompts} prompts a round, 2 samples each, tournament, {count} rounds, eta {ETA:g}, tau {TAU:g}"
    return [
        Outcome(
            "rounds-converge",
            f"Nash {numbers(nash.exp(), '.3f')}, last round {numbers(settled[-1].exp(), '.3f')}; total variation "
            f"{numbers(last, '.3f')}",
            settings=settings,
            numbers={"largest total variation": [max(last)]},
            picture=Picture(
                "distance from the regularised Nash policy",
                "round",
                "total variation",
                {
                    name: [(float(number), total_variation(policy, nash)) for number, policy in enumerate(path)]
                    for name, path in {"INPO": settled, **{f"DPO, beta {b:g}": p for b, p in iterated.items()}}.items()
                },
            ),
        ),
        Outcome(
            "dpo-rounds-cycle",
            shown,
            min(gaps.values()) > 0.2 and all(float(path[-1].exp().min()) < 1 / prompts for path in iterated.values()),
            settings,
        ),
    ]


def exact_gradient(length: int = 3) -> Outcome:
    """All completions of a tiny language model, each with its probability, in place of samples."""
    torch.manual_seed(0)
    symbols = 4
    model, reference = TinyLM(symbols, hidden=8).double(), TinyLM(symbols, hidden=8).double()
    with torch.no_grad():  # as they are made, both are nearly uniform
        for parameter in (*model.parameters(), *reference.parameters()):
            parameter.add_(torch.randn_like(parameter))
    tokens = torch.tensor([(0, *completion) for completion in itertools.product(range(symbols), repeat=length)])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    rows = Rows(tokens, mask)
    ref_logps = sums(reference, rows).detach()
    parameters = list(model.parameters())
    logps = sums(model, rows)
    exact = torch.autograd.grad((logps.exp() * (logps - ref_logps)).sum(), parameters)
    logps = sums(model, rows)
    weight = {"weight": logps.detach().exp() * len(tokens)}
    lengths = torch.full((len(tokens),), length)
    loss = KLOnline("none")(PreferenceBatch(sampled=Scores(logps, lengths, ref_logps, columns=weight))).loss
    found = torch.autograd.grad(loss, parameters)
    gap = max(float((a - b).abs().max()) for a, b in zip(exact, found, strict=True))
    largest = max(float(a.abs().max()) for a in exact)
    value = float((logps.exp() * (logps - ref_logps)).sum().detach())
    estimate = float(loss.detach())
    return Outcome(
        "exact-online-kl",
        f"largest difference {gap:.1g} of gradients up to {largest:.2g}; value {estimate:.12f}, KL {value:.12f}",
        gap < 1e-12 and abs(estimate - value) < 1e-12,
    )
