"""The run of a recipe: evaluate, train, evaluate, save, publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from prefopt.demo.before_after import PairMetrics, side_by_side, summarize
from prefopt.demo.data import heldout_prompts
from prefopt.generation.answers import Answer, greedy_answers
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.progress import RunProgress
from prefopt.safety.files import write_whole
from prefopt.safety.tables import table
from prefopt.trainer import PreferenceTrainer
from prefopt.trainer.engine import describe_engine, engine_not_used
from prefopt.trainer.publishing import PushError
from prefopt.trainer.saving.stops import sigterm_raises


def run(recipe: Recipe, trainer: PreferenceTrainer) -> dict[str, Any]:
    """Evaluate, train, evaluate, save; on the bundled data also answer held-out prompts before and after.

    A run that is stopped by a signal ends in `train`, after its checkpoint: it is not evaluated or saved as if it had
    finished. What it found before training is kept in `before.json` for the run that goes on with it.

    Returns:
        What `results.json` in the output folder holds.
    """
    console, training = recipe.console, recipe.training
    console.print(f"Running on {describe_engine(trainer)}")
    if warning := engine_not_used(trainer):
        console.print(f"[bold]{warning}[/bold]", soft_wrap=True)
    has_heldout = trainer.eval_dataset is not None
    # A resumed policy is not where the run began, and sharded engines are set up by train() only.
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    checkpoint = trainer.checkpoint_to_resume(training.resume_from_checkpoint)
    if training.resume_from_checkpoint is not None:
        where = "No checkpoint yet: from the start" if checkpoint is None else f"Resuming from {checkpoint}"
        console.print(where, soft_wrap=True)
    kept = Path(training.output_dir) / "before.json"
    if checkpoint is None:
        can_look_first = has_heldout and not sharded
        before = trainer.evaluate() if can_look_first and recipe.script.evaluate_first else None
        if before is not None:
            trainer.check_best_metric(before)  # no step is needed to know
        answers_before = _answers(recipe, trainer) if can_look_first and recipe.bundled_data else None
        if trainer.is_world_process_zero():
            said = None if answers_before is None else [vars(answer) for answer in answers_before]
            _save_results(kept, {"before": before, "answers": said})
    else:
        first = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        before, said = first.get("before"), first.get("answers")
        answers_before = None if said is None else [Answer(**answer) for answer in said]
        trainer.started_from(before)
    try:
        with sigterm_raises():
            trainer.train(resume_from_checkpoint=checkpoint)
    except (KeyboardInterrupt, SystemExit):
        _say_interrupted(recipe, trainer)
        raise
    trainer.save_model(_internal_call=True)  # pushed below, with a card that has the numbers
    after = trainer.evaluate() if has_heldout else None
    answers_after = None if answers_before is None else _answers(recipe, trainer)
    results: dict[str, Any] = {
        "loss": str(trainer.objective or training.loss_type),
        "engine": describe_engine(trainer),
        "before": before,
        "after": after,
    }
    for name, answers in (("answers_before", answers_before), ("answers_after", answers_after)):
        if answers is not None:
            results[name] = vars(summarize(answers))
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        _save_results(Path(training.output_dir) / "results.json", results)
    if answers_before is not None and answers_after is not None:
        old, new = (None if logs is None else PairMetrics.from_logs(logs) for logs in (before, after))
        console.print(side_by_side(heldout_prompts(), answers_before, answers_after, old, new))
    elif after is not None:
        console.print(_comparison(before, after))
    console.print(f"Saved to {training.output_dir}")
    _publish(recipe, trainer)
    return results


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


def _publish(recipe: Recipe, trainer: PreferenceTrainer) -> None:
    """Push what was saved, where that was asked for. A Hub that fails costs nobody a trained model."""
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
    made = table("", "before", "after", right=("before", "after"), title="Held-out rows")
    start = None if before is None else PairMetrics.from_logs(before)
    for name in sorted(after):
        if name.removeprefix("eval_").startswith(("loss", "rewards/", "ratios/", "logps/", "entropy")):
            old = "" if before is None or name not in before else f"{before[name]:.4g}"
            if name == "eval_rewards/accuracies" and start is not None and start.is_reference:
                old += " (policy = reference)"
            made.add_row(name.removeprefix("eval_"), old, f"{after[name]:.4g}")
    return made


def _save_results(path: Path, results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=2) + "\n"
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
