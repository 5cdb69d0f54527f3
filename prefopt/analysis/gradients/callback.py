"""Gradient entanglement inside a trainer, every so many steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerCallback

from prefopt.analysis.gradients.entangled import Entanglement, entanglement
from prefopt.analysis.gradients.probes import PROBES, Probes, draw_probes
from prefopt.analysis.gradients.push import refuse_unpushable
from prefopt.data.encodings import text_tokenizer
from prefopt.losses import Loss
from prefopt.safety.errors import UsageError
from prefopt.scoring.model import peeled
from prefopt.trainer.config import resolve_objective


class EntanglementCallback(TrainerCallback):  # type: ignore[misc]
    """Measures gradient entanglement on probe pairs: `trainer.add_callback(EntanglementCallback(trainer))`.

    For `PreferenceTrainer` and plain `trl.DPOTrainer`, on one device or under DDP, where every process measures the
    same probes. It measures before the first step and then every `every` steps, and logs a line of its own with
    `entanglement/...` (docs/numbers.md), which trackers receive too. `HealthCallback` reads those lines.

    A measurement of 16 pairs takes as long as training on about 40 (forward passes under policy and reference, then
    forward and backward passes row by row), and the memory of two gradients of the trainable parameters.

    Args:
        trainer: with pairs as its held-out set; without one, probes come from the training set.
        every: steps between measurements.
        probes: pairs to measure on.
        seed: of their draw.

    Attributes:
        measured: (step, `Entanglement`) of each measurement.

    Raises:
        UsageError: for a loss, data or an engine that it cannot measure.
    """

    def __init__(self, trainer: Any, every: int = 100, probes: int = PROBES, seed: int = 0):
        if every < 1 or probes < 1:
            raise UsageError(f"every and probes must be 1 or more, got {every} and {probes}")
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise UsageError("gradient entanglement needs whole gradients, which DeepSpeed and FSDP shard")
        self._trainer, self._every = trainer, every
        self._loss = _loss_of(trainer)
        self._probes = _probes_of(trainer, self._loss, probes, seed)
        self.measured: list[tuple[int, Entanglement]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.measured.clear()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._every == 0:
            trainer = self._trainer
            measured = entanglement(
                peeled(trainer.model), self._probes.batch, self._loss, reference=trainer.ref_model,
                autocast=trainer.accelerator.autocast(),
            )  # fmt: skip
            self.measured.append((state.global_step, measured))
            # Not trainer.log, which would end the running means of the next log line.
            Trainer.log(trainer, measured.metrics())


def _loss_of(trainer: Any) -> Loss:
    """The objective of our trainer, or the expression of TRL's options."""
    loss = getattr(trainer, "objective", None) or resolve_objective(None, trainer.args)
    if loss is None:
        raise UsageError("gradient entanglement needs a loss expression, and TRL computes this trainer's loss itself")
    refuse_unpushable(loss)
    return loss


def _probes_of(trainer: Any, loss: Loss, count: int, seed: int) -> Probes:
    rows, of = trainer.eval_dataset, "held-out"
    if isinstance(rows, Mapping):
        rows = next(iter(rows.values()), None)
    if rows is None:
        rows, of = trainer.train_dataset, "training"
    args = trainer.args
    return draw_probes(
        rows, loss, text_tokenizer(trainer.processing_class).pad_token_id, count=count, seed=seed, of=of,
        max_length=args.max_length, truncation_mode=args.truncation_mode,
        trust_logps=args.precompute_ref_log_probs,
    )  # fmt: skip
