"""The steps that every recipe script takes: arguments, data, plan, trainer, run.

A recipe is these five calls with a loss of its own, so it reads as a list of what happens. Imports everything below it
in the package, and of TRL its argument parser and model options.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from prefopt.data import (
    clean,
    load_preferences,
    mix,
    normalise,
    parse_columns,
    parse_sources,
    validate,
)
from prefopt.demo.data import heldout_prompts, load_demo
from prefopt.demo.model import resolve_demo_model
from prefopt.demo.report import PairMetrics, greedy_answers, side_by_side, summarize
from prefopt.plan import show_plan
from prefopt.progress import RunProgress
from prefopt.trainer import PreferenceConfig, PreferenceTrainer
from prefopt.trainer.config import TRL_LOSS_OPTIONS

DEMO_CONFIG = Path(__file__).parent / "demo" / "config.yaml"
"""Settings of the bundled job; they are the defaults wherever no model is named."""


@dataclass
class RecipeArguments(ScriptArguments):  # type: ignore[misc]
    """Data and behaviour of a recipe, beside TRL's `ModelConfig` and our `PreferenceConfig`.

    Args:
        columns: how the data set names its columns: `prompt=question chosen=response_j rejected=response_k`.
        on_bad_rows: "error" stops on rows that cannot be trained on, "drop" writes them to a file and goes on.
        eval_rows: rows held out of the training split where the data has no test split; 0 for none.
        dry_run: validate the data, show the resolved settings, one decoded batch, steps and memory; train nothing.
        evaluate_first: also evaluate before training, to show what training changed.
    """

    columns: list[str] | None = field(
        default=None,
        metadata={"help": "How the data set names its columns, e.g. prompt=question chosen=good rejected=bad"},
    )
    on_bad_rows: str = field(
        default="error",
        metadata={
            "help": "Rows that cannot be trained on: stop with an error, or drop them into a file.",
            "choices": ["error", "drop"],
        },
    )
    eval_rows: int = field(
        default=100,
        metadata={"help": "Rows to hold out of the training split where there is no test split; 0 for none."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Show what would happen and train nothing."})
    evaluate_first: bool = field(default=True, metadata={"help": "Evaluate before training as well as after."})


@dataclass
class Recipe:
    """The resolved arguments of one run."""

    script: RecipeArguments
    training: PreferenceConfig
    model: ModelConfig
    console: Console

    @property
    def bundled_data(self) -> bool:
        return self.script.dataset_name is None


def parse_arguments(loss: str, argv: Sequence[str] | None = None) -> Recipe:
    """Command line and `--config` YAML, over the recipe's own defaults.

    Without `--model_name_or_path` the bundled model is used, with the settings of `DEMO_CONFIG` as defaults. Without
    `--dataset_name` the bundled preference pairs are used.
    """
    _quiet_libraries()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = TrlParser((RecipeArguments, PreferenceConfig, ModelConfig))
    parser.set_defaults_with_config(**_defaults(loss, argv))
    script, training, model = parser.parse_args_and_config(argv)
    _refuse_what_is_ignored(script)
    console = Console(quiet=not PartialState().is_main_process)
    return Recipe(script, training, model, console)


def _defaults(loss: str, argv: list[str]) -> dict[str, Any]:
    given = _given_options(argv)
    defaults: dict[str, Any] = {"report_to": "none", "output_dir": "runs/latest", "loss": loss}
    if not torch.accelerator.is_available():
        defaults["use_cpu"] = True
    if "model_name_or_path" not in given:
        defaults |= yaml.safe_load(DEMO_CONFIG.read_text(encoding="utf-8"))
    if given & set(TRL_LOSS_OPTIONS) and "loss" not in given:
        defaults.pop("loss")
    return defaults


def _given_options(argv: list[str]) -> set[str]:
    """Names of the options on the command line and in its `--config` file."""
    names = {word[2:].split("=", 1)[0].replace("-", "_") for word in argv if word.startswith("--")}
    if "--config" in argv:
        position = argv.index("--config") + 1
        path = Path(argv[position]) if position < len(argv) else None
        if path is None or not path.is_file():
            raise SystemExit(f"--config {path or ''}: there is no such file")
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise SystemExit(f"--config {path}: not valid YAML: {error}") from None
        if not isinstance(loaded, dict):
            raise SystemExit(f"--config {path}: must be a mapping of option names to values")
        names |= set(loaded)
    return names


def _refuse_what_is_ignored(script: RecipeArguments) -> None:
    if script.eval_rows < 0:
        raise SystemExit(f"--eval_rows must be 0 or more, got {script.eval_rows}")
    if script.dataset_name is None and script.columns:
        raise SystemExit("--columns renames columns of a data set of yours: name it with --dataset_name")
    if script.dataset_streaming and script.on_bad_rows == "drop":
        raise SystemExit("--dataset_streaming cannot validate rows ahead, so --on_bad_rows drop has no effect with it")
    if script.dataset_streaming and script.dataset_name is None:
        raise SystemExit("--dataset_streaming streams a data set of yours: name it with --dataset_name")


def _quiet_libraries() -> None:
    """Keep the screen for what a person needs; warnings about other libraries' own internals are not among it."""
    warnings.filterwarnings("ignore", message=r".*is deprecated and will be removed in v6.*", category=FutureWarning)
    if not os.environ.get("PREFOPT_VERBOSE"):
        from datasets.utils.logging import disable_progress_bar
        from transformers.utils import logging as transformers_logging

        disable_progress_bar()
        transformers_logging.disable_progress_bar()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)


