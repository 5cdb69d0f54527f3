"""Evaluation on several processes: padding examples do not count, and losses are means over examples.

Processes get batches of the same size, because sharded models must be called equally often everywhere. The last
batches are filled up with repeated examples. Those are scored too, but the objective does not see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from prefopt.losses import ConflictFree, Loss
from prefopt.losses.scores import Role
from prefopt.safety.errors import UsageError
from prefopt.scoring.rows import RowBatch
from prefopt.trainer.metrics import PART_OF_LOSS, RunningMeans
from prefopt.trainer.output_slot import OutputSlot

OF_ANSWERS = ("mean_score", "accuracy", "pass_at_k", "majority_vote", "win_rate", "length_controlled_win_rate")
"""Metrics of `prefopt rounds run` and `prefopt evaluate`, which no evaluation of a trainer has."""


def examples_that_count(accelerator: Any, rows: RowBatch) -> int | None:
    """How many of this process's examples count, the first ones; None for all.

    The length of streamed data is unknown, so nothing is known about its last batch.
    """
    state = accelerator.gradient_state
    loader = state.active_dataloader
    if loader is None or not state.end_of_dataloader or state.remainder <= 0:
        return None
    each = loader.total_batch_size // accelerator.num_processes
    mine: int = min(max(state.remainder - accelerator.process_index * each, 0), each)
    return mine if mine < int(rows.examples.max()) + 1 else None


def add_loss(
    means: RunningMeans, objective: Loss, loss: Tensor, slot: OutputSlot, rows: RowBatch, processes: int
) -> None:
    """Add a batch to the mean over examples, in which each process's loss is weighted by its number of examples.

    The mean of the losses over processes is that of all examples together. For pairs each loss is a mean over the
    process's own examples; for single completions it is a sum, divided by the processes' mean count. Then each term
    of the objective is averaged over the completions that it uses; a batch may hold none of them.

    Args:
        loss: of the batch, auxiliary losses included.
        processes: how many there are; all of them must call this.
    """
    if rows.paired:
        count = rows.example_count
        means.add("loss", loss * count, torch.tensor(count))
        return
    counts = {role.field: len(rows.rows_of(role)) for role in (Role.CHOSEN, Role.REJECTED)}
    objective = objective.loss if isinstance(objective, ConflictFree) else objective
    output, every = slot.get(), tuple(counts)
    # Auxiliary losses, such as experts' load balancing, are about all completions.
    parts = [(loss - output.loss, every)]
    roles = [term.roles if set(term.roles) <= set(every) else every for _, _, term in objective.terms()]
    parts += zip(output.terms or (output.loss,), roles, strict=True)
    everyone = gather_object([counts])
    for number, (value, about) in enumerate(parts):
        mine, all_of_them = (sum(some[role] for some in of for role in about) for of in ([counts], everyone))
        share = all_of_them / processes
        means.add(f"{PART_OF_LOSS}{number}", value * share, torch.tensor(mine))


def check_best_metric(wanted: str | None, metrics: Mapping[str, float]) -> None:
    """As `LossMixin.check_best_metric`, for the option `metric_for_best_model`."""
    if wanted is None or f"eval_{wanted.removeprefix('eval_')}" in metrics:
        return
    names = [name.removeprefix("eval_") for name in metrics if not name.endswith(("_runtime", "_per_second"))]
    drawn = ""
    if wanted.removeprefix("eval_") in OF_ANSWERS:
        drawn = ". It is measured on drawn answers: rounds choose their best model by it (prefopt rounds run ... "
        drawn += f"--best_round_by {wanted.removeprefix('eval_')}), and prefopt evaluate compares saved models"
    raise UsageError(
        f"metric_for_best_model={wanted!r} is not a metric of evaluations, which have {', '.join(names)}{drawn}"
    )
