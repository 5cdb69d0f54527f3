"""IRPO (2404.19733): preference training on a small model's own chains of thought, for two-digit addition."""

from __future__ import annotations

from prefopt.losses import SFT, Loss, presets
from prefopt.reproduction.experiments.addition import (
    PROBLEMS,
    base_model,
    copy_of,
    draw_pairs,
    greedy_accuracy,
    sampled_accuracy,
)
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import numbers
from prefopt.reproduction.experiments.tiny_lm import Pairs, TinyLM, log_ratios, train

SETTINGS = (
    "a GRU of 128 units, supervised until 30% of its samples are right; 500 problems an iteration, beta 0.1, alpha 1, "
    "N = 30, K = 10, temperature 0.8 (the paper's), Adam, lr 3e-4, batches of 64 pairs, 2 epochs"
)


def irpo(alpha: float = 1.0) -> Loss:
    return presets()["irpo"].build(beta=0.1, alpha=alpha)


def fresh(iteration: int, problems: int) -> list[tuple[int, int]]:
    start = 2500 + iteration * problems
    return PROBLEMS[start : start + problems]


def tune(model: TinyLM, pairs: Pairs, loss: Loss, epochs: int = 2) -> TinyLM:
    return train(copy_of(model), pairs, loss, lr=3e-4, steps=max(1, epochs * len(pairs) // 64))


def iterations(problems: int = 500) -> list[Outcome]:
    base = base_model()
    model, greedy, sampled, usable = base, [greedy_accuracy(base)], [sampled_accuracy(base)], []
    for number in range(3):
        drawn = draw_pairs(model, fresh(number, problems), 30, 10, 0.8, seed=number)
        usable.append(drawn.usable)
        model = tune(model, drawn.pairs, irpo())
        greedy.append(greedy_accuracy(model))
        sampled.append(sampled_accuracy(model))
    late = {t: draw_pairs(model, fresh(3, problems), 30, 10, t, seed=9).usable for t in (0.8, 1.3)}
    return [
        Outcome(
            "accuracy-rises",
            f"greedy, start and iterations 1 to 3: {numbers(greedy)}; sampled: {numbers(sampled)}; prompts with both "
            f"right and wrong chains: {usable} of {problems}",
            greedy[0] < greedy[1] < greedy[2],
            SETTINGS,
            picture=Picture(
                "accuracy over iterations",
                "iteration",
                "accuracy",
                {name: list(enumerate(path)) for name, path in {"greedy": greedy, "sampled": sampled}.items()},
            ),
        ),
        Outcome(
            "temperature",
            f"of {problems}: {late[0.8]} at 0.8, {late[1.3]} at 1.3",
            late[1.3] > late[0.8],
            SETTINGS,
        ),
    ]


def first_iteration(problems: int = 500) -> list[Outcome]:
    base = base_model()
    drawn = draw_pairs(base, fresh(0, problems), 30, 10, 0.8, seed=0)
    held_out = draw_pairs(base, fresh(4, problems // 2), 30, 4, 0.8, seed=5).pairs
    models = {
        "DPO": tune(base, drawn.pairs, irpo(alpha=0.0)),
        "IRPO": tune(base, drawn.pairs, irpo()),
        "SFT": tune(base, drawn.pairs, SFT()),
    }
    here = {name: [float(u.mean()) for u in log_ratios(model, drawn.pairs)] for name, model in models.items()}
    there = {name: [float(u.mean()) for u in log_ratios(model, held_out)] for name, model in models.items()}
    accuracy = {name: greedy_accuracy(model) for name, model in models.items()}
    table = "; ".join(
        f"{n} {here[n][0]:+.2f} / {here[n][1]:+.2f} ({there[n][0]:+.2f} / {there[n][1]:+.2f})" for n in here
    )
    margin = {name: there[name][0] - there[name][1] for name in there}
    measured = f"mean log-ratio chosen / rejected in nats, training pairs (held-out pairs): {table}"
    return [
        Outcome(
            "likelihood-figure",
            measured,
            here["DPO"][0] < 0 < here["IRPO"][0],
            SETTINGS,
        ),
        Outcome(
            "sft-raises-rejected",
            f"held-out log-ratio of the rejected: {there['SFT'][1]:+.2f}, of the chosen {there['SFT'][0]:+.2f}",
            there["SFT"][0] > 0 and there["SFT"][1] > 0,
            SETTINGS,
        ),
        Outcome(
            "margin-over-sft",
            f"held-out margins: {'; '.join(f'{name} {value:.2f}' for name, value in margin.items())}",
            margin["IRPO"] > margin["SFT"],
            SETTINGS,
        ),
        Outcome(
            "beats-dpo",
            f"greedy accuracy: {'; '.join(f'{name} {value:.3f}' for name, value in accuracy.items())}",
            accuracy["IRPO"] > accuracy["DPO"],
            SETTINGS,
        ),
        Outcome(
            "beats-sft",
            "same runs",
            accuracy["IRPO"] > accuracy["SFT"],
            SETTINGS,
        ),
    ]
