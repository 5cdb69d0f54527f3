"""The language-model head on completion tokens, a chunk at a time, so that the logits never exist as a whole.

While a model is called inside `replaced_head`, its head returns the quantities of `measure` instead of logits. The
model is called as it is, wrappers and all; what changes is the forward method of one linear layer, for that call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefopt.scoring.measure import (
    LOOKED_AT,
    Extras,
    Measured,
    Softmax,
    by_name,
    detached_where_constant,
    gradients,
    joined,
    measure,
    part_of,
    pull_back,
)
from prefopt.scoring.model import head_layer, replaced_forward

CHUNK_BYTES = {"cpu": 2**24, "elsewhere": 2**28}
"""Size of a chunk's logits: on a CPU what stays in its caches, elsewhere enough to keep the device busy."""
KEPT_BYTES = 2**27
"""Logits up to this size are kept for the backward pass where it needs them; larger ones are computed again."""

UNSUPPORTED = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""What models multiply their logits with after the head."""


@dataclass
class Head:
    """The head of a model and what follows it.

    Attributes:
        linear: from hidden states to logits.
        softcap: logits are squashed to (-softcap, softcap); None if not.
    """

    linear: nn.Linear
    softcap: float | None = None

    @property
    def sharded(self) -> bool:
        """Whether its weights are here only while the model is called (ZeRO-3, FSDP)."""
        return hasattr(self.linear.weight, "ds_id") or hasattr(self.linear.weight, "device_mesh")

    def weight_for(self, hidden: Tensor) -> Tensor:
        """The weight in the precision of the product with (N, H) hidden states, which autocast may set."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return self.linear.weight.detach().to(dtype)

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, V) logits, at least float32.

        Args:
            hidden: (N, H) hidden states.
            weight: what `weight_for` gave.
            out: (M, V), M >= N, to write them into if their precision is its own.
        """
        bias: Tensor | None = self.linear.bias
        with torch.autocast(hidden.device.type, enabled=False):
            if out is not None and bias is None and out.dtype == weight.dtype:
                logits = torch.mm(hidden.to(weight.dtype), weight.T, out=out[: len(hidden)])
            else:
                bias = None if bias is None else bias.to(weight.dtype)
                logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias)
                logits = logits.to(torch.promote_types(weight.dtype, torch.float32))
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def chunks(self, hidden: Tensor) -> list[slice]:
        size = chunk_bytes(hidden.device.type)
        rows = max(size // (4 * self.linear.weight.shape[0]), 1)
        return [slice(start, start + rows) for start in range(0, max(hidden.shape[0], 1), rows)]


def chunk_bytes(device: str) -> int:
    """How large a chunk's logits are on a kind of device."""
    return CHUNK_BYTES["cpu" if device == "cpu" else "elsewhere"]


@dataclass
class Kept:
    """The logits of N positions, or what it takes to have them again.

    Attributes:
        values: (N, V) logits; with a `head`, (N, H) hidden states.
        head: of the model that they come from.
    """

    values: Tensor
    head: Head | None = None

    def logits(self, part: slice) -> Tensor:
        if self.head is None:
            return self.values[part]
        with torch.no_grad():
            return self.head.logits(self.values[part], self.head.weight_for(self.values))


def head_of(model: nn.Module) -> Head | None:
    """The head of an unwrapped model, if it is a plain linear layer whose logits are the model's own."""
    linear = head_layer(model)
    # Leave a replaced forward method alone: accelerate moves weights between devices with it.
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return None
    config: Any = model.config
    for part in (config, config.get_text_config()):
        if any(getattr(part, name, None) not in (None, 1.0) for name in UNSUPPORTED):
            return None
    return Head(linear, getattr(config.get_text_config(), "final_logit_softcapping", None))


