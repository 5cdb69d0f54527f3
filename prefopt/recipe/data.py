"""The data of a recipe: every source loaded, checked row by row, held out and mixed, before any model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console

from prefopt.data import DataError, Report, clean, mix, parse_columns, parse_sources, read_preferences, validate
from prefopt.data.columns import column_names, without_columns
from prefopt.data.one_pass import can_pass, one_pass
from prefopt.data.reuse import Made
from prefopt.data.stored import tokenizer_key
from prefopt.data.unused import MEDIA, unused_columns
from prefopt.data.validate import row_check
from prefopt.demo.data import load_demo, load_demo_groups
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.earlier_run import make_room
from prefopt.recipe.holdout import hold_out, own_split, tell_shared_prompts
from prefopt.recipe.ready import Ready, hub_errors
from prefopt.recipe.rehearsal import check_recipe
from prefopt.recipe.vectors import check_vectors, with_vectors


@dataclass(frozen=True)
class Data:
    """The rows of a run.

    Attributes:
        train: a data set or a stream.
        heldout: the same, or None.
        heldout_split: where the held-out rows come from: a split of the data, or `of train`.
        room_made: whether an earlier run was moved out of the output folder, to write dropped rows there.
        ids: tokens of the checked rows, for the trainer.
        reports: what the check of the rows found; None for rows that are not checked.
    """

    train: Any
    heldout: Any = None
    heldout_split: str = ""
    room_made: bool = False
    ids: tuple[Made, ...] = ()
    reports: tuple[Report, ...] | None = None


def load_data(recipe: Recipe, ready: Ready) -> Data:
    """Training and held-out rows: loaded, converted to the standard columns, validated row by row, before any model.

    All other checks that need no model weights are done here too.

    Raises:
        DataError: naming the problem, the rows and the remedy.
        HubUnreachable: if data are not on this machine and the Hub does not answer.
        UsageError, CheckpointError: of `check_recipe`.
    """
    with hub_errors(recipe):
        data = _bundled(recipe) if recipe.bundled_data else _loaded(recipe, ready)
        if not ready.limits.images:
            _refuse_images(ready.model, {**data.heldout, **data.train})
        sources, held = with_vectors(recipe, data.train, data.heldout)
        train, heldout = _mixed(recipe, sources), _mixed(recipe, held, weighted=False) if held else None
    check_recipe(recipe, ready, train, heldout)
    return replace(data, train=train, heldout=heldout)


def _bundled(recipe: Recipe) -> Data:
    grouped = recipe.objective is not None and recipe.objective.grouped
    load = load_demo_groups if grouped else load_demo
    held_out = {"the bundled held-out pairs": load("heldout")} if recipe.script.eval_rows else {}
    return Data({"the bundled pairs": load("train")}, held_out)


def _loaded(recipe: Recipe, ready: Ready) -> Data:
    """The rows of every source of `--dataset_name`, by the source's name, checked row by row."""
    script = recipe.script
    train = _load_sources(recipe, script.dataset_train_split)
    split, heldout = own_split(recipe, lambda split: _load_sources(recipe, split))
    check_vectors(recipe, train, "training")
    check_vectors(recipe, heldout, "held-out")
    if script.dataset_streaming:
        return Data(train, heldout, split)
    # Row numbers in the reports are those of the files, so rows are checked before anything is split or mixed.
    # Weights repeat rows, so they apply only to the training part, after the held-out rows are split off.
    rows = _RowCheck(recipe, ready)
    train = rows.checked(train, "training")
    if split:
        heldout = rows.checked(heldout, "held-out")
        tell_shared_prompts(recipe, split, train, heldout)
    else:
        split = f"of {script.dataset_train_split}"
        train, heldout = hold_out(recipe, train)
    return Data(train, heldout, split, rows.room_made, tuple(rows.ids), tuple(rows.reports))


def _load_sources(recipe: Recipe, split: str) -> dict[str, Any]:
    """Every source of `--dataset_name` by name, in the standard columns."""
    script = recipe.script
    columns = parse_columns(script.columns)
    # Held-out rows have the layout of the training rows, which is reported once.
    console = recipe.console if split == script.dataset_train_split else Console(quiet=True)
    say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    return {
        name: read_preferences(
            name, config=script.dataset_config, split=split, columns=columns, format=script.format,
            streaming=script.dataset_streaming, used=_used_columns(recipe), say=say,
            unlabelled=_takes_unlabelled(recipe),
        )
        for name, _ in parse_sources(str(script.dataset_name))
    }  # fmt: skip


