"""What each engine keeps of weights, gradients and optimizer on a process: one process, DDP, DeepSpeed and FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefopt.planning.setting import HALF, SINGLE, Setting, Sizes

REDUCE_BUCKET = 500_000_000
"""Parameters: DeepSpeed's `reduce_bucket_size`, allocated in full whatever the model's size."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: gathered weights that may be there before some are given back."""


@dataclass(frozen=True)
class States:
    """Bytes of what lasts from step to step, and of what the engine adds to a step."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    buffers: float = 0
    host: float = 0


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
