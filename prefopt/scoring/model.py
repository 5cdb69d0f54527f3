"""Looking at the model inside its wrappers. It is always called through them."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def peeled(model: nn.Module) -> nn.Module:
    """The model out of DDP, DeepSpeed and torch.compile, with its adapters."""
    while True:
        inner = getattr(model, "module", None)  # DDP, DeepSpeed
        if not isinstance(inner, nn.Module):
            inner = getattr(model, "_orig_mod", None)  # torch.compile
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DeepSpeed, torch.compile and PEFT wrappers, for looking at; it is called through them."""
    model = peeled(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def has_adapter(model: nn.Module) -> bool:
    """Whether the model is one of PEFT's, whatever wraps it."""
    peft = sys.modules.get("peft")  # slow to import, and no model is one of its before that
    return peft is not None and isinstance(peeled(model), peft.PeftModel)


def head_layer(model: nn.Module) -> Any:
    """The layer that an unwrapped model names as its head; None where it names none."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and list of an unwrapped model's decoder layers; None where it cannot be told which they are."""
    config: Any = getattr(model, "config", None)
    count = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0] if len(lists) == 1 else None


def positions_of(model: Any) -> int | None:
    """The longest row a model is made for, as its configuration says; None where it says nothing."""
    config = getattr(unwrapped(model), "config", None)
    return None if config is None else positions_in(config)


def positions_in(config: Any) -> int | None:
    """The same of a configuration alone."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model can be told to compute logits for the last positions only."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


def is_checkpointed(model: nn.Module) -> bool:
    """Whether layers are computed again in the backward pass."""
    inner = unwrapped(model)
    # The second is transformers' older name for it, which later releases warn about.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(next((getattr(inner, name) for name in names if hasattr(type(inner), name)), False))


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which a module computes `forward`; its hooks, and those of wrappers, are called as usual."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
