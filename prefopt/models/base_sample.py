"""A few numbers of the model that an adapter was trained on, saved beside the adapter.

An adapter names its base in its configuration, which cannot tell whether the weights in memory were that model's: one
that was merged with another adapter and not saved has the same name. `prefopt merge` compares the numbers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = "base_sample.json"
_NUMBERS, _WEIGHTS = 8, 400


def sample(model: nn.Module) -> dict[str, Any]:
    """Up to eight numbers of each frozen matrix, by name, with their precision.

    Args:
        model: with an adapter on it; its weights must be whole on this process.
    """
    entries = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or parameter.dim() < 2 or not parameter.is_floating_point() or _of_adapter(name):
            continue
        numbers = _some(parameter).float().tolist()
        dtype = str(parameter.dtype).removeprefix("torch.")
        entries[_plain(name)] = {"size": parameter.numel(), "dtype": dtype, "numbers": numbers}
    names = sorted(entries)
    return {name: entries[name] for name in names[:: max(len(names) // _WEIGHTS, 1)]}


def write(folder: Path, numbers: dict[str, Any]) -> None:
    (folder / FILE).write_text(json.dumps(numbers), encoding="utf-8")


def differing(folder: Path, model: nn.Module) -> list[str]:
    """The weights of a model under an adapter that are not those that the adapter was trained on.

    Args:
        folder: of the adapter; without a sample in it nothing is known, and nothing differs.
        model: the model with the adapter on it.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))
    differ = []
    for name, parameter in model.named_parameters():
        entry = entries.get(_plain(name)) if parameter.is_floating_point() and not _of_adapter(name) else None
        if entry is None or entry["size"] != parameter.numel():
            continue  # embeddings that were resized, which PEFT saves with the adapter
        then, now = torch.tensor(entry["numbers"]), _some(parameter).cpu()
        # Compared in the coarser of the two precisions.
        coarse = min(getattr(torch, entry["dtype"]), now.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        if not torch.equal(then.to(coarse), now.to(coarse)):
            differ.append(_plain(name))
    return differ


def _some(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(len(flat) // _NUMBERS, 1) | 1][:_NUMBERS]


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _of_adapter(name: str) -> bool:
    return any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens"))


def digest(model: nn.Module) -> str:
    """16 hex digits by which two runs tell whether they started from one model; "" where weights are sharded.

    Of a few numbers of each matrix outside of adapters, in bfloat16: the same weights in another precision are the
    same model.
    """
    found = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted((_plain(name), parameter) for name, parameter in model.named_parameters()):
        if parameter.dim() < 2 or not parameter.is_floating_point() or _of_adapter(name):
            continue
        if not parameter.numel() or hasattr(parameter, "to_local"):
            return ""
        numbers = _some(parameter).to("cpu", torch.bfloat16).float().tolist()
        found.update(f"{name} {parameter.numel()} {numbers}".encode())
    return found.hexdigest()