# ---- data ---------------------------------------------------------------------------------------------------------


def load_data(recipe: Recipe) -> tuple[Any, Any]:
    """Training and held-out data: loaded, brought to the standard columns, validated row by row, before any model.

    Raises:
        DataError: naming the problem, the rows and the remedy.
    """
    script = recipe.script
    if recipe.model.model_name_or_path is None:
        with PartialState().main_process_first():
            path = resolve_demo_model(say=lambda line: recipe.console.print(line, soft_wrap=True))
        recipe.model.model_name_or_path = str(path)
    if recipe.bundled_data:
        return load_demo("train"), load_demo("heldout") if script.eval_rows else None
    assert script.dataset_name is not None
    train = _load_sources(recipe, script.dataset_train_split)
    heldout = _load_test_split(recipe)
    if script.dataset_streaming:
        return _mixed(recipe, train), None if heldout is None else _mixed(recipe, heldout, weighted=False)
    # Row numbers in the reports are those of the files, so rows are checked before anything is split or mixed; and
    # weights repeat rows, so they apply to the training part only, after the held-out rows are set apart.
    train = {name: _validated(recipe, rows, f"training{i or ''}") for i, (name, rows) in enumerate(train.items())}
    if heldout is None:
        train, heldout = _hold_out(recipe, train)
    else:
        heldout = {n: _validated(recipe, rows, f"held-out{i or ''}") for i, (n, rows) in enumerate(heldout.items())}
    return _mixed(recipe, train), _mixed(recipe, heldout, weighted=False) if heldout else None


def _load_sources(recipe: Recipe, split: str) -> dict[str, Any]:
    """Every source of `--dataset_name` by name, in the standard columns."""
    script = recipe.script
    columns = parse_columns(script.columns)
    return {
        name: normalise(
            load_preferences(
                name, config=script.dataset_config, split=split, columns=columns, streaming=script.dataset_streaming
            )
        )
        for name, _ in parse_sources(str(script.dataset_name))
    }


def _load_test_split(recipe: Recipe) -> dict[str, Any] | None:
    """The data's own test split; None where it has none (a single local file never does)."""
    script = recipe.script
    if any(Path(name).is_file() for name, _ in parse_sources(str(script.dataset_name))):
        return None
    try:
        return _load_sources(recipe, script.dataset_test_split)
    except ValueError as error:
        if "split" not in str(error):
            raise
        return None


def _mixed(recipe: Recipe, sources: dict[str, Any], weighted: bool = True) -> Any:
    if len(sources) == 1:
        return next(iter(sources.values()))
    given = [weight for _, weight in parse_sources(str(recipe.script.dataset_name))]
    weights = [1.0 if weight is None else weight for weight in given] if weighted and any(given) else None
    return mix(sources, weights, recipe.training.seed)


