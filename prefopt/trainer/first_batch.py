"""Checks of the first training batch: the policy starts as the reference, and no token attends to later ones."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from prefopt.losses import Loss, Need, PreferenceBatch
from prefopt.safety.errors import UsageError
from prefopt.scoring.causal import looks_ahead
from prefopt.scoring.model import unwrapped
from prefopt.scoring.rows import RowBatch

logger = logging.getLogger(__name__)


class FirstBatch:
    """Looks at the first training batch, before any update.

    Args:
        trainer: the trainer; its model, arguments, state and accelerator are read.
        objective: its loss.
        reference_is_initial_policy: whether the reference is the policy as it starts.
    """

    def __init__(self, trainer: Any, objective: Loss, reference_is_initial_policy: bool):
        self._trainer = trainer
        self._checked = False
        self._compares = Need.REFERENCE in objective.needs and reference_is_initial_policy

    @property
    def _mode(self) -> str:
        mode: str = getattr(self._trainer.args, "step0_check", "error")
        return mode

    def check_causal(self, model: nn.Module, rows: RowBatch) -> None:
        """Runs before the batch is scored, as some models (RWKV) change weights when their mode changes."""
        if self._checked or not self._trainer.model.training or self._mode == "off" or "pixel_values" in rows.extra:
            return
        if not (gap := looks_ahead(model, rows)):
            return
        config: Any = getattr(unwrapped(model), "config", None)
        decoder = " Set is_decoder=True in its configuration, or use" if hasattr(config, "is_decoder") else " Use"
        _refuse(
            f"{type(unwrapped(model)).__name__} sees tokens that come later (with another last token, the logits "
            f"before it differ by {gap:.1%}), so its outputs are not probabilities of the next token.{decoder} a "
            "causal language model (an architecture that ends in ForCausalLM). To continue anyway, set step0_check to "
            "'warn' or 'off'",
            self._mode,
        )

    def check_reference(self, batch: PreferenceBatch) -> None:
        """Before the first update the policy must equal the reference; otherwise every ratio of the run is wrong."""
        trainer = self._trainer
        if self._checked or not trainer.model.training:
            return
        self._checked = True
        # Dropout that is left on by choice makes the two differ.
        mode = self._mode if trainer.args.disable_dropout else "warn"
        if mode == "off" or not self._compares or trainer.state.global_step > 0:
            return
        worst = torch.zeros((), device=trainer.accelerator.device)
        for scores in (batch.chosen, batch.rejected, batch.candidate):
            if scores is not None and scores.ref_logps is not None and len(scores):
                gap = (scores.ratios.detach() / scores.lengths.clamp(min=1)).abs().max()
                worst = torch.maximum(worst, gap.float())
        worst_gap = float(trainer.accelerator.gather(worst.reshape(1)).max())
        dtype = trainer.model.dtype
        tolerance = getattr(trainer.args, "step0_tolerance", None)
        if tolerance is None:
            half = dtype in (torch.float16, torch.bfloat16) or trainer.accelerator.mixed_precision != "no"
            tolerance = 0.05 if half else 1e-3
        # Values that are not finite are left to the check of the loss, which names the examples.
        if worst_gap <= tolerance or not math.isfinite(worst_gap):
            return
        _refuse(
            f"policy and reference differ before the first update: up to {worst_gap:.3g} nats per token, "
            f"{tolerance:g} accepted. Every log-ratio of this run would be off by as much. Usual causes: dropout that "
            "is still on (attention_dropout, an adapter's), an adapter that does not start at zero "
            f"(init_lora_weights, init_weights), a reference in another dtype (policy: {dtype}) or from another "
            "checkpoint (that of a model changed in memory is loaded as it was). Pass ref_model=... to use a "
            "different reference on purpose, raise step0_tolerance, or set step0_check to 'warn' or 'off'",
            mode,
        )


def _refuse(message: str, mode: str) -> None:
    if mode == "error":
        raise UsageError(message)
    logger.warning(message)
