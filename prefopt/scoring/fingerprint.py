"""A digest of a reference's weights and settings, under which its cached log-probabilities are stored.

It is the same however the weights are spread over processes, so what one process computed serves a sharded run of the
same model. Imports torch, and DeepSpeed only where a weight is DeepSpeed's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.safety.errors import UsageError

_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_version", "revision",
    "task_type",
}  # fmt: skip
"""Settings of a trained adapter that its output does not depend on."""
_NOT_OF_THE_NETWORK = {
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "bos_token_id", "dtype", "eos_token_id",
    "id2label", "label2id", "pad_token_id", "quantization_config", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Settings of a model that say what it is called, or what stands elsewhere in the digest."""


def fingerprint(model: nn.Module, trained_adapter: str | None = None, about: str = "") -> str:
    """A digest of a reference's weights and of the settings they are used with, 16 hex digits.

    Where weights are sharded (DeepSpeed ZeRO-3, FSDP2, tensor parallelism), every process must call this at the same
    point; each weight is gathered by itself, so no more than one is whole at a time.

    Args:
        model: taken out of DDP and DeepSpeed wrappers.
        trained_adapter: the adapter that is disabled for the reference; it is not part of the digest.
        about: what else the numbers depend on, such as the precision that the reference is run in.

    Raises:
        ValueError: if weights cannot be told apart (FSDP1) or are on no process (meta tensors).
    """
    _refuse_flat(model)
    digest = hashlib.blake2b(about.encode(), digest_size=8)
    # The same weights with another rotary base, window or soft cap are another reference.
    if (config := getattr(model, "config", None)) is not None:
        digest.update(json.dumps(of_the_network(config), sort_keys=True, default=str).encode())
    for adapter, config in sorted(getattr(model, "peft_config", {}).items()):
        # The same adapter weights at another lora_alpha are another reference.
        if adapter != trained_adapter:
            digest.update(f"{adapter} {_settings(config)}".encode())
    # Parameters as they are, not detached: only these say that they are sharded.
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(value, Tensor) or (trained_adapter is not None and f".{trained_adapter}." in f"{name}."):
            continue
        # The same weights inside and outside an adapter's wrapping.
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        with _whole(value) as whole:
            if whole.is_meta:
                raise UsageError(
                    f"{name} is on the meta device, so the reference has no fingerprint: load the model without "
                    "offloading, or set reference_cache='off'"
                )
            digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
            # bfloat16 has no numpy counterpart; its bytes do.
            data = whole.cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(data)  # type: ignore[arg-type]
    return digest.hexdigest()


def of_the_network(config: Any) -> Any:
    """The settings of a model that its output depends on, those of its parts included."""
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, dict):
        return values
    settings = {name: value for name, value in values.items() if name not in _NOT_OF_THE_NETWORK}
    return {name: of_the_network(value) for name, value in settings.items()}


def is_sharded(model: nn.Module) -> bool:
    """Whether a weight is sharded over several processes, so that only all of them together can read it."""
    return any(
        _is_zero3(parameter) or hasattr(parameter, "full_tensor") or _is_flat(name, parameter)
        for name, parameter in model.named_parameters()
    )


def _is_zero3(value: Tensor) -> bool:
    return hasattr(value, "ds_id") and hasattr(value, "ds_status")


def _is_flat(name: str, value: Tensor) -> bool:
    """Whether FSDP1 holds a weight, with or without `use_orig_params`."""
    return "_fsdp_wrapped_module" in name or "_flat_param" in name or hasattr(value, "_fsdp_flattened")


@contextmanager
def _whole(value: Tensor) -> Iterator[Tensor]:
    """Context in which a weight is whole."""
    if _is_zero3(value):
        import deepspeed  # type: ignore[import-untyped, import-not-found, unused-ignore]

        with deepspeed.zero.GatheredParameters([value]):
            yield value.detach()
    elif hasattr(value, "full_tensor"):
        # A shard that is kept on the CPU is gathered where its process group works.
        yield value.detach().to(value.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    else:
        yield value.detach()


def _refuse_flat(model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if _is_flat(name, value):
            raise UsageError(
                f"the reference is sharded by FSDP1, which joins weights into flat pieces ({name}) that have no "
                "fingerprint: use FSDP2 (fsdp_version: 2 in fsdp_config) or DeepSpeed ZeRO-3, or set "
                "reference_cache='off'"
            )


def _settings(config: Any) -> str:
    values = {name: value for name, value in config.to_dict().items() if name not in _WITHOUT_EFFECT}
    return json.dumps(values, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
