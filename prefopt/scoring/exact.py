"""Prepares a model for a trial: in evaluation mode and float32, with active adapters, and with few of its layers.

Everything is restored afterwards, bit by bit, also after an error: weights, modes, adapters, random state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.scoring.fingerprint import is_sharded
from prefopt.scoring.model import decoder_layers, replaced_forward, unwrapped

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, adapters on, no gradient; modes, adapters and the random state are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    off: list[Any] = [module for module, _ in modes if vars(module).get("_disable_adapters") is True]
    places = {p.device.index or 0 for p in model.parameters() if p.is_cuda} if torch.cuda.is_available() else ()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(places)):
            for module, _ in modes:
                module.training = False
            for module in off:
                module._disable_adapters = False
            yield
    finally:
        for module in off:
            module._disable_adapters = True
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """Context in which weights that are all zero (a new adapter's) have values, so that they have an effect."""
    before: list[tuple[Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in model.parameters():
            # What is here of a weight that is spread over processes.
            local: Any = getattr(parameter, "ds_tensor", parameter)
            local = (local.to_local() if hasattr(local, "to_local") else local).detach()
            if local.dtype not in FLOATS or local.is_meta or not local.numel():
                continue
            if bool(local[(0,) * local.dim()]) or bool(local.any()):
                continue
            before.append((local, local.clone()))
            local.copy_(torch.randn(local.shape, generator=generator).mul_(0.05))
        yield
    finally:
        for tensor, values in before:
            tensor.copy_(values)


@contextlib.contextmanager
def in_float32(model: nn.Module, skipped: list[nn.Module]) -> Iterator[None]:
    """Context in which everything is computed in float32, and some decoder layers return their input.

    Args:
        model: its weights are float32 in the context, except those of skipped layers.
        skipped: as `like_others` returns it.
    """
    left = {id(tensor) for layer in skipped for tensor in (*layer.parameters(), *layer.buffers())}
    half = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)}
    changed: list[tuple[Tensor, Tensor]] = []
    device = next(model.parameters()).device.type
    with contextlib.ExitStack() as stack:
        # accelerate's own forward methods set autocast.
        for module in dict.fromkeys((model, unwrapped(model))):
            if (forward := vars(module).get("_original_forward")) is not None:
                stack.enter_context(replaced_forward(module, forward))
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_without_tf32())
        if skipped:
            stack.enter_context(_passed(skipped, unwrapped(model)))
        try:
            for key, tensor in half.items():
                if key not in left:
                    changed.append((tensor, tensor.data))
                    tensor.data = tensor.data.float()
            yield
        finally:
            for tensor, data in changed:
                tensor.data = data


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    matmul, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolutions


# ---- layers that need no trial of their own ------------------------------------------------------------------------


def ways_to_call(model: nn.Module) -> list[list[nn.Module] | None]:
    """How a model can be called in a trial, the best first: layers to skip in float32, or None to call it as it is."""
    # Sharded weights cannot be cast, nor can one process leave layers out.
    if is_sharded(model):
        return [None]
    some = like_others(unwrapped(model))
    return [some, [], None] if some else [[], None]


@contextlib.contextmanager
def called_so(model: nn.Module, skipped: list[nn.Module] | None) -> Iterator[None]:
    """Context in which a model is called in one of `ways_to_call`."""
    with in_float32(model, skipped) if skipped is not None else contextlib.nullcontext():
        yield


def like_others(model: nn.Module) -> list[nn.Module]:
    """Decoder layers that can be skipped, as two others of the same kind are tried; none if the kinds are unknown."""
    named_layers = decoder_layers(model)
    if named_layers is None or len(named_layers[1]) <= 2:
        return []
    config: Any = model.config
    layers = list(named_layers[1])
    settings = [
        v for v in config.get_text_config().to_dict().values() if isinstance(v, list) and len(v) == len(layers)
    ]
    met: dict[Any, int] = {}
    skipped = []
    for number, layer in enumerate(layers):
        kind = (_kind(layer), tuple(str(values[number]) for values in settings))
        met[kind] = met.get(kind, 0) + 1
        if met[kind] > 2:
            skipped.append(layer)
    return skipped


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """The structure of a layer: its modules, their plain settings, and the shapes of weights and buffers."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, torch.dtype)) and "idx" not in key and key != "layer_id"
        }
        parts.append((name, type(module), tuple(sorted((k, str(v)) for k, v in plain.items()))))
    parts += [(name, p.shape, p.requires_grad) for name, p in layer.named_parameters()]
    parts += [(name, b.shape, float(b.double().sum())) for name, b in layer.named_buffers() if not b.is_meta]
    return tuple(parts)


@contextlib.contextmanager
def _passed(skipped: list[nn.Module], model: nn.Module) -> Iterator[None]:
    """Context in which layers return their input; their other outputs are those of the layer before them."""
    others: list[tuple[Any, ...] | None] = [None]

    def note(_: nn.Module, inputs: Any, output: Any) -> None:
        others[0] = tuple(output[1:]) if isinstance(output, tuple) else None

    def instead(*arguments: Any, **keywords: Any) -> Any:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        return hidden if others[0] is None else (hidden, *others[0])

    named_layers = decoder_layers(model)
    assert named_layers is not None
    with contextlib.ExitStack() as stack:
        for layer in named_layers[1]:
            if layer in skipped:
                stack.enter_context(replaced_forward(layer, instead))
            else:
                stack.callback(layer.register_forward_hook(note).remove)
        yield
