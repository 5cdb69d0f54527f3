"""Training steps for `conflict_free`: the terms' gradients are combined before each update. And where it, and
`pair_normalized`, can be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from prefopt.losses.conflict import ConflictFree, OwnGradient, coefficients, combined, gram_of
from prefopt.losses.distributed import mean_gradient
from prefopt.safety.errors import UsageError
from prefopt.scoring.rows import SHARE
from prefopt.trainer.metrics import RunMetrics
from prefopt.trainer.output_slot import SLOT, OutputSlot


def check_engine(trainer: Any, objective: OwnGradient) -> None:
    """Refuse engines in which the gradients of single terms, or of single answers, cannot be separated.

    Raises:
        ValueError: naming the engine.
    """
    for wrong, what in (
        (trainer.is_deepspeed_enabled, "DeepSpeed, which adds gradients up during the backward pass"),
        (trainer.is_fsdp_enabled, "FSDP, which shards gradients during the backward pass"),
        (trainer.accelerator.scaler is not None, "fp16, whose loss scale changes between steps: use bf16"),
        (
            isinstance(objective, ConflictFree) and getattr(trainer, "aux_loss_enabled", False),
            "the load-balancing loss of experts, which belongs to no term",
        ),
    ):
        if wrong:
            raise UsageError(f"{objective.name} does not work with {what}")


class TermGradients:
    """The gradients of a `ConflictFree` loss, term by term.

    Micro-batches add to each term's own gradient. Before the optimizer's step these are averaged over processes and
    combined, and the result replaces the parameters' gradients. Clipping acts on the combined gradient.

    Args:
        trainer: the trainer.
        objective: its loss.
        metrics: where the cosines between terms are logged.
    """

    def __init__(self, trainer: Any, objective: ConflictFree, metrics: RunMetrics):
        self._trainer, self._objective, self._metrics = trainer, objective, metrics
        self._gradients: list[list[Tensor | None]] = []

    def step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Replaces transformers' `training_step`: forward and backward passes of a batch."""
        trainer = self._trainer
        share = 1 / trainer.current_gradient_accumulation_steps
        model.train()
        inputs = trainer._prepare_inputs(inputs)
        slot = inputs.get(SLOT) or OutputSlot()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # DDP would exchange gradients in the first term's backward pass, and miss the others'.
        with trainer.accelerator.no_sync(model):
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, {**inputs, SLOT: slot}, num_items_in_batch=num_items_in_batch)
            self._add([term * (share * inputs.get(SHARE, 1.0)) for term in slot.get().terms], trained)
        if trainer.accelerator.sync_gradients:
            self._combine(trained)
        loss_of_step: Tensor = loss.detach() * share
        return loss_of_step

    def _add(self, terms: Sequence[Tensor], trained: list[Any]) -> None:
        if not self._gradients:
            self._gradients = [[None] * len(trained) for _ in terms]
        with _gradients_put_aside(trained):
            for number, (term, gradients) in enumerate(zip(terms, self._gradients, strict=True)):
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter.grad = gradient
                if term.requires_grad:
                    term.backward(retain_graph=number < len(terms) - 1)  # type: ignore[no-untyped-call]
                gradients[:] = [parameter.grad for parameter in trained]

    def _combine(self, trained: list[Any]) -> None:
        gradients, self._gradients = self._gradients, []
        if self._trainer.accelerator.num_processes > 1:
            gradients = [list(map(mean_gradient, parts, trained)) for parts in gradients]
        gram = gram_of(gradients)
        weights = coefficients(gram, self._objective.method)
        for parameter, gradient in zip(trained, combined(gradients, weights), strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        self._log_angles(gram)

    def _log_angles(self, gram: Tensor) -> None:
        lengths, labels = gram.diagonal().sqrt(), self._objective.labels
        for i, label in enumerate(labels):
            for j in range(i):
                if bool(lengths[i] > 0) and bool(lengths[j] > 0):
                    cosine = (gram[i, j] / (lengths[i] * lengths[j])).reshape(1)
                    name = f"conflict/{labels[j]},{label}"
                    self._metrics.train.add(name, cosine.to(self._trainer.accelerator.device))


@contextlib.contextmanager
def _gradients_put_aside(trained: list[Any]) -> Iterator[None]:
    before = [parameter.grad for parameter in trained]
    try:
        yield
    finally:
        for parameter, gradient in zip(trained, before, strict=True):
            parameter.grad = gradient
