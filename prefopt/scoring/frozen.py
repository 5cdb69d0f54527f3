"""Layers that policy and reference have in common, computed once for both.

Where adapters or trained weights are in the upper layers only, everything below them gives the policy what it gave the
reference. The hidden states that enter the first trained layer are kept from the first call and put in its place in
the second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from prefopt.scoring.model import replaced_forward, unwrapped

BEHIND = ("norm", "ln_f", "final_layer")
"""What modules that follow the last layer are called."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and list of an unwrapped model's decoder layers."""
    config: Any = getattr(model, "config", None)
    count = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return found[0] if len(found) == 1 else None


def frozen_depth(model: nn.Module) -> int:
    """How many of the first layers are the same under policy and reference: 0 if anything before them trains.

    Args:
        model: the policy, wrapped or not, with its adapters on.
    """
    inner: Any = unwrapped(model)
    layers = decoder_layers(inner)
    inside = set(inner.parameters())
    # Trained parameters of the wrapping are tokens or keys of prompt learning, which every layer sees.
    outside = any(p.requires_grad and p not in inside for p in model.parameters())
    # Hooks in the layers' own forward methods move what goes from device to device.
    spread = len(getattr(inner, "hf_device_map", None) or {}) > 1
    if layers is None or outside or spread or _drops(inner):
        return 0
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    behind_head = set() if head is None else set(head.parameters())
    if hasattr(inner, "get_input_embeddings"):
        behind_head -= set(inner.get_input_embeddings().parameters())
    touched = {name for name, p in inner.named_parameters() if p.requires_grad and p not in behind_head}
    touched |= {f"{name}.adapter" for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}
    depth = len(layers[1])
    for name in touched:
        rest = name.removeprefix(f"{layers[0]}.")
        if rest != name:
            depth = min(depth, int(rest.split(".")[0]))
        elif not any(part in name.rsplit(".", 2)[-2] for part in BEHIND):
            return 0
    return depth


def _drops(model: nn.Module) -> bool:
    """Whether dropout may be on, so that two passes differ."""
    config: Any = model.config
    rates = {
        name: value
        for name, value in config.get_text_config().to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and not name.startswith(("classifier", "summary"))
    }
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return modules or any(isinstance(rate, float) and rate > 0 for rate in rates.values())


def same_below(policy: nn.Module, reference: nn.Module, depth: int) -> bool:
    """Whether the first `depth` layers of two models, and what comes before them, have equal weights.

    Args:
        policy, reference: wrapped or not; of one architecture.
        depth: as `frozen_depth` found it for the policy.
    """
    mine, theirs = unwrapped(policy), unwrapped(reference)
    layers = decoder_layers(mine)
    if layers is None or not depth:
        return False
    others = dict(theirs.named_parameters())

    def shared(name: str) -> bool:
        rest = name.removeprefix(f"{layers[0]}.")
        return rest == name or int(rest.split(".")[0]) < depth

    pairs = [(p, others.get(name)) for name, p in mine.named_parameters() if shared(name) and not p.requires_grad]
    return all(other is not None and torch.equal(p, other) for p, other in pairs)


class FrozenLayers:
    """Keeps what the shared layers gave in a call without a gradient, for the next call with the same tokens.

    Whoever owns it clears it when a batch is done, and keeps it away from models that do not share the layers.

    Args:
        depth: how many of the first layers are shared.
    """

    def __init__(self, depth: int):
        self.depth = depth
        self.reused = 0
        self._kept: dict[bytes, Any] = {}

    def clear(self) -> None:
        """Forget everything: a new batch begins."""
        self._kept = {}

    @contextlib.contextmanager
    def around(self, model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[None]:
        """A call of an unwrapped model in here keeps its hidden states, or takes those that are kept."""
        found = decoder_layers(model)
        ids = arguments.get("input_ids")
        if found is None or not isinstance(ids, Tensor):
            yield
            return
        positions = arguments.get("position_ids")
        parts = [part.cpu().numpy().tobytes() for part in (ids, positions) if isinstance(part, Tensor)]
        key = b"|".join([str(tuple(ids.shape)).encode(), *parts])
        layers = list(found[1])[: self.depth]
        if any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
            yield  # unfrozen since the depth was found out
            return
        if key in self._kept:
            self.reused += 1
            with self._passing_on(self._kept[key], layers):
                yield
            return
        if torch.is_grad_enabled():
            yield
            return

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._kept[key] = output

        handle = layers[-1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @staticmethod
    @contextlib.contextmanager
    def _passing_on(kept: Any, layers: list[nn.Module]) -> Iterator[None]:
        """In here layers give what the last of them gave, whatever they get."""
        hidden, *others = kept if isinstance(kept, tuple) else (kept,)
        # With reentrant checkpointing a layer without an input that wants a gradient would get none.
        hidden = hidden.detach().requires_grad_(torch.is_grad_enabled())
        given = (hidden, *others) if isinstance(kept, tuple) else hidden
        with contextlib.ExitStack() as stack:
            for layer in layers:
                stack.enter_context(replaced_forward(layer, lambda *_, **__: given))
            yield
