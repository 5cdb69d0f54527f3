"""Which of the examples a term is about, where pairs to forget and rows to retain share a batch.

A numeric column `forget` says it: 1 for what is to be forgotten, 0 for what is to be retained. An objective on pairs,
whose forget set has two completions a row, gets its retain term this way:
`20*on_forget(dpo(beta=0.1)) + on_retain(sft(nll='token'))`.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefopt.losses.base import Loss
from prefopt.losses.distributed import global_sum
from prefopt.losses.registry import register
from prefopt.losses.scores import FORGET, PreferenceBatch, Scores
from prefopt.losses.wrappers import Wrapper


class OnPart(Wrapper):
    """A loss on the examples whose column `forget` has one value; the others count as absent.

    Values are scaled so that the mean over the batch of all processes is the mean over the part.
    """

    batchwise = True
    of_forget: ClassVar[bool]

    def __init__(self, loss: Loss):
        super().__init__(loss)
        self.columns = tuple(dict.fromkeys([*loss.columns, FORGET]))
        self.limits = {**loss.limits, FORGET: (0.0, 1.0)}

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        roles = {role: scores for role in self.roles if (scores := batch.role(role)) is not None}
        inner = {role: self._weighted(scores) for role, scores in roles.items()}
        values = self.inner(replace(batch, **inner))  # type: ignore[arg-type]
        marks = [self._marks(scores) for role, scores in roles.items() if not self.paired or role == self.roles[0]]
        marked = torch.cat(marks).to(values)
        count, part = global_sum(values.new_tensor(float(len(values)))), global_sum(marked.sum())
        return values * marked * count / part.clamp(min=1)

    def _marks(self, scores: Scores) -> Tensor:
        """(N,) 1 for the examples of the part, else 0."""
        return ((scores.columns[FORGET] > 0.5) == self.of_forget).to(scores.logps)

    def _weighted(self, scores: Scores) -> Scores:
        weight, marks = scores.weight, self._marks(scores)
        return replace(scores, columns={**scores.columns, "weight": marks if weight is None else weight * marks})

    def _metrics(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        parts: dict[str, Any] = {
            role: _selected(scores, self._marks(scores) > 0)
            for role in self.roles
            if (scores := batch.role(role)) is not None
        }
        return super()._metrics(PreferenceBatch(**parts, paired=batch.paired))


def _selected(scores: Scores, rows: Tensor) -> Scores:
    values = {field.name: getattr(scores, field.name) for field in fields(scores)}
    tensors: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
    return replace(scores, **tensors, columns={name: column[rows] for name, column in scores.columns.items()})


@register("on_forget")
class OnForget(OnPart):
    """A loss on the examples to forget alone: those with `forget` = 1.

    loss = mean of the loss over the examples with forget = 1, in the batch of all processes

    Args:
        loss: the loss, such as dpo with an "I don't know" as chosen and the true answer as rejected.

    Needs: what `loss` needs, and a numeric column `forget`.
    Limits: without an example of the part the loss is 0.
    With accumulated batches each one takes its own mean, as token means do; `paired_retain` gives all of them equally
    many examples of both parts.
    """

    formula = "mean of loss over examples with forget = 1"
    of_forget = True


@register("on_retain")
class OnRetain(OnPart):
    """A loss on the examples to retain alone: those with `forget` = 0.

    loss = mean of the loss over the examples with forget = 0, in the batch of all processes

    Args:
        loss: the loss, such as sft or kl_retain on their chosen completions.

    Needs: what `loss` needs, and a numeric column `forget`.
    Limits: without an example of the part the loss is 0.
    """

    formula = "mean of loss over examples with forget = 0"
    of_forget = False
