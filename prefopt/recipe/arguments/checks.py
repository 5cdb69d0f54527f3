"""Options that are refused as soon as they are read: out of range, without effect, or renamed."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

from trl import ModelConfig

from prefopt.analysis.gradients.push import refuse_unpushable
from prefopt.analysis.health.callback import check_stop_on
from prefopt.data.embed import DEFAULT
from prefopt.losses import Need
from prefopt.models.load import adapter_base
from prefopt.recipe.arguments.options import Recipe
from prefopt.trainer import PreferenceConfig

_RENAMED = {
    "warmup_ratio": "--warmup_steps takes a fraction of the run too, as in --warmup_steps 0.1",
    "evaluation_strategy": "write --eval_strategy",
    "torch_dtype": "write --dtype",
    "max_prompt_length": "--max_length cuts prompt and completion together, and --truncation_mode says at which end",
    "max_completion_length": "--max_length cuts prompt and completion together",
    "no_cuda": "write --use_cpu true",
}
"""Options of earlier releases of transformers and TRL, and what replaces them."""


def renamed(option: str) -> str | None:
    """The replacement for an option of an earlier release; None for any other word."""
    return _RENAMED.get(option.lstrip("-").replace("-", "_"))


_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "num_train_epochs": (0, math.inf),
    "per_device_train_batch_size": (1, 2**31),
    "per_device_eval_batch_size": (1, 2**31),
    "gradient_accumulation_steps": (1, 2**31),
    "dataloader_num_workers": (0, 2**31),
    "dataset_num_proc": (1, 2**31),
    "max_length": (2, 2**31),
    "pad_to_multiple_of": (1, 2**31),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "step0_tolerance": (0, math.inf),
    "sample_max_new_tokens": (1, 2**31),
    "dataloader_prefetch_factor": (1, 2**31),
    "lora_r": (1, 2**31),
    "lora_alpha": (0, 2**31),
    "lora_dropout": (0, 1),
}
"""Minimum and maximum of options that would otherwise fail only once the model is loaded."""


def _refuse_out_of_range(training: PreferenceConfig, model: ModelConfig) -> None:
    """Numbers that would otherwise fail only once the model is loaded."""
    for name, (least, most) in _RANGES.items():
        value = getattr(model if hasattr(model, name) else training, name, None)
        # `inf` as a learning rate or a norm is a mistake too, and NaN is outside every range.
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            limits = f"of at least {least}" if most in (2**31, math.inf) else f"from {least} to {most}"
            raise SystemExit(f"--{name} must be a finite number {limits}, got {value}")


def refuse_steps_and_epochs(config: dict[str, Any], words: set[str], known: argparse.Namespace) -> None:
    """Refuse both in one place: `max_steps` would win, and the epochs would have no effect."""
    both = {"max_steps", "num_train_epochs"}
    for where, names, steps in (("", words, known.max_steps), ("the config: ", set(config), config.get("max_steps"))):
        if both <= names and steps is not None and float(steps) > 0:
            raise SystemExit(
                f"{where}num_train_epochs would have no effect beside max_steps {steps}, which decides how long to "
                "train: leave one of them out"
            )


def refuse_unusable(recipe: Recipe, words: set[str], named: set[str]) -> None:
    """Refuse options that are out of range or that do nothing.

    Args:
        recipe: the options, as they were read.
        words: the options on the command line.
        named: the options on the command line and in the config.

    Raises:
        SystemExit: naming the option and what to do.
    """
    for name, remedy in recipe.script.no_effect.items():
        if name in named:
            raise SystemExit(f"--{name} has no effect here: {remedy}")
    for name, other in recipe.script.replaced_by.items():
        # A config's option may be replaced on the command line.
        again = name in words or (name in named and other not in words)
        if again and getattr(recipe.script, other):
            raise SystemExit(f"--{name} would have no effect beside --{other}, which replaces it: leave one out")
    _refuse_out_of_range(recipe.training, recipe.model)
    _refuse_what_is_ignored(recipe, words)
    _refuse_without_effect(named, recipe.script, recipe.training, recipe.model)
    _refuse_embeddings(recipe)
    _refuse_idle_loss_file(recipe)


def _refuse_answers(recipe: Recipe) -> None:
    """Answers at evaluations that cannot be drawn."""
    if recipe.script.eval_answers < 0:
        raise SystemExit(f"--eval_answers must be 0 or more, got {recipe.script.eval_answers}")
    if recipe.script.eval_answers and (recipe.training.deepspeed or recipe.training.fsdp):
        raise SystemExit("--eval_answers needs a whole model, which DeepSpeed and FSDP may shard: leave it out")
    if recipe.script.eval_answers and not recipe.script.eval_rows and recipe.bundled_data:
        raise SystemExit("--eval_answers has no effect with --eval_rows 0: no prompts are held out")


def _refuse_unmeasurable(recipe: Recipe) -> None:
    """A measurement of gradient entanglement that this loss or engine does not allow."""
    every = recipe.script.entanglement_every
    if every is None:
        return
    if every < 1:
        raise SystemExit(f"--entanglement_every must be 1 or more steps, got {every}")
    if recipe.training.deepspeed or recipe.training.fsdp:
        raise SystemExit("--entanglement_every needs whole gradients, which DeepSpeed and FSDP shard: leave it out")
    if recipe.objective is None:
        raise SystemExit("--entanglement_every needs a loss expression, and TRL computes this loss itself: use --loss")
    refuse_unpushable(recipe.objective)


def _refuse_what_is_ignored(recipe: Recipe, words: set[str]) -> None:
    """Options about data that is not named, and options of a new adapter when a saved one is trained."""
    script, model = recipe.script, recipe.model
    if script.eval_rows < 0:
        raise SystemExit(f"--eval_rows must be 0 or more, got {script.eval_rows}")
    if script.stop_on is not None:
        check_stop_on(script.stop_on)
        if recipe.training.logging_strategy.value == "no":
            raise SystemExit("--stop_on would have no effect with --logging_strategy no: it reads the log lines")
    _refuse_answers(recipe)
    _refuse_unmeasurable(recipe)
    if recipe.bundled_data and script.columns:
        raise SystemExit("--columns renames columns of your own data set: name it with --dataset_name")
    if recipe.bundled_data and script.format:
        raise SystemExit("--format is the layout of your own data set: name it with --dataset_name")
    if script.dataset_streaming and script.on_bad_rows == "drop":
        raise SystemExit("--dataset_streaming cannot validate rows ahead, so --on_bad_rows drop has no effect with it")
    if script.dataset_streaming and recipe.bundled_data:
        raise SystemExit("--dataset_streaming streams your own data set: name it with --dataset_name")
    shape = sorted(name for name in words if name.startswith("lora_") or name in ("use_rslora", "use_dora"))
    if shape and model.model_name_or_path is not None and adapter_base(model.model_name_or_path) is not None:
        raise SystemExit(
            f"--{shape[0]} is for a new adapter, but {model.model_name_or_path} is a saved adapter, whose training "
            "continues unchanged: leave the option out, or merge the adapter into its model first"
        )
    if model.use_peft and model.lora_task_type != "CAUSAL_LM":
        raise SystemExit(
            f"--lora_task_type {model.lora_task_type}: only CAUSAL_LM can be trained here; leave the option out"
        )


def _refuse_idle_loss_file(recipe: Recipe) -> None:
    """Refuse a file of losses of which the objective uses none."""
    file = recipe.loss_file
    if file is not None and not set(file.names) & set(re.findall(r"\w+", recipe.objective_text)):
        raise SystemExit(
            f"--loss_file {file.path} would have no effect: the loss is {recipe.objective_text}. Use what the file "
            f'registers ({", ".join(file.names)}), as in --loss "{file.names[0]}"'
        )


# ---- embeddings --------------------------------------------------------------------------------------------------

REMEDY = (
    f"compute them with --embeddings {DEFAULT} (a folder or a Hub name works as well), or use the policy's hidden "
    "states with embeddings='hidden' in the loss"
)
"""What to do if the loss compares embeddings that the data does not have."""


def compares_given(recipe: Recipe) -> bool:
    """Whether the loss compares embeddings that come with the data. TRL's own loss options never do."""
    objective = recipe.objective if recipe.training.loss is not None else None
    return objective is not None and Need.EMBEDDINGS in objective.needs


