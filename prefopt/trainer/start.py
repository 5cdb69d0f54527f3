"""Checks as training starts: the optimizer holds the model's parameters, and its first updates change them.

Everything here reads parameters and optimizers and changes nothing. Without these checks, a run that trains nothing
would run to its end with normal losses and gradient norms.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from prefopt.safety.errors import UsageError

logger = logging.getLogger(__name__)

SAMPLED = 4096
"""Maximum elements of a parameter that are compared before and after an update."""
WORTH_A_STEP = 1e-8
"""Gradients below this count as zero; it is Adam's epsilon."""
LOST, FEW = 0.01, 0.10
"""Fractions of half-precision weights that an update must change: below `LOST` a run stops, below `FEW` it warns."""
JUDGED = 256
"""With fewer nonzero gradients than this there is no verdict, as when the objective is almost saturated."""
WITHOUT_GRADIENT = 4
"""After this many checks (steps 1, 2, 4, 8 at the latest) without any gradient, or at a shorter run's end, a warning
is logged."""
_FINER_COPY = ("kahan", "compensation", "master")
"""Names of optimizer state that makes up for the coarse rounding of half-precision weights."""


class StartCheck(TrainerCallback):
    """Stops a run that trains nothing.

    Args:
        trainer: the trainer it is added to.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._settled = False
        self._before: list[_Sample] | None = None  # None if nothing was sampled
        self._empty = 0
        self._at_end = ""  # the message if no step reaches the full learning rate

    @property
    def _mode(self) -> str:
        mode: str = getattr(self._trainer.args, "step0_check", "error")
        return mode

    def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        trainer = self._trainer
        # DeepSpeed keeps float32 copies of the weights elsewhere, and takes its step within the backward pass.
        self._settled = trainer.is_deepspeed_enabled or self._mode == "off"
        self._before, self._empty, self._at_end = None, 0, ""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError(_nothing_to_train(model))
        if optimizer is None or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return  # their optimizers hold pieces of parameters, which cannot be matched by identity
        outside = not_in_optimizer(model, optimizer)
        if outside is None:
            raise UsageError(
                "the optimizer holds no trainable parameter of the model, so nothing would be trained: it was made "
                "for another model, or before the adapter was added or the weights were frozen. Make it from the "
                "parameters that the trainer trains, or leave `optimizers` out"
            )
        if outside:
            logger.warning(
                "%d parameters require gradients but are not in the optimizer (%s): they are not trained, but count "
                "in grad_norm and in clipping. Add them to the optimizer, or call requires_grad_(False) on them",
                *(len(outside), _some(outside)),
            )
        if all(group.get("initial_lr", group["lr"]) == 0 for group in optimizer.param_groups):
            logger.warning("the learning rate is 0, so nothing will be trained: set learning_rate above 0")

    def on_pre_optimizer_step(self, _: Any, state: Any, *__: Any, optimizer: Any = None, **___: Any) -> None:
        # During a warm-up, checking steps 1, 2, 4, 8 ... is enough.
        if self._settled or optimizer is None:
            return
        step = state.global_step + 1
        if step & (step - 1) == 0 or all(at_peak(group) for group in optimizer.param_groups):
            self._before = list(_samples(optimizer))

    def on_optimizer_step(self, _: Any, state: Any, *__: Any, optimizer: Any = None, **___: Any) -> None:
        samples, self._before = self._before, None
        # Whether samples were taken depends only on the step and the learning rate, so every process agrees.
        if self._settled or optimizer is None or self._trainer.accelerator.optimizer_step_was_skipped:
            return
        if samples is None:
            return
        sharded = self._trainer.is_fsdp_enabled  # a process's own pieces may be without a gradient
        if samples:
            self._empty = 0
        elif not sharded and any(float(group["lr"] or 0) > 0 for group in optimizer.param_groups):
            self._count_empty()
        # conflict_free removes a term's gradient while it waits for the others: that step changes nothing.
        before = [sample for sample in samples if sample.parameter.grad is not None]
        if not before and not sharded:
            return
        moved, total, coarse = 0, 0, False
        for sample in before:
            moved, total = moved + sample.moved(), total + len(sample.values)
            coarse = coarse or sample.values.dtype in (torch.float16, torch.bfloat16)
        if self._trainer.accelerator.num_processes > 1:
            everyone = gather_object([(moved, total, coarse)])
            moved, total = sum(m for m, _, _ in everyone), sum(t for _, t, _ in everyone)
            coarse = any(c for _, _, c in everyone)
        if total >= JUDGED:
            self._judge(moved, total, coarse, optimizer, state.global_step + 1)

    def _count_empty(self) -> None:
        self._empty += 1
        if self._empty == WITHOUT_GRADIENT:
            self._warn_empty()

    def _warn_empty(self) -> None:
        logger.warning(
            "no weight had a gradient in the first %d updates that were checked, so nothing has been learned: check "
            "that the data has rows with the label that the objective uses, pairs that differ, and weights above 0, "
            "and that the loss depends on the model's scores",
            self._empty,
        )

    def _judge(self, moved: int, total: int, coarse: bool, optimizer: Any, step: int) -> None:
        share = moved / total
        coarse = coarse and not _keeps_finer_copy(optimizer)
        enough = share >= FEW if coarse else moved > 0
        full_rate = all(at_peak(group) for group in optimizer.param_groups)
        self._settled, self._at_end = enough or full_rate, ""
        if enough:
            return
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        if not coarse:
            outcome = (
                f"changed none of {total} weights that were checked, although they have gradients: nothing is "
                "trained. Raise the learning rate, or check the optimizer: it may hold copies of the weights instead "
                "of the model's own"
            )
        else:
            outcome = (
                f"changed {moved} of {total} weights that were checked ({share:.1%}): in half precision the others "
                "are rounded back to what they were. Keep the weights in float32 and compute in bfloat16 "
                "(--dtype float32 --bf16 true; in Python model_init_kwargs={'dtype': 'float32'} and bf16=True), or "
                "train an adapter, or raise the learning rate"
            )
        if not full_rate:
            self._at_end = f"the run ended before its full learning rate; update {step} (at {rate:g}) {outcome}"
            return
        message = f"the first update at the full learning rate ({rate:g}) {outcome}"
        if share < LOST and self._mode == "error":
            raise UsageError(f"{message}. To continue anyway, set step0_check to 'warn' or 'off'")
        logger.warning(message)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._at_end:
            logger.warning(self._at_end)
        if 0 < self._empty < WITHOUT_GRADIENT:
            self._warn_empty()


@dataclass
class _Sample:
    """Some elements of one parameter that have a gradient.

    Attributes:
        parameter: the parameter.
        places: indices of the elements in the flattened parameter.
        values: before the update.
    """

    parameter: Tensor
    places: Tensor
    values: Tensor

    def moved(self) -> int:
        return int((_flat(self.parameter)[self.places] != self.values).sum())


def _flat(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, flattened."""
    return getattr(tensor, "_local_tensor", tensor).detach().reshape(-1)


