"""What training needs of a process's memory, part by part, on one device or sharded over many.

Weights are counted on the meta device, activations by `activations`; the rest follows from what accelerate, DeepSpeed
and FSDP2 keep. `--dry_run` and `prefopt plan` both read their numbers here. Sizes are in bytes; a GB is 1e9.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefopt.losses import ConflictFree, Loss
from prefopt.planning.activations import Activations, Rows, activations
from prefopt.scoring.head import KEPT_BYTES, chunk_bytes
from prefopt.scoring.model import decoder_layers

SINGLE, HALF = 4, 2

REDUCE_BUCKET = 500_000_000
"""Parameters: DeepSpeed's `reduce_bucket_size`, allocated in full whatever the model's size."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: gathered weights that may be there before some are given back."""
FOUR_BIT = 0.5 + 0.127 / 8
"""Bytes of a weight in NF4 with its block constants quantised too (QLoRA, Dettmers et al. 2023, 2305.14314)."""
FOUR_BIT_PLAIN = 0.5 + 0.5 / 8
"""The same with a float32 constant for every block of 64."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a model.

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
        from peft import get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, copy.deepcopy(adapter))  # PEFT writes into what it is given
    inner = model.get_base_model() if adapter is not None else model
    found = decoder_layers(inner)
    layers = list(found[1]) if found is not None else [inner]
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
    """How a model is trained, as far as it costs memory.

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
        term_gradients: terms whose gradients are kept apart, a copy each, until all are there.
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
    """What `conflict_free` keeps of its terms, as arguments of `Setting`; nothing for any other loss."""
    return {"term_gradients": len(loss.labels)} if isinstance(loss, ConflictFree) else {}


def kept_under(engine: str, config: Any, rows: Rows, setting: Setting, adapter: Any = None) -> Activations:
    """What a model's layers keep under an engine.

    Sharded engines compute with weights that are in half precision already, and with PEFT's own LoRA layers, as do
    accelerators.

    Args:
        engine: a name in `ENGINES`.
        config: of the model.
        rows: what goes through it together.
        setting: how it is trained.
        adapter: a PEFT configuration, or None where all weights train.
    """
    whole = engine == "ddp"
    dtype = torch.bfloat16 if setting.half and not whole else setting.dtype
    fused = whole and setting.device == "cpu"
    return activations(config, rows, dtype=dtype, autocast=setting.half, adapter=adapter, fused=fused)


