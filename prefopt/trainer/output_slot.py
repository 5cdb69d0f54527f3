"""How a training or evaluation step gets the objective's output for its batch."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.losses import LossOutput
from prefopt.safety.errors import UsageError

SLOT = "output_slot"
"""Key of the slot in a batch: between a step and its loss, transformers' methods pass on only the batch."""


@dataclass
class OutputSlot:
    """Put into a batch by the step, and filled by `_compute_loss`."""

    output: LossOutput | None = None

    def get(self) -> LossOutput:
        """The output.

        Raises:
            UsageError: if an overridden `compute_loss` has called `super().compute_loss` on another batch.
        """
        if self.output is None:
            raise UsageError(
                f"the batch was passed to super().compute_loss without its entry {SLOT!r}: an overridden compute_loss "
                "must pass on every entry of the batch that it does not know"
            )
        return self.output
