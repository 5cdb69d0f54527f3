"""The data of a recipe: every source loaded, checked row by row, held out and mixed, before any model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

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
from prefopt.data.unused import MEDIA, unused_columns
from prefopt.demo.data import load_demo
from prefopt.losses import parse
from prefopt.models.bundled import HUB_ID, is_converted, resolve_demo_model
from prefopt.models.load import check_weights
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.earlier_run import make_room, refuse_overwriting
from prefopt.recipe.embeddings import check_given, with_embeddings
from prefopt.recipe.holdout import hold_out, own_split
from prefopt.recipe.preflight import (
    check_recipe,
    keep_to_positions,
    model_limits,
    to_be_made,
    tokenizer_of,
    with_the_hub,
)
from prefopt.safety.errors import UsageError
from prefopt.trainer.saving.disk import check_writable


def load_data(recipe: Recipe) -> tuple[Any, Any]:
    """Training and held-out data: loaded, brought to the standard columns, validated row by row, before any model.

    What else can be refused without a model is refused here as well.

    Raises:
        DataError: naming the problem, the rows and the remedy.
        CheckpointError: where nothing can be written into the output folder.
        HubUnreachable: where model or data are not on this machine and the Hub does not answer.
    """
    if (missing := to_be_made(recipe)) is not None:
        raise UsageError(missing)
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
    limits = model_limits(recipe)
    keep_to_positions(recipe, limits.positions)
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
    tokenizer = tokenizer_of(recipe)
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
