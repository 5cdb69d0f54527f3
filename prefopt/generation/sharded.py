"""Whole weights on every process for as long as samples are drawn, where training has sharded them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from prefopt.safety.errors import UsageError
from prefopt.scoring.fingerprint import is_sharded


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gather the weights once, and let the processes run the model independently of one another.

    All processes must enter and leave this together; in it, no forward pass waits for another process. It needs
    memory for the whole model on each device. A model that is not sharded is left as it is.

    Args:
        model: taken out of DDP and DeepSpeed wrappers; sharded by DeepSpeed ZeRO-3 or by FSDP2, or not at all.

    Raises:
        UsageError: for weights that are sharded in another way (FSDP1, tensor parallelism).
    """
    if not is_sharded(model):
        yield
        return
    with contextlib.ExitStack() as stack:
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            import deepspeed  # type: ignore[import-untyped, import-not-found, unused-ignore]

            stack.enter_context(deepspeed.zero.GatheredParameters(list(model.parameters())))
        elif any(isinstance(module, FSDPModule) for module in model.modules()):
            stack.enter_context(_unsharded(model))
        else:
            raise UsageError(
                "the model's weights are sharded by neither DeepSpeed ZeRO-3 nor FSDP2, so they are not gathered for "
                "sampling: save the model, and sample from the saved folder"
            )
        # These gather and release weights around every layer, all processes at the same time.
        stack.enter_context(_without_hooks(model))
        yield


@contextlib.contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    modules: list[Any] = list(model.modules())
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module in modules:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after
