"""An expression as a loss of `prefopt.losses`. A file of `prefopt discover export` has a subclass of it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from prefopt.discovery.grammar import evaluate
from prefopt.discovery.read import read
from prefopt.losses.direct import ReferencePairLoss
from prefopt.losses.distributed import global_moments
from prefopt.losses.scores import PreferenceBatch


class ExpressionLoss(ReferencePairLoss):
    """A loss of the scaled margin, written as an expression.

    loss = expression at x = beta d

    Class attributes:
        expression: its text, in the grammar of `prefopt.discovery`.

    Args:
        beta: scale of the margin.

    Needs: reference sums. Statistics of the batch are over the global batch.
    """

    expression: ClassVar[str] = "softplus(-x)"

    def __init__(self, beta: float = 0.1):
        super().__init__(beta)
        self._tree = read(self.expression)
        self.batchwise = self._tree.batchwise

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        x = self.scaled_margin(batch)
        weights = self._weights(batch)

        def moments(values: Tensor) -> tuple[Tensor, Tensor]:
            mean, variance, _ = global_moments(values, weights)
            return mean, variance

        return evaluate(self._tree, x, x.new_full((), self.beta), moments).expand_as(x)
