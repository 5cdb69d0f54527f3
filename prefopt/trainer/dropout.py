"""Dropout that models apply as a function: TRL's `disable_dropout` reaches `nn.Dropout` modules only.

OPT, GPT-BigCode and others keep a rate as a number on their modules (`self.dropout`, `self.layerdrop`), Falcon and
GPT-J read it from the configuration whenever they are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from prefopt.scoring.model import peeled


def turn_off_dropout(model: nn.Module) -> None:
    """Set dropout rates to 0 that modules of a model keep as numbers."""
    for module in model.modules():
        for name in _rates(module):
            setattr(module, name, 0.0)


@contextlib.contextmanager
def without_configured_dropout(models: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which dropout rates in models' configurations are 0, until they are restored at its end.

    Args:
        models: wrapped or not.
    """
    # accelerate's unwrap_model would look at every module, at each step.
    all_configs = [config for model in models if (config := getattr(peeled(model), "config", None)) is not None]
    configs = {id(c): c for config in all_configs for c in (config, config.get_text_config())}
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