@dataclass(frozen=True)
class Estimate:
    """Bytes by part.

    Attributes:
        parts: of a process's device, in the order in which they are shown; parts of 0 are left out.
        host: of main memory on each machine, where weights or optimizer are kept there.
    """

    parts: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class States:
    """Bytes of what lasts from step to step, and of what the engine adds to a step."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    buffers: float = 0
    host: float = 0


def estimate(sizes: Sizes, kept: Activations, scored: int, setting: Setting, engine: str = "ddp") -> Estimate:
    """What a process needs at the peak of a step.

    Gradients and activations are added up where gradients are accumulated. Where they are not, activations are freed
    as gradients come, which is a part below zero.

    Args:
        sizes: of the model.
        kept: what its layers keep, for the rows that go through it together.
        scored: completion tokens among them.
        setting: how it is trained.
        engine: a name in `ENGINES`.
    """
    states = ENGINES[engine](sizes, setting)
    saved = kept.kept(sizes.layers, setting.checkpointed)
    freed = 0.0
    # Where a term's backward pass is not the last, activations stay for the next one.
    if not (setting.accumulates or setting.term_gradients):
        # The head's gradient comes first, when all activations are still there.
        first = states.gradients * sizes.head / max(sizes.trainable, 1) if sizes.head_trains else 0
        freed = min(saved, max(states.gradients - first, 0))
    # A checkpointed layer is made again before its activations get gradients, of their own size at most.
    layer: float = kept.layer * (2 if setting.checkpointed else 1)
    head, waiting = _head(sizes, scored, setting, engine)
    layer += waiting
    parts = {
        "weights": states.weights,
        "reference model": states.reference if setting.reference and not sizes.adapters else 0,
        "gradients": states.gradients,
        "terms' gradients": setting.term_gradients * states.gradients,
        "optimizer (AdamW)": states.optimizer,
        "activations": saved,
        "a layer going backward": layer,
        "freed as gradients come": -freed,
        "autocast's copies of weights": _copies(sizes, kept, setting, engine),
        "logits, a chunk at a time": head,
        "head and layer take turns": -min(head, layer),
        "buffers": states.buffers + (sizes.largest_linear * HALF if setting.quantized else 0),
    }
    return Estimate({name: round(size) for name, size in parts.items() if size}, round(states.host))


def _copies(sizes: Sizes, kept: Activations, setting: Setting, engine: str) -> float:
    """What autocast holds of trained weights in half precision until the forward pass is over, beyond its backward.

    torch.autocast keeps its casts of leaves that want a gradient, the reference's as well as the policy's, until its
    outermost context ends. Without checkpointing the policy's are in `kept`, since layers keep them anyway.
    """
    if engine != "ddp" or sizes.adapters or not setting.half or setting.dtype != torch.float32:
        return 0
    models = int(setting.reference) + int(setting.checkpointed)
    # When they are gone a layer's activations get their gradients, and with checkpointing are made again before.
    return max(models * sizes.linear * HALF - kept.layer * (2 if setting.checkpointed else 1), 0)


def _head(sizes: Sizes, scored: int, setting: Setting, engine: str) -> tuple[float, float]:
    """Bytes that the head takes while it is at work (`prefopt.scoring.head`), and those that wait for the embedding.

    Logits and their powers are there a chunk at a time; where the head trains, its gradient is added up in float32,
    the product of a chunk beside it. A tied head's gradient waits until the embedding's comes.
    """
    logits = scored * sizes.vocabulary * SINGLE
    chunks = 2 * min(logits, chunk_bytes(setting.device))
    cast = sizes.head * HALF if setting.half and setting.dtype == torch.float32 and engine == "ddp" else 0
    if not sizes.head_trains:
        return chunks + cast, 0
    # Small logits are kept for the backward pass, where their gradient stands beside them.
    kept = logits if logits <= KEPT_BYTES else 0
    # Without earlier gradients to be added to, what is made is at once the weight's own, which is counted there.
    is_its_own = engine == "ddp" and not setting.accumulates and setting.dtype == torch.float32
    made = 0 if is_its_own else sizes.head * SINGLE
    return kept + chunks + cast + made + sizes.head * setting.computed, made if sizes.tied else 0


# ---- what the engines keep ------------------------------------------------------------------------------------------


def _loaded(sizes: Sizes, setting: Setting, width: float) -> float:
    """Bytes of the frozen weights, `width` bytes each unless they are quantised."""
    if setting.quantized is None:
        return sizes.frozen * width
    return sizes.linear * setting.quantized + max(sizes.frozen - sizes.linear, 0) * width


def _adapter_width(sizes: Sizes, setting: Setting) -> int:
    """PEFT keeps adapters in float32 beside half-precision weights; TRL puts those of quantised models in bfloat16."""
    if not sizes.adapters:
        return setting.dtype.itemsize
    return HALF if setting.quantized else SINGLE


def _replicated(sizes: Sizes, setting: Setting) -> States:
    """One process, or DDP: everything whole on each, in the precision it was loaded in; bf16 is autocast's business.

    DDP's buckets hold every gradient a second time (`gradient_as_bucket_view=False`, which accelerate leaves as it is;
    torch.nn.parallel.DistributedDataParallel's documentation gives the saving as "the total gradients size").
    """
    width = _adapter_width(sizes, setting)
    gradients = sizes.trainable * width
    return States(
        weights=_loaded(sizes, setting, setting.dtype.itemsize) + gradients,
        gradients=gradients,
        optimizer=2 * gradients,
        reference=sizes.total * setting.dtype.itemsize,
        buffers=gradients if setting.processes > 1 else 0,
    )


def _zero(stage: int, offload: bool = False) -> Callable[[Sizes, Setting], States]:
    """DeepSpeed: weights cast to bfloat16, a float32 copy and AdamW's moments of this process's share of what trains.

    18 bytes a parameter as in DeepSpeed's own `estimate_zero2_model_states_mem_needs` and
    `estimate_zero3_model_states_mem_needs` (runtime/zero): 2 weights + 2 gradients + 4 gradients in float32 for the
    step + 4 master weights + 8 moments, of which stage 1 shares out the last three, stage 2 gradients as well, stage 3
    everything. The buffers are its defaults for `reduce_bucket_size` and `stage3_max_live_parameters`. TRL shards the
    reference at stage 3 and keeps it whole below (`trl.models.utils.prepare_deepspeed`).
    """

    def states(sizes: Sizes, setting: Setting) -> States:
        share, width = 1 / setting.processes, setting.computed
        weights: float = _loaded(sizes, setting, width) + sizes.trainable * width
        gradients = sizes.trainable * (width * (1 if stage == 1 else share) + SINGLE * share)
        optimizer = 3 * SINGLE * sizes.trainable * share
        reference: float = sizes.total * width
        buffers: float = REDUCE_BUCKET * width
        if stage == 3:
            weights, reference = weights * share, reference * share
            buffers += min(sizes.total, max(LIVE_PARAMETERS, sizes.layer)) * width
        if not offload:
            return States(weights, gradients, optimizer, reference, buffers)
        host = (weights + gradients + optimizer) * setting.processes / setting.nodes
        # TRL takes the offloading of the optimizer out of the reference's configuration, that of weights it leaves.
        return States(0, 0, 0, 0, buffers, host + (reference * setting.processes / setting.nodes if setting.reference
                                                   and not sizes.adapters else 0))  # fmt: skip

    return states


def _fsdp2(sizes: Sizes, setting: Setting) -> States:
    """FSDP2: a share of everything; what trains is float32 under mixed precision and gathered in bfloat16.

    `accelerate.utils.fsdp_utils.fsdp2_prepare_model` casts trained weights to float32 unless the model is quantised,
    shards layer by layer, and keeps embedding and head gathered once they are. Frozen weights keep their type. A layer
    is gathered while the one before it computes, so two are there; its whole gradient stands beside the copy that
    `reduce_scatter` sends.
    """
    share, width = 1 / setting.processes, setting.computed
    master = HALF if setting.quantized else SINGLE if setting.half else setting.dtype.itemsize
    trained = sizes.trainable * master * share
    layer: float = sizes.layer * width
    if setting.quantized:
        layer = (sizes.layer - sizes.layer_trainable) * setting.quantized + sizes.layer_trainable * width
    return States(
        weights=_loaded(sizes, setting, setting.dtype.itemsize) * share + trained,
        gradients=trained,
        optimizer=2 * trained,
        reference=sizes.total * setting.dtype.itemsize * share,
        buffers=2 * layer + sizes.outside * width + 2 * width * (sizes.layer_trainable + sizes.outside_trainable),
    )


ENGINES: dict[str, Callable[[Sizes, Setting], States]] = {
    "ddp": _replicated,
    "zero1": _zero(1),
    "zero2": _zero(2),
    "fsdp2": _fsdp2,
    "zero3": _zero(3),
    "zero3_offload": _zero(3, offload=True),
}
"""The engines by the names of their files in configs/accelerate, the simplest first."""
