"""The steps that every recipe script takes: arguments, data, plan, trainer, run.

A recipe is these five calls with a loss of its own, so it reads as a list of what happens. Imports everything below it
in the package.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback
from trl import get_peft_config, get_quantization_config

from prefopt.announce import announce
from prefopt.arguments import Recipe, RecipeArguments, parse_arguments
from prefopt.data import (
    DataError,
    clean,
    mix,
    parse_columns,
    parse_sources,
    read_preferences,
    validate,
)
from prefopt.data.columns import column_names, without_columns
from prefopt.data.embed import find_encoder
from prefopt.data.prepare import rows_are_checked
from prefopt.data.unused import MEDIA, unused_columns
from prefopt.demo.data import heldout_prompts, load_demo
from prefopt.demo.model import HUB_ID, is_converted, resolve_demo_model
from prefopt.demo.report import Answer, PairMetrics, greedy_answers, side_by_side, summarize
from prefopt.earlier_run import make_room, refuse_overwriting
from prefopt.embeddings import check_given, with_embeddings
from prefopt.files import write_whole
from prefopt.holdout import hold_out, own_split
from prefopt.losses import parse
from prefopt.models import Limits, adapter_base, check_weights, limits_of, load_model, load_tokenizer
from prefopt.plan import show_batch, show_settings
from prefopt.preflight import HubUnreachable, check_recipe, to_be_made, with_the_hub
from prefopt.progress import RunProgress
from prefopt.tables import table
from prefopt.trainer import PreferenceTrainer
from prefopt.trainer.disk import check_writable
from prefopt.trainer.engine import describe_engine, engine_not_used
from prefopt.trainer.facts import RunNotes, changed_settings
from prefopt.trainer.publishing import PushError
from prefopt.trainer.stops import sigterm_raises

__all__ = ["Recipe", "RecipeArguments", "dry_run", "load_data", "main", "make_trainer", "parse_arguments", "run"]


# ---- data ---------------------------------------------------------------------------------------------------------


def load_data(recipe: Recipe) -> tuple[Any, Any]:
    """Training and held-out data: loaded, brought to the standard columns, validated row by row, before any model.

    What else can be refused without a model is refused here as well.

    Raises:
        DataError: naming the problem, the rows and the remedy.
        CheckpointError: where nothing can be written into the output folder.
        HubUnreachable: where model or data are not on this machine and the Hub does not answer.
    """
    if (missing := to_be_made(recipe)) is not None:
        raise SystemExit(missing)
    if not recipe.script.dry_run and PartialState().is_main_process:
        refuse_overwriting(recipe)
        check_writable(Path(recipe.training.output_dir))
    train, heldout = with_the_hub(recipe, _load)
    check_recipe(recipe, train, heldout)
    return train, heldout


def _load(recipe: Recipe) -> tuple[Any, Any]:
    script = recipe.script
    if recipe.model.model_name_or_path is None:
        with PartialState().main_process_first():
            path = resolve_demo_model(say=lambda line: recipe.console.print(line, soft_wrap=True))
        recipe.model.model_name_or_path, recipe.base_model = str(path), HUB_ID
        recipe.converted_model = is_converted(path)
    for name in (
        recipe.model.model_name_or_path,
        script.ref_model_name_or_path,
        script.previous_model_name_or_path,
    ):
        if name is not None:
            check_weights(name)
    limits = _limits(recipe)
    _keep_to_positions(recipe, limits.positions)
    if script.embeddings is not None:
        find_encoder(script.embeddings)  # what cannot be had is said before the data is looked through
    train, heldout = _bundled(recipe) if recipe.bundled_data else _loaded(recipe, limits.vocabulary)
    if not limits.images:
        _refuse_images(recipe, {**heldout, **train})
    train, heldout = with_embeddings(recipe, train, heldout)
    return _mixed(recipe, train), _mixed(recipe, heldout, weighted=False) if heldout else None


def _bundled(recipe: Recipe) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    held_out = {"the bundled held-out pairs": load_demo("heldout")} if recipe.script.eval_rows else {}
    return {"the bundled pairs": load_demo("train")}, held_out


def _loaded(recipe: Recipe, vocabulary: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every source of `--dataset_name` by name, checked row by row; those held out are none where there are none."""
    script = recipe.script
    assert script.dataset_name is not None
    train = _load_sources(recipe, script.dataset_train_split)
    heldout = own_split(recipe, lambda split: _load_sources(recipe, split))
    check_given(recipe, train, "training")
    check_given(recipe, heldout or {}, "held-out")
    if script.dataset_streaming:
        return train, heldout or {}
    # Row numbers in the reports are those of the files, so rows are checked before anything is split or mixed; and
    # weights repeat rows, so they apply to the training part only, after the held-out rows are set apart.
    train = _validated(recipe, train, "training", vocabulary)
    if heldout is None:
        return hold_out(recipe, train)
    return train, _validated(recipe, heldout, "held-out", vocabulary)


