"""Parameters inside a loss, such as a kernel's weights: trained beside the model, at their own learning rate."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from prefopt.losses import Loss
from prefopt.losses.distributed import mean_gradient, world_size
from prefopt.safety.errors import UsageError

SHOWN = 8
"""Parameters with at most this many elements are logged one by one, larger ones by mean and spread."""


class LearnedLoss(TrainerCallback):
    """Steps an optimizer over a loss's own parameters whenever the model's is about to step.

    The loss is not part of a wrapped model: under DDP or sharding too, its parameters are complete on every process,
    and their gradients are averaged here. The learning rate follows the model's schedule.

    Args:
        objective: a loss with parameters, on its device.
        learning_rate: at the peak of the schedule.
    """

    def __init__(self, objective: Loss, learning_rate: float):
        self._named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self._learning_rate = learning_rate
        # No weight decay: 0 has no special meaning for these parameters.
        self._optimizer = torch.optim.AdamW(self._named.values(), lr=learning_rate, weight_decay=0.0)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if world_size() > 1:
            for parameter in self._named.values():
                dist.broadcast(parameter.data, 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for parameter in self._named.values():
            # No gradient, for example in another term's backward pass, counts as 0 on every process.
            parameter.grad = mean_gradient(parameter.grad, parameter)
        scale = _height(more["optimizer"], args.learning_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * scale
        self._optimizer.step()
        self._optimizer.zero_grad()

    def logs(self) -> dict[str, float]:
        """The parameters as they are now, under `learned/`."""
        logs: dict[str, float] = {}
        for name, parameter in self._named.items():
            values = parameter.detach().float().flatten()
            if len(values) == 1:
                logs[f"learned/{name}"] = float(values)
            elif len(values) <= SHOWN:
                logs |= {f"learned/{name}/{i}": float(value) for i, value in enumerate(values)}
            else:
                logs |= {f"learned/{name}/mean": float(values.mean()), f"learned/{name}/std": float(values.std())}
        return logs

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's tensors by parameter, flat; the parameters themselves are the loss's own state."""
        return {
            f"{name}.{key}": value.detach()
            for name, parameter in self._named.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            mine = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            # The optimizer keeps the step count on the CPU.
            self._optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device).clone()
                for key, value in mine.items()
            }


def learned_of(objective: Loss, args: Any, accelerator: Any) -> LearnedLoss | None:
    """The optimizer of an objective's own parameters, None if it has none. The objective is on its device already."""
    if not any(parameter.requires_grad for parameter in objective.parameters()):
        return None
    if accelerator.mixed_precision == "fp16":  # asked for by `accelerate launch`, not by the arguments
        raise UsageError(f"{objective} has its own parameters, which are not trained in fp16: use bf16")
    rate = getattr(args, "loss_learning_rate", None)
    return LearnedLoss(objective, args.learning_rate if rate is None else rate)


def _height(optimizer: Any, learning_rate: float) -> float:
    """The model's learning rate relative to its peak; 1 if the schedule is unknown.

    Args:
        optimizer: of the model, made by the trainer or passed in.
        learning_rate: from the arguments, for optimizers that do not store their initial one.
    """
    group = optimizer.param_groups[0]
    # Schedulers store the initial rate; those driven by metrics do not, and keep the optimizer's default.
    peak = group.get("initial_lr", getattr(optimizer, "defaults", {}).get("lr", learning_rate))
    rate = group["lr"]
    return float(rate) / float(peak) if rate is not None and peak else 1.0
