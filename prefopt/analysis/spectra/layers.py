"""The spectra of a model's linear layers before and after training. Imports torch and the fit, never a trainer."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.analysis.spectra.power_law import PowerLaw, fit_power_law
from prefopt.safety.errors import UsageError
from prefopt.scoring.model import has_adapter, unwrapped

SMALLEST_SIDE = 32
"""Narrower layers have too few singular values for a tail."""
SHOWN = 5
TYPICAL = (2.0, 6.0)
"""Exponents of well-trained layers of public models (Martin, Peng, Mahoney 2021, arXiv 2002.06716)."""


@dataclass(frozen=True)
class LayerSpectrum:
    """The squared singular values of a layer's weight.

    Attributes:
        name: of the layer.
        before: fit before training; None where it is not known.
        after: fit after training.
        change: relative size of the update, |after - before| / |before| in the Frobenius norm.
    """

    name: str
    before: PowerLaw | None
    after: PowerLaw
    change: float | None


def layer_spectra(model: nn.Module, before: nn.Module | None = None) -> list[LayerSpectrum]:
    """Fit the spectrum of every linear layer that was trained.

    Takes a singular value decomposition of each weight, twice.

    Args:
        model: with a LoRA adapter, whose layers are compared with and without it; or a whole model.
        before: of a whole model, the one that training started from. Without it only `after` is known.

    Raises:
        UsageError: for quantised weights, or where no layer is wide enough.
    """
    spectra = []
    for name, old, new in _weights(model, before):
        after = fit_power_law(_squares(new))
        if after is None:
            continue
        change = None if old is None else float((new - old).norm() / old.norm())
        spectra.append(LayerSpectrum(name, None if old is None else fit_power_law(_squares(old)), after, change))
    if not spectra:
        raise UsageError("the model has no trained linear layer that is wide enough for a spectrum")
    return spectra


def describe(spectra: Sequence[LayerSpectrum]) -> list[str]:
    """The exponents in a few lines: medians, layers outside the usual range, and the largest changes."""
    alphas = [spectrum.after.alpha for spectrum in spectra]
    compared = [(s, s.before) for s in spectra if s.before is not None]
    was = f" (before: {statistics.median(b.alpha for _, b in compared):.2f})" if compared else ""
    low, high = TYPICAL
    lines = [
        f"spectra of {len(spectra)} layers: median power-law exponent {statistics.median(alphas):.2f}{was}; "
        f"{sum(a < low for a in alphas)} below {low:g}, {sum(a > high for a in alphas)} above {high:g}"
    ]
    for spectrum, first in sorted(compared, key=lambda one: -abs(one[0].after.alpha - one[1].alpha))[:SHOWN]:
        lines.append(
            f"  {spectrum.name}: {first.alpha:.2f} -> {spectrum.after.alpha:.2f}, the weight changed by "
            f"{spectrum.change or 0:.2%}"
        )
    return lines


def _squares(weight: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(weight)
    return values.square()


def _weights(model: nn.Module, before: nn.Module | None) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """Name, old and new float32 weight of each trained linear layer."""
    with torch.no_grad():
        if has_adapter(model):
            yield from _adapted(model)
            return
        inner = unwrapped(model)
        old = {} if before is None else dict(unwrapped(before).named_modules())
        head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None  # type: ignore[operator]
        for name, module in inner.named_modules():
            if isinstance(module, nn.Linear) and module is not head and min(module.weight.shape) >= SMALLEST_SIDE:
                first: Any = old.get(name)
                yield name, None if first is None else _whole(first, name), _whole(module, name)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, module in model.named_modules():
        layer: Any = module
        if not (hasattr(layer, "get_delta_weight") and isinstance(getattr(layer, "base_layer", None), nn.Linear)):
            continue
        old = _whole(layer.base_layer, name)
        if min(old.shape) >= SMALLEST_SIDE:
            update = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            yield name.removeprefix("base_model.model."), old, old + update


def _whole(layer: Any, name: str) -> Tensor:
    weight: Tensor = layer.weight
    if not weight.is_floating_point():
        raise UsageError(
            f"{name} is quantised: its spectrum is that of the whole weight, so load the model without it"
        )
    return weight.detach().float()
