"""The levels above the toy: the bundled model for a few steps, and a run with a recipe's config.

Each training is a process of its own, `prefopt train` with the candidate as a loss file. Trainings that are in the
archive are not repeated, unless they failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.discovery.archive import Archive, Result
from prefopt.discovery.export import export
from prefopt.safety.errors import UsageError

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainedLevel:
    """Trainings of a language model.

    Attributes:
        name: in the archive.
        betas: of the loss.
        seeds: of the runs.
        candidates: how many of the best are trained, beside DPO.
        arguments: of `prefopt train`.
    """

    name: str
    betas: tuple[float, ...]
    seeds: tuple[int, ...]
    candidates: int
    arguments: tuple[str, ...]


MODEL, CONFIGURED = "model", "config"


def bundled_level(steps: int = 8) -> TrainedLevel:
    """The bundled model on the bundled pairs."""
    return TrainedLevel(MODEL, (0.05, 0.5), (0, 1), 2, ("--max_steps", str(steps)))


def configured_level(config: Path) -> TrainedLevel:
    """A run with a config of `prefopt train`."""
    if not config.is_file():
        raise UsageError(f"--config: there is no file {config}")
    return TrainedLevel(CONFIGURED, (0.05, 0.5), (0, 1), 1, ("--config", str(config.resolve())))


def train_best(
    archive: Archive, level: TrainedLevel, order: Sequence[int], folder: Path, say: Say = print
) -> list[int]:
    """Train the best candidates at every beta and seed of a level, and DPO beside them.

    Args:
        archive: of the search.
        level: what to run.
        order: candidates, best first.
        folder: of the runs and loss files.
        say: called with a line for each training.

    Returns:
        Those that were trained, best first by the worst beta's mean reward.
    """
    dpo = [row.id for row in archive.candidates("proposer = 'seed: dpo'")]
    numbers = [*dpo, *[number for number in order if number not in dpo][: level.candidates]]
    for number in numbers:
        done = {(r.beta, r.seed) for r in archive.results(level.name, [number]) if r.reward is not None}
        for beta in level.betas:
            for seed in level.seeds:
                if (beta, seed) in done:
                    continue
                say(f"{level.name}: candidate {number}, beta {beta:g}, seed {seed}")
                started = time.monotonic()
                result = _one(archive, level, number, beta, seed, folder)
                reason = "" if result.reward is not None else f"{level.name}: {result.details['error']}"
                archive.reached(number, level.name, reason, [result], time.monotonic() - started)
    return sorted(numbers, key=lambda number: -_worst(archive.results(level.name, [number])))


def _worst(results: Sequence[Result]) -> float:
    """The mean reward at the worst beta; minus infinity where a training failed."""
    by_beta: dict[float, list[float]] = {}
    for result in results:
        by_beta.setdefault(result.beta, []).append(float("-inf") if result.reward is None else result.reward)
    return min(sum(rewards) / len(rewards) for rewards in by_beta.values())


def _one(archive: Archive, level: TrainedLevel, number: int, beta: float, seed: int, folder: Path) -> Result:
    name = f"candidate_{number}"
    folder.mkdir(parents=True, exist_ok=True)
    loss, _ = export(archive, number, folder / f"{name}.py", overwrite=True)
    output = folder / level.name / f"{name}-beta{beta:g}-seed{seed}"
    words = [
        sys.executable, "-m", "prefopt", "train", *level.arguments, "--loss_file", str(loss.resolve()),
        "--loss", f"{name}(beta={beta!r})", "--seed", str(seed), "--output_dir", str(output.resolve()),
    ]  # fmt: skip
    process = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if process.returncode != 0:
        lines = [line.strip() for line in (process.stderr or process.stdout).splitlines() if line.strip()]
        said = lines[-1][:300] if lines else f"exit status {process.returncode}"
        return Result(number, level.name, beta, seed, None, None, None, None, {"error": said})
    return read_results(output, number, level.name, beta, seed)


def read_results(output: Path, number: int, level: str, beta: float, seed: int) -> Result:
    """What a run's `results.json` says: the rate of the bundled rule, else the held-out reward accuracy.

    KL is not measured there; the mean log-ratio of the held-out chosen answers, in nats, is among the details.
    """
    stored = json.loads((output / "results.json").read_text(encoding="utf-8"))
    after: dict[str, Any] = stored.get("after") or {}
    first: dict[str, Any] = stored.get("answers_before") or {}
    last: dict[str, Any] = stored.get("answers_after") or {}
    accuracy, chosen = after.get("eval_rewards/accuracies"), after.get("eval_ratios/chosen")
    details = {"rule rate": last.get("rule_rate"), "words": last.get("mean_words"), "empty": last.get("empty"),
               "accuracy": accuracy, "log-ratio of chosen": chosen}  # fmt: skip
    length = last["mean_words"] - first["mean_words"] if first and last else None
    reward = last.get("rule_rate", accuracy)
    if reward is None:
        details["error"] = "the run has no held-out rows: no accuracy is known"
    return Result(number, level, beta, seed, reward, None, length, None, details)
