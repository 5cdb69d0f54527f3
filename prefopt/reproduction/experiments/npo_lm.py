"""NPO (2404.05868), theorem 2 on the bundled 135M model: how far its weights move while it forgets six answers."""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import TrainerCallback

from prefopt.recipe import parse_arguments, preflight
from prefopt.recipe.unlearning import Measurements, UnlearningArguments, learned_models, load_sets, make_trainer
from prefopt.reproduction.experiments.npo import r_squared
from prefopt.reproduction.experiments.outcome import Outcome

LOSSES = {"NPO": "npo(beta=0.1)", "GA": "ga(nll='sum')"}
STEPS, ROWS, RATE = 40, 6, 5e-4
SETTINGS = (
    f"SmolLM2-135M-Instruct that knows the bundled authors; gradient descent on all weights with a rate of {RATE:g}, "
    f"without momentum or clipping, on the same {ROWS} answers to forget in each step, no retain term, {STEPS} steps, "
    "one seed; the theorem is about logistic regression. R^2 without the first tenth of the steps"
)


@dataclass
class Forgetting(TrainerCallback):  # type: ignore[misc]
    """Where the weights go while they forget.

    Attributes:
        distances: the Euclidean distance of all weights from their start, after each step.
        logps: the mean log-probability of the answers in nats, before each step.
    """

    distances: list[float] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._start = [weight.detach().clone() for weight in model.parameters()]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        pairs = zip(model.parameters(), self._start, strict=True)
        squares = sum(float((weight.detach() - start).square().sum()) for weight, start in pairs)
        self.distances.append(math.sqrt(squares))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logps += [value for name, value in logs.items() if name.startswith("logps/")]


def forget(loss: str) -> Forgetting:
    """Forget with a loss, from the model that the bundled job learns."""
    with tempfile.TemporaryDirectory() as output:
        words = (
            "--demo", "--loss", loss, "--learning_rate", str(RATE), "--evaluate_every", "0", "--best", "none",
            "--output_dir", output, "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true",
        )  # fmt: skip
        recipe = parse_arguments(loss, words, UnlearningArguments)
        ready, questions = preflight(recipe), load_sets(recipe)
        models = learned_models(recipe, ready, questions)
        args = ready.training
        args.optim, args.max_grad_norm = type(args.optim)("sgd"), 0.0
        args.lr_scheduler_type, args.warmup_steps = type(args.lr_scheduler_type)("constant"), 0
        args.per_device_train_batch_size, args.max_steps = ROWS, STEPS
        args.precompute_ref_log_probs = True
        few = replace(questions, forget=questions.forget[:ROWS])
        trainer = make_trainer(recipe, ready, few, models, Measurements({}, None))
        path = Forgetting()
        trainer.add_callback(path)
        with contextlib.suppress(FloatingPointError):  # gradient ascent has no minimum
            trainer.train()
        return path


def weights() -> list[Outcome]:
    paths = {name: forget(loss) for name, loss in LOSSES.items()}
    at = [STEPS // 4, STEPS // 2, STEPS]
    fits, lines = {}, []
    for name, path in paths.items():
        distances = torch.tensor(path.distances, dtype=torch.float64)[STEPS // 10 :]
        steps = torch.arange(1, len(path.distances) + 1, dtype=torch.float64)[STEPS // 10 :]
        fits[name] = r_squared(steps, distances), r_squared(steps.log(), distances)
        far = ", ".join(f"{path.distances[step - 1]:.3g}" for step in at if step <= len(path.distances))
        fit = " / ".join(f"{value:.4f}" for value in fits[name])
        lines.append(f"{name}: {far}; {fit}; {path.logps[-1]:.0f} nats")
    measured = (
        f"distance after {', '.join(map(str, at))} steps; R^2 of a line in t / in log t; mean log-probability of an "
        f"answer at the last step. {'. '.join(lines)}"
    )
    return [
        Outcome(
            "weights-linear-under-ascent",
            measured,
            fits["GA"][0] > max(0.99, fits["GA"][1]),
            SETTINGS,
        ),
        Outcome(
            "weights-logarithmic-under-npo",
            "same runs",
            fits["NPO"][1] > max(0.99, fits["NPO"][0]),
            SETTINGS,
        ),
    ]
