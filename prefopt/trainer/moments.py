"""`conflict_free` with momentum: what stands between one term's gradient and the optimizer, saved and resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from prefopt.losses.conflict import ConflictFree, TermMoments

FILE = "objective_moments.safetensors"


class MomentStep(TrainerCallback):
    """Puts what `TermMoments` makes of one term's gradient in its place whenever the optimizer is about to step.

    By then that gradient was accumulated, averaged over processes, clipped and found finite, so that nothing that is
    not finite enters a moment, and what Adam is given is not clipped again.

    Args:
        trainer: whose model is trained, whole on every process.
        moments: of its objective.
    """

    def __init__(self, trainer: Any, moments: TermMoments):
        self._trainer = trainer
        self._adam = True
        self.moments = moments

    @property
    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self._trainer.model.named_parameters() if p.requires_grad}

    @property
    def bytes(self) -> int:
        """How much the moments take once every term was taken, in memory and in a checkpoint."""
        sizes = (p.numel() * max(p.element_size(), 4) for p in self._trained.values())  # float32 at least
        return self.moments.count * sum(sizes)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 0:
            self.moments.reset()  # of an earlier run of the same trainer
        self._adam = averages_gradients(given["optimizer"], self.moments.momentum)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        trained = list(self._trained.values())
        made = self.moments.step([parameter.grad for parameter in trained], self._adam)
        for parameter, gradient in zip(trained, made, strict=True):
            # Adam leaves a parameter without a gradient as it is, its decay and its count of steps included.
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        objective = self._trainer.objective
        if self.moments.gram is not None and isinstance(objective, ConflictFree):
            self._trainer._log_angles(self.moments.gram, objective.labels)

    def save(self, folder: Path) -> None:
        """Write the moments into a checkpoint."""
        state = self.moments.state_dict(list(self._trained))
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, os.fspath(folder / FILE))

    def restore(self, folder: Path) -> None:
        """Read them back.

        Raises:
            FileNotFoundError: if the checkpoint holds none.
        """
        if not (folder / FILE).exists():
            raise FileNotFoundError(
                f"{folder / FILE} does not exist: the checkpoint was written without the moments of the terms, which "
                "momentum cannot go on without. Start anew, or resume with the objective that it was trained with"
            )
        self.moments.load_state_dict(load_file(folder / FILE), self._trained)


def averages_gradients(optimizer: Any, momentum: float) -> bool:
    """Whether an optimizer is Adam with `momentum` as its beta1 (True) or plain SGD (False).

    Raises:
        ValueError: if it is neither, so that it would not step along the combined moments.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    name = type(optimizer).__name__
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        for beta in {group["betas"][0] for group in optimizer.param_groups}:
            if beta != momentum:
                raise ValueError(
                    f"conflict_free(momentum={momentum:g}) averages each term's gradient as Adam would, but {name} "
                    f"has beta1={beta:g}: set momentum={beta:g}, or adam_beta1={momentum:g}"
                )
        return True
    if isinstance(optimizer, torch.optim.SGD):
        for factor in {group["momentum"] for group in optimizer.param_groups if group["momentum"]}:
            raise ValueError(
                f"conflict_free(momentum={momentum:g}) averages gradients itself, but {name} has momentum={factor:g}: "
                "set that to 0"
            )
        return False
    raise ValueError(
        f"conflict_free(momentum={momentum:g}) goes with Adam or AdamW (optim='adamw_torch') and plain SGD "
        f"(optim='sgd'), not with {name}, which does something else with the gradients it is given: set optim, or "
        "leave momentum out"
    )
