"""Adapters while a trainer is set up: their names, initialisations that change the base, and adapters on the head.

TRL expects an adapter named "default". It keeps a frozen copy of a loaded adapter as "ref", and disables a new adapter
to compute the reference. This file handles the cases that TRL does not.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import trl.trainer.dpo_trainer as of_trl
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import Tensor, nn

from prefopt.models import base_sample
from prefopt.safety.errors import UsageError
from prefopt.scoring.fingerprint import is_sharded

CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Prefixes of `init_lora_weights` values that move a part of the base's weights into the adapter."""
_LOOKED_AT = 64
"""How many elements of each base weight are compared."""


def sample_of_base(model: Any) -> dict[str, Any]:
    """A few elements of the base weights of an adapter, to be saved beside it; {} if there is nothing to compare."""
    # The part moved out of the base on loading differs in its last digits between machines.
    if not isinstance(model, PeftModel) or any(map(changes_base, model.peft_config.values())) or is_sharded(model):
        return {}
    return base_sample.sample(model)


def learns_prompts(model: Any) -> bool:
    """Whether an adapter adds its own tokens before every row, so that its policy never starts as the reference."""
    configs = getattr(model, "peft_config", {}).values() if is_peft_model(model) else ()
    return any(config.is_prompt_learning for config in configs)


def check_adapters(model: Any, peft_config: Any, own_reference: bool) -> None:
    """Refuse adapters that TRL would not find, or that could not be loaded again.

    Args:
        model: as it is passed to the trainer.
        peft_config: of a new adapter, or None.
        own_reference: whether no reference is passed in.

    Raises:
        ValueError: saying how the adapter is to be loaded.
    """
    configs = dict(model.peft_config) if isinstance(model, PeftModel) else {}
    for config in (peft_config, *configs.values()):
        if "_niter_" in str(init := getattr(config, "init_lora_weights", "")):
            raise UsageError(
                f"init_lora_weights={init!r} moves a random part of the base into the adapter. Loading the adapter "
                "draws another part, which gives a different model: use 'pissa'"
            )
    if not configs or not own_reference or peft_config is not None:
        return
    how = (
        "Load the adapter to train without adapter_name: PeftModel.from_pretrained(base, folder, is_trainable=True). "
        "The reference is then a frozen copy of it; to compare with another adapter instead, pass "
        "ref_model=PeftModel.from_pretrained(another_base, its_folder).merge_and_unload()"
    )
    names = ", ".join(map(repr, configs))
    if "default" not in configs:
        raise UsageError(f"the model has the adapters {names}, but the one to train must be called 'default'. {how}")
    if "ref" in configs:
        raise UsageError(
            f"the model has the adapters {names}, but 'ref' is the name of the reference, a frozen copy of 'default': "
            f"call model.delete_adapter('ref'). {how}"
        )
    if (active := model.active_adapters) != ["default"]:
        named = f"adapter is {active[0]!r}" if len(active) == 1 else f"adapters are {', '.join(map(repr, active))}"
        raise UsageError(
            f"the active {named}, but the one to train must be 'default', of which the reference is a copy: call "
            f"model.set_adapter('default'). {how}"
        )
    if any(getattr(layer, "merged", False) is True for layer in model.modules()):
        raise UsageError(
            "the adapter is merged into the base's weights (merge_adapter), where it is not trained: call "
            "model.unmerge_adapter()"
        )


@contextlib.contextmanager
def set_up(model: Any, own_reference: bool) -> Iterator[None]:
    """Context for TRL's constructor: adapters on the head are allowed, and the base stays unchanged.

    TRL refuses an adapter on the head because it computes log-probabilities from the head's weight. We call the head
    if it is not a plain layer. And a copy of an adapter must not be initialised like the first: PiSSA and similar
    methods would move another part out of the base.

    Raises:
        ValueError: if the base of a loaded adapter was changed anyway.
    """
    continued = isinstance(model, PeftModel) and own_reference
    configs = {name: c for name, c in model.peft_config.items() if changes_base(c)} if continued else {}
    inits = {name: config.init_lora_weights for name, config in configs.items()}
    before = _sample(model) if continued else {}
    has_check = hasattr(of_trl, "BaseTunerLayer")
    check = getattr(of_trl, "BaseTunerLayer", None)
    try:
        for config in configs.values():
            config.init_lora_weights = True
        if has_check:
            of_trl.BaseTunerLayer = _NoLayer
        yield
    finally:
        if has_check:
            of_trl.BaseTunerLayer = check
        if configs and model.peft_config.get("ref") is model.peft_config["default"]:
            model.peft_config["ref"] = copy.copy(model.peft_config["default"])
        for name, init in inits.items():
            model.peft_config[name].init_lora_weights = init
    for name, numbers in _sample(model).items() if continued else ():
        if name in before and not torch.equal(before[name], numbers):
            raise UsageError(
                f"the base's weights changed while the trainer was set up ({name}), so neither policy nor reference "
                "would be the model that was passed in: pass a separate model as ref_model=..., or save the adapter "
                "with path_initial_model_for_weight_conversion and load that"
            )


class _NoLayer:
    """Replaces the class in TRL's check of the head; no layer is an instance of it."""


def changes_base(config: Any) -> bool:
    """Whether a new adapter of this configuration changes the weights that it is put on."""
    return moves_weights(getattr(config, "init_lora_weights", ""))


def moves_weights(init: Any) -> bool:
    """Whether this `init_lora_weights` moves a part of the base's weights into the adapter."""
    return str(init).lower().startswith(CHANGES_BASE)


def keep_first_adapter(model: Any, precomputes: bool) -> None:
    """Keep a copy of a new adapter as "ref", if disabling the adapter would not give the initial model.

    Args:
        model: the trainer's, taken out of wrappers.
        precomputes: whether the reference's log-probabilities were precomputed with the adapter disabled.

    Raises:
        ValueError: if they were.
    """
    if precomputes:
        raise UsageError(
            "precompute_ref_log_probs=True computes the reference with the adapter disabled, which is not the "
            "initial model with an init_lora_weights that changes the base: set it to False, or pass ref_model=..."
        )
    name = model.active_adapter
    config = copy.copy(model.peft_config[name])
    config.init_lora_weights = True
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    model.add_adapter("ref", config)
    model.set_adapter(name)
    with torch.no_grad():
        for of_name, parameter in model.named_parameters():
            if f".{name}." in of_name:
                model.get_parameter(of_name.replace(f".{name}.", ".ref.")).copy_(parameter)
            parameter.requires_grad_(id(parameter) in wanted)


def _sample(model: nn.Module) -> dict[str, Tensor]:
    """A few elements of every frozen weight."""
    return {
        name: parameter.detach().reshape(-1)[:: max(parameter.numel() // _LOOKED_AT, 1) | 1].clone()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