def _hold_out(recipe: Recipe, sources: dict[str, Dataset]) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Set rows of every source apart, in proportion to its size; at most a fifth of each."""
    script, training = recipe.script, recipe.training
    total = sum(len(source) for source in sources.values())
    kept, apart = {}, {}
    for name, source in sources.items():
        count = min(round(script.eval_rows * len(source) / total), len(source) // 5)
        kept[name] = source
        if count:
            parts = source.train_test_split(test_size=count, seed=training.data_seed or training.seed)
            kept[name], apart[name] = parts["train"], parts["test"]
    if apart:
        recipe.console.print(
            f"The data has no split {script.dataset_test_split!r}: {sum(map(len, apart.values()))} of its {total} "
            "rows are held out."
        )
    return kept, apart


def _validated(recipe: Recipe, dataset: Dataset, name: str) -> Dataset:
    model = recipe.model
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
    )
    # With keep_end it is the prompt's start that is cut, never the completion.
    limit = recipe.training.max_length if recipe.training.truncation_mode == "keep_start" else None
    report = validate(dataset, tokenizer=tokenizer, max_length=limit)
    if report.problems:
        recipe.console.print(f"{name} rows:", report.table())
    dropped = Path(recipe.training.output_dir) / f"dropped_{name}_rows.jsonl"
    kept = clean(dataset, report, recipe.script.on_bad_rows, dropped)  # type: ignore[arg-type]
    if len(kept) < len(dataset):
        recipe.console.print(f"{len(dataset) - len(kept)} {name} rows dropped; they are in {dropped}.")
    return kept


# ---- training -----------------------------------------------------------------------------------------------------


def make_trainer(recipe: Recipe, train: Any, heldout: Any) -> PreferenceTrainer:
    """The trainer, its model loaded."""
    model, training = recipe.model, recipe.training
    kwargs = dict(training.model_init_kwargs or {}) if isinstance(training.model_init_kwargs, dict) else {}
    kwargs.setdefault("revision", model.model_revision)
    if model.attn_implementation is not None:
        kwargs.setdefault("attn_implementation", model.attn_implementation)
    if model.dtype is not None:
        kwargs.setdefault("dtype", model.dtype)
    training.model_init_kwargs = kwargs
    recipe.console.print(f"Loading {model.model_name_or_path}", soft_wrap=True)
    if heldout is None and training.eval_strategy.value != "no":
        raise SystemExit(
            f"--eval_strategy {training.eval_strategy.value} needs held-out rows, but there are none: name a test "
            "split with --dataset_test_split, set --eval_rows, or use --eval_strategy no"
        )
    trainer = PreferenceTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=train,
        eval_dataset=heldout,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    # Ours replaces the two ways in which transformers prints the same numbers.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if not training.disable_tqdm:
        trainer.add_callback(RunProgress(recipe.console))
    return trainer


def run(recipe: Recipe, trainer: PreferenceTrainer) -> dict[str, Any]:
    """Evaluate, train, evaluate, save; on the bundled data also answer held-out prompts before and after.

    Returns:
        What `results.json` in the output folder holds.
    """
    console, training = recipe.console, recipe.training
    has_heldout = trainer.eval_dataset is not None
    # A resumed policy is not where the run began, and sharded engines are set up by train() only.
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    can_look_first = has_heldout and training.resume_from_checkpoint is None and not sharded
    before = trainer.evaluate() if can_look_first and recipe.script.evaluate_first else None
    answers_before = _answers(recipe, trainer) if can_look_first and recipe.bundled_data else None
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    after = trainer.evaluate() if has_heldout else None
    answers_after = None if answers_before is None else _answers(recipe, trainer)
    results: dict[str, Any] = {"loss": str(trainer.objective or training.loss_type), "before": before, "after": after}
    for name, answers in (("answers_before", answers_before), ("answers_after", answers_after)):
        if answers is not None:
            results[name] = vars(summarize(answers))
    if trainer.is_world_process_zero():
        _save_results(Path(training.output_dir), results)
    if answers_before is not None and answers_after is not None:
        old, new = (None if logs is None else PairMetrics.from_logs(logs) for logs in (before, after))
        console.print(side_by_side(heldout_prompts(), answers_before, answers_after, old, new))
    elif after is not None:
        console.print(_comparison(before, after))
    console.print(f"Saved to {training.output_dir}")
    return results


def _answers(recipe: Recipe, trainer: PreferenceTrainer) -> Any:
    recipe.console.print("Answering the held-out prompts greedily")
    return greedy_answers(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, heldout_prompts())


def _comparison(before: dict[str, float] | None, after: dict[str, float]) -> Table:
    table = Table(title="Held-out rows")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in sorted(after):
        if name.removeprefix("eval_").startswith(("loss", "rewards/", "ratios/", "logps/", "entropy")):
            old = "" if before is None or name not in before else f"{before[name]:.4g}"
            table.add_row(name.removeprefix("eval_"), old, f"{after[name]:.4g}")
    return table


def _save_results(folder: Path, results: dict[str, Any]) -> None:
    path, unfinished = folder / "results.json", folder / "results.json.unfinished"
    unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def main(loss: str, argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The whole of a recipe; `recipes/dpo.py` spells the same steps out."""
    recipe = parse_arguments(loss, argv)
    train, heldout = load_data(recipe)
    if recipe.script.dry_run:
        show_plan(recipe.console, recipe.training, recipe.model, train)
        return None
    return run(recipe, make_trainer(recipe, train, heldout))
