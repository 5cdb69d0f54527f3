"""A key-value cache whose layers have room for the tokens to come.

transformers' own layer copies all earlier keys and values for every new token. Imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64
"""Tokens to make room for at a time."""


def can_pick(cache: Any) -> bool:
    """Whether `pick_rows` works for this cache; models with caches of their own have another class."""
    return type(cache) is DynamicCache


def pick_rows(cache: Any, index: Tensor) -> None:
    """Let a cache hold these rows of itself, in this order; a row may come several times.

    Plain layers get room for more tokens; layers with a sliding window or a recurrent state remain what they are.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[number] = _RoomyLayer(layer, index)
        else:
            layer.reorder_cache(index)


def can_join(cache: Any) -> bool:
    """Whether `join` works: every layer has all tokens of a row, and may have padding before them."""
    return all(isinstance(layer, _RoomyLayer) for layer in cache.layers)


def join(cache: Any, other: Any, unused: int) -> None:
    """Append the rows of another cache to one; the shorter of both gets padding on the left.

    Args:
        cache: becomes both.
        other: is not used after this.
        unused: tokens at the start of `cache` to leave out.
    """
    for first, second in zip(cache.layers, other.layers, strict=True):
        first.join(second, unused)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values at the start of larger tensors, into which new ones are written."""

    def __init__(self, layer: Any, index: Tensor):
        super().__init__()
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.keys, self.values = layer.keys, layer.values
        self.is_initialized = True
        self.reorder_cache(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._all_keys, self._all_values = (_roomy(part, beam_idx) for part in (self.keys, self.values))
        self._show(self.keys.shape[-2])

    def join(self, other: _RoomyLayer, unused: int) -> None:
        self._all_keys = _joined(self.keys[:, :, unused:], other.keys)
        self._all_values = _joined(self.values[:, :, unused:], other.values)
        self._show(self._all_keys.shape[-2] - _ROOM)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if end > self._all_keys.shape[-2]:
            self.reorder_cache(torch.arange(len(self.keys), device=self.keys.device))
        self._all_keys[:, :, start:end] = key_states
        self._all_values[:, :, start:end] = value_states
        self._show(end)
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys, self.values = self._all_keys[:, :, :length], self._all_values[:, :, :length]


def _roomy(part: Tensor, index: Tensor) -> Tensor:
    rows, (heads, length, size) = len(index), part.shape[1:]
    whole = part.new_empty(rows, heads, length + _ROOM, size)
    whole[:, :, :length] = part.index_select(0, index)
    return whole


def _joined(one: Tensor, other: Tensor) -> Tensor:
    rows, (heads, length, size) = len(one), one.shape[1:]
    end = max(length, other.shape[-2])
    # Zeros, since what is masked is multiplied by a weight of zero, and must be a number.
    whole = one.new_zeros(rows + len(other), heads, end + _ROOM, size)
    whole[:rows, :, end - length : end] = one
    whole[rows:, :, end - other.shape[-2] : end] = other
    return whole
