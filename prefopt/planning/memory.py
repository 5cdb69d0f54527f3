"""The memory that a training step needs on a process, part by part, on one device or sharded over many.

The states come from `engines`, activations from `activations`. `--dry_run` and `prefopt plan` both read their numbers
here. Sizes are in bytes; a GB is 1e9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prefopt.planning.activations import Activations, Rows, activations
from prefopt.planning.engines import ENGINES
from prefopt.planning.setting import HALF, SINGLE, Setting, Sizes
from prefopt.scoring.head import KEPT_BYTES, chunk_bytes


def kept_under(engine: str, config: Any, rows: Rows, setting: Setting, adapter: Any = None) -> Activations:
    """What a model's layers keep under an engine.

    Sharded engines compute with weights that are in half precision already, and with PEFT's own LoRA layers, as do
    accelerators.

    Args:
        engine: a name in `ENGINES`.
        config: of the model.
        rows: of one forward pass.
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


def estimate(sizes: Sizes, kept: Activations, scored: int, setting: Setting, engine: str = "ddp") -> Estimate:
    """What a process needs at the peak of a step.

    Gradients and activations are added up where gradients are accumulated. Where they are not, activations are freed
    as gradients come, which is a part below zero.

    Args:
        sizes: of the model.
        kept: by its layers, for the rows of one forward pass.
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
    whole = logits if logits <= KEPT_BYTES else 0
    # Without earlier gradients to be added to, the gradient is at once the weight's own, which is counted there.
    is_its_own = engine == "ddp" and not setting.accumulates and setting.dtype == torch.float32
    gradient = 0 if is_its_own else sizes.head * SINGLE
    return whole + chunks + cast + gradient + sizes.head * setting.computed, gradient if sizes.tied else 0
