"""How a training or evaluation step learns what the objective made of its batch."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.losses import LossOutput
from prefopt.safety.errors import UsageError

SLOT = "output_slot"
"""Where a batch carries its slot: between a step and its loss, transformers' methods hand on the batch alone."""


@dataclass
class OutputSlot:
    """Is put into a batch by the step, and filled by `_compute_loss`."""

    output: LossOutput | None = None

    def get(self) -> LossOutput:
        """The output.

        Raises:
            UsageError: if an overridden `compute_loss` has called `super().compute_loss` on another batch.
        """
        if self.output is None:
            raise UsageError(
                f"the batch came to super().compute_loss without its entry {SLOT!r}: an overridden compute_loss must "
                "hand on every entry of the batch that it does not know"
            )
        return self.output
