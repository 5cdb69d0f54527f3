"""The trainer of a recipe, its model loaded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from trl import get_peft_config, get_quantization_config

from prefopt.data import (
    parse_sources,
)
from prefopt.data.prepare import rows_are_checked
from prefopt.models.bundled import WHEEL
from prefopt.models.load import adapter_base, load_model
from prefopt.recipe.announce import announce
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.earlier_run import make_room
from prefopt.recipe.preflight import tokenizer_of
from prefopt.recipe.progress import RunProgress
from prefopt.safety.errors import UsageError
from prefopt.trainer import PreferenceTrainer
from prefopt.trainer.facts import RunNotes, changed_settings
from prefopt.trainer.publishing import PushError


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
                processing_class=tokenizer_of(recipe) if keeps_tokenizer else None,
                quantization_config=get_quantization_config(model) if base is None else None,
                peft_config=get_peft_config(model) if base is None else None,
            )
    except PushError as error:
        raise UsageError(f"{error}. Nothing was trained") from None
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
        converted_from=WHEEL if recipe.converted_model else "",
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
        raise UsageError("--model_init_kwargs: use_safetensors cannot be turned off: pickled weights can run code")
    return options


def _compared_with(name: str | None, options: dict[str, Any]) -> Any:
    """A frozen model that the loss compares the policy with; None for the trainer's own choice."""
    if name is None:
        return None
    # The revision is the policy's.
    return load_model(name, {option: value for option, value in options.items() if option != "revision"})
