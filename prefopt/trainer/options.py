"""Options that are refused by name before anything is loaded, and models that are not causal.

docs/options.md lists every argument of `PreferenceConfig` and its effect; a test compares the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, ProcessorMixin

from prefopt.losses import Loss
from prefopt.models.causal import why_not_causal
from prefopt.models.load import adapter_base
from prefopt.safety.errors import UsageError
from prefopt.scoring.model import unwrapped


@contextlib.contextmanager
def with_arguments(args: Any, **values: Any) -> Iterator[dict[str, Any]]:
    """Context in which training arguments have other values; yields the earlier ones and restores them at the end."""
    before = {name: getattr(args, name) for name in values}
    for name, value in values.items():
        setattr(args, name, value)
    try:
        yield before
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def groups_by_length(args: Any) -> bool:
    """Whether examples are to be sampled by length."""
    strategy = getattr(args, "train_sampling_strategy", "random")
    return strategy in ("group_by_length", "batch_rebalance") or bool(getattr(args, "group_by_length", False))


def ungrouped(args: Any) -> contextlib.AbstractContextManager[Any]:
    """Context in which examples are not sampled by length."""
    values = {"train_sampling_strategy": "random", "group_by_length": False} if groups_by_length(args) else {}
    return with_arguments(args, **{name: value for name, value in values.items() if hasattr(args, name)})


def _sharded_rows(args: Any) -> bool:
    parallel = getattr(args, "parallelism_config", None)
    return any((getattr(parallel, name, 1) or 1) > 1 for name in ("cp_size", "sp_size"))


REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "neftune_noise_alpha": (
        lambda args: bool(args.neftune_noise_alpha),
        "its noise would be in the reference too, and scaled by the length of a packed or padded row instead of the "
        "example's: leave it out",
    ),
    "label_smoothing_factor": (
        lambda args: bool(args.label_smoothing_factor),
        "it smooths the labels of a cross-entropy, which is not computed here, so it would have no effect: write "
        "label_smoothing inside the loss, as in loss='dpo(beta=0.1, label_smoothing=0.1)'",
    ),
    "bf16_full_eval": (
        lambda args: bool(args.bf16_full_eval),
        "an evaluation would cast the policy's weights for good and not the reference's: use bf16=True",
    ),
    "fp16_full_eval": (
        lambda args: bool(args.fp16_full_eval),
        "an evaluation would cast the policy's weights for good and not the reference's: use bf16=True",
    ),
    "activation_offloading": (
        lambda args: args.activation_offloading and (args.use_cpu or not torch.accelerator.is_available()),
        "it moves activations from a GPU to the CPU, and this run is on a CPU: leave it out",
    ),
    "parallelism_config": (
        _sharded_rows,
        "context and sequence parallelism cut rows into pieces, which are scored as a whole here: use DDP, FSDP or "
        "DeepSpeed",
    ),
}
"""Options by name: whether they are set, and why they are refused."""


def refuse_options(args: Any) -> None:
    """Refuse options that would have no effect, do harm, or fail late.

    Args:
        args: a `PreferenceConfig` or `trl.DPOConfig`; None is TRL's default.

    Raises:
        ValueError: naming the option, its value and what to do.
    """
    for name, (is_set, why) in REFUSED.items():
        if getattr(args, name, None) is not None and is_set(args):
            raise UsageError(f"{name}={getattr(args, name)!r} cannot be used here: {why}")


def refuse_sampling(args: Any, data: Any, columns: Collection[str]) -> None:
    """Refuse sampling by length where the lengths are not known.

    Raises:
        ValueError: for streams and images.
    """
    if args is None or not groups_by_length(args):
        return
    name = "train_sampling_strategy" if hasattr(args, "train_sampling_strategy") else "group_by_length"
    asked = f"{name}={getattr(args, name)!r}"
    if isinstance(data, IterableDataset):
        raise UsageError(f"{asked} would have no effect: streamed rows cannot be reordered. Leave it out")
    if {"image", "images"} & set(columns):
        raise UsageError(
            f"{asked} cannot be used here: with images, an example's tokens are counted in its batch only"
        )


def refuse_images(model: Any, args: Any, processor: Any, columns: Collection[str]) -> None:
    """Refuse images for a model that reads text alone.

    Args:
        model: as it was passed to the trainer.
        args: the training arguments, or None.
        processor: as it was passed to the trainer; a processor for images ends the check.
        columns: of the training rows, without columns that hold no image.

    Raises:
        ValueError: naming the column and the model.
    """
    media = sorted({"image", "images"} & set(columns))
    if not media or isinstance(processor, ProcessorMixin):
        return
    config, named, _ = _described(model, args)
    if config is not None and getattr(config, "vision_config", None) is None:
        raise UsageError(
            f"the rows have a vision-related column, {media[0]!r}, but {named} reads only text: use a vision-language "
            f"model, or train on the texts with train_dataset.remove_columns({media[0]!r})"
        )


def refuse_model(model: Any, args: Any, role: str) -> None:
    """Refuse models that do not predict the next token of one row (T5, BERT, reward models) or must be loaded first.

    Args:
        model: as it was passed to the trainer, an object or what `from_pretrained` takes.
        args: the training arguments, or None.
        role: what the model is passed as.

    Raises:
        ValueError: naming the model and what it is.
    """
    if isinstance(model, str) and role != "model":
        raise UsageError(
            f"{role}={model!r} is a name, and only `model` is loaded by its name: pass "
            f"{role}=AutoModelForCausalLM.from_pretrained({model!r})"
        )
    if isinstance(model, str) and (base := adapter_base(model)) is not None:
        raise UsageError(
            f"{role}={model!r} holds an adapter on {base}. To train it further, load it first: "
            f"AutoPeftModelForCausalLM.from_pretrained({model!r}, is_trainable=True). For a new adapter or all "
            "weights, merge it into its model with prefopt merge, and pass the folder of that"
        )
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        raise UsageError(
            f"{role} is wrapped in {type(model).__name__}, which the trainer does itself: pass {role}.module"
        )
    config, named, architecture = _described(model, args)
    if config is None and not isinstance(model, str):
        raise UsageError(
            f"{role} is a {architecture}, not a transformers model: pass a model, or the name or folder of one"
        )
    if reason := why_not_causal(config, architecture):
        raise UsageError(f"{role}={named} {reason}")


def refuse_nameless(model: Any, objective: Loss) -> None:
    """Refuse a model made in memory if TRL would load a reference from the path in its configuration.

    Raises:
        ValueError: saying how to pass one.
    """
    config = None if isinstance(model, str) else getattr(unwrapped(model), "config", None)
    if config is not None and not getattr(config, "_name_or_path", ""):
        copied = ", pass ref_model=copy.deepcopy(model)" if objective.needs.frozen else ""
        raise UsageError(
            f"model is a {type(unwrapped(model)).__name__} made in memory, but TRL loads the reference from the path "
            f"a model came from: save the model (save_pretrained) and pass its folder{copied}, or train an adapter"
        )


def _described(model: Any, args: Any) -> tuple[Any, str, str]:
    """A model's configuration (None where it cannot be read), its name and its architecture."""
    if not isinstance(model, str):
        inner = unwrapped(model)
        config, architecture = getattr(inner, "config", None), type(inner).__name__
        return config, repr(getattr(config, "_name_or_path", "") or architecture), architecture
    options = dict(getattr(args, "model_init_kwargs", None) or {})
    trust = options.get("trust_remote_code", getattr(args, "trust_remote_code", False))
    config = None
    with contextlib.suppress(Exception):  # errors are reported when the model is loaded
        config = AutoConfig.from_pretrained(model, revision=options.get("revision"), trust_remote_code=trust)
    return config, repr(model), str(next(iter(getattr(config, "architectures", None) or ()), ""))