@contextlib.contextmanager
def replaced_head(model: nn.Module, head: Head, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context in which the head of `model` (unwrapped) computes `forward`, and steps after the head are disabled."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if head.softcap is not None:
        config.final_logit_softcapping = None
    try:
        with replaced_forward(head.linear, forward):
            yield
    finally:
        if head.softcap is not None:
            config.final_logit_softcapping = head.softcap


def measured_by_head(
    head: Head, hidden: Tensor, labels: Tensor, extras: Extras, reference: Kept | None = None
) -> Measured:
    """What `measure` reads off the logits of (N, H) hidden states, with gradient for them and for the head."""
    weight, bias = head.linear.weight, head.linear.bias
    values = _HeadScores.apply(hidden, weight, bias, labels, head, extras, reference)  # type: ignore[no-untyped-call]
    return by_name(values)


class _HeadScores(torch.autograd.Function):
    """Hidden states -> values as `MEASURED`.

    The gradient of log p(y) with respect to a hidden state is W[y] - sum_v p(v) W[v], which is known when the logits
    are; where nothing else asks for a gradient it is computed at once, and the logits are gone before the next chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head,
        extras: Extras, reference: Kept | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        differs = extras.several_gradients or head.softcap is not None
        needed = ctx.needs_input_grad[0] or trained
        at_once = needed and not trained and not differs
        keeps = needed and not at_once and 4 * hidden.shape[0] * weight.shape[0] <= KEPT_BYTES
        parts, directions, stored = [], [], []
        chunks, cast = head.chunks(hidden), head.weight_for(hidden)
        space = _workspace(head, hidden, chunks[0]) if not keeps else (None, None)
        for part in chunks:
            logits = head.logits(hidden[part], cast, space[0])
            softmax = Softmax.of(logits, space[1])
            theirs = None if reference is None else reference.logits(part)
            parts.append(measure(logits, labels[part], extras, theirs, softmax))
            if at_once:
                directions.append(_direction(softmax, labels[part], weight))
            if keeps:
                stored.append(logits)
        measured = joined(parts)
        looked_at = (measured.get(name) for name in LOOKED_AT)
        ctx.save_for_backward(hidden, labels, torch.cat(directions) if at_once else None, *looked_at, *stored)
        ctx.head, ctx.reference, ctx.at_once, ctx.dtype = head, reference, at_once, hidden.dtype
        ctx.divergences = extras.divergences
        ctx.autocast = (
            torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        )
        return detached_where_constant(ctx, measured)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads_by_name = gradients(grads)
        hidden, labels, directions, *others = ctx.saved_tensors
        looked_at, kept = others[: len(LOOKED_AT)], others[len(LOOKED_AT) :]
        if not grads_by_name:
            return (None,) * 7
        if ctx.at_once:
            return ((grads_by_name["logps"].unsqueeze(-1) * directions).to(ctx.dtype), *(None,) * 6)
        head: Head = ctx.head
        weight, bias = head.linear.weight, head.linear.bias
        for_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        exact = torch.promote_types(weight.dtype, torch.float32)  # to add chunks up in
        for_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        for_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        device, cast = hidden.device.type, None
        for number, part in enumerate(head.chunks(hidden)):
            with torch.autocast(device, dtype=ctx.autocast, enabled=ctx.autocast is not None):
                cast = head.weight_for(hidden) if cast is None else cast
                logits = kept[number] if kept else head.logits(hidden[part], cast)
                theirs = None if ctx.reference is None else ctx.reference.logits(part)
            upstream = {name: value[part] for name, value in grads_by_name.items()}
            grad = pull_back(logits, labels[part], part_of(looked_at, part), upstream, theirs, ctx.divergences)
            if head.softcap is not None:
                grad.mul_(1 - (logits / head.softcap) ** 2)
            grad = grad.to(cast.dtype)
            if for_hidden is not None:
                for_hidden[part] = (grad @ cast).to(hidden.dtype)
            if for_weight is not None:
                for_weight += grad.T @ hidden[part].to(grad.dtype)
            if for_bias is not None:
                for_bias += grad.sum(0)
        weight_grad = None if for_weight is None else for_weight.to(weight.dtype)
        return for_hidden, weight_grad, for_bias, None, None, None, None


def _workspace(head: Head, hidden: Tensor, first: slice) -> tuple[Tensor | None, Tensor | None]:
    """Room for the logits of a chunk and their powers: fresh memory for every chunk costs more than the arithmetic."""
    if hidden.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(hidden.device.type):
        return None, None
    shape = (len(hidden[first]), head.linear.weight.shape[0])
    return hidden.new_empty(shape), hidden.new_empty(shape)


def _direction(softmax: Softmax, labels: Tensor, weight: Tensor) -> Tensor:
    """(N, H) gradient of the labels' log-probabilities with respect to the hidden states."""
    with torch.autocast(weight.device.type, enabled=False):
        expected = (softmax.powers.to(weight.dtype) @ weight).to(softmax.total.dtype) / softmax.total
    return weight[labels].to(expected.dtype) - expected
