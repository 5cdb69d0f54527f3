"""Two-digit addition by a small model: claims on sampling, rounds, an online KL and two stages, over three seeds."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from prefopt.losses import HDPO, SFT, Loss, PreferenceBatch, Scores, presets
from prefopt.reproduction.experiments.addition import (
    ANSWER,
    HELD_OUT,
    PROBLEMS,
    base_model,
    copy_of,
    draw_pairs,
    greedy_accuracy,
    is_right,
    prompts_of,
    rows,
)
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tiny_lm import Pairs, TinyLM, batch_of, log_ratios, sums, train

SEEDS = (0, 1, 2)
COMMON = (
    "a GRU of 128 units, supervised until 30% of its samples are right; pairs of a right and a wrong sample (30 "
    "samples of each of 250 problems, 10 pairs, temperature 0.8), Adam, lr 3e-4, batches of 64 pairs, 2 epochs; a "
    "seed draws problems, samples and batches"
)


def problems_of(seed: int, number: int = 0, count: int = 250) -> list[tuple[int, int]]:
    start = 2500 + (4 * seed + number) * count
    return PROBLEMS[start : start + count]


@cache
def pairs_of(seed: int) -> Pairs:
    return draw_pairs(base_model(), problems_of(seed), 30, 10, 0.8, seed).pairs


@cache
def unseen_pairs() -> Pairs:
    return draw_pairs(base_model(), PROBLEMS[:250], 30, 4, 0.8, 99).pairs


def tune(model: TinyLM, pairs: Pairs, loss: Loss, seed: int, epochs: float = 2) -> TinyLM:
    return train(copy_of(model), pairs, loss, 3e-4, max(1, int(epochs * len(pairs) / 64)), seed=seed)


# ------------------------------------------------------------------------------------------------------ H-DPO, pass@k


def pass_at(right: Tensor, k: int) -> float:
    """Mean over problems of the chance that one of k samples is right, unbiased: (problems, samples) right or not."""
    count = right.shape[1]
    misses = (count - right.sum(1)).tolist()
    return sum(1 - math.comb(int(wrong), k) / math.comb(count, k) for wrong in misses) / len(misses)


def sampled(model: TinyLM, seed: int, samples: int = 64, count: int = 250) -> Tensor:
    """(problems, samples) whether a sample at temperature 1 is right."""
    asked = [problem for problem in HELD_OUT[:count] for _ in range(samples)]
    answers = model.continue_rows(prompts_of(asked), ANSWER, torch.Generator().manual_seed(seed))
    return is_right(answers, asked).reshape(count, samples)


def pass_at_k(samples: int = 64) -> list[Outcome]:
    sizes = [2**power for power in range(samples.bit_length())]
    found: dict[float, list[list[float]]] = {}
    for alpha in (0.8, 1.0, 1.2):
        found[alpha] = []
        for seed in SEEDS:
            right = sampled(tune(base_model(), pairs_of(seed), HDPO(0.1, alpha), seed), seed, samples)
            found[alpha].append([pass_at(right, k) for k in sizes])
    mean = {alpha: torch.tensor(values).mean(0).tolist() for alpha, values in found.items()}
    shown = "; ".join(
        f"alpha {alpha:g}: " + ", ".join(f"{value:.3f}" for value in values) for alpha, values in mean.items()
    )
    one, most = (
        {f"alpha {alpha:g}": [values[at] for values in by_seed] for alpha, by_seed in found.items()} for at in (0, -1)
    )
    settings = f"{COMMON}; beta 0.1 for every alpha, {samples} samples of 250 held-out problems at temperature 1"
    picture = Picture(
        "right answers among k samples, mean of 3 seeds",
        "k",
        "pass@k",
        {f"alpha {alpha:g}": list(zip(map(float, sizes), values, strict=True)) for alpha, values in mean.items()},
        log="x",
    )
    measured = f"pass@k for k = {', '.join(map(str, sizes))}, mean of 3 seeds. {shown}"
    return [
        Outcome("pass-at-1", measured, settings=settings, numbers=one),
        Outcome("pass-at-64", "same runs", settings=settings, numbers=most, picture=picture),
    ]


# ------------------------------------------------------------------------------------------------ HyPO, on its samples


def hybrid(pairs: Pairs, lam: float, seed: int, drawn: int = 64, clip: float = 1.0) -> TinyLM:
    """DPO on pairs and, in the same step, lam times the reverse KL on completions that the policy draws now."""
    base = base_model()
    model, loss = copy_of(base), presets()["hypo"].build(beta=0.1, lam=lam)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for _ in range(2 * len(pairs) // 64):
        here = pairs[torch.randint(len(pairs), (64,), generator=generator)]
        prompts = here.chosen.tokens[torch.randperm(64, generator=generator)[:drawn], :6]
        own = rows(prompts, model.continue_rows(prompts, ANSWER, generator))
        with torch.no_grad():
            reference = sums(base, own)
        online = Scores(sums(model, own), own.mask[:, 1:].sum(-1), reference)
        both = batch_of(model, here, loss)
        optimizer.zero_grad()
        loss(PreferenceBatch(both.chosen, both.rejected, sampled=online)).loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


@torch.no_grad()
def sampled_kl(model: TinyLM, seed: int, copies: int = 8) -> float:
    """Mean log pi - log ref of the policy's own answers to held-out problems."""
    prompts = prompts_of(HELD_OUT[:250] * copies)
    own = rows(prompts, model.continue_rows(prompts, ANSWER, torch.Generator().manual_seed(seed)))
    return float((sums(model, own) - sums(base_model(), own)).mean())


