"""LoRA layers on CPUs with fewer passes over memory: the adapter's output is added inside its own matrix product.

PEFT computes `W x + s * B(A(x))` with the scaled adapter output as a tensor of its own, in the forward pass and again
for the gradient. On a CPU those elementwise passes cost as much as the adapter's products; elsewhere PEFT's own code
runs. It also runs for every other kind of adapter, dropout, quantised or sharded weights, and autocast.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _LoraProduct(torch.autograd.Function):
    """(N, I) x, frozen (O, I) weight and (O,) bias, (R, I) down, (O, R) up, scale -> (N, O)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        low = x @ down.T
        ctx.save_for_backward(x, low, weight, down, up)
        ctx.scale = scale
        return nn.functional.linear(x, weight, bias).addmm_(low, up.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, down, up = ctx.saved_tensors
        low_grad = torch.mm(grad, up).mul_(ctx.scale)
        for_x = torch.mm(grad, weight).addmm_(low_grad, down) if ctx.needs_input_grad[0] else None
        for_up = torch.mm(grad.T, low).mul_(ctx.scale)
        return for_x, None, None, torch.mm(low_grad.T, x), for_up, None


def _forward(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Any:
    base = self.base_layer
    active = [name for name in self.active_adapters if name in self.lora_A]
    if (
        arguments or options or self.disable_adapters or self.merged or len(active) != 1
        or active[0] in self.lora_variant or any(p.requires_grad for p in base.parameters())
        or not torch.is_grad_enabled()
        or torch.is_autocast_enabled(x.device.type)
    ):  # fmt: skip
        return type(self).forward(self, x, *arguments, **options)
    name = active[0]
    down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
    dropped = isinstance(dropout, nn.Dropout) and dropout.p > 0 and self.training
    biased = down.bias is not None or up.bias is not None
    if dropped or biased or not x.dtype == base.weight.dtype == down.weight.dtype:
        return type(self).forward(self, x, *arguments, **options)
    flat = x.reshape(-1, x.shape[-1])
    product: Tensor = _LoraProduct.apply(flat, base.weight, base.bias, down.weight, up.weight, self.scaling[name])  # type: ignore[no-untyped-call]
    return product.reshape(*x.shape[:-1], product.shape[-1])


def fuse_lora(model: nn.Module) -> int:
    """Let the plain LoRA layers of a model that are on a CPU compute in one product; returns how many there are.

    Not for weights sharded over processes (ZeRO-3, FSDP): hooks of the inner modules would not be called.
    """
    plain: list[Any] = [m for m in model.modules() if type(m) is LoraLinear and type(m.base_layer) is nn.Linear]
    # On the meta device a model is only counted, as the CPU would compute it.
    plain = [m for m in plain if m.base_layer.weight.device.type in ("cpu", "meta")]
    # One that has a forward of its own belongs to somebody else: accelerate moves weights between devices so.
    layers = [layer for layer in plain if "forward" not in vars(layer) and "forward" not in vars(layer.base_layer)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)
