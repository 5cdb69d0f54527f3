"""The collator that an objective needs: a trainer's, and the one behind the batch that a dry run shows."""

from __future__ import annotations

from typing import Any

from trl import DPOConfig

from prefopt.losses import Loss
from prefopt.scoring.collate import PreferenceCollator


def collator_for(objective: Loss | None, args: Any, pad_token_id: int | None = None) -> PreferenceCollator:
    """The collator of a run on text.

    Args:
        objective: the loss; None where TRL computes it, which needs rows alone.
        args: a `PreferenceConfig` or `trl.DPOConfig`; None for TRL's defaults.
        pad_token_id: the tokenizer's; a trainer sets it once it has its tokenizer.
    """
    args = DPOConfig(output_dir="unused", use_cpu=True, bf16=False) if args is None else args
    return PreferenceCollator.for_loss(
        objective, pad_token_id, max_length=args.max_length, truncation_mode=args.truncation_mode,
        pad_to_multiple_of=args.pad_to_multiple_of,
    )  # fmt: skip
