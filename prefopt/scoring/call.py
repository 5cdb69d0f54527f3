"""One call of a model, and the values computed from it: the head on scored tokens only, or the whole logits.

Both layouts call models through here, so both use the chunked head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefopt.safety.errors import UsageError
from prefopt.scoring.head import Head, Kept, head_of, measured_by_head, replaced_head
from prefopt.scoring.logprobs import scores_of_logits
from prefopt.scoring.measure import DIFFERENTIABLE, MEASURED, Extras, Measured, by_name
from prefopt.scoring.model import decoder_layers, head_layer, unwrapped


@dataclass(frozen=True)
class Pool:
    """Which of B * K positions, row after row, are averaged into each of S vectors.

    Attributes:
        places: (P,) positions; one may be in several vectors.
        vectors: (P,) the vector that each goes into.
        count: S.
    """

    places: Tensor
    vectors: Tensor
    count: int

    def mean(self, hidden: Tensor) -> Tensor:
        """(S, H) means of (B, K, H) hidden states, at least float32; zero for a vector without positions."""
        picked = hidden.reshape(-1, hidden.shape[-1])[self.places]
        picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
        sums = picked.new_zeros(self.count, picked.shape[-1]).index_add(0, self.vectors, picked)
        return sums / self.vectors.bincount(minlength=self.count).clamp(min=1).to(sums.dtype).unsqueeze(-1)


@dataclass
class Request:
    """The values to compute from a call.

    Attributes:
        labels: (B, K) the token that each of the last K positions predicts.
        mask: (B, K) bool, which of them are scored: M in all.
        places: (M,) the same as numbers, row after row, which are known without asking the device.
        extras: what to compute besides log-probabilities.
        reference: what a call of the reference with the same positions kept, for extras that compare the two.
        keep: keep what it takes to have the logits again, in `kept`.
        pool: of which positions to average the hidden states, into `pooled`.
    """

    labels: Tensor
    mask: Tensor
    places: Tensor
    extras: Extras
    reference: Kept | None = None
    keep: bool = False
    kept: Kept | None = field(default=None, repr=False)
    pool: Pool | None = None
    pooled: Tensor | None = field(default=None, repr=False)


@dataclass
class Call:
    """How models are called.

    Attributes:
        chunked_head: compute the head on scored tokens, a chunk at a time, where the model's head is a plain layer.
        recompute: keep only the computed values for the backward pass, and repeat the call in it.
    """

    chunked_head: bool = True
    recompute: bool = False

    def __call__(
        self, model: nn.Module, arguments: Mapping[str, Any], request: Request, *, whole_logits: bool = False
    ) -> tuple[Measured, Any]:
        """The values of the M scored positions, and the model's output.

        Args:
            model: wrapped or not.
            arguments: its keyword arguments.
            request: the values to compute.
            whole_logits: the output must hold the logits.
        """
        if self.recompute and torch.is_grad_enabled():
            return self._twice(model, arguments, request)
        inner = unwrapped(model)
        head = head_of(inner) if self.chunked_head and not whole_logits else None
        # Kept hidden states need weights that are there when the policy is scored.
        if request.keep and head is not None and head.sharded:
            head = None
        with _layers_watched(inner, arguments, request) as states:
            if head is not None:
                return self._by_head(model, inner, head, arguments, request, states)
            outputs = _pooling(model, inner, arguments, request)
            measured = _off_logits(outputs.logits[:, -request.mask.shape[1] :], request)
            if states:
                # Wrappers wait for a gradient of every parameter, those of later layers too: it is zero.
                rest = measured["logps"].nan_to_num(0.0, 0.0, 0.0).sum() * 0
                measured["states"] = _stacked(states, request) + rest
            return measured, outputs

    def _twice(self, model: nn.Module, arguments: Mapping[str, Any], request: Request) -> tuple[Measured, Any]:
        once = replace(self, recompute=False)

        def values() -> tuple[Tensor | None, ...]:
            measured, _ = once(model, arguments, request)
            return (*(measured.get(name) for name in MEASURED), measured.get("states"), request.pooled)

        *measured, states, request.pooled = checkpoint(values, use_reentrant=False)
        return by_name(measured) | ({} if states is None else {"states": states}), None

    @staticmethod
    def _by_head(
        model: nn.Module,
        inner: nn.Module,
        head: Head,
        arguments: Mapping[str, Any],
        request: Request,
        states: dict[int, Tensor],
    ) -> tuple[Measured, Any]:
        measured: Measured = {}
        through: dict[str, Tensor] = {}

        def instead(hidden: Tensor) -> Tensor:
            # A model without `logits_to_keep` returns every position; only the last ones are needed.
            hidden = hidden[:, hidden.shape[1] - request.mask.shape[1] :]
            flat, places = hidden.reshape(-1, hidden.shape[-1]), request.places
            flat = flat if len(flat) == len(places) else flat[places]
            labels = request.labels.flatten()[places]
            measured.update(measured_by_head(head, flat, labels, request.extras, request.reference))
            if request.keep:
                request.kept = Kept(flat.detach(), head)
            through.update({name: measured[name] for name in DIFFERENTIABLE if name in measured})
            if request.extras.layers:
                through["states"] = _stacked(states, request)
            if request.pool is not None:
                through["pooled"] = request.pool.mean(hidden)
            return torch.cat([value.reshape(1, 1, -1) for value in through.values()], dim=-1)

        with replaced_head(inner, head, instead):
            outputs = model(**arguments)
        # Wrappers follow a model's outputs to know when its backward pass begins, so the gradient goes through them.
        # Their values, which a wrapper may have cast to its own precision, come from where they were made.
        sizes = [value.numel() for value in through.values()]
        for (name, value), carried in zip(through.items(), outputs.logits.flatten().split(sizes), strict=True):
            carried = carried.reshape(value.shape)
            if carried.dtype != value.dtype:
                carried = value.detach() + (carried - carried.detach()).to(value.dtype)
            through[name] = carried
        request.pooled = through.pop("pooled", None)
        return {**measured, **through}, outputs


def _pooling(model: nn.Module, inner: nn.Module, arguments: Mapping[str, Any], request: Request) -> Any:
    """The model's output; what its own head is given is averaged on the way, where the request asks for that."""
    if request.pool is None:
        return model(**arguments)
    pool = request.pool
    head = head_layer(inner)
    if head is None:
        raise UsageError(
            f"{type(inner).__name__} does not say which layer its head is, so its hidden states are unknown"
        )

    seen: list[Tensor] = []

    def look(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(pool.mean(given[0][:, given[0].shape[1] - request.mask.shape[1] :]))

    handle = head.register_forward_pre_hook(look)
    try:
        outputs = model(**arguments)
    finally:
        handle.remove()
    if not seen:
        raise UsageError(
            f"{type(inner).__name__} did not call its head as a module, so its hidden states were not seen; if it is "
            "compiled (torch_compile), train it without that"
        )
    request.pooled = seen[-1]
    return outputs


@contextlib.contextmanager
def _layers_watched(inner: nn.Module, arguments: Mapping[str, Any], request: Request) -> Iterator[dict[int, Tensor]]:
    """Context in which a call of the model fills in the states after the layers that the request asks for.

    Yields:
        (M, H) hidden states of the scored positions, by the layer's number.
    """
    states: dict[int, Tensor] = {}
    if not request.extras.layers:
        yield states
        return
    named = decoder_layers(inner)
    if named is None:
        raise UsageError(f"the layers of {type(inner).__name__} are not known, so it has no states after one of them")
    name, layers = named
    keep = arguments.get("logits_to_keep")

    def watch(number: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden[:, keep] if isinstance(keep, Tensor) else hidden
            hidden = hidden[:, hidden.shape[1] - request.mask.shape[1] :]
            states[number] = hidden.reshape(-1, hidden.shape[-1])[request.places]

        return hook

    with contextlib.ExitStack() as handles:
        for number in request.extras.layers:
            if number >= len(layers):
                raise UsageError(f"layer {number} is asked for, but {name} has {len(layers)}, numbered from 0")
            handles.callback(layers[number].register_forward_hook(watch(number)).remove)
        yield states


def _stacked(states: Mapping[int, Tensor], request: Request) -> Tensor:
    """(M, L, H) states in the order that the request asks for them."""
    if missing := [number for number in request.extras.layers if number not in states]:
        raise UsageError(
            f"the states after layer {missing[0]} were not seen in the call; if the model is compiled "
            "(torch_compile), train it without that"
        )
    return torch.stack([states[number] for number in request.extras.layers], dim=1)


def _off_logits(logits: Tensor, request: Request) -> Measured:
    reference = None
    if request.extras.full_reference and request.reference is not None:
        reference = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        reference[request.mask] = request.reference.logits(slice(None)).float()
    if request.keep:
        request.kept = Kept(logits.detach()[request.mask])
    return scores_of_logits(logits, request.labels, request.mask, request.extras, reference)
