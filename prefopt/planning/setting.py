"""What memory depends on: a model's parameter counts, taken on the meta device, and how it is trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from prefopt.losses import ConflictFree, Loss, PairNormalized
from prefopt.scoring.model import decoder_layers

SINGLE, HALF = 4, 2
"""Bytes of a number."""
FOUR_BIT = 0.5 + 0.127 / 8
"""Bytes of a weight in NF4 with its block constants quantised too (QLoRA, Dettmers et al. 2023, 2305.14314)."""
FOUR_BIT_PLAIN = 0.5 + 0.5 / 8
"""The same with a float32 constant for every block of 64."""


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a model.

    Attributes:
        total: of all, adapters included.
        trainable: of those that train.
        linear: in linear layers other than the head, which is what 4 bits quantise.
        largest_linear: in the largest of them.
        layer: in the largest decoder layer.
        layer_trainable: of those, the ones that train.
        outside: in embeddings, head and norms outside the layers.
        outside_trainable: of those, the ones that train.
        head: in the head.
        tied: the head is the embedding.
        layers: number of decoder layers.
        vocabulary: V.
        adapters: whether what trains was added to a frozen model.
    """

    total: int
    trainable: int
    linear: int
    largest_linear: int
    layer: int
    layer_trainable: int
    outside: int
    outside_trainable: int
    head: int
    tied: bool
    layers: int
    vocabulary: int
    adapters: bool

    @property
    def frozen(self) -> int:
        return self.total - self.trainable

    @property
    def head_trains(self) -> bool:
        return not self.adapters


def count(model: Any, adapter: Any = None) -> Sizes:
    """Count a model on the meta device.

    Args:
        model: with or without weights.
        adapter: a PEFT configuration to add; None where all weights train.
    """
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    if adapter is not None:
        with torch.device("meta"):
            model = get_peft_model(model, copy.deepcopy(adapter))  # PEFT writes into what it is given
    inner = model.get_base_model() if adapter is not None else model
    decoder = decoder_layers(inner)
    layers = list(decoder[1]) if decoder is not None else [inner]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = [p for p in inner.parameters() if id(p) not in inside]
    largest = max(layers, key=_numel)
    return Sizes(
        total=_numel(model),
        trainable=_numel(model, only_trainable=True),
        linear=sum(linear),
        largest_linear=max(linear, default=0),
        layer=_numel(largest),
        layer_trainable=_numel(largest, only_trainable=True),
        outside=sum(p.numel() for p in outside),
        outside_trainable=sum(p.numel() for p in outside if p.requires_grad),
        head=0 if head is None else head.weight.numel(),
        tied=head is not None and embedding is not None and head.weight is embedding.weight,
        layers=len(layers),
        vocabulary=config.vocab_size,
        adapters=adapter is not None,
    )


def _numel(module: nn.Module, only_trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_trainable)


@dataclass(frozen=True)
class Setting:
    """How a model is trained, as far as memory depends on it.

    Attributes:
        dtype: that the weights are loaded in.
        half: bfloat16 or float16 mixed precision.
        checkpointed: activations are computed again in the backward pass.
        accumulates: gradients of earlier batches are there during a backward pass.
        reference: a frozen reference model is kept.
        quantized: bytes of a linear layer's weight in 4 bits; None if it is not.
        processes: that share the work.
        nodes: machines that they run on.
        device: "cpu" or another kind, which sets the size of the head's chunks.
        term_gradients: copies of the gradients besides `.grad`: terms' or answers', kept apart until all are there.
    """

    dtype: torch.dtype = torch.float32
    half: bool = False
    checkpointed: bool = True
    accumulates: bool = True
    reference: bool = True
    quantized: float | None = None
    processes: int = 1
    nodes: int = 1
    device: str = "cuda"
    term_gradients: int = 0

    @property
    def computed(self) -> int:
        """Bytes of a number that the engines compute with where they keep weights in another precision."""
        return HALF if self.half else self.dtype.itemsize


def of_terms(loss: Loss | None) -> dict[str, Any]:
    """What `conflict_free` keeps of its terms and `pair_normalized` of a pair, as arguments of `Setting`."""
    if isinstance(loss, PairNormalized):
        return {"term_gradients": 2}  # one answer's, and the sum of the normalised ones
    return {"term_gradients": len(loss.labels)} if isinstance(loss, ConflictFree) else {}
