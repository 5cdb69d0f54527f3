"""Training steps within a budget of tokens: a batch goes through the model in parts, its gradient stays the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import gather_object

from prefopt.losses import Loss
from prefopt.safety.errors import UsageError
from prefopt.scoring.collate import groups_of, select_examples
from prefopt.scoring.layout import Layout
from prefopt.scoring.parts import cut


class TokenBudgetMixin:
    """The part of `LossMixin` that cuts batches where `token_budget` is set.

    Where the loss is a mean over examples, each part has its forward and backward pass, its loss weighted by its share
    of the examples. Where examples act on one another the loss needs all of them at once: then parts are scored one
    after the other, keeping nothing but their log-probabilities, and scored again in the backward pass.
    """

    objective: Loss | None
    args: Any
    model: Any
    accelerator: Any
    _layout: Layout
    _share: float
    _in_parts_of: int | None

    @property
    def _budget(self) -> int | None:
        return getattr(self.args, "token_budget", None)

    def _check_budget(self, objective: Loss, own_collator: bool) -> None:
        """Refuse what a budget cannot be kept in."""
        if self._budget is None:
            return
        if not own_collator:
            raise UsageError("token_budget is for text: this run has a collator of its own")
        if getattr(self, "aux_loss_enabled", False):
            raise UsageError(
                f"token_budget={self._budget} cannot be kept with a load-balancing loss of experts, which is no mean "
                "over examples: lower per_device_train_batch_size, or set the model's router_aux_loss_coef to 0"
            )
        if not objective.separable and self._layout.one_call:
            raise UsageError(self._together(f"{objective}, whose examples act on one another,"))

    def _together(self, what: str) -> str:
        return (
            f"token_budget={self._budget} cannot be kept for {what} where the model may be called only once a step "
            "(on several processes, with DeepSpeed or FSDP): lower per_device_train_batch_size, or use "
            "gradient_checkpointing=True"
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if self.objective is None or self._budget is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        model.train()
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            model_inputs = self._model_inputs(inputs)  # type: ignore[attr-defined]
            in_trees = self._layout.in_trees(model, inputs, model_inputs, self._budget)
        if not self.objective.separable or not groups_of(inputs).paired:
            if self._layout.one_call:
                raise UsageError(self._together("single completions"))
            if not in_trees:
                raise UsageError(
                    f"token_budget={self._budget} cannot be kept with {self.objective} in the padded layout "
                    f"({self._layout.reason or 'asked for'}): its examples act on one another. Lower "
                    "per_device_train_batch_size, or use gradient_checkpointing=True"
                )
            with self._in_parts(self._budget):
                return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        total: Any = 0.0
        parts = self._parts(inputs, self._budget, in_trees)
        for number, (part, share) in enumerate(parts):
            with self._accumulating(model) if number < len(parts) - 1 else contextlib.nullcontext():
                self._share = share
                try:
                    total = total + super().training_step(model, part, num_items_in_batch)  # type: ignore[misc]
                finally:
                    self._share = 1.0
        return total

    def _parts(self, inputs: Mapping[str, Any], budget: int, in_trees: bool) -> list[tuple[Any, float]]:
        """The parts of a batch and their shares of its examples; as many on every process."""
        examples = cut(inputs, budget, in_trees)
        count = sum(len(some) for some in examples)
        parts = [(select_examples(inputs, some), len(some) / count) for some in examples]
        if self.accelerator.num_processes > 1:
            most = max(gather_object([len(parts)]))
            # A part of no weight, for a process that is done before the others.
            parts = [(parts[-1][0], 0.0)] * (most - len(parts)) + parts
        return parts

    @contextlib.contextmanager
    def _in_parts(self, budget: int) -> Iterator[None]:
        """Whatever is scored in here goes through the model in parts, and again in the backward pass."""
        self._in_parts_of = budget
        try:
            yield
        finally:
            self._in_parts_of = None

    @contextlib.contextmanager
    def _accumulating(self, model: Any) -> Iterator[None]:
        """Backward passes in here are not the last of the step: nothing is exchanged or updated yet."""
        state = self.accelerator.gradient_state
        syncs = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            if self.is_deepspeed_enabled:  # type: ignore[attr-defined]
                yield
            else:
                with self.accelerator.no_sync(model):
                    yield
        finally:
            state._set_sync_gradients(syncs)
