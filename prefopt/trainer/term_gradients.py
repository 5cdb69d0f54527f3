"""Training steps for `conflict_free`: the terms' gradients are combined before each update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from prefopt.losses import Loss
from prefopt.losses.conflict import ConflictFree, coefficients, combined, gram_of
from prefopt.losses.distributed import mean_gradient
from prefopt.safety.errors import UsageError


class ConflictFreeMixin:
    """The part of `LossMixin` that trains on a `ConflictFree` loss.

    Micro-batches add to each term's own gradient; when the optimizer is about to step these are averaged over
    processes, combined, and put in the place of the parameters' gradients. Clipping sees the combined gradient.
    """

    objective: Loss | None
    args: Any
    accelerator: Any
    _terms: Sequence[Tensor]
    _term_gradients: list[list[Tensor | None]]

    def _check_conflict_free(self, objective: Loss) -> None:
        """Refuse engines that keep gradients where they cannot be told apart by term."""
        if not isinstance(objective, ConflictFree):
            return
        for wrong, what in (
            (self.is_deepspeed_enabled, "DeepSpeed, which adds gradients up as they are made"),  # type: ignore[attr-defined]
            (self.is_fsdp_enabled, "FSDP, which shards gradients as they are made"),  # type: ignore[attr-defined]
            (self.accelerator.scaler is not None, "fp16, whose loss scale differs between steps: use bf16"),
            (getattr(self, "aux_loss_enabled", False), "the load-balancing loss of experts, which belongs to no term"),
        ):
            if wrong:
                raise UsageError(f"{objective.name} does not go with {what}")

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if not isinstance(self.objective, ConflictFree):
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        share = 1 / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        model.train()
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # DDP would exchange gradients with the first term's backward pass, and miss the others'.
        with self.accelerator.no_sync(model):
            with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)  # type: ignore[attr-defined]
            self._add_gradients([term * share for term in self._terms], trained)
        self._terms = ()
        if self.accelerator.sync_gradients:
            self._combine(trained)
        return loss.detach() * share

    def _add_gradients(self, terms: Sequence[Tensor], trained: list[Any]) -> None:
        if not self._term_gradients:
            self._term_gradients = [[None] * len(trained) for _ in terms]
        with _gradients_put_aside(trained):
            for number, (term, gradients) in enumerate(zip(terms, self._term_gradients, strict=True)):
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter.grad = gradient
                if term.requires_grad:
                    term.backward(retain_graph=number < len(terms) - 1)  # type: ignore[no-untyped-call]
                gradients[:] = [parameter.grad for parameter in trained]

    def _combine(self, trained: list[Any]) -> None:
        assert isinstance(self.objective, ConflictFree)
        gradients, self._term_gradients = self._term_gradients, []
        if self.accelerator.num_processes > 1:
            gradients = [list(map(mean_gradient, parts, trained)) for parts in gradients]
        gram = gram_of(gradients)
        weights = coefficients(gram, self.objective.method)
        for parameter, gradient in zip(trained, combined(gradients, weights), strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        self._log_angles(gram, self.objective.labels)

    def _log_angles(self, gram: Tensor, labels: list[str]) -> None:
        lengths = gram.diagonal().sqrt()
        for i, label in enumerate(labels):
            for j in range(i):
                if bool(lengths[i] > 0) and bool(lengths[j] > 0):
                    cosine = (gram[i, j] / (lengths[i] * lengths[j])).reshape(1)
                    name = f"conflict/{labels[j]},{label}"
                    self._train_means.add(name, cosine.to(self.accelerator.device))  # type: ignore[attr-defined]


@contextlib.contextmanager
def _gradients_put_aside(trained: list[Any]) -> Iterator[None]:
    kept = [parameter.grad for parameter in trained]
    try:
        yield
    finally:
        for parameter, gradient in zip(trained, kept, strict=True):
            parameter.grad = gradient