def _refuse_images(model: str, sources: dict[str, Any]) -> None:
    for name, rows in sources.items():
        media = [column for column in MEDIA if column in column_names(rows)]
        if media:
            raise DataError(
                f"{name}: column {media[0]!r} is filled, but {model} reads only text. Name a model that reads it, or "
                f"pass --columns unused={media[0]} to train on the texts."
            )


def _used_columns(recipe: Recipe) -> tuple[str, ...]:
    return (*MEDIA, *(() if recipe.objective is None else recipe.objective.columns))


def _takes_unlabelled(recipe: Recipe) -> bool:
    """Whether the objective needs desirable completions alone, so that rows need no label."""
    return recipe.objective is not None and tuple(recipe.objective.roles) == ("chosen",)


def _mixed(recipe: Recipe, sources: dict[str, Any], weighted: bool = True) -> Any:
    # Unused columns have been reported; the trainer would report them again.
    sources = {
        name: without_columns(rows, unused_columns(rows, _used_columns(recipe))) for name, rows in sources.items()
    }
    if len(sources) == 1:
        return next(iter(sources.values()))
    weights = [weight for _, weight in parse_sources(str(recipe.script.dataset_name))]
    shares = [1.0 if weight is None else weight for weight in weights] if weighted and any(weights) else None
    return mix(sources, shares, recipe.training.seed)


class _RowCheck:
    """Validates sources row by row, and drops bad rows if requested.

    Attributes:
        room_made: whether an earlier run was moved out of the output folder, to write dropped rows there.
        ids: tokens of the rows, made while they were checked.
        reports: what was found.
    """

    def __init__(self, recipe: Recipe, ready: Ready):
        self._recipe, self._ready = recipe, ready
        self._roles = ("chosen", "rejected") if recipe.objective is None else recipe.objective.roles
        self.room_made = False
        self.ids: list[Made] = []
        self.reports: list[Report] = []

    def checked(self, sources: dict[str, Dataset], role: str) -> dict[str, Dataset]:
        """The sources without rows that cannot be trained on.

        Raises:
            DataError: naming such rows, unless they are to be dropped.
        """
        return {name: self._one(rows, f"{role}{number or ''}") for number, (name, rows) in enumerate(sources.items())}

    def _one(self, dataset: Dataset, name: str) -> Dataset:
        console, script = self._recipe.console, self._recipe.script
        report = self._report(dataset, name)
        self.reports.append(report)
        drops = script.on_bad_rows == "drop" and len(report.bad_rows) < report.total
        if report.problems and (report.ok or drops):  # otherwise `clean` raises an error that lists them
            console.print(f"{name} rows:", report.table())
        for note in report.notes:
            console.print(note, soft_wrap=True)
        if report.ok or script.on_bad_rows == "error":
            return clean(dataset, report)
        return self._without_bad_rows(dataset, report, name)

    def _report(self, dataset: Dataset, name: str) -> Report:
        training, tokenizer = self._ready.training, self._ready.tokenizer
        limits = {"max_length": training.max_length, "truncation_mode": training.truncation_mode}
        vocabulary = self._ready.limits.vocabulary
        if not can_pass(dataset):
            return validate(dataset, tokenizer=tokenizer, vocabulary=vocabulary, roles=self._roles, **limits)
        check = row_check(dataset, tokenizer, vocabulary=vocabulary, **limits)
        # The first process of a machine writes what the others read.
        with PartialState().local_main_process_first():
            passed = one_pass(dataset, check, self._roles, training.dataset_num_proc, name)
        if (key := tokenizer_key(tokenizer)) is not None:
            self.ids.append(Made(dataset, passed.ids, key))
        return passed.report

    def _without_bad_rows(self, dataset: Dataset, report: Report, name: str) -> Dataset:
        dry, folder = self._recipe.script.dry_run, Path(self._recipe.training.output_dir)
        if not dry and not self.room_made:
            make_room(self._recipe)
            self.room_made = True
        with tempfile.TemporaryDirectory() as scratch:
            file = (Path(scratch) if dry else folder) / f"dropped_{name}_rows.jsonl"
            rest = clean(dataset, report, "drop", file)
        what = "would be dropped" if dry else f"dropped; they are in {file}"
        self._recipe.console.print(f"{len(dataset) - len(rest)} {name} rows {what}.")
        return rest
