"""Dropout that models apply as a function: TRL's `disable_dropout` reaches `nn.Dropout` modules only.

OPT, GPT-BigCode and others keep a rate as a number on their modules (`self.dropout`, `self.layerdrop`), Falcon and
GPT-J read it from the configuration whenever they are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from prefopt.losses import Loss


class DropoutMixin:
    """The part of `LossMixin` that honours `disable_dropout` for models whose dropout is not a module."""

    objective: Loss | None
    args: Any
    model: Any
    ref_model: Any
    accelerator: Any

    def _turn_off_dropout(self) -> None:
        for model in (self.model, self.ref_model):
            if model is not None and self.args.disable_dropout:
                turn_off_dropout(model)

    def training_step(self, *arguments: Any, **keywords: Any) -> Any:
        if self.objective is None or not self.args.disable_dropout:
            return super().training_step(*arguments, **keywords)  # type: ignore[misc]
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        with without_configured_dropout(*models):
            return super().training_step(*arguments, **keywords)  # type: ignore[misc]


def turn_off_dropout(model: nn.Module) -> None:
    """Set the rates to 0 that the modules of a model keep as numbers."""
    for module in model.modules():
        for name in _rates(module):
            setattr(module, name, 0.0)


@contextlib.contextmanager
def without_configured_dropout(*models: nn.Module) -> Iterator[None]:
    """In here the rates in models' configurations are 0. They are put back, as configurations are saved."""
    found = [config for model in models if (config := getattr(model, "config", None)) is not None]
    configs = {id(c): c for config in found for c in (config, config.get_text_config())}
    before = [(c, name, rate) for c in configs.values() for name, rate in _rates(c).items()]
    try:
        for c, name, _ in before:
            setattr(c, name, 0.0)
        yield
    finally:
        for c, name, rate in before:
            setattr(c, name, rate)


def _rates(owner: Any) -> dict[str, float]:
    """The numbers of a module or configuration that are rates of dropout above 0."""
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, float) and 0 < value <= 1 and "drop" in name.lower()
    }
