"""The trainer of a recipe, its model loaded. `recipes/dpo.py` writes `make_trainer` out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from trl import get_peft_config, get_quantization_config

from prefopt.analysis.gradients.callback import EntanglementCallback
from prefopt.analysis.health.callback import HealthCallback
from prefopt.data import parse_sources
from prefopt.data.prepare import rows_are_checked
from prefopt.models.bundled import WHEEL
from prefopt.models.load import load_model
from prefopt.recipe.announce import announce
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.data import Data
from prefopt.recipe.earlier_run import make_room
from prefopt.recipe.progress import RunProgress
from prefopt.recipe.ready import Ready
from prefopt.recipe.rehearsal import push_errors
from prefopt.trainer import PreferenceTrainer
from prefopt.trainer.facts import RunNotes, changed_settings


def make_trainer(recipe: Recipe, ready: Ready, data: Data, policy: Any = None) -> PreferenceTrainer:
    """The trainer, its model loaded; `policy` is the model if it was loaded already."""
    whole = ready.adapter_of is None
    with starting(recipe, ready, data):
        trainer = PreferenceTrainer(
            load_policy(recipe, ready) if policy is None else policy,
            ref_model=load_frozen(recipe.script.ref_model_name_or_path, ready),
            previous_model=load_frozen(recipe.script.previous_model_name_or_path, ready),
            args=ready.training,
            train_dataset=data.train,
            eval_dataset=data.heldout,
            processing_class=ready.processing_class,
            quantization_config=get_quantization_config(recipe.model) if whole else None,
            peft_config=get_peft_config(recipe.model) if whole else None,
        )
    trainer.notes = card_notes(recipe, ready, data)
    show_progress(recipe, trainer)
    return trainer


@contextmanager
def starting(recipe: Recipe, ready: Ready, data: Data) -> Iterator[None]:
    """Context in which a trainer is made: prints what is trained, and moves an earlier run out of the output folder.

    Rows are not checked inside it: `load_data` has done that, and made their tokens.

    Raises:
        UsageError: if the result is to be pushed and cannot be.
    """
    announce(recipe, ready, data)
    if not data.room_made:
        make_room(recipe)
    recipe.console.print(f"Loading {ready.model}", soft_wrap=True)
    if ready.adapter_of is not None:
        own_reference = recipe.script.ref_model_name_or_path is None
        what = "; the reference is the adapter as it is now" if own_reference else ""
        recipe.console.print(f"It is an adapter of {ready.adapter_of} and is trained on{what}.", soft_wrap=True)
    with push_errors(), rows_are_checked(data.ids):
        yield


def load_policy(recipe: Recipe, ready: Ready) -> Any:
    """A saved adapter on its model, loaded; or the name of a whole model, for the trainer to load."""
    if ready.adapter_of is None:
        return ready.model
    quantized = {"quantization_config": get_quantization_config(recipe.model)}
    return load_model(ready.model, ready.options | quantized, trainable=True)


def load_frozen(name: str | None, ready: Ready) -> Any:
    """A frozen model that the loss compares the policy with; None for the trainer's own choice."""
    if name is None:
        return None
    # The revision is the policy's.
    return load_model(name, {option: value for option, value in ready.options.items() if option != "revision"})


def load_to_sample(name: str, recipe: Recipe, ready: Ready) -> Any:
    """A model or a saved adapter in evaluation mode, on this process's device, loaded as the policy is."""
    options: dict[str, Any] = {**ready.options, "device_map": None}
    if (quantization := get_quantization_config(recipe.model)) is not None:
        return load_model(name, {**options, "quantization_config": quantization}).eval()
    return load_model(name, options).to(ready.training.device).eval()


def card_notes(recipe: Recipe, ready: Ready, data: Data) -> RunNotes:
    """Facts for the model card that only the command line knows."""
    script = recipe.script
    names = "the pairs bundled with prefopt" if recipe.bundled_data else str(script.dataset_name)
    return RunNotes(
        base_model=ready.bundled or ready.adapter_of or ready.model,
        converted_from=WHEEL if ready.converted else "",
        sources=tuple(source for source, _ in parse_sources(names)),
        splits=("", "") if recipe.bundled_data else (script.dataset_train_split, data.heldout_split),
        expression=str(recipe.training.loss or ""),
        command=recipe.command,
        problems=data.reports,
        settings={**changed_settings(script), **changed_settings(recipe.model)},
    )


def show_progress(recipe: Recipe, trainer: PreferenceTrainer) -> None:
    """Replace transformers' two printers of the same numbers by our progress bar, and say what the numbers show."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if not recipe.training.disable_tqdm:
        trainer.add_callback(RunProgress(recipe.console))
    say = partial(recipe.console.print, soft_wrap=True, markup=False, highlight=False)
    trainer.add_callback(HealthCallback(recipe.script.stop_on or (), say))
    if recipe.script.entanglement_every is not None:
        trainer.add_callback(EntanglementCallback(trainer, recipe.script.entanglement_every))
