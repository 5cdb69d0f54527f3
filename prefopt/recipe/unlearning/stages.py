"""The stages of `recipes/unlearn.py`: models that have learned, their numbers, the trainer that forgets, its run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback
from trl import get_peft_config, get_quantization_config

from prefopt.analysis.health.saved import save_findings
from prefopt.losses import Loss
from prefopt.models.load import load_model
from prefopt.recipe.arguments import Recipe, parse_arguments
from prefopt.recipe.build import load_policy, show_progress
from prefopt.recipe.dry_run import show_settings
from prefopt.recipe.earlier_run import RESULTS, make_room
from prefopt.recipe.pages import write_page
from prefopt.recipe.ready import HubUnreachable, MustBeMade, Ready, preflight
from prefopt.recipe.run import begin, findings_of_log, publish, save_results, train
from prefopt.recipe.unlearning.options import UnlearningArguments, options_of
from prefopt.recipe.unlearning.sets import Sets, load_sets
from prefopt.recipe.unlearning.sources import store_sources
from prefopt.recipe.vectors import loaded_whole
from prefopt.safety.errors import UsageError
from prefopt.scoring import Layout
from prefopt.unlearning.data import data_step, forget_rows, uses_retain
from prefopt.unlearning.findings import findings_of
from prefopt.unlearning.learn import Lesson, learn
from prefopt.unlearning.measure import Measured, check_gold, measure, stored
from prefopt.unlearning.report import answers_side_by_side, as_json, draw, table_of
from prefopt.unlearning.trainer import UnlearningTrainer, settle

LOSS = "npo_rt(beta=0.2, retain=4)"  # the NPO paper: beta=0.1, and retain=1, 5 or 12 by the size of the forget set


@dataclass(frozen=True)
class Models:
    """The model that is to forget, and the gold model if there is one: folders or Hub names."""

    start: str
    gold: str | None


def learned_models(recipe: Recipe, ready: Ready, questions: Sets) -> Models:
    """The two models: learned now, found from an earlier run, or named."""
    script = options_of(recipe)
    gold = script.gold_model_name_or_path
    if not script.learn:
        return Models(ready.model, gold)
    args = copy.copy(ready.training)
    args.learning_rate, args.num_train_epochs, args.max_steps = script.learn_learning_rate, script.learn_epochs, -1
    lessons = [Lesson("learned", ready.model, ready.options, args, [*questions.forget, *questions.retain])]
    if gold is None:
        lessons.append(Lesson("gold", ready.model, ready.options, args, questions.retain))
    folder, say = Path(script.models_dir), partial(recipe.console.print, soft_wrap=True)
    watch = partial(show_progress, recipe)
    start, *others = (str(learn(lesson, folder, ready.tokenizer, say, watch)) for lesson in lessons)
    return Models(start, others[0] if others else gold)


@dataclass(frozen=True)
class Measurements:
    """The models before forgetting, measured.

    Attributes:
        start: of the model that is to forget.
        gold: of the gold model, if there is one.
    """

    start: Measured
    gold: Measured | None


def measure_first(recipe: Recipe, ready: Ready, questions: Sets, models: Models) -> Measurements:
    """Measure both models, or read what an earlier run measured.

    Raises:
        UsageError: if the gold model knows the forget set.
    """
    script, layout = options_of(recipe), Layout("auto")
    folder, beginning = Path(script.models_dir), script.verbatim_tokens

    def of(name: str, role: str) -> Measured:
        def now() -> Measured:
            recipe.console.print(f"Measuring the {role}", soft_wrap=True)
            with loaded_whole(ready.training):
                model = load_model(name, {**ready.options, "device_map": None}).to(ready.training.device)
            return measure(
                model, ready.tokenizer, questions.measured, max_length=ready.training.max_length,
                verbatim_tokens=beginning, layout=layout,
            )  # fmt: skip

        return stored(folder, name, questions.measured, now, ready.training.max_length, beginning)

    start = of(models.start, "model before forgetting")
    if models.gold is None:
        return Measurements(start, None)
    gold = of(models.gold, "gold model")
    check_gold(start, gold)
    return Measurements(start, gold)


def make_trainer(
    recipe: Recipe, ready: Ready, questions: Sets, models: Models, measurements: Measurements
) -> UnlearningTrainer:
    """The trainer that forgets, its model loaded."""
    script, objective = options_of(recipe), _objective(recipe)
    rows = forget_rows(
        questions.forget, questions.retain, ready.tokenizer, objective, idk=questions.idk,
        max_length=ready.training.max_length, seed=ready.training.seed,
    )  # fmt: skip
    args = copy.copy(ready.training)
    args.paired_retain = both = uses_retain(objective)
    forget = len(questions.forget)
    settle(args, script.rule, script.evaluate_every, 2 * forget if both else forget, models.gold is not None)
    make_room(recipe)
    layout = Layout("auto")  # for all evaluations: trying it takes as long as scoring a set
    if PartialState().is_main_process:
        store_sources(recipe, models.start, models.gold)
    recipe.console.print(f"Forgetting {forget} rows with {objective}", soft_wrap=True)

    trainer = UnlearningTrainer(
        load_policy(recipe, dataclasses.replace(ready, model=models.start)),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,  # evaluations measure the questions instead
        processing_class=ready.tokenizer,
        quantization_config=get_quantization_config(recipe.model),
        peft_config=get_peft_config(recipe.model),
        measure=lambda model, start: measure(
            model,
            ready.tokenizer,
            questions.measured,
            start=start,
            max_length=args.max_length,
            verbatim_tokens=script.verbatim_tokens,
            layout=layout,
        ),
        gold=measurements.gold,
        rule=script.rule,
    )
    show_progress(recipe, trainer)
    trainer.add_callback(_Progress(recipe))
    return trainer


class _Progress(TrainerCallback):  # type: ignore[misc]
    """One line for each measurement."""

    def __init__(self, recipe: Recipe) -> None:
        self._console = recipe.console

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        names = (
            "forget_probability",
            "forget_rouge",
            "forget_f1",
            "forget_quality",
            "retain_probability",
            "model_utility",
        )
        present = {name.replace("_", " "): metrics.get(f"eval_{name}") for name in names}
        values = [f"{words} {value:.2g}" for words, value in present.items() if value is not None]
        self._console.print(f"measured at step {state.global_step}: {', '.join(values)}", soft_wrap=True)


def run(recipe: Recipe, trainer: UnlearningTrainer, questions: Sets, measurements: Measurements) -> dict[str, Any]:
    """Forget, save, measure, show.

    Returns:
        The content of `results.json` in the output folder.
    """
    train(recipe, trainer, begin(recipe, trainer))
    after = trainer.result()
    step = trainer.state.best_global_step if trainer.rule != "none" else None
    findings = findings_of(
        measurements.start, after, measurements.gold, questions.measured, step or trainer.state.global_step
    )
    of_log = findings_of_log(trainer)
    evaluations = [entry for entry in trainer.state.log_history if "eval_forget_probability" in entry]
    results = {
        "loss": str(trainer.objective),
        "best": {"rule": trainer.rule, "checkpoint": trainer.state.best_model_checkpoint},
        **as_json(measurements.start, after, measurements.gold),
        "evaluations": evaluations,
        "findings": [finding.as_object() for finding in [*findings, *of_log]],
    }
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        save_results(recipe, RESULTS, results)
        save_findings(Path(recipe.training.output_dir), [*findings, *of_log])
        recipe.console.print(answers_side_by_side(questions.measured, measurements.start, after))
        recipe.console.print(table_of(results, len(questions.measured["forget"])))
        if (picture := draw(results, Path(recipe.training.output_dir) / "forgetting.png")) is not None:
            recipe.console.print(f"Forget quality and utility over the steps: {picture}", soft_wrap=True)
        for finding in findings:
            recipe.console.print(str(finding), soft_wrap=True, markup=False)
    recipe.console.print(f"Saved to {recipe.training.output_dir}", soft_wrap=True)
    write_page(recipe, trainer)
    publish(recipe, trainer)
    return results


def dry_run(recipe: Recipe) -> None:
    """Show the settings, and what would be learned, forgotten and measured; nothing is trained.

    If the Hub cannot be reached, everything that does not need it is shown, and one line says what is missing.
    """
    show_settings(recipe)
    try:
        ready = preflight(recipe)
        _show_stages(recipe, ready, load_sets(recipe))
    except (MustBeMade, HubUnreachable) as error:
        recipe.console.print(f"No sets and no steps: {error}.", soft_wrap=True)
    recipe.console.print("Dry run: nothing was trained.")


def _show_stages(recipe: Recipe, ready: Ready, questions: Sets) -> None:
    script, objective, say = options_of(recipe), _objective(recipe), partial(recipe.console.print, soft_wrap=True)
    forget, retain, batch = len(questions.forget), len(questions.retain), ready.training.per_device_train_batch_size
    if script.learn:
        gold = script.gold_model_name_or_path
        others = f"the gold model the {retain} to retain" if gold is None else f"the gold model is {gold}"
        say(f"Learn: {forget + retain} rows, {script.learn_epochs:g} epochs; {others}")
    batch *= ready.training.gradient_accumulation_steps * PartialState().num_processes
    what = {"answers": "their answers", "idk": '"I don\'t know" in place of their answers', "pairs": "pairs"}
    say(f"Forget: {forget} rows ({what[data_step(objective)]}) with {objective}, {batch} rows a step")
    say("Measure: " + ", ".join(f"{len(rows)} rows of {name}" for name, rows in questions.measured.items()))
    if not script.learn and script.gold_model_name_or_path is None:
        say("There is no gold model, so no forget quality: name one with --gold_model_name_or_path, or --learn true")


def _objective(recipe: Recipe) -> Loss:
    if recipe.objective is None or recipe.training.loss is None:
        raise UsageError("unlearning needs a loss expression, such as --loss npo_rt")
    return recipe.objective


def main(loss: str = LOSS, argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run unlearning; `recipes/unlearn.py` writes out the same steps.

    Args:
        loss: the loss expression, unless the command line or a config has another.
        argv: the command line's words; default: those of this process.

    Returns:
        The content of `results.json` in the output folder; None after a dry run.
    """
    recipe = parse_arguments(loss, argv, UnlearningArguments)
    if recipe.script.dry_run:
        dry_run(recipe)
        return None
    ready = preflight(recipe)
    questions = load_sets(recipe)
    models = learned_models(recipe, ready, questions)
    measurements = measure_first(recipe, ready, questions, models)
    trainer = make_trainer(recipe, ready, questions, models, measurements)
    return run(recipe, trainer, questions, measurements)
