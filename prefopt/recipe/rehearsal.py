"""Checks of options that would otherwise fail only once the model is loaded.

Attention, quantisation, the adapter, the optimizer and the schedule are tried on a model without weights, with the
code of transformers and PEFT: a missing package or module ends a recipe here. Models that cannot be made from their
configuration alone are not checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import get_peft_model
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.quantizers import AutoHfQuantizer
from trl import get_peft_config, get_quantization_config

from prefopt.losses import Need
from prefopt.losses.scores import EMBEDDINGS
from prefopt.planning.activations import causal_model
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.ready import Ready
from prefopt.safety.errors import UsageError, retold
from prefopt.trainer import PreferenceConfig
from prefopt.trainer.checks import RunPlan, check_run
from prefopt.trainer.publishing import PushError
from prefopt.trainer.saving import checkpoints
from prefopt.trainer.saving.state import loss_of, refuse_other_loss


def check_recipe(recipe: Recipe, ready: Ready, train: Any, heldout: Any) -> None:
    """Refuse what the run would refuse once its model is loaded.

    Raises:
        UsageError: naming the option that has no effect or lacks something, and the library's error.
        CheckpointError: if the checkpoint to resume from does not exist, is incomplete, or is of another loss.
    """
    script, training, objective = recipe.script, recipe.training, recipe.objective
    if heldout is None and training.eval_strategy.value != "no":
        raise UsageError(
            f"--eval_strategy {training.eval_strategy.value} needs held-out rows, but there are none: name a test "
            "split with --dataset_test_split, set --eval_rows, or use --eval_strategy no"
        )
    if script.ref_model_name_or_path is not None and objective is not None and not objective.needs.compares:
        raise UsageError(f"--ref_model_name_or_path has no effect: {training.loss} compares with no reference")
    if script.previous_model_name_or_path is not None and (objective is None or Need.PREVIOUS not in objective.needs):
        raise UsageError(
            f"--previous_model_name_or_path has no effect: {recipe.objective_text} does not compare with a previous "
            "iterate"
        )
    folder, _ = checkpoints.choose(training.resume_from_checkpoint, Path(training.output_dir))
    if folder is not None:
        refuse_other_loss(checkpoints.read_state(folder).get("run", {}), loss_of(objective, training), folder)
    plan = RunPlan(
        objective, ready.training, train, heldout,
        reference=script.ref_model_name_or_path is not None,
        previous=script.previous_model_name_or_path is not None,
        adapter=recipe.model.use_peft or ready.adapter_of is not None,
        more_columns=EMBEDDINGS if script.embeddings is not None else (),
    )  # fmt: skip
    with push_errors():
        check_run(plan)
    _rehearse(recipe, ready, steps_of(training, train))


@contextmanager
def push_errors() -> Iterator[None]:
    """Refuse a push that cannot work before anything is trained."""
    try:
        yield
    except PushError as error:
        raise UsageError(f"{error}. Nothing was trained") from None


def steps_of(training: PreferenceConfig, train: Any) -> int | None:
    """The number of steps of the run; None for a stream without a length."""
    steps: int = training.max_steps
    if steps > 0:
        return steps
    if not hasattr(train, "__len__"):
        return None
    per_pass = math.ceil(len(train) / (training.per_device_train_batch_size * PartialState().num_processes))
    steps = math.ceil(math.ceil(per_pass / training.gradient_accumulation_steps) * training.num_train_epochs)
    return steps


# ---- checks by the libraries -------------------------------------------------------------------------------------


def _rehearse(recipe: Recipe, ready: Ready, steps: int | None) -> None:
    """Attention, quantisation, the adapter, the optimizer and the schedule, each by the library's own code."""
    _quantization(recipe)
    model = _without_weights(recipe, ready)
    if model is not None and ready.adapter_of is None:
        model = _adapter(recipe, model)
    _optimizer(recipe, model)
    _schedule(recipe, steps)


def _named(options: str) -> AbstractContextManager[None]:
    """Turn a library's error about options into one with the options' names and without a traceback."""
    kinds = (ImportError, ValueError, TypeError, RuntimeError, KeyError, NotImplementedError)
    return retold(UsageError, options, kinds)


def _quantization(recipe: Recipe) -> None:
    settings = get_quantization_config(recipe.model)
    if settings is None:
        return
    with _named("--load_in_4bit" if recipe.model.load_in_4bit else "--load_in_8bit"):
        AutoHfQuantizer.from_config(settings, pre_quantized=False).validate_environment(device_map=None)


def _without_weights(recipe: Recipe, ready: Ready) -> Any:
    attention = recipe.model.attn_implementation
    try:
        with torch.device("meta"):
            model = causal_model(ready.config)
    except Exception:  # of the configuration or the model itself: loading it will report the error
        return None
    if attention is not None:
        with _named(f"--attn_implementation {attention}"), torch.device("meta"):
            causal_model(ready.config, attn_implementation=attention)
    return model


# ---- adapters ----------------------------------------------------------------------------------------------------


def _adapter(recipe: Recipe, model: Any) -> Any:
    settings = get_peft_config(recipe.model)
    if settings is None:
        return model
    _refuse_unmatched(recipe, [name for name, _ in model.named_modules()], model)
    with _named("--use_peft"), torch.device("meta"):
        return get_peft_model(model, settings)


def _refuse_unmatched(recipe: Recipe, modules: list[str], model: Any) -> None:
    """PEFT ignores names that match nothing if another one matches; a single name is a regular expression."""
    targets, saved = recipe.model.lora_target_modules, recipe.model.lora_modules_to_save
    if isinstance(targets, str) and targets != "all-linear" and not any(re.fullmatch(targets, m) for m in modules):
        raise UsageError(_unmatched("lora_target_modules", targets, model))
    for option, names in (("lora_target_modules", targets), ("lora_modules_to_save", saved)):
        for wanted in names if isinstance(names, list) else ():
            if not any(module == wanted or module.endswith(f".{wanted}") for module in modules):
                raise UsageError(_unmatched(option, wanted, model))


def _unmatched(option: str, wanted: str, model: Any) -> str:
    kinds = (nn.Linear,) if option == "lora_target_modules" else (nn.Linear, nn.Embedding)
    there = dict.fromkeys(name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, kinds))
    spaces = ". Names are separated by spaces" if "," in wanted else ""
    return f"--{option} {wanted}: the model has no such module{spaces}. It has {', '.join(there)}"


# ---- optimizer and schedule --------------------------------------------------------------------------------------


def _optimizer(recipe: Recipe, model: Any) -> None:
    training = recipe.training
    options = f"--optim {getattr(training.optim, 'value', training.optim)}"
    if training.optim_args:
        options += f" --optim_args {training.optim_args}"
    if model is not None:
        with _named(options):
            Trainer.get_optimizer_cls_and_kwargs(training, model)


def _schedule(recipe: Recipe, steps: int | None) -> None:
    training = recipe.training
    if steps is None:
        return
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    warmup = training.get_warmup_steps(steps)
    with _named(f"--lr_scheduler_type {name}"):
        get_scheduler(
            training.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    if warmup >= steps > 1 and name != "constant":
        recipe.console.print(
            f"The learning rate is still warming up when training ends: {warmup} warm-up steps, {steps} steps.",
            soft_wrap=True,
        )