def _refuse_embeddings(recipe: Recipe) -> None:
    """Refuse an encoder that the loss does not use, and a loss for which the bundled pairs have no vectors."""
    encoder, wanted = recipe.script.embeddings, compares_given(recipe)
    if encoder is None:
        if wanted and recipe.bundled_data:
            raise SystemExit(
                f"--loss {recipe.training.loss}: it compares embeddings that come with the data, and the bundled "
                f"pairs have none: {REMEDY}"
            )
    elif not wanted:
        raise SystemExit(
            f"--embeddings {encoder} has no effect: {recipe.objective_text} compares no embeddings that come with "
            "the data. Leave the option out, or set embeddings='given' in a loss that has it (kernel_dpo, hmk)"
        )
    elif recipe.script.dataset_streaming:
        raise SystemExit(
            "--embeddings computes the vectors of all texts before training, which a stream does not allow: leave "
            "--dataset_streaming out, or give the data columns of vectors"
        )


# ---- options that depend on another one --------------------------------------------------------------------------


def _is(name: str, *values: str) -> Callable[[dict[str, Any]], bool]:
    return lambda options: str(getattr(options[name], "value", options[name])) in values


def _set(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda options: any(bool(options[name]) for name in names)


def _picks_the_best(options: dict[str, Any]) -> bool:
    return bool(options["load_best_model_at_end"]) or (
        _is("save_strategy", "best")(options) or _is("lr_scheduler_type", "reduce_lr_on_plateau", "greedy")(options)
    )


_LORA = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "use_rslora", "use_dora",
)  # fmt: skip
_SWITCHES: tuple[tuple[tuple[str, ...], str, str, Callable[[dict[str, Any]], bool]], ...] = (
    (_LORA, "use_peft", "--use_peft", _set("use_peft")),
    (("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), "load_in_4bit", "--load_in_4bit",
     _set("load_in_4bit")),
    (("eval_steps", "eval_delay"), "eval_strategy", "--eval_strategy steps", _is("eval_strategy", "steps", "epoch")),
    (("save_steps", "save_total_limit"), "save_strategy", "--save_strategy steps",
     _is("save_strategy", "steps", "epoch", "best")),
    (("metric_for_best_model", "greater_is_better"), "load_best_model_at_end", "--load_best_model_at_end true",
     _picks_the_best),
    (("ref_model_mixup_alpha", "ref_model_sync_steps", "sync_ref_before_step"), "sync_ref_model",
     "--sync_ref_model true",
     _set("sync_ref_model")),
    (("precompute_ref_batch_size",), "precompute_ref_log_probs", "--precompute_ref_log_probs true",
     _set("precompute_ref_log_probs")),
    (("dataset_config", "dataset_train_split", "dataset_test_split"), "dataset_name", "--dataset_name",
     _set("dataset_name")),
    (("model_revision",), "model_name_or_path", "--model_name_or_path", _set("model_name_or_path")),
)  # fmt: skip
"""Options, the one that they depend on, how that is written, and whether it is on."""


def _refuse_without_effect(named: set[str], *parts: Any) -> None:
    """Refuse options that do nothing because the one they depend on is off by default."""
    options = {name: value for part in parts for name, value in vars(part).items()}
    for names, switch, written, is_on in _SWITCHES:
        idle = [name for name in names if name in named]
        if idle and switch not in named and not is_on(options):
            raise SystemExit(f"--{idle[0]} would have no effect without {written}: add that, or leave it out")
    kwargs = options["model_init_kwargs"]
    if kwargs is not None and not isinstance(kwargs, dict):
        raise SystemExit(f'--model_init_kwargs must be a JSON object such as \'{{"revision": "main"}}\', got {kwargs}')