def _keep_to_positions(recipe: Recipe, end: int | None) -> None:
    """Cut rows where the model's learned positions end: beyond it would fail at the first row that is so long."""
    training = recipe.training
    if end is not None and (training.max_length is None or training.max_length > end):
        recipe.console.print(
            f"max_length is {end} in place of {training.max_length}: {recipe.model.model_name_or_path} has learned no "
            "more positions.",
            soft_wrap=True,
        )
        training.max_length = end


def _limits(recipe: Recipe) -> Limits:
    model = recipe.model
    return limits_of(
        str(model.model_name_or_path),
        revision=model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
    )


def _load_sources(recipe: Recipe, split: str) -> dict[str, Any]:
    """Every source of `--dataset_name` by name, in the standard columns."""
    script = recipe.script
    columns = parse_columns(script.columns)
    # Held-out rows have the layout of the training rows, which is said once.
    say = _line(recipe) if split == script.dataset_train_split else _silent
    return {
        name: read_preferences(
            name,
            config=script.dataset_config,
            split=split,
            columns=columns,
            format=script.format,
            streaming=script.dataset_streaming,
            used=_used_columns(recipe),
            say=say,
        )
        for name, _ in parse_sources(str(script.dataset_name))
    }


def _line(recipe: Recipe) -> Callable[[str], None]:
    return lambda text: recipe.console.print(text, soft_wrap=True, markup=False, highlight=False)


def _silent(text: str) -> None:
    pass


def _refuse_images(recipe: Recipe, sources: dict[str, Any]) -> None:
    for name, rows in sources.items():
        media = [column for column in MEDIA if column in column_names(rows)]
        if media:
            raise DataError(
                f"{name}: column {media[0]!r} is filled, and {recipe.model.model_name_or_path} reads text alone. Name "
                f"a model that reads it, or pass --columns unused={media[0]} to train on the texts."
            )


def _used_columns(recipe: Recipe) -> tuple[str, ...]:
    loss = recipe.training.loss
    return (*MEDIA, *(parse(loss).columns if isinstance(loss, str) else ()))


def _mixed(recipe: Recipe, sources: dict[str, Any], weighted: bool = True) -> Any:
    # What is not used has been named; left in, the trainer would name it again.
    sources = {
        name: without_columns(rows, unused_columns(rows, _used_columns(recipe))) for name, rows in sources.items()
    }
    if len(sources) == 1:
        return next(iter(sources.values()))
    given = [weight for _, weight in parse_sources(str(recipe.script.dataset_name))]
    weights = [1.0 if weight is None else weight for weight in given] if weighted and any(given) else None
    return mix(sources, weights, recipe.training.seed)


def _validated(recipe: Recipe, sources: dict[str, Dataset], role: str, vocabulary: int | None) -> dict[str, Dataset]:
    return {
        name: _checked(recipe, rows, f"{role}{number or ''}", vocabulary)
        for number, (name, rows) in enumerate(sources.items())
    }


def _checked(recipe: Recipe, dataset: Dataset, name: str, vocabulary: int | None) -> Dataset:
    tokenizer = _tokenizer(recipe)
    cut = {"max_length": recipe.training.max_length, "truncation_mode": recipe.training.truncation_mode}
    roles = parse(recipe.training.loss).roles if recipe.training.loss else ("chosen", "rejected")
    report = validate(dataset, tokenizer=tokenizer, vocabulary=vocabulary, roles=roles, **cut)
    drops = recipe.script.on_bad_rows == "drop" and len(report.bad_rows) < report.total
    if report.problems and (report.ok or drops):  # else the error of `clean` tells them
        recipe.console.print(f"{name} rows:", report.table())
    for note in report.notes:
        recipe.console.print(note, soft_wrap=True)
    if report.ok or recipe.script.on_bad_rows == "error":
        return clean(dataset, report)
    if recipe.script.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            kept = clean(dataset, report, "drop", Path(folder) / "dropped.jsonl")
        recipe.console.print(f"{len(dataset) - len(kept)} {name} rows would be dropped.")
        return kept
    make_room(recipe)
    dropped = Path(recipe.training.output_dir) / f"dropped_{name}_rows.jsonl"
    kept = clean(dataset, report, "drop", dropped)
    recipe.console.print(f"{len(dataset) - len(kept)} {name} rows dropped; they are in {dropped}.")
    return kept


def _tokenizer(recipe: Recipe) -> Any:
    arguments = recipe.training.chat_template_kwargs
    return load_tokenizer(
        str(recipe.model.model_name_or_path),
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
        chat_template=recipe.script.chat_template,
        chat_template_kwargs=arguments if isinstance(arguments, dict) else None,
    )


# ---- training -----------------------------------------------------------------------------------------------------


