"""How a `trl.DPOTrainer` makes its `Scorer`: from its models, engine, precision and options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object, is_peft_model
from trl.models.utils import unwrap_model_for_generation

from prefopt.data.encodings import text_tokenizer
from prefopt.losses import Loss
from prefopt.safety.errors import UsageError
from prefopt.scoring.adapters import fuse_lora
from prefopt.scoring.cache import ReferenceCache, cache_root
from prefopt.scoring.fingerprint import fingerprint, is_sharded
from prefopt.scoring.layout import Layout
from prefopt.scoring.rows import RowBatch
from prefopt.scoring.sampling import with_samples
from prefopt.scoring.scorer import Scorer
from prefopt.trainer.saving.state import CacheWriter

logger = logging.getLogger(__name__)


def make_scorer(trainer: Any, objective: Loss, previous_model: Any, own_collator: bool) -> Scorer:
    """The scorer of a trainer's batches.

    Args:
        trainer: set up by TRL.
        objective: its loss.
        previous_model: the previous iterate, if one was passed.
        own_collator: whether `PreferenceCollator` makes the batches.
    """
    return Scorer(
        objective,
        policy=trainer.model,
        reference=trainer.ref_model,
        previous=None if previous_model is None else _frozen(trainer, previous_model),
        layout=make_layout(trainer),
        cache=_open_cache(trainer, own_collator),
        # Columns of an earlier run with another reference would be mistaken for this one's.
        trusts_data=trainer.args.precompute_ref_log_probs,
        policy_options={"output_router_logits": True} if getattr(trainer, "aux_loss_enabled", False) else {},
        autocast=trainer.accelerator.autocast,
    )


def make_layout(trainer: Any) -> Layout:
    """How a trainer's models are called."""
    args, accelerator = trainer.args, trainer.accelerator
    name: Any = getattr(args, "layout", "auto")
    if getattr(trainer, "aux_loss_enabled", False) and name != "padded":
        logger.warning("padded layout: the load-balancing loss of experts is computed over padded rows")
        name = "padded"
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    compiled = bool(args.torch_compile)
    if not sharded and not compiled and is_peft_model(trainer.model):
        fuse_lora(trainer.model)
    return Layout(
        name,
        gather=lambda value: gather_object([value]),
        one_call=sharded or accelerator.num_processes > 1,
        compiled=compiled,
        half=accelerator.mixed_precision != "no",
        max_length=args.max_length,
    )


def _open_cache(trainer: Any, own_collator: bool) -> ReferenceCache | None:
    where = getattr(trainer.args, "reference_cache", "off")
    if where == "off":
        return None
    if not own_collator:
        raise UsageError(f"reference_cache={where!r} is for text: this run has its own collator")
    accelerator = trainer.accelerator
    reference = accelerator.unwrap_model(trainer.model if trainer.ref_model is None else trainer.ref_model)
    adapter = reference.active_adapter if trainer.ref_model is None and is_peft_model(reference) else None
    precision = f"{reference.dtype} {accelerator.mixed_precision}"
    if accelerator.mixed_precision != "no":
        # These cast the weights themselves; autocast casts the inputs of each operation.
        precision += " deepspeed" if trainer.is_deepspeed_enabled else ""
        precision += " fsdp" if trainer.is_fsdp_enabled else ""
    # Complete weights come from the main process in the end: FSDP may leave the others empty until it wraps.
    takes_part = is_sharded(reference) or accelerator.is_main_process
    name: str = gather_object([fingerprint(reference, adapter, precision) if takes_part else ""])[0]
    root = cache_root() if where == "auto" else Path(where)
    cache = ReferenceCache(root / name, {"model": reference.config._name_or_path, "precision": precision})
    trainer.add_callback(CacheWriter(cache, accelerator.wait_for_everyone))
    return cache


def _frozen(trainer: Any, previous_model: Any) -> Any:
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise UsageError(
            "previous_model is not sharded, so it cannot be used with DeepSpeed or FSDP: put its log-probabilities "
            "into the data as prev_chosen_logps and prev_rejected_logps"
        )
    return previous_model.requires_grad_(False).eval().to(trainer.accelerator.device)


def draw_samples(trainer: Any, model: Any, rows: RowBatch) -> RowBatch:
    """A batch with a completion sampled from the policy for each prompt, for objectives that need them."""
    tokenizer = text_tokenizer(trainer.processing_class)
    most = getattr(trainer.args, "sample_max_new_tokens", 64)
    with unwrap_model_for_generation(model, trainer.accelerator) as generator, trainer.accelerator.autocast():
        ends = generator.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        return with_samples(rows, generator, most, tokenizer.pad_token_id, ends)
