"""IRPO (2404.19733): preference training on a small model's own chains of thought, for two-digit addition.

python scripts/claims/irpo.py
"""

from __future__ import annotations

from _addition import PROBLEMS, base_model, copy_of, draw_pairs, greedy_accuracy, sampled_accuracy
from _common import Claim, numbers, run
from _tiny_lm import Pairs, TinyLM, log_ratios, train

from prefopt.losses import SFT, Loss, presets

PAPER = "IRPO 2404.19733"
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


def iterations(base: TinyLM, problems: int) -> tuple[list[Claim], TinyLM]:
    model, greedy, sampled, usable = base, [greedy_accuracy(base)], [sampled_accuracy(base)], []
    for number in range(3):
        drawn = draw_pairs(model, fresh(number, problems), 30, 10, 0.8, seed=number)
        usable.append(drawn.usable)
        model = tune(model, drawn.pairs, irpo())
        greedy.append(greedy_accuracy(model))
        sampled.append(sampled_accuracy(model))
    late = {t: draw_pairs(model, fresh(3, problems), 30, 10, t, seed=9).usable for t in (0.8, 1.3)}
    return [
        Claim(
            f"{PAPER}, table 1",
            "Accuracy rises with the iterations: second > first > start",
            f"greedy, start and iterations 1 to 3: {numbers(greedy)}; sampled: {numbers(sampled)}; prompts with both "
            f"right and wrong chains: {usable} of {problems}",
            greedy[0] < greedy[1] < greedy[2],
            SETTINGS,
        ),
        Claim(
            f"{PAPER}, section 3.1",
            "Late in training temperature 1.3 leaves more prompts with both right and wrong chains than 0.8",
            f"of {problems}: {late[0.8]} at 0.8, {late[1.3]} at 1.3",
            late[1.3] > late[0.8],
            SETTINGS,
        ),
    ], model


def first_iteration(base: TinyLM, problems: int) -> list[Claim]:
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
        Claim(
            f"{PAPER}, figure 3",
            "Without the likelihood term the chosen chains' log-probability falls below its start, with it it ends "
            "above",
            measured,
            here["DPO"][0] < 0 < here["IRPO"][0],
            SETTINGS,
        ),
        Claim(
            f"{PAPER}, figure 2",
            "Supervised training on the chosen chains raises the rejected ones too",
            f"held-out log-ratio of the rejected: {there['SFT'][1]:+.2f}, of the chosen {there['SFT'][0]:+.2f}",
            there["SFT"][0] > 0 and there["SFT"][1] > 0,
            SETTINGS,
        ),
        Claim(
            f"{PAPER}, figure 2",
            "IRPO tells chosen from rejected by a larger margin than supervised training on the chosen chains",
            f"held-out margins: {'; '.join(f'{name} {value:.2f}' for name, value in margin.items())}",
            margin["IRPO"] > margin["SFT"],
            SETTINGS,
        ),
        Claim(
            f"{PAPER}, table 1",
            "After one iteration IRPO is more accurate than DPO",
            f"greedy accuracy: {'; '.join(f'{name} {value:.3f}' for name, value in accuracy.items())}",
            accuracy["IRPO"] > accuracy["DPO"],
            SETTINGS,
        ),
        Claim(
            f"{PAPER}, table 1",
            "After one iteration IRPO is more accurate than supervised training on the chosen chains",
            "same runs",
            accuracy["IRPO"] > accuracy["SFT"],
            SETTINGS,
        ),
    ]


def claims(problems: int = 500) -> list[Claim]:
    base = base_model()
    found, _ = iterations(base, problems)
    return [*found, *first_iteration(base, problems)]


if __name__ == "__main__":
    run(__doc__, claims)
