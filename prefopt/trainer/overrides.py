"""Checks of methods that a subclass overrides around `LossMixin`, and of the trainers that the mixin works on.

Inspects classes only; nothing here runs a trainer.
"""

from __future__ import annotations

import logging
from typing import Any

from trl import DPOTrainer

from prefopt.losses import ConflictFree, Loss
from prefopt.safety.errors import UsageError

logger = logging.getLogger(__name__)

REPLACED = {
    "_compute_loss": "LossMixin computes the loss in its place. Override compute_loss and call super().compute_loss",
    "_prepare_dataset": "LossMixin prepares the data in its place. Prepare them before they are passed in",
    "compute_ref_log_probs": "LossMixin scores the reference in its place. Pass ref_model=... to change it",
}
"""Methods that LossMixin replaces, and what to do instead; all others call the next class's method."""
OF_OLD_TRL = (
    "concatenated_forward", "concatenated_inputs", "dpo_loss", "get_batch_logps", "get_batch_loss_metrics",
    "get_sequence_logps", "kto_loss", "tokenize_row",
)  # fmt: skip
"""Methods of earlier trainers that people override; reported if the installed TRL lacks them."""


def check_order(cls: type, mixin: type) -> None:
    """Refuse a class in which the mixin comes after the trainer that it should change.

    Raises:
        TypeError: naming the order that works.
    """
    mro = cls.__mro__
    if DPOTrainer in mro and mro.index(DPOTrainer) < mro.index(mixin):
        bases = [base.__name__ for base in sorted(cls.__bases__, key=lambda base: base is not mixin)]
        raise TypeError(
            f"{mixin.__name__} comes after the trainer in {cls.__name__} and would change nothing: write "
            f"class {cls.__name__}({', '.join(bases)})"
        )


def check(cls: type, mixin: type) -> list[type]:
    """Find methods overridden around the mixin, and warn about those that are never called.

    Returns:
        The classes between the mixin and TRL's trainer that override `compute_loss`, which are called.

    Raises:
        TypeError: for a trainer that is not a `trl.DPOTrainer`.
    """
    if not issubclass(cls, DPOTrainer):
        trainers = [
            c.__name__ for c in cls.__mro__ if c.__name__.endswith("Trainer") and not c.__name__.startswith("_")
        ]
        below = next((name for name in trainers if name != cls.__name__), "object")
        raise TypeError(
            f"{cls.__name__} puts {mixin.__name__} on {below}; it works only on trl.DPOTrainer and its subclasses. "
            f"Write class {cls.__name__}({mixin.__name__}, DPOTrainer) and choose the objective with loss=..., such "
            "as 'kto', 'cpo', 'orpo' or 'sft'"
        )
    mro = cls.__mro__
    below_mixin = [c for c in mro[mro.index(mixin) : mro.index(DPOTrainer)] if not issubclass(mixin, c)]
    for owner in below_mixin:
        for name in REPLACED.keys() & vars(owner).keys():
            logger.warning("%s.%s is never called: %s", owner.__name__, name, REPLACED[name])
    for owner in own_classes(cls, mixin):
        for name in OF_OLD_TRL:
            if name in vars(owner) and not hasattr(DPOTrainer, name) and not hasattr(mixin, name):
                logger.warning(
                    "%s.%s is never called: the installed TRL's DPOTrainer has no such method. "
                    "Override compute_loss and call super().compute_loss, or write the objective as a prefopt Loss",
                    *(owner.__name__, name),
                )
    return [c for c in below_mixin if "compute_loss" in vars(c)]


def own_classes(cls: type, mixin: type) -> list[type]:
    """The classes of a trainer that are neither ours nor a library's, as far as TRL's trainer."""
    ours = (mixin.__module__.partition(".")[0], "trl", "transformers")
    mro: tuple[Any, ...] = cls.__mro__
    return [c for c in mro[: mro.index(DPOTrainer)] if c.__module__.partition(".")[0] not in ours]


def refuse_dropped_gradient(cls: type, mixin: type, objective: Loss) -> None:
    """Refuse an overridden loss around `conflict_free`, which uses only the gradients of its own terms.

    Raises:
        ValueError: naming the class.
    """
    own = [c for c in own_classes(cls, mixin) if {"compute_loss", "_compute_loss"} & {*vars(c)}]
    if isinstance(objective, ConflictFree) and own:
        raise UsageError(
            f"{objective.name} uses only the gradients of its own terms, so what {own[0].__name__}.compute_loss adds "
            "would have no effect: write that as a prefopt Loss and make it one of the terms"
        )
