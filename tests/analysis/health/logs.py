"""Logs of runs: two measured ones of the bundled model, and synthetic ones of any length."""

from __future__ import annotations

import random
from typing import Any

_NAMES = (
    "loss", "grad_norm", "learning_rate", "entropy", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "logps/chosen", "lengths/chosen", "ratios/chosen", "logps/rejected", "lengths/rejected",
    "ratios/rejected", "step",
)  # fmt: skip

# accelerate launch recipes/dpo.py --learning_rate 5e-4 --max_length 80 --max_steps 24: its first eight steps.
_TOO_HARD = """
0.6931 1.734 0.0005 1.917 0 0 0 0 -26.45 21.12 0 -56.27 45.38 0 1
0.3788 1.1 0.0004792 1.931 0.2279 -0.5569 0.7847 1 -22.89 23.5 2.279 -55.62 45.88 -5.569 2
0.2414 0.5829 0.0004583 2.078 0.03943 -1.398 1.437 1 -23.23 20.88 0.3943 -61.3 43.25 -13.98 3
0.152 0.4864 0.0004375 2.115 -0.2991 -2.231 1.932 1 -25.52 20.25 -2.991 -70.52 43.88 -22.31 4
0.02876 0.1726 0.0004167 2.455 -1.084 -4.88 3.796 1 -33.82 20.5 -10.84 -97.9 44.75 -48.8 5
0.01623 0.1128 0.0003958 2.772 -1.057 -5.861 4.803 1 -29.86 16.75 -10.57 -109.8 44.88 -58.61 6
0.006362 0.05605 0.000375 2.953 -3.321 -8.818 5.496 1 -58.82 21.38 -33.21 -143.3 45.88 -88.18 7
0.005836 0.0591 0.0003542 3.042 -3.811 -9.805 5.994 1 -64.67 19.5 -38.11 -152.7 43.62 -98.05 8
"""
# accelerate launch recipes/dpo.py: the first six of its steps, and the log-ratios and losses of all sixteen.
_HEALTHY = """
0.6931 1.76 0.0001 1.943 0 0 0 0 -26.45 21.12 0 -72.06 58 0 1
0.6225 1.81 9.375e-05 1.826 0.0867 -0.06037 0.1471 1 -24.3 23.5 0.867 -74.74 67.25 -0.6037 2
0.5423 1.655 8.75e-05 1.842 0.2155 -0.1192 0.3347 1 -21.47 20.88 2.155 -67.54 59.25 -1.192 3
0.5302 1.476 8.125e-05 1.901 0.1958 -0.1635 0.3593 1 -20.57 20.25 1.958 -74.62 61.62 -1.635 4
0.4174 1.543 7.5e-05 1.991 0.3128 -0.3593 0.6721 1 -19.85 20.5 3.128 -75.94 62.25 -3.593 5
0.3312 1.601 6.875e-05 2.131 0.3527 -0.6144 0.967 1 -15.76 16.75 3.527 -94.69 72.25 -6.144 6
"""
_HEALTHY_LATER = (  # loss, margin, chosen ratio, rejected ratio
    (0.384, 0.78, 1.1, -6.7), (0.298, 1.10, 1.4, -9.7), (0.214, 1.54, 2.5, -12.9), (0.255, 1.35, 1.4, -12.1),
    (0.212, 1.55, 1.8, -13.7), (0.235, 1.51, 0.8, -14.3), (0.198, 1.67, 2.5, -14.2), (0.202, 1.59, 1.3, -14.6),
    (0.193, 1.91, 2.2, -16.9), (0.178, 1.70, 0.9, -16.1),
)  # fmt: skip

Log = list[dict[str, Any]]


def _table(text: str) -> Log:
    return [dict(zip(_NAMES, map(float, line.split()), strict=True)) for line in text.split("\n") if line]


def too_hard() -> Log:
    """The bundled job with five times its learning rate and answers that are cut."""
    return _table(_TOO_HARD)


def bundled() -> Log:
    """The bundled job, with its evaluations before and after."""
    lines = _table(_HEALTHY)
    for place, (loss, margin, chosen, rejected) in enumerate(_HEALTHY_LATER):
        lines.append(
            lines[5]
            | {"loss": loss, "rewards/margins": margin, "ratios/chosen": chosen, "ratios/rejected": rejected}
            | {"learning_rate": 1e-4 * (10 - place) / 16, "step": 7 + place}
            | {"logps/chosen": -23.3 + chosen, "logps/rejected": -82.8 + rejected, "lengths/rejected": 72.5}
        )
    before = {"eval_loss": 0.693, "eval_ratios/chosen": 0.0, "eval_logps/chosen": -23.3, "step": 0}
    after = {"eval_loss": 0.122, "eval_ratios/chosen": 1.7, "eval_logps/chosen": -21.6, "step": 16}
    return [before, *lines, after]


def synthetic(steps: int = 60, seed: int = 0, without: tuple[str, ...] = (), **changes: Any) -> Log:
    """A healthy run of DPO on noisy pairs, with the noise of batches of eight; the first line is policy = reference.

    Args:
        steps: log lines, one a step.
        seed: of the noise.
        without: beginnings of names that this run does not log.
        changes: name, `/` written `__` -> a function of the part of the run that is over (0 to 1) in place of ours.
    """
    rng, lines = random.Random(seed), []
    for step in range(1, steps + 1):
        done = (step - 1) / max(steps - 1, 1)
        chosen, rejected = 1.0 * done + rng.gauss(0, 0.4) * done, -6.0 * done + rng.gauss(0, 1) * done
        values = {
            "loss": 0.693 - 0.15 * done + rng.gauss(0, 0.03) * done,
            "grad_norm": 4.0 * rng.lognormvariate(0, 0.3),
            "learning_rate": 1e-5 * (1 - done) + 1e-7,
            "entropy": 1.8 - 0.2 * done + rng.gauss(0, 0.05),
            "ratios/chosen": chosen,
            "ratios/rejected": rejected,
            "logps/chosen": -250 + rng.gauss(0, 25) + chosen,
            "logps/rejected": -240 + rng.gauss(0, 25) + rejected,
            "lengths/chosen": 180 + rng.gauss(0, 15),
            "lengths/rejected": 170 + rng.gauss(0, 15),
            "rewards/accuracies": 0.0 if step == 1 else min(1.0, 0.5 + 0.15 * done + rng.gauss(0, 0.1)),
        }
        for name, change in changes.items():
            values[name.replace("__", "/")] = change(done)
        values["rewards/chosen"] = 0.1 * values["ratios/chosen"]
        values["rewards/rejected"] = 0.1 * values["ratios/rejected"]
        values.setdefault("rewards/margins", values["rewards/chosen"] - values["rewards/rejected"])
        lines.append({name: value for name, value in values.items() if not name.startswith(without or ("-",))})
        lines[-1]["step"] = step
    return lines


def with_evaluations(lines: Log, losses: list[float]) -> Log:
    """A log with evaluations at equal distances, one after the other."""
    every = len(lines) // len(losses)
    mixed: Log = []
    for line in lines:
        mixed.append(line)
        if line["step"] % every == 0 and line["step"] // every <= len(losses):
            mixed.append({"eval_loss": losses[line["step"] // every - 1], "step": line["step"]})
    return mixed


def with_measurements(lines: Log, every: int = 20, **metrics: float) -> Log:
    """A log with a line of `EntanglementCallback` before every so many steps."""
    mixed: Log = []
    for line in lines:
        if (before := line["step"] - 1) % every == 0:
            mixed.append({f"entanglement/{name}": value for name, value in metrics.items()} | {"step": before})
        mixed.append(line)
    return mixed