def _samples(optimizer: Any) -> Iterator[_Sample]:
    """Up to `SAMPLED` elements of every parameter that is about to be updated."""
    for group in optimizer.param_groups:
        if group["lr"] is not None and not float(group["lr"]) > 0:
            continue
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None or gradient.layout is not torch.strided or not parameter.is_floating_point():
                continue
            values, gradient = _flat(parameter), _flat(gradient)
            # Odd, so that the elements are not all from the same column.
            every = max(len(values) // SAMPLED, 1) | 1
            of_gradient = gradient[::every]
            places = (torch.isfinite(of_gradient) & (of_gradient.abs() > WORTH_A_STEP)).nonzero().flatten() * every
            if len(places):
                yield _Sample(parameter, places, values[places].clone())


def at_peak(group: dict[str, Any]) -> bool:
    """Whether a parameter group is at the peak of its schedule, or has no schedule."""
    if group["lr"] is None:
        return False  # Adafactor's own schedule, whose peak is unknown
    rate = float(group["lr"])
    return rate > 0 and rate >= 0.99 * float(group.get("initial_lr", rate))


def not_in_optimizer(model: nn.Module, optimizer: Any) -> list[str] | None:
    """The names of parameters that require gradients and are not in the optimizer; None if it holds none at all."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner  # accelerate's wrapper
    # Optimizers that step layer by layer in the backward pass are hidden behind one without parameters.
    parts = getattr(optimizer, "optimizer_dict", None)
    held = {id(p) for p in parts} if parts else {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outside = [name for name, p in wanted.items() if id(p) not in held]
    return None if len(outside) == len(wanted) else outside


def _keeps_finer_copy(optimizer: Any) -> bool:
    states = getattr(optimizer, "state", None) or {}
    state: Any = next(iter(states.values()), {})
    names = [str(name).lower() for name in (state if isinstance(state, dict) else {})]
    return any(word in name for name in names for word in _FINER_COPY)


def check_separate(policy: nn.Module, other: nn.Module, role: str) -> None:
    """Refuse a reference or previous model that would be trained along with the policy.

    Args:
        policy: the trained model.
        other: the model to compare with.
        role: the argument that it was passed as.

    Raises:
        ValueError: naming trained parameters that both models share.
    """
    theirs = {id(parameter) for parameter in other.parameters()}
    if shared := [name for name, p in policy.named_parameters() if p.requires_grad and id(p) in theirs]:
        raise UsageError(
            f"{role} shares {len(shared)} trained parameters with the model ({_some(shared)}), so it would change "
            f"with it and the two would hardly differ: load {role} on its own with from_pretrained, or make it with "
            "copy.deepcopy before an adapter is added to the model"
        )


def _nothing_to_train(model: Any) -> str:
    if is_peft_model(model):
        return (
            f"no parameter of the model requires gradients, not even of its adapter {model.active_adapter!r}, so "
            "nothing would be trained: load a saved adapter with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    return (
        "no parameter of the model requires gradients (requires_grad=False), so nothing would be trained: call "
        "requires_grad_(True) on the parameters to train, or pass peft_config=... to train an adapter"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
