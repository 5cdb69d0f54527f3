"""What scripts/bench/speed.py counts: real tokens, operations of matrix products, the rate a machine reaches."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def sizes(batch: Mapping[str, Any]) -> list[tuple[int, list[int]]]:
    """Tokens of each distinct prompt of a batch, and of each distinct completion of it."""
    trees: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for prompt, completion in _rows(batch):
        trees.setdefault(prompt, set()).add(completion)
    return [(len(prompt), sorted(map(len, completions))) for prompt, completions in trees.items()]


def _rows(batch: Mapping[str, Any]) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    names = ("input_ids", "attention_mask", "completion_mask")
    for ids, attended, mask in zip(*(batch[name].tolist() for name in names), strict=True):
        real = [(token, scored) for token, seen, scored in zip(ids, attended, mask, strict=True) if seen]
        yield tuple(token for token, scored in real if not scored), tuple(token for token, scored in real if scored)


def real_tokens(trees: Iterable[tuple[int, Sequence[int]]]) -> int:
    return sum(prompt + sum(completions) for prompt, completions in trees)


def digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Equal for two trainers whose batches hold the same tokens in the same order."""
    text = json.dumps([list(_rows(batch)) for batch in batches])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Weights:
    """Sizes of a model's matrices.

    Attributes:
        body: weights of the linear layers.
        head: weights of the output layer.
        adapters: weights of LoRA's matrices.
        attention: layers times the width of all query heads of one.
    """

    body: int
    head: int
    adapters: int
    attention: int

    @classmethod
    def of(cls, model: Any) -> Weights:
        import torch

        head = model.get_output_embeddings().weight
        linear = [(n, m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        linear = [(name, weight) for name, weight in linear if weight is not head]
        adapters = sum(weight.numel() for name, weight in linear if "lora_" in name)
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        body = sum(weight.numel() for _, weight in linear) - adapters
        return cls(body, head.numel(), adapters, config.num_hidden_layers * width)


def matmul_operations(
    weights: Weights, trees: Iterable[tuple[int, Sequence[int]]], *, full: bool, cached_reference: bool
) -> int:
    """Floating point operations of the matrix products that a step cannot do without.

    Each prompt once, each distinct completion once, the head on completion tokens. A product costs its forward, as
    much for the gradient of its inputs and, where weights train, as much again for theirs; the reference is one more
    forward.
    """
    reference = 0 if cached_reference else 1
    passes = (3 if full else 2) + reference
    total = 0
    for prompt, completions in trees:
        own = sum(completions)
        total += 2 * passes * (weights.body * (prompt + own) + weights.head * own)
        total += 2 * 3 * weights.adapters * (prompt + own)
        # Scores and values: 4 operations for each pair of a query and a key it sees, and both sides have gradients.
        seen = prompt**2 / 2 + sum(length * prompt + length**2 / 2 for length in completions)
        total += round(4 * (3 + reference) * weights.attention * seen)
    return total


def matmul_rate(dtype: Any) -> float:
    """Operations a second of this process on products of the job's shape."""
    import torch

    gpu = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if gpu else "cpu"
    rows, inner, outer = (8192, 4096, 4096) if gpu else (512, 576, 1536)
    a, b = torch.randn(rows, inner, dtype=dtype, device=device), torch.randn(inner, outer, dtype=dtype, device=device)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(40):
            a @ b
        if gpu:
            torch.accelerator.synchronize()
        best = max(best, 40 * 2 * rows * inner * outer / (time.perf_counter() - began))
    return best
