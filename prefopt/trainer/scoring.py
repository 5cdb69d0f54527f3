"""How a `trl.DPOTrainer` makes its `Scorer`: from its models, engine, precision and options."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object, is_peft_model
from torch import Tensor
from trl.models.utils import unwrap_model_for_generation

from prefopt.losses import Loss
from prefopt.safety.errors import UsageError
from prefopt.scoring.adapters import fuse_lora
from prefopt.scoring.cache import ReferenceCache, cache_root
from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.fingerprint import fingerprint, is_sharded
from prefopt.scoring.layout import Layout
from prefopt.scoring.rows import RowBatch
from prefopt.scoring.sampling import with_samples
from prefopt.scoring.scorer import Scored, Scorer
from prefopt.trainer.saving.state import CacheWriter

logger = logging.getLogger(__name__)


class ScoringMixin:
    """The part of `LossMixin` that makes and calls a `Scorer`."""

    objective: Loss | None
    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    processing_class: Any
    _own_collator: PreferenceCollator | None
    _previous_model: Any
    _scorer: Scorer | None

    def _make_layout(self) -> Layout:
        name: Any = getattr(self.args, "layout", "auto")
        if getattr(self, "aux_loss_enabled", False) and name != "padded":
            logger.warning("padded layout: the load-balancing loss of experts is computed over padded rows")
            name = "padded"
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]
        compiled = bool(self.args.torch_compile)
        if not sharded and not compiled and is_peft_model(self.model):
            fuse_lora(self.model)
        return Layout(
            name,
            gather=lambda found: gather_object([found]),
            one_call=sharded or self.accelerator.num_processes > 1,
            compiled=compiled,
            half=self.accelerator.mixed_precision != "no",
            max_length=self.args.max_length,
        )

    def _open_cache(self, objective: Loss) -> ReferenceCache | None:
        where = getattr(self.args, "reference_cache", "off")
        if where == "off":
            return None
        if self._own_collator is None:
            raise UsageError(f"reference_cache={where!r} is for text: this run has a collator of its own")
        reference = self.accelerator.unwrap_model(self.model if self.ref_model is None else self.ref_model)
        adapter = reference.active_adapter if self.ref_model is None and is_peft_model(reference) else None
        precision = f"{reference.dtype} {self.accelerator.mixed_precision}"
        if self.accelerator.mixed_precision != "no":
            # These cast the weights themselves, where autocast casts what goes into each operation.
            precision += " deepspeed" if self.is_deepspeed_enabled else ""  # type: ignore[attr-defined]
            precision += " fsdp" if self.is_fsdp_enabled else ""  # type: ignore[attr-defined]
        # Weights that are whole are the main process's in the end: FSDP may leave the others' empty until it wraps.
        takes_part = is_sharded(reference) or self.accelerator.is_main_process
        name: str = gather_object([fingerprint(reference, adapter, precision) if takes_part else ""])[0]
        root = cache_root() if where == "auto" else Path(where)
        cache = ReferenceCache(root / name, {"model": reference.config._name_or_path, "precision": precision})
        self.add_callback(CacheWriter(cache, self.accelerator.wait_for_everyone))  # type: ignore[attr-defined]
        return cache

    def _make_previous(self, objective: Loss, previous_model: Any) -> Any:
        if previous_model is None:
            return None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # type: ignore[attr-defined]
            raise UsageError(
                "previous_model is not sharded, so it does not go with DeepSpeed or FSDP: put its log-probabilities "
                "into the data as prev_chosen_logps and prev_rejected_logps"
            )
        return previous_model.requires_grad_(False).eval().to(self.accelerator.device)

    def _make_scorer(self, objective: Loss, layout: Layout, cache: ReferenceCache | None) -> Scorer:
        return Scorer(
            objective,
            policy=self.model,
            reference=self.ref_model,
            previous=self._previous_model,
            layout=layout,
            cache=cache,
            # Columns of an earlier run with another reference would be taken for this one's.
            trusts_data=self.args.precompute_ref_log_probs,
            policy_options={"output_router_logits": True} if getattr(self, "aux_loss_enabled", False) else {},
            autocast=self.accelerator.autocast,
        )

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed reference log-probabilities of a collated batch, for TRL's precomputation: (E,) chosen, rejected.

        For unpaired data both are those of the single completions, in row order.
        """
        if self.objective is None:
            scores: tuple[Tensor, Tensor] = super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]
            return scores
        rows = RowBatch.of(inputs)
        # TRL calls this while it sets up, where nothing but the models is known.
        scorer = self._scorer or Scorer(self.objective, self.model, self.ref_model, autocast=self.accelerator.autocast)
        logps = scorer.run_reference(rows, model).logps.sum(-1)
        if not rows.paired:
            return logps, logps
        chosen, rejected = logps.chunk(2)
        return chosen, rejected

    def _score(self, model: Any, rows: RowBatch, all_logits: bool) -> Scored:
        assert self.objective is not None
        assert self._scorer is not None
        self._scorer.policy = self.model  # FSDP wraps it when training starts
        if "sampled" in self.objective.roles:
            rows = self._with_samples(model, rows)
        every_role = all_logits or not self.model.training
        return self._scorer.score(model, rows, every_role=every_role, all_logits=all_logits)

    def _with_samples(self, model: Any, rows: RowBatch) -> RowBatch:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        most = getattr(self.args, "sample_max_new_tokens", 64)
        with unwrap_model_for_generation(model, self.accelerator) as generator, self.accelerator.autocast():
            ends = generator.generation_config.eos_token_id
            ends = tokenizer.eos_token_id if ends is None else ends
            return with_samples(rows, generator, most, tokenizer.pad_token_id, ends)
