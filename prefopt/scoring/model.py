"""Looking at the model inside its wrappers. It is always called through them."""

from __future__ import annotations

import inspect

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DeepSpeed, torch.compile and PEFT wrappers, for looking at; it is called through them."""
    while True:
        inner = getattr(model, "module", None)  # DDP, DeepSpeed
        if not isinstance(inner, nn.Module):
            inner = getattr(model, "_orig_mod", None)  # torch.compile
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()  # type: ignore[operator]
    return model


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model can be told to compute logits for the last positions only."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters
