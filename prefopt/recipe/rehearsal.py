"""What a run asks of transformers and PEFT, asked of a model without weights.

That is attention, quantisation, the adapter, the optimizer and the schedule of the learning rate.

Their own code decides, so a missing package or a module that does not exist ends a recipe before its model is loaded.
Models that cannot be made from their configuration alone are left to the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, Trainer, get_scheduler
from transformers.quantizers import AutoHfQuantizer
from trl import get_peft_config, get_quantization_config

from prefopt.models.load import adapter_base
from prefopt.planning.activations import causal_model
from prefopt.safety.errors import UsageError

if TYPE_CHECKING:
    from prefopt.recipe.arguments import Recipe


def rehearse(recipe: Recipe, steps: int | None) -> None:
    """Refuse what the run would be refused once its model is loaded.

    Args:
        recipe: the resolved arguments.
        steps: how many steps the run takes; None where nobody knows.

    Raises:
        UsageError: naming the option, and what the library says about it.
    """
    _quantization(recipe)
    model = _without_weights(recipe)
    if model is not None and adapter_base(str(recipe.model.model_name_or_path)) is None:
        model = _adapter(recipe, model)
    _optimizer(recipe, model)
    _schedule(recipe, steps)


@contextmanager
def _named(options: str) -> Iterator[None]:
    """What a library says about options, under the options' names and without its traceback."""
    try:
        yield
    except (ImportError, ValueError, TypeError, RuntimeError, KeyError, NotImplementedError) as error:
        raise UsageError(f"{options}: {' '.join(str(error).split())}") from error


def _quantization(recipe: Recipe) -> None:
    settings = get_quantization_config(recipe.model)
    if settings is None:
        return
    with _named("--load_in_4bit" if recipe.model.load_in_4bit else "--load_in_8bit"):
        AutoHfQuantizer.from_config(settings, pre_quantized=False).validate_environment(device_map=None)


def _without_weights(recipe: Recipe) -> Any:
    name, attention = str(recipe.model.model_name_or_path), recipe.model.attn_implementation
    try:
        config = AutoConfig.from_pretrained(
            adapter_base(name) or name,
            revision=recipe.model.model_revision,
            trust_remote_code=recipe.training.trust_remote_code,
        )
        with torch.device("meta"):
            model = causal_model(config)
    except Exception:  # of the configuration or the model itself: for whoever loads it to say
        return None
    if attention is not None:
        with _named(f"--attn_implementation {attention}"), torch.device("meta"):
            causal_model(config, attn_implementation=attention)
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
    """PEFT leaves out names that match nothing as long as another one matches; a lone one is a regular expression."""
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