def on_policy() -> list[Outcome]:
    kl: dict[str, list[float]] = {"DPO": [], "HyPO": []}
    accuracy: dict[str, list[float]] = {"DPO": [], "HyPO": []}
    for seed in SEEDS:
        for name, lam in (("DPO", 0.0), ("HyPO", 0.1)):
            model = hybrid(pairs_of(seed), lam, seed)
            kl[name].append(sampled_kl(model, seed))
            up, down = log_ratios(model, unseen_pairs())
            accuracy[name].append(float((up > down).float().mean()))
    settings = f"{COMMON}; beta 0.1, lambda 0.1 or 0, one fresh sample for each pair and step, gradients clipped to 1"
    return [
        Outcome(
            "smaller-kl",
            f"KL of own samples by seed: DPO {_listed(kl['DPO'], '.2f')}; HyPO {_listed(kl['HyPO'], '.2f')}",
            settings=settings,
            numbers=kl,
        ),
        Outcome(
            "equal-accuracy",
            f"held-out pairs ranked right: DPO {_listed(accuracy['DPO'])}; HyPO {_listed(accuracy['HyPO'])}",
            settings=settings,
            numbers={
                "lost": [a - b for a, b in zip(accuracy["DPO"], accuracy["HyPO"], strict=True)],
                **accuracy,
            },
        ),
    ]


def _listed(values: list[float], form: str = ".3f") -> str:
    return ", ".join(format(value, form) for value in values)


# ------------------------------------------------------------------------------------------------- IRPO, three rounds


def three_rounds() -> list[Outcome]:
    paths: dict[str, list[list[float]]] = {"with": [], "without": []}
    for seed in SEEDS:
        for name, alpha in (("with", 1.0), ("without", 0.0)):
            model, path = base_model(), [greedy_accuracy(base_model())]
            for number in range(3):
                drawn = draw_pairs(model, problems_of(seed, number), 30, 10, 0.8, seed=10 * seed + number)
                model = tune(model, drawn.pairs, presets()["irpo"].build(beta=0.1, alpha=alpha), seed)
                path.append(greedy_accuracy(model))
            paths[name].append(path)
    mean = {name: torch.tensor(values).mean(0).tolist() for name, values in paths.items()}
    numbers = {f"{name} the term": [path[-1] for path in values] for name, values in paths.items()}
    return [
        Outcome(
            "three-rounds",
            "greedy accuracy at the start and after rounds 1 to 3, mean of 3 seeds: "
            + "; ".join(f"{name} the term {_listed(values)}" for name, values in mean.items()),
            settings=f"{COMMON}; alpha 1 or 0, each round from the model that drew its samples",
            numbers={**numbers, "start": [path[0] for path in paths["with"]]},
            picture=Picture(
                "greedy accuracy over rounds, mean of 3 seeds",
                "round",
                "accuracy",
                {f"{name} the likelihood term": list(enumerate(values)) for name, values in mean.items()},
            ),
        )
    ]


# ---------------------------------------------------------------------- ORPO and ASFT, two stages


def two_stages() -> list[Outcome]:
    accuracy: dict[str, list[float]] = {}
    greedy: dict[str, list[float]] = {}
    for seed in SEEDS:
        pairs = pairs_of(seed)
        for name in ("orpo", "asft"):
            one = tune(base_model(), pairs, presets()[f"{name}_paper"].build(), seed)
            first = tune(base_model(), pairs, SFT(), seed, epochs=1)
            two = tune(first, pairs, _term(name), seed, epochs=1)
            for stage, model in (("one stage", one), ("two stages", two)):
                up, down = log_ratios(model, unseen_pairs())
                accuracy.setdefault(f"{name}, {stage}", []).append(float((up > down).float().mean()))
                greedy.setdefault(f"{name}, {stage}", []).append(greedy_accuracy(model))
    shown = "; ".join(
        f"{name} {_listed(values)} (greedy {_listed(greedy[name])})" for name, values in accuracy.items()
    )
    settings = f"{COMMON}; one stage: the paper's sum; two stages: an epoch of likelihood, one of the term"
    return [
        Outcome(
            f"two-stages-{name}",
            f"held-out pairs ranked right by seed: {shown}" if name == "orpo" else "same runs",
            settings=settings,
            numbers={stage: accuracy[f"{name}, {stage}"] for stage in ("one stage", "two stages")},
        )
        for name in ("orpo", "asft")
    ]


def _term(name: str) -> Loss:
    from prefopt.losses import parse

    return parse(f"{name}(beta=1.0)")