def make_trainer(recipe: Recipe, train: Any, heldout: Any) -> PreferenceTrainer:
    """The trainer, its model loaded."""
    model, training, script = recipe.model, recipe.training, recipe.script
    announce(recipe, train, heldout)
    make_room(recipe)
    name = str(model.model_name_or_path)
    own_reference = script.ref_model_name_or_path is None
    options = _model_options(recipe)
    training.model_init_kwargs = options
    recipe.console.print(f"Loading {name}", soft_wrap=True)
    policy: Any = name
    if (base := adapter_base(name)) is not None:
        what = "; the reference is the adapter as it is now" if own_reference else ""
        recipe.console.print(f"It is an adapter of {base} and is trained on{what}.", soft_wrap=True)
        policy = load_model(name, options | {"quantization_config": get_quantization_config(model)}, trainable=True)
        training.model_init_kwargs = None
    keeps_tokenizer = base is not None or script.chat_template is not None
    if "trackio" in training.report_to and training.run_name is None:
        # trackio would name the evaluation after training as a run of its own.
        training.run_name = f"{Path(training.output_dir).absolute().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        with rows_are_checked():
            trainer = PreferenceTrainer(
                policy,
                ref_model=_compared_with(script.ref_model_name_or_path, options),
                previous_model=_compared_with(script.previous_model_name_or_path, options),
                args=training,
                train_dataset=train,
                eval_dataset=heldout,
                processing_class=_tokenizer(recipe) if keeps_tokenizer else None,
                quantization_config=get_quantization_config(model) if base is None else None,
                peft_config=get_peft_config(model) if base is None else None,
            )
    except PushError as error:
        raise SystemExit(f"{error}. Nothing was trained") from None
    trainer.notes = _notes(recipe, base or name)
    # Ours replaces the two ways in which transformers prints the same numbers.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if not training.disable_tqdm:
        trainer.add_callback(RunProgress(recipe.console))
    return trainer


def _notes(recipe: Recipe, base: str) -> RunNotes:
    """What the model card says that only the command line knows."""
    script = recipe.script
    data = "the pairs bundled with prefopt" if recipe.bundled_data else str(script.dataset_name)
    return RunNotes(
        base_model=recipe.base_model or base,
        converted_base=recipe.converted_model,
        sources=tuple(source for source, _ in parse_sources(data)),
        splits=("", "") if recipe.bundled_data else (script.dataset_train_split, recipe.heldout_split),
        expression=str(recipe.training.loss or ""),
        command=recipe.command,
        settings={**changed_settings(script), **changed_settings(recipe.model)},
    )


def _model_options(recipe: Recipe) -> dict[str, Any]:
    """What `from_pretrained` is told about the model."""
    model, training = recipe.model, recipe.training
    options = dict(training.model_init_kwargs or {}) if isinstance(training.model_init_kwargs, dict) else {}
    options.setdefault("revision", model.model_revision)
    options.setdefault("trust_remote_code", training.trust_remote_code)
    if model.attn_implementation is not None:
        options.setdefault("attn_implementation", model.attn_implementation)
    if model.dtype is not None:
        options.setdefault("dtype", model.dtype)
    if options.setdefault("use_safetensors", True) is not True:
        raise SystemExit("--model_init_kwargs: use_safetensors cannot be turned off: pickled weights can run code")
    return options


def _compared_with(name: str | None, options: dict[str, Any]) -> Any:
    """A frozen model that the loss compares the policy with; None for the trainer's own choice."""
    if name is None:
        return None
    # The revision is the policy's.
    return load_model(name, {option: value for option, value in options.items() if option != "revision"})


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


# ---- the plan -----------------------------------------------------------------------------------------------------


def dry_run(recipe: Recipe) -> None:
    """Show what the run would be, train nothing.

    Where the Hub cannot be reached, whatever does not need it is shown, and one line says what is missing.
    """
    console = recipe.console
    show_settings(recipe)
    if (missing := to_be_made(recipe)) is not None:
        console.print(f"No batch, steps or memory: {missing}.", soft_wrap=True)
    else:
        try:
            train, heldout = load_data(recipe)
        except HubUnreachable as error:
            console.print(f"No batch, steps or memory: {error}.", soft_wrap=True)
        else:
            announce(recipe, train, heldout)
            show_batch(console, recipe.training, recipe.model, train, _tokenizer(recipe))
    console.print("Dry run: nothing was trained.")


def main(loss: str, argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The whole of a recipe; `recipes/dpo.py` spells the same steps out.

    Args:
        loss: the loss expression, unless the command line or a config has another.
        argv: the command line's words; default: those of this process.
    """
    recipe = parse_arguments(loss, argv)
    if recipe.script.dry_run:
        dry_run(recipe)
        return None
    train, heldout = load_data(recipe)
    return run(recipe, make_trainer(recipe, train, heldout))
