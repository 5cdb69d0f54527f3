"""The run of a recipe: evaluate, train, evaluate, save, publish."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from prefopt.analysis.health.callback import HealthCallback
from prefopt.analysis.health.finding import Finding
from prefopt.analysis.health.history import Settings
from prefopt.analysis.health.saved import ended_by, save_findings, save_log
from prefopt.demo.before_after import PairMetrics, side_by_side, summarize
from prefopt.demo.data import heldout_prompts
from prefopt.generation.answers import Answer, greedy_answers
from prefopt.recipe import pages
from prefopt.recipe.arguments import LOSS_FILE, Recipe
from prefopt.recipe.earlier_run import RESULTS
from prefopt.recipe.eval_answers import answer_at_evaluations
from prefopt.recipe.progress import RunProgress
from prefopt.report.folder import BEFORE
from prefopt.safety.files import write_text
from prefopt.safety.tables import table
from prefopt.trainer import PreferenceTrainer
from prefopt.trainer.engine import describe_engine, not_as_asked
from prefopt.trainer.finite import NonFiniteError
from prefopt.trainer.publishing import PushError
from prefopt.trainer.saving.stops import sigterm_raises


@dataclass(frozen=True)
class Measured:
    """Measurements of a model before or after training.

    Attributes:
        metrics: of the held-out rows, if there are any.
        answers: to the bundled held-out prompts, if the bundled pairs are trained on.
    """

    metrics: dict[str, float] | None = None
    answers: list[Answer] | None = None


def run(
    recipe: Recipe, trainer: PreferenceTrainer, before: Measured | None = None, start: Any = None
) -> dict[str, Any]:
    """Evaluate, train, evaluate, save; on the bundled data also answer held-out prompts before and after.

    A run that is stopped by a signal ends in `train`, after its checkpoint, and is not evaluated or saved as a
    finished run. Its results before training are in `before.json`, for the run that resumes it.

    Args:
        recipe: the options.
        trainer: not trained yet.
        before: the measurements before training, if they are not to be made; prompts are answered after training only
            if they were answered before.
        start: the model before training, if it is at hand: KL on answers is then from it.

    Returns:
        The content of `results.json` in the output folder.
    """
    checkpoint = begin(recipe, trainer)
    answers_stored = answer_at_evaluations(recipe, trainer, checkpoint is not None, start)
    if before is None:
        before = _measure_first(recipe, trainer) if checkpoint is None else _measured_before(recipe, trainer)
    train(recipe, trainer, checkpoint)
    metrics = None if trainer.eval_dataset is None else trainer.evaluate()
    after = Measured(metrics, None if before.answers is None else _answers(recipe, trainer))
    pages.save_pairs(recipe, trainer)
    results = _results(recipe, trainer, before, after)
    _save_log(recipe, trainer)  # again, with the evaluation
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        save_results(recipe, RESULTS, results)
        if before.answers is not None and after.answers is not None and not answers_stored:
            answers = {0: before.answers, trainer.state.global_step: after.answers}
            pages.save_answers(recipe, heldout_prompts(), answers)
    _show_both(recipe, before, after)
    recipe.console.print(f"Saved to {recipe.training.output_dir}")
    pages.write_page(recipe, trainer)
    publish(recipe, trainer)
    return results


def begin(recipe: Recipe, trainer: PreferenceTrainer) -> str | None:
    """Print what the run runs on and where it starts; returns the checkpoint to resume from, or None."""
    console, asked = recipe.console, recipe.training.resume_from_checkpoint
    console.print(f"Running on {describe_engine(trainer)}{_threads(trainer)}")
    if warning := not_as_asked(trainer):
        console.print(f"[bold]{warning}[/bold]", soft_wrap=True)
    if trainer.is_world_process_zero():
        _copy_loss_file(recipe)
    checkpoint = trainer.checkpoint_to_resume(asked)
    if asked is not None:
        where = "No checkpoint yet: starting from step 0" if checkpoint is None else f"Resuming from {checkpoint}"
        console.print(where, soft_wrap=True)
    pages.save_start(recipe, trainer)
    return checkpoint


def train(recipe: Recipe, trainer: PreferenceTrainer, checkpoint: str | None) -> None:
    """Train and save the model and its log; a signal ends the program after a checkpoint."""
    not_finite, ended_early = None, True
    try:
        with sigterm_raises():
            trainer.train(resume_from_checkpoint=checkpoint)
        ended_early = False
    except (KeyboardInterrupt, SystemExit):
        _say_interrupted(recipe, trainer)
        raise
    except NonFiniteError as error:
        not_finite = str(error).splitlines()[0]
        raise
    finally:
        with contextlib.suppress(OSError):  # an error of the training itself says more
            _save_log(recipe, trainer, not_finite)
            _save_findings(recipe, trainer, not_finite)
            if ended_early and trainer.state.log_history:
                pages.write_page(recipe, trainer)
    trainer.save_model(_internal_call=True)  # pushed later, with a card that has the numbers


def _save_log(recipe: Recipe, trainer: PreferenceTrainer, not_finite: str | None = None) -> None:
    if trainer.is_world_process_zero():
        settings = Settings.of(trainer.args, trainer.state.max_steps)
        save_log(Path(recipe.training.output_dir), trainer.state, settings, not_finite)


def _save_findings(recipe: Recipe, trainer: PreferenceTrainer, not_finite: str | None) -> None:
    """Write the findings of a run, also of one that ended before its end."""
    watching = _watching(trainer)
    if watching is not None and trainer.is_world_process_zero():
        ended = [] if not_finite is None else [ended_by(trainer.state.global_step, not_finite)]
        save_findings(Path(recipe.training.output_dir), [*ended, *watching.findings])


def findings_of_log(trainer: PreferenceTrainer) -> list[Finding]:
    """What the log says about the run, the most serious first."""
    watching = _watching(trainer)
    return [] if watching is None else watching.findings


def _findings(trainer: PreferenceTrainer) -> dict[str, Any]:
    """What the log says about the run, and whether that ended it."""
    watching = _watching(trainer)
    if watching is None:
        return {}
    ended = watching.stopped_by
    return {
        "findings": [finding.as_object() for finding in watching.findings],
        **({} if ended is None else {"stopped_by": ended.rule}),
    }


def _watching(trainer: PreferenceTrainer) -> HealthCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, HealthCallback)), None)


def _threads(trainer: PreferenceTrainer) -> str:
    """On CPUs: how many threads each process computes with."""
    if trainer.args.device.type != "cpu":
        return ""
    count = torch.get_num_threads()
    each = " each" if trainer.accelerator.num_processes > 1 else ""
    return f" on CPU, {count} thread{'s' if count > 1 else ''}{each}"


def _measure_first(recipe: Recipe, trainer: PreferenceTrainer) -> Measured:
    # Sharded engines are set up by train() only.
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    possible = trainer.eval_dataset is not None and not sharded
    metrics = trainer.evaluate() if possible and recipe.script.evaluate_first else None
    if metrics is not None:
        trainer.check_best_metric(metrics)  # fails before any training
    answers = _answers(recipe, trainer) if possible and recipe.bundled_data else None
    if trainer.is_world_process_zero():
        texts = None if answers is None else [vars(answer) for answer in answers]
        save_results(recipe, BEFORE, {"before": metrics, "answers": texts})
    return Measured(metrics, answers)


def _measured_before(recipe: Recipe, trainer: PreferenceTrainer) -> Measured:
    """The results before training of the run that is resumed: its policy is no longer the initial one."""
    file = Path(recipe.training.output_dir) / BEFORE
    first = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    texts = first.get("answers")
    before = Measured(first.get("before"), None if texts is None else [Answer(**answer) for answer in texts])
    trainer.started_from(before.metrics)
    return before


def _results(recipe: Recipe, trainer: PreferenceTrainer, before: Measured, after: Measured) -> dict[str, Any]:
    results: dict[str, Any] = {
        "loss": str(trainer.objective or trainer.args.loss_type),
        **({} if recipe.loss_file is None else {"loss_file": LOSS_FILE}),
        "engine": describe_engine(trainer),
        "before": before.metrics,
        "after": after.metrics,
    }
    for name, measured in (("answers_before", before), ("answers_after", after)):
        if measured.answers is not None:
            results[name] = vars(summarize(measured.answers))
    return results | _findings(trainer)


def _show_both(recipe: Recipe, before: Measured, after: Measured) -> None:
    if before.answers is not None and after.answers is not None:
        logs = (before.metrics, after.metrics)
        old, new = (None if metrics is None else PairMetrics.from_logs(metrics) for metrics in logs)
        recipe.console.print(side_by_side(heldout_prompts(), before.answers, after.answers, old, new))
    elif after.metrics is not None:
        recipe.console.print(_comparison(before.metrics, after.metrics))


def _say_interrupted(recipe: Recipe, trainer: PreferenceTrainer) -> None:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RunProgress):
            callback.close()
    if recipe.training.save_strategy.value == "no":
        recipe.console.print(
            f"Interrupted after step {trainer.state.global_step}: nothing was saved. With --save_strategy steps or "
            "epoch, Ctrl-C and SIGTERM save a checkpoint first.",
            soft_wrap=True,
        )


def publish(recipe: Recipe, trainer: PreferenceTrainer) -> None:
    """Push the saved model, if requested. A failed push is printed; the run succeeds anyway."""
    if not recipe.training.push_to_hub:
        return
    try:
        trainer.push_to_hub()
    except PushError as error:
        recipe.console.print(f"{error}", soft_wrap=True, markup=False)
    else:
        recipe.console.print(f"Pushed to {trainer.hub_model_id}", soft_wrap=True)


def _answers(recipe: Recipe, trainer: PreferenceTrainer) -> Any:
    recipe.console.print("Answering the held-out prompts greedily")
    return greedy_answers(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, heldout_prompts())


def _comparison(before: dict[str, float] | None, after: dict[str, float]) -> Table:
    shown = table("", "before", "after", right=("before", "after"), title="Held-out rows")
    start = None if before is None else PairMetrics.from_logs(before)
    for name in sorted(after):
        if name.removeprefix("eval_").startswith(("loss", "rewards/", "ratios/", "logps/", "entropy", "kl")):
            old = "" if before is None or name not in before else f"{before[name]:.4g}"
            if name == "eval_rewards/accuracies" and start is not None and start.is_reference:
                old += " (policy = reference)"
            shown.add_row(name.removeprefix("eval_"), old, f"{after[name]:.4g}")
    return shown


def _copy_loss_file(recipe: Recipe) -> None:
    """Keep the user's own losses with the run, so that its loss can be read and used later."""
    if (file := recipe.loss_file) is None:
        return
    copy = Path(recipe.training.output_dir) / LOSS_FILE
    if copy.exists() and copy.read_text(encoding="utf-8") != file.text:
        before = copy.rename(copy.with_name(f"{copy.stem}-{time.strftime('%Y%m%d-%H%M%S')}.py"))
        recipe.console.print(f"{file.path} has changed since this run began; as it was: {before}", soft_wrap=True)
    write_text(copy, file.text)


def save_results(recipe: Recipe, name: str, results: dict[str, Any]) -> None:
    """Write a JSON file into the output folder, whole or not at all."""
    write_text(Path(recipe.training.output_dir) / name, json.dumps(results, indent=2) + "\n")
