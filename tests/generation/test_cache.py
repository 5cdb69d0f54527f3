"""The cache with room: the same keys and values as transformers' own, however it grows and shrinks."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from prefopt.generation import cache as roomy
from prefopt.generation.cache import can_pick, pick_rows


@pytest.mark.parametrize("room", [1, 3, 64])
def test_it_holds_what_transformers_cache_holds(monkeypatch, room):
    monkeypatch.setattr(roomy, "_ROOM", room)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = DynamicCache(), DynamicCache()

    def grow(rows: int, tokens: int) -> None:
        for layer in range(2):
            keys, values = (torch.randn(rows, 2, tokens, size, generator=generator) for size in (4, 3))
            mine, its = ours.update(keys, values, layer), theirs.update(keys, values, layer)
            assert torch.equal(mine[0], its[0])
            assert torch.equal(mine[1], its[1])
        assert ours.get_seq_length() == theirs.get_seq_length()

    grow(2, 5)
    assert can_pick(ours)
    for index in ([0, 0, 0, 1, 1], [4, 0, 2], [1]):
        picked = torch.tensor(index)
        pick_rows(ours, picked)
        theirs.reorder_cache(picked)
        for _ in range(5):
            grow(len(index), 1)
