"""A reference that follows the policy one step behind, as Humanline's does."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from trl.trainer.callbacks import SyncRefModelCallback

from prefopt.safety.errors import UsageError


class SyncBeforeStep(SyncRefModelCallback):
    """Moves the reference toward the policy right before the optimizer changes the policy, where TRL does so after it.

    The gradient of a step is then taken at ratios of one step's movement; after TRL's, every step, they are all 0.
    Source: ContextualAI/HALOs, train/trainers.py (sync_reference_with_policy), for arXiv 2509.24207.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if (state.global_step + 1) % args.ref_model_sync_steps == 0:
            policy = self.accelerator.unwrap_model(more["model"])
            self.sync_target_model(policy, self.ref_model, args.ref_model_mixup_alpha)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Nothing: the reference has moved already."""


def sync_before_step(trainer: Any) -> None:
    """Replace TRL's callback by `SyncBeforeStep`, if `sync_ref_before_step` asks for it.

    Raises:
        UsageError: under DeepSpeed, whose engine makes its step with the backward pass.
    """
    if not getattr(trainer.args, "sync_ref_before_step", False):
        return
    if trainer.accelerator.distributed_type is DistributedType.DEEPSPEED:
        raise UsageError(
            "sync_ref_before_step does not work with DeepSpeed, which changes the weights at the end of the backward "
            "pass: leave it out, or use FSDP or DDP"
        )
    trainer.remove_callback(SyncRefModelCallback)
    trainer.add_callback(SyncBeforeStep(trainer.ref_model, trainer.accelerator))
