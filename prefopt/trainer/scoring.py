"""How the trainer scores: which model is called, in which layout, and where the reference's numbers come from.

What is scored is decided in `prefopt.scoring`; here its requests meet adapters, wrappers, autocast and the reference
cache of a `trl.DPOTrainer`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor
from trl.models.utils import unwrap_model_for_generation

from prefopt.losses import Loss, PreferenceBatch
from prefopt.losses.scores import EMBEDDINGS, GIVEN_LOGPS
from prefopt.safety.errors import UsageError
from prefopt.scoring import Extras, TokenScores
from prefopt.scoring.adapters import fuse_lora
from prefopt.scoring.cache import ReferenceCache, cache_root
from prefopt.scoring.collate import COLUMN_PREFIX, COUNTED, SIZES, PreferenceCollator, select_rows
from prefopt.scoring.fingerprint import fingerprint, is_sharded
from prefopt.scoring.layout import Layout
from prefopt.scoring.logprobs import BARE
from prefopt.scoring.sampling import with_samples
from prefopt.scoring.score import Models, score_batch
from prefopt.trainer.saving.state import CacheWriter

logger = logging.getLogger(__name__)

_NOT_FOR_THE_MODEL = {"completion_mask", "roles", "examples", "paired", COUNTED, SIZES, *GIVEN_LOGPS, *EMBEDDINGS}


class ScoringMixin:
    """The part of `LossMixin` that turns a collated batch into a `PreferenceBatch`."""

    objective: Loss | None
    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    processing_class: Any
    _own_collator: PreferenceCollator | None
    _previous_model: Any
    _layout: Layout
    _reference_cache: ReferenceCache | None
    _share: float
    _in_parts_of: int | None

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

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed reference log-probabilities of a collated batch, for TRL's precomputation: (E,) chosen, rejected.

        For unpaired data both are those of the single completions, in row order.
        """
        if self.objective is None:
            scores: tuple[Tensor, Tensor] = super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]
            return scores
        logps = self._reference_scores(model, inputs).logps.sum(-1)
        if not bool(inputs.get("paired", True)):
            return logps, logps
        chosen, rejected = logps.chunk(2)
        return chosen, rejected

    def _model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in inputs.items() if k not in _NOT_FOR_THE_MODEL and not k.startswith(COLUMN_PREFIX)}

    def _reference_scores(
        self, model: Any, inputs: Mapping[str, Any], keep_logits: bool = False, all_logits: bool = False
    ) -> TokenScores:
        """Token scores under the frozen reference: its own model, or the policy with its adapter put aside."""
        with torch.no_grad(), self._as_reference(), self.accelerator.autocast():
            scores, _ = self._layout.score(
                model, inputs, self._model_inputs(inputs), extras=BARE, keep_logits=keep_logits,
                all_logits=all_logits, in_parts_of=self._in_parts_of,
            )  # fmt: skip
        return scores

    def _cached_reference(self, cache: ReferenceCache, model: Any, inputs: Mapping[str, Any]) -> TokenScores:
        def compute(rows: Tensor) -> Tensor:
            some = select_rows(inputs, rows)
            # The layout tries itself out on the first two examples of what it is given.
            some["examples"] = some["examples"].unique(return_inverse=True)[1]
            return self._reference_scores(model, some).logps

        alone = self.accelerator.num_processes == 1
        logps = cache.scores(inputs, compute, bool if alone else lambda missing: any(gather_object([missing])))
        mask = inputs["completion_mask"][:, 1:].bool()
        return TokenScores(logps, torch.zeros_like(logps), torch.zeros_like(mask), mask)

    def _previous_scores(self, inputs: Mapping[str, Any]) -> TokenScores:
        with torch.no_grad(), self.accelerator.autocast():
            scores, _ = self._layout.score(
                self._previous_model, inputs, self._model_inputs(inputs), extras=BARE, in_parts_of=self._in_parts_of
            )
        return scores

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        if self.ref_model is not None or not is_peft_model(self.model):
            yield
            return
        peft_model = self.accelerator.unwrap_model(self.model)
        with _same_trainable(peft_model):
            if "ref" not in peft_model.peft_config:
                with peft_model.disable_adapter():
                    yield
                return
            # Training continues from an adapter: TRL keeps its frozen copy under this name.
            active = peft_model.active_adapter
            peft_model.set_adapter("ref")
            try:
                yield
            finally:
                peft_model.set_adapter(active)

    def _score(self, model: Any, inputs: Mapping[str, Any], all_logits: bool) -> tuple[PreferenceBatch, Any]:
        assert self.objective is not None
        outputs: Any = None

        def policy(rows: Mapping[str, Any], extras: Extras, reference: TokenScores | None) -> TokenScores:
            nonlocal outputs
            model_inputs = self._model_inputs(rows)
            if getattr(self, "aux_loss_enabled", False):
                model_inputs["output_router_logits"] = True
            scores, made = self._layout.score(
                model, rows, model_inputs, extras=extras, reference=reference, all_logits=all_logits,
                in_parts_of=self._in_parts_of,
            )  # fmt: skip
            # The rows that the loss is about come first; what comes after them carries no gradient.
            outputs = made if outputs is None else outputs
            return scores

        def reference(rows: Mapping[str, Any], keep_logits: bool) -> TokenScores:
            frozen = self.model if self.ref_model is None else self.ref_model
            if self._reference_cache is not None:
                return self._cached_reference(self._reference_cache, frozen, rows)
            # Distributions are compared in one layout, so the reference follows the policy's.
            return self._reference_scores(frozen, rows, keep_logits, all_logits)

        if not self.args.precompute_ref_log_probs:
            # Columns of an earlier run with another reference would be taken for this one's.
            inputs = {name: value for name, value in inputs.items() if name not in GIVEN_LOGPS[:2]}
        models = Models(policy, reference, None if self._previous_model is None else self._previous_scores)
        if "sampled" in self.objective.roles:
            inputs = self._with_samples(model, inputs)
        if not all_logits:
            self._layout.meet(model, inputs, self._model_inputs(inputs))
        batch, scores, scored = score_batch(
            inputs, self.objective, models, every_role=all_logits or not self.model.training
        )
        if self._share > 0:
            self._record_tokens(scores, scored)  # type: ignore[attr-defined]
        return batch, outputs

    def _with_samples(self, model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        most = getattr(self.args, "sample_max_new_tokens", 64)
        with unwrap_model_for_generation(model, self.accelerator) as generator, self.accelerator.autocast():
            ends = generator.generation_config.eos_token_id
            ends = tokenizer.eos_token_id if ends is None else ends
            return with_samples(inputs, generator, most, tokenizer.pad_token_id, ends)


@contextlib.contextmanager
def _same_trainable(model: torch.nn.Module) -> Iterator[None]:
    """What wants gradients afterwards is what wanted them before: PEFT's switching of adapters unfreezes them."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, wanted in before:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
