"""Evaluation on several processes: what fills up the last batch does not count, and losses are means over examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from prefopt.losses import ConflictFree, Loss, LossOutput
from prefopt.losses.scores import Role
from prefopt.safety.errors import UsageError
from prefopt.scoring.rows import COUNTED, RowBatch
from prefopt.trainer.metrics import PART_OF_LOSS, RunningMeans


class EvaluationMixin:
    """The part of `LossMixin` that says which examples of an evaluation count.

    Processes get batches of one size, because sharded models must be called equally often everywhere; the last ones
    are filled up with examples that were there before. Those are scored like the others, and left out of what the
    objective sees.
    """

    objective: Loss | None
    args: Any
    accelerator: Any
    processing_class: Any
    _is_vision_dataset: bool
    _eval_means: RunningMeans
    _evaluated: LossOutput  # what the objective made of the batch

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """As transformers has it, for `evaluate` and `predict`: means count the rows of this loop alone."""
        self._eval_means = RunningMeans()
        try:
            return super().evaluation_loop(*arguments, **keywords)  # type: ignore[misc]
        except BaseException:
            self._eval_means = RunningMeans()
            raise

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """As transformers has it; takes raw rows as `evaluate` does, and its metrics hold the objective's."""
        if self.objective is None:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]
        if not self._is_vision_dataset:
            test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")  # type: ignore[attr-defined]
            if self.args.precompute_ref_log_probs and "ref_chosen_logps" not in (test_dataset.column_names or ()):
                raise UsageError(
                    "predict needs rows with ref_chosen_logps and ref_rejected_logps here, as "
                    "precompute_ref_log_probs=True keeps no reference: pass them to evaluate, which computes these"
                )
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]
        means = self._eval_means.drain()
        return output._replace(
            metrics={**output.metrics, **{f"{metric_key_prefix}_{name}": value for name, value in means.items()}}
        )

    def check_best_metric(self, metrics: Mapping[str, float]) -> None:
        """Refuse a `metric_for_best_model` that an evaluation does not have.

        Args:
            metrics: of one evaluation, as `evaluate` returns them.

        Raises:
            ValueError: naming those that it has.
        """
        wanted = self.args.metric_for_best_model
        if wanted is None or f"eval_{wanted.removeprefix('eval_')}" in metrics:
            return
        names = [name.removeprefix("eval_") for name in metrics if not name.endswith(("_runtime", "_per_second"))]
        raise UsageError(f"metric_for_best_model={wanted!r}: evaluations have {', '.join(names)}")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self.check_best_metric(metrics)
        better: bool = super()._determine_best_metric(metrics, trial)  # type: ignore[misc]
        return better

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.objective is None:
            return super().prediction_step(model, inputs, *arguments, **keywords)  # type: ignore[misc]
        if (counted := self._counted(inputs)) is not None:
            inputs = {**inputs, COUNTED: counted}
        made = super().prediction_step(model, inputs, *arguments, **keywords)  # type: ignore[misc]
        self._record_eval_loss(made[0], inputs)
        return made

    def _counted(self, inputs: Mapping[str, Any]) -> int | None:
        """How many of this process's examples count, the first ones; None for all.

        Data that is streamed does not know its length, so nothing is known about its last batch.
        """
        state = self.accelerator.gradient_state
        loader = state.active_dataloader
        if loader is None or not state.end_of_dataloader or state.remainder <= 0:
            return None
        each = loader.total_batch_size // self.accelerator.num_processes
        mine: int = min(max(state.remainder - self.accelerator.process_index * each, 0), each)
        return mine if mine < int(RowBatch.of(inputs).examples.max()) + 1 else None

    def _record_eval_loss(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Add a batch to the mean over examples, in which each process's loss has the share that its examples have.

        Losses are such that their mean over processes is that of all examples together. For pairs each is a mean over
        the process's own examples; for single completions it is a sum, divided by the processes' mean count. There
        each term of the objective has a mean over the completions that it is about: a batch may hold none of them.
        """
        rows = RowBatch.of(inputs)
        counts = {role.field: len(rows.rows_of(role)) for role in (Role.CHOSEN, Role.REJECTED)}
        if rows.paired:
            self._eval_means.add("loss", loss * counts["chosen"], torch.tensor(counts["chosen"]))
            return
        objective: Any = self.objective
        objective = objective.loss if isinstance(objective, ConflictFree) else objective
        output, every = self._evaluated, tuple(counts)
        # What was added to the objective's own value, such as experts' load balancing, is about all completions.
        parts = [(loss - output.loss, every)]
        roles = [term.roles if set(term.roles) <= set(every) else every for _, _, term in objective.terms()]
        parts += zip(output.terms or (output.loss,), roles, strict=True)
        everyone = gather_object([counts])
        for number, (value, about) in enumerate(parts):
            mine, all_of_them = (sum(some[role] for some in of for role in about) for of in ([counts], everyone))
            share = all_of_them / self.accelerator.num_processes
            self._eval_means.add(f"{PART_OF_LOSS}{number}", value * share, torch.tensor(mine))
