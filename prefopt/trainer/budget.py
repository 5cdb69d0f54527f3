"""Training steps within a budget of tokens: a batch goes through the model in parts, its gradient stays the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from prefopt.losses import Loss, PairNormalized
from prefopt.safety.errors import UsageError
from prefopt.scoring.layout import Layout
from prefopt.scoring.parts import cut
from prefopt.scoring.rows import RowBatch
from prefopt.trainer.output_slot import SLOT, OutputSlot


def parts_of(trainer: Any, objective: Loss, layout: Layout, own_collator: bool) -> Parts | None:
    """What cuts a trainer's batches; None where they stay whole.

    `pair_normalized` has parts of one pair: the backward passes of an answer then go through its own pair alone.

    Args:
        trainer: set up by TRL.
        objective: its loss.
        layout: how batches are scored.
        own_collator: whether batches are made by `PreferenceCollator`.

    Raises:
        UsageError: if a budget that was asked for cannot be kept.
    """
    budget = getattr(trainer.args, "token_budget", None)
    balances_experts = getattr(trainer, "aux_loss_enabled", False)
    if isinstance(objective, PairNormalized) and own_collator and not balances_experts:
        budget = 1
    if budget is None:
        return None
    parts = Parts(budget, objective, layout, trainer.accelerator)
    parts.check(own_collator, balances_experts)
    return parts


@dataclass
class Parts:
    """Cuts batches into parts that keep a budget.

    Where the loss is a mean over examples, each part has its forward and backward pass, its loss weighted by its share
    of the examples. Where examples act on one another the loss needs all of them at once: then parts are scored one
    after the other, keeping nothing but their log-probabilities, and scored again in the backward pass.

    Attributes:
        budget: maximum tokens per forward pass.
        objective: the loss.
        layout: how batches are scored.
        accelerator: of the run.
    """

    budget: int
    objective: Loss
    layout: Layout
    accelerator: Accelerator

    def check(self, own_collator: bool, balances_experts: bool) -> None:
        """Refuse runs in which the budget cannot be kept.

        Args:
            own_collator: whether batches are made by `PreferenceCollator`.
            balances_experts: whether a load-balancing loss of experts is added.
        """
        if not own_collator:
            raise UsageError("token_budget is for text: this run has its own collator")
        if balances_experts:
            raise UsageError(
                f"token_budget={self.budget} cannot be kept with a load-balancing loss of experts, which is not a "
                "mean over examples: lower per_device_train_batch_size, or set the model's router_aux_loss_coef to 0"
            )
        if not self.objective.separable and self.layout.one_call:
            raise UsageError(self._one_call(f"{self.objective}, whose examples act on one another,"))

    def _one_call(self, what: str) -> str:
        return (
            f"token_budget={self.budget} cannot be kept for {what} where the model may be called only once a step "
            "(on several processes, with DeepSpeed or FSDP): lower per_device_train_batch_size, or use "
            "gradient_checkpointing=True"
        )

    def of(self, model: Any, rows: RowBatch) -> list[RowBatch]:
        """The parts of a batch, each for one forward and backward pass; the same number on every process."""
        rows = replace(rows, tokens_at_once=self.budget)
        in_trees = self.layout.in_trees(model, rows)
        if not self.objective.separable or not rows.paired:
            if self.layout.one_call:
                raise UsageError(self._one_call("single completions"))
            if not in_trees:
                raise UsageError(
                    f"token_budget={self.budget} cannot be kept with {self.objective} in the padded layout "
                    f"({self.layout.reason or 'asked for'}): its examples act on one another. Lower "
                    "per_device_train_batch_size, or use gradient_checkpointing=True"
                )
            return [rows]
        examples = cut(rows, self.budget, in_trees)
        count, whole = sum(map(len, examples)), replace(rows, tokens_at_once=None)
        parts = [replace(whole.select_examples(some), share=len(some) / count) for some in examples]
        most = max(self.layout.gather(len(parts)))
        # A process with fewer parts than the others gets parts of weight 0.
        return [replace(parts[-1], share=0.0)] * (most - len(parts)) + parts

    def step(self, model: Any, parts: list[RowBatch], step: Callable[[dict[str, Any]], Any]) -> Any:
        """A training step on each part of a batch.

        Args:
            model: as it is wrapped.
            parts: as `of` returns them.
            step: the training step on one part.

        Returns:
            The sum of what the steps return.
        """
        total: Any = 0.0
        for number, part in enumerate(parts):
            slot = OutputSlot()
            with self._accumulating(model) if number < len(parts) - 1 else contextlib.nullcontext():
                total = total + step({**part.inputs(), SLOT: slot})
            slot.get()  # without its share, this part would weigh as much as the whole batch
        return total

    @contextlib.contextmanager
    def _accumulating(self, model: Any) -> Iterator[None]:
        """Context for backward passes before the last of a step: no gradient exchange and no update yet."""
        state = self.accelerator.gradient_state
        syncs = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
                yield
            else:
                with self.accelerator.no_sync(model):
                    yield
        finally:
            state._set_sync_gradients(syncs)
