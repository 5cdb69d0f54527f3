"""One call of a model, and what is read off it: the head on scored tokens only, or the whole logits.

Both layouts call models through here, so what saves work below them (a chunked head, frozen layers that are computed
once for policy and reference) serves both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefopt.scoring.frozen import FrozenLayers
from prefopt.scoring.head import Head, Kept, head_of, measured_by_head, replaced_head
from prefopt.scoring.logprobs import DIFFERENTIABLE, MEASURED, Extras, Measured, scores_of_logits
from prefopt.scoring.model import unwrapped


@dataclass
class Request:
    """What is to be read off a call.

    Attributes:
        labels: (B, K) the token that each of the last K positions predicts.
        mask: (B, K) bool, which of them are scored: M in all.
        extras: what to compute besides log-probabilities.
        reference: what a call of the reference with the same positions kept, for extras that compare the two.
        keep: keep what it takes to have the logits again, in `kept`.
    """

    labels: Tensor
    mask: Tensor
    extras: Extras
    reference: Kept | None = None
    keep: bool = False
    kept: Kept | None = field(default=None, repr=False)


@dataclass
class Call:
    """How models are called.

    Attributes:
        chunked_head: compute the head on scored tokens, a chunk at a time, where the model's head is a plain layer.
        frozen: layers that policy and reference share, to be computed once; None where there are none.
        recompute: keep nothing for the backward pass but what was read off, and make the call again in it.
    """

    chunked_head: bool = True
    frozen: FrozenLayers | None = None
    recompute: bool = False

    def __call__(
        self, model: nn.Module, arguments: Mapping[str, Any], request: Request, *, whole_logits: bool = False
    ) -> tuple[Measured, Any]:
        """The values of the M scored positions, and the model's output.

        Args:
            model: wrapped or not.
            arguments: its keyword arguments.
            request: what to read off.
            whole_logits: the output must hold the logits.
        """
        if self.recompute and torch.is_grad_enabled():
            return self._twice(model, arguments, request)
        return self._once(model, arguments, request, whole_logits)

    def _twice(self, model: nn.Module, arguments: Mapping[str, Any], request: Request) -> tuple[Measured, Any]:
        def values() -> tuple[Tensor | None, ...]:
            measured, _ = self._once(model, arguments, request, False)
            return tuple(getattr(measured, name) for name in MEASURED)

        return Measured(*checkpoint(values, use_reentrant=False)), None

    def _once(
        self, model: nn.Module, arguments: Mapping[str, Any], request: Request, whole_logits: bool
    ) -> tuple[Measured, Any]:
        inner = unwrapped(model)
        head = head_of(inner) if self.chunked_head and not whole_logits else None
        # Kept hidden states need weights that are there when the policy is scored.
        if request.keep and head is not None and head.sharded:
            head = None
        shared = contextlib.nullcontext() if self.frozen is None else self.frozen.around(inner, arguments)
        with shared:
            if head is None:
                outputs = model(**arguments)
                return _off_logits(outputs.logits[:, -request.mask.shape[1] :], request), outputs
            return self._by_head(model, inner, head, arguments, request)

    @staticmethod
    def _by_head(
        model: nn.Module, inner: nn.Module, head: Head, arguments: Mapping[str, Any], request: Request
    ) -> tuple[Measured, Any]:
        made: list[Measured] = []

        def instead(hidden: Tensor) -> Tensor:
            # A model without `logits_to_keep` hands over every position; the last ones are meant.
            hidden = hidden[:, hidden.shape[1] - request.mask.shape[1] :]
            flat = hidden.reshape(-1, hidden.shape[-1]) if bool(request.mask.all()) else hidden[request.mask]
            measured = measured_by_head(head, flat, request.labels[request.mask], request.extras, request.reference)
            made.append(measured)
            if request.keep:
                request.kept = Kept(flat.detach(), head)
            values = [getattr(measured, name) for name in DIFFERENTIABLE]
            columns = [v if v.dim() == 2 else v.unsqueeze(-1) for v in values if v is not None]
            return torch.cat(columns, dim=-1).unsqueeze(0)

        with replaced_head(inner, head, instead):
            outputs = model(**arguments)
        # Wrappers follow a model's outputs to know when its backward pass begins, so the gradient goes through them.
        # Their values, which a wrapper may have cast to its own precision, come from where they were made.
        (measured,) = made
        carried = outputs.logits.squeeze(0)
        values: dict[str, Tensor] = {}
        start = 0
        for name in DIFFERENTIABLE:
            value = getattr(measured, name)
            if value is None:
                continue
            width = value.shape[1] if value.dim() == 2 else 1
            column = carried[:, start : start + width].reshape(value.shape)
            if column.dtype == value.dtype:
                values[name] = column
            else:
                values[name] = value.detach() + (column - column.detach()).to(value.dtype)
            start += width
        return replace(measured, **values), outputs


def _off_logits(logits: Tensor, request: Request) -> Measured:
    reference = None
    if request.extras.full_reference and request.reference is not None:
        reference = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        reference[request.mask] = request.reference.logits(slice(None)).float()
    if request.keep:
        request.kept = Kept(logits.detach()[request.mask])
    return scores_of_logits(logits, request.labels, request.mask, request.extras, reference)
