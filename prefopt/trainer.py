"""The only file that knows TRL: `trl.DPOTrainer` with any objective of `prefopt.losses` in place of its own.

`LossMixin` overrides what has kept still between TRL releases: `compute_loss`, `log`, the collator, dataset
preparation and `compute_ref_log_probs`. Scoring lives in `prefopt.scoring`, objectives in `prefopt.losses`; nothing
here computes either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from prefopt.data import kind, normalise, tokenize_dataset
from prefopt.losses import Loss, LossOutput, Need, PreferenceBatch, parse
from prefopt.metrics import RunningMeans, batch_metrics, describe_non_finite
from prefopt.scoring import RowGroups, TokenScores, assemble_batch, score_rows
from prefopt.scoring.collate import COLUMN_PREFIX, PreferenceCollator, WithColumns

logger = logging.getLogger(__name__)

_NOT_FOR_THE_MODEL = {"completion_mask", "roles", "examples", "paired", "ref_chosen_logps", "ref_rejected_logps"}
_TRL_LOSS_OPTIONS = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
)


@dataclass
class PreferenceConfig(DPOConfig):
    """`trl.DPOConfig` with an objective. On a machine without an accelerator `bf16` is off unless asked for.

    Args:
        loss: a loss expression such as `dpo(beta=0.1) + 0.2*sft` (see `prefopt losses`). Hyperparameters stand inside
            it. Without one, TRL's own options (`loss_type`, `beta`, ...) choose the objective as they do in TRL.
        step0_check: the first training batch is scored before any update, when the policy must equal the reference.
            "error" stops a run in which it does not, "warn" says so and goes on, "off" does not look. Applies where
            the reference is the initial policy, not to a `ref_model` that is passed in.
        step0_tolerance: largest accepted difference of mean per-token log-probabilities, in nats. If None, 1e-3 in
            float32 and 0.05 in half precision.
    """

    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Use bfloat16 mixed precision. If not set: on where there is an accelerator, off on a CPU, where "
            "it is far slower than float32."
        },
    )
    loss: str | None = field(
        default=None,
        metadata={"help": "Loss expression, for example 'dpo(beta=0.1) + 0.2*sft'. `prefopt losses` lists the names."},
    )
    step0_check: str = field(
        default="error",
        metadata={
            "help": "What to do if policy and reference differ before the first update.",
            "choices": ["error", "warn", "off"],
        },
    )
    step0_tolerance: float | None = field(
        default=None,
        metadata={"help": "Largest accepted per-token difference between policy and reference at step 0, in nats."},
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not torch.accelerator.is_available():
            # TRL's default of bf16 is a hundred times slower than float32 on CPUs without bf16 units.
            self.bf16 = False
        super().__post_init__()
        if self.step0_check not in ("error", "warn", "off"):
            raise ValueError(f"step0_check must be 'error', 'warn' or 'off', got {self.step0_check!r}")
        if self.loss is not None:
            parse(self.loss)
            _refuse_trl_loss_options(self)


def _changed_trl_options(args: DPOConfig) -> dict[str, Any]:
    """TRL's loss options that differ from their defaults."""
    changed = {}
    for option in dataclasses.fields(args):
        if option.name in _TRL_LOSS_OPTIONS:
            factory = option.default_factory
            default = option.default if factory is dataclasses.MISSING else factory()
            if getattr(args, option.name) != default:
                changed[option.name] = getattr(args, option.name)
    return changed


def _refuse_trl_loss_options(args: DPOConfig) -> None:
    if changed := _changed_trl_options(args):
        listed = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise ValueError(
            f"{listed} would have no effect beside a loss expression: write hyperparameters inside it, as in "
            "loss='dpo(beta=0.2, label_smoothing=0.1)', or leave `loss` out to use TRL's options"
        )


def expression_from_trl_options(args: DPOConfig) -> str | None:
    """The loss expression that TRL's own options ask for, or None where only TRL implements them."""
    changed = _changed_trl_options(args)
    if set(changed) - {"loss_type", "loss_weights", "beta", "label_smoothing"}:
        return None
    beta = f"beta={args.beta!r}"
    known = {
        # Unlike TRL since 0.29, which drops the option without a word, sigmoid honours label_smoothing.
        "sigmoid": f"dpo({beta}, label_smoothing={args.label_smoothing!r})",
        "ipo": f"ipo({beta})",
        "hinge": f"hinge({beta})",
        "sft": "sft(nll='token')",
    }
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    if not set(types) <= set(known) or ("label_smoothing" in changed and "sigmoid" not in types):
        return None
    weights = args.loss_weights or [1.0] * len(types)
    return " + ".join(f"{weight!r}*{known[name]}" for name, weight in zip(types, weights, strict=True))


class LossMixin:
    """Gives a `trl.DPOTrainer` subclass a `loss` argument: `class Mine(LossMixin, TheirTrainer): ...`.

    Args:
        loss: a `Loss` or a loss expression. Without one, `args.loss` is used, then TRL's options in `args`; options
            that name an objective only TRL has are left to TRL altogether, its logging included.
    """

    objective: Loss | None
    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    state: Any
    data_collator: Any
    processing_class: Any
    _signature_columns: list[str] | None

    def __init__(self, *arguments: Any, loss: Loss | str | None = None, **keywords: Any) -> None:
        bound = _bind(super().__init__, arguments, keywords)
        args = bound.get("args")
        if args is None:
            # With no `args`, TRL makes itself a default DPOConfig.
            args = DPOConfig.__new__(DPOConfig)
            for option in dataclasses.fields(DPOConfig):
                if option.name in _TRL_LOSS_OPTIONS:
                    factory = option.default_factory
                    setattr(args, option.name, option.default if factory is dataclasses.MISSING else factory())
        self.objective = _resolve_objective(loss, args)
        self._train_means, self._eval_means = RunningMeans(), RunningMeans()
        self._tokens_seen: Any = 0
        self._start_checked = False
        self._own_collator: PreferenceCollator | None = None
        if self.objective is not None:
            if hasattr(args, "seed"):
                # An adapter's random weights are drawn while TRL sets up; TRL seeds that itself since 1.15 only.
                set_seed(args.seed)
            self._before_trl(self.objective, bound, args)
        super().__init__(**bound)
        if self.objective is not None:
            self.objective.to(self.accelerator.device)
            # Prompt learning puts tokens of its own before every row, so its policy never starts as the reference.
            self._reference_is_initial_policy = bound.get("ref_model") is None and not _learns_prompts(self.model)
            self._align_padding(bound.get("ref_model") is None)
            if self._own_collator is None and not isinstance(self.data_collator, WithColumns):
                self.data_collator = WithColumns(self.data_collator, self.objective.columns)

    def _before_trl(self, objective: Loss, bound: dict[str, Any], args: Any) -> None:
        """Settle what TRL's constructor already uses: the collator, and options that cannot go together."""
        if Need.MISMATCHED in objective.needs:
            if getattr(args, "per_device_train_batch_size", 2) < 2:
                raise ValueError(
                    f"{objective} moves completions to other examples' prompts within a batch: "
                    "per_device_train_batch_size must be at least 2"
                )
            if getattr(args, "precompute_ref_log_probs", False):
                raise ValueError(
                    f"{objective} scores other completions of the batch under the reference at every step, which "
                    "cannot be computed ahead: set precompute_ref_log_probs=False"
                )
        if Need.TOKENS in objective.needs and getattr(args, "precompute_ref_log_probs", False):
            raise ValueError(f"{objective} needs per-token values, but precompute_ref_log_probs keeps sums only")
        if getattr(args, "accelerator_config", None) is not None:
            # Dispatching joins and slices batches by their first dimension, here rows instead of examples. TRL turns
            # it off for a streamed training set only.
            args.accelerator_config.dispatch_batches = False
        dataset = bound.get("train_dataset")
        sample: dict[str, Any] = next(iter(dataset), {}) if isinstance(dataset, (Dataset, IterableDataset)) else {}
        _check_columns(objective, sample)
        if bound.get("data_collator") is None and not {"image", "images"} & set(sample):
            self._own_collator = bound["data_collator"] = PreferenceCollator(
                max_length=getattr(args, "max_length", None),
                truncation_mode=getattr(args, "truncation_mode", "keep_start"),
                pad_to_multiple_of=getattr(args, "pad_to_multiple_of", None),
                mismatched=Need.MISMATCHED in objective.needs,
                columns=objective.columns,
            )

    def _align_padding(self, own_reference: bool) -> None:
        """One padding token for policy and reference: some multimodal models embed images by way of it."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        for model in (self.model, self.ref_model if own_reference else None):
            if model is not None and hasattr(model, "config"):
                model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    # ---- data -----------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if self.objective is None:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)  # type: ignore[misc]
        if self._own_collator is not None:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            if getattr(args, "pad_token", None) is not None:
                if args.pad_token not in tokenizer.get_vocab():
                    raise ValueError(f"pad_token {args.pad_token!r} is not in the tokenizer's vocabulary")
                tokenizer.pad_token = args.pad_token
            self._own_collator.pad_token_id = tokenizer.pad_token_id
        with args.main_process_first(local=False, desc=f"preparing the {dataset_name} set"):
            if "prompt_ids" in next(iter(dataset)):
                return dataset
            dataset = normalise(dataset, transcripts=False)
            if self.objective.paired and kind(dataset) == "unpaired":
                raise ValueError(
                    f"{self.objective} compares two completions of one prompt, but the {dataset_name} set holds "
                    "single labelled completions (prompt, completion, label); use a loss for unpaired data, as kto"
                )
            dataset = tokenize_dataset(
                dataset, processing_class, getattr(args, "dataset_num_proc", None), dataset_name
            )
            return self._drop_overlong(dataset, args, dataset_name)

    def _drop_overlong(self, dataset: Any, args: Any, dataset_name: str) -> Any:
        """Without the rows whose prompt alone fills `max_length`, as TRL does, but not in silence."""
        limit = args.max_length
        if limit is None or args.truncation_mode != "keep_start":
            return dataset
        if not isinstance(dataset, Dataset):
            return dataset.filter(lambda example: len(example["prompt_ids"]) < limit)
        kept = [i for i, ids in enumerate(dataset["prompt_ids"]) if len(ids) < limit]
        if len(kept) == len(dataset):
            return dataset
        dropped = sorted(set(range(len(dataset))) - set(kept))
        shown = ", ".join(map(str, dropped[:10])) + (", ..." if len(dropped) > 10 else "")
        logger.warning(
            "dropped %d of %d rows of the %s set, whose prompts alone reach max_length=%d and leave no room for a "
            "completion (rows %s, from 0); raise max_length to keep them",
            *(len(dropped), len(dataset), dataset_name, limit, shown),
        )
        return dataset.select(kept)

    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if fresh and self.objective is not None and self._signature_columns is not None:
            more = ["completion_ids", "label", "weight", *self.objective.columns]
            self._signature_columns += [name for name in more if name not in self._signature_columns]

    # ---- scoring --------------------------------------------------------------------------------------------------

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

    def _reference_scores(self, model: Any, inputs: Mapping[str, Any]) -> TokenScores:
        """Token scores under the frozen reference: its own model, or the policy with its adapter put aside."""
        with torch.no_grad(), self._as_reference(), self.accelerator.autocast():
            scores, _ = score_rows(model, self._model_inputs(inputs), inputs["completion_mask"])
        return scores

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        if self.ref_model is not None or not is_peft_model(self.model):
            yield
            return
        peft_model = self.accelerator.unwrap_model(self.model)
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
        mask = inputs["completion_mask"]
        model_inputs = self._model_inputs(inputs)
        if getattr(self, "aux_loss_enabled", False):
            model_inputs["output_router_logits"] = True
        policy, outputs = score_rows(model, model_inputs, mask, all_logits=all_logits)
        groups = _row_groups(inputs)
        ref_token_logps = ref_logps = None
        if Need.REFERENCE in self.objective.needs:
            if "ref_chosen_logps" in inputs:
                ref_logps = _by_row(groups, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
            else:
                reference = self.model if self.ref_model is None else self.ref_model
                ref_token_logps = self._reference_scores(reference, inputs).logps
        self._record_tokens(policy, inputs, groups)
        batch = assemble_batch(groups, policy, self.objective.needs, ref_token_logps, ref_logps)
        return batch, outputs

    # ---- the loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.objective is None:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        try:
            batch, outputs = self._score(model, inputs, all_logits=return_outputs)
        except ValueError as error:
            if "mage features and image tokens do not match" not in str(error) or self.args.max_length is None:
                raise
            raise ValueError(
                f"max_length={self.args.max_length} cuts off image tokens while the image stays whole; raise "
                "max_length, or set it to None"
            ) from error
        self._check_start(batch)
        output: LossOutput = self.objective(batch)
        loss = output.loss
        if not bool(torch.isfinite(loss)):
            step = self.state.global_step
            raise FloatingPointError(describe_non_finite(batch, loss.item(), self._row_texts(inputs), step))
        if getattr(self, "aux_loss_enabled", False):
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss  # type: ignore[attr-defined]
            self._means.add("aux_loss", outputs.aux_loss.reshape(1))
        self._means.add_all(batch_metrics(batch, output))
        return (loss, outputs) if return_outputs else loss

    def _check_start(self, batch: PreferenceBatch) -> None:
        """Before the first update the policy is the reference; if it is not, every ratio of the run is off."""
        if self._start_checked or not self.model.training:
            return
        self._start_checked = True
        mode = getattr(self.args, "step0_check", "error")
        assert self.objective is not None
        needed = Need.REFERENCE in self.objective.needs and self._reference_is_initial_policy
        if mode == "off" or not needed or self.state.global_step > 0:
            return
        worst = torch.zeros((), device=self.accelerator.device)
        for scores in (batch.chosen, batch.rejected):
            if scores is not None and len(scores):
                gap = (scores.ratios.detach() / scores.lengths.clamp(min=1)).abs().max()
                worst = torch.maximum(worst, gap.float())
        worst_gap = float(self.accelerator.gather(worst.reshape(1)).max())
        tolerance = getattr(self.args, "step0_tolerance", None)
        if tolerance is None:
            half = self.model.dtype in (torch.float16, torch.bfloat16) or self.accelerator.mixed_precision != "no"
            tolerance = 0.05 if half else 1e-3
        if worst_gap <= tolerance:
            return
        message = (
            f"policy and reference differ before the first update: up to {worst_gap:.3g} nats per token, "
            f"{tolerance:g} accepted. Every log-ratio of this run would be off by as much. Usual causes: dropout that "
            "is still on (attention_dropout, an adapter's), an adapter that does not start at zero "
            f"(init_lora_weights), a reference in another dtype (policy: {self.model.dtype}) or from another "
            "checkpoint. Pass ref_model=... to use a different reference on purpose, raise step0_tolerance, or set "
            "step0_check to 'warn' or 'off'"
        )
        if mode == "error":
            raise ValueError(message)
        logger.warning(message)

    def _row_texts(self, inputs: Mapping[str, Any]) -> dict[str, list[str]]:
        groups = _row_groups(inputs)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        texts = {}
        for number, role in enumerate(("chosen", "rejected")):
            rows = (groups.roles == number).nonzero().squeeze(-1).tolist()
            texts[role] = [
                tokenizer.decode(inputs["input_ids"][row][inputs["attention_mask"][row].bool()]) for row in rows
            ]
        return texts

    # ---- metrics --------------------------------------------------------------------------------------------------

    @property
    def _means(self) -> RunningMeans:
        return self._train_means if self.model.training else self._eval_means

    def _record_tokens(self, policy: TokenScores, inputs: Mapping[str, Any], groups: RowGroups) -> None:
        self._means.add("entropy", policy.entropy, policy.mask.sum())
        chosen = groups.roles == 0
        self._means.add("mean_token_accuracy", policy.is_top1[chosen], policy.mask[chosen].sum())
        if self.model.training:
            self._tokens_seen = self._tokens_seen + inputs["attention_mask"].sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.objective is not None:
            # An evaluation of a named set logs under eval_<name>_; its own keys tell the prefix.
            prefix = next((key.removesuffix("runtime") for key in logs if key.endswith("_runtime")), "")
            if self.model.training or prefix == "train_":
                prefix, means = "", self._train_means.drain()
            else:
                prefix, means = prefix or "eval_", self._eval_means.drain()
            if means:
                means["num_tokens"] = sum(gather_object([int(self._tokens_seen)]))
            logs.update({f"{prefix}{name}": value for name, value in means.items()})
        super().log(logs, start_time)  # type: ignore[misc]

    def create_model_card(self, *arguments: Any, **keywords: Any) -> None:
        super().create_model_card(*arguments, **keywords)  # type: ignore[misc]
        card = Path(self.args.output_dir) / "README.md"
        if self.objective is None or not card.exists() or not self.accelerator.is_main_process:
            return
        papers = [f"[{p}](https://huggingface.co/papers/{p})" for _, _, t in self.objective.terms() if (p := t.paper)]
        lines = ["", "## Objective", "", f"Trained with prefopt; loss expression: `{self.objective}`."]
        if papers:
            lines.append(f"Papers: {', '.join(dict.fromkeys(papers))}.")
        card.write_text(card.read_text(encoding="utf-8") + "\n".join(lines) + "\n", encoding="utf-8")


class PreferenceTrainer(LossMixin, DPOTrainer):
    """`trl.DPOTrainer` with any objective of `prefopt.losses`.

    Takes every argument of `trl.DPOTrainer`, and `loss`: a `Loss` or an expression (else `args.loss` decides). Data
    sets hold pairs (`prompt`, `chosen`, `rejected`, the prompt possibly implicit) or, for losses that take them,
    single completions (`prompt`, `completion`, `label`), plain or conversational. A numeric `weight` column scales
    examples.

    Example:
        >>> trainer = PreferenceTrainer("path/to/model", args=PreferenceConfig("out", loss="ipo(beta=0.1)"),
        ...                             train_dataset=pairs)
        >>> trainer.train()
    """

    _tag_names = [*DPOTrainer._tag_names, "prefopt"]  # noqa: RUF012


def _bind(init: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, so that `args` and the collator are found however a subclass orders them."""
    parameters = inspect.signature(init).parameters
    positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < len(arguments) and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        # A subclass that takes *args hands them on to DPOTrainer unchanged.
        positional = [name for name in inspect.signature(DPOTrainer.__init__).parameters if name != "self"]
    if len(arguments) > len(positional):
        raise TypeError(f"got {len(arguments)} positional arguments, at most {len(positional)} are accepted")
    named = dict(zip(positional, arguments, strict=False))
    if twice := set(named) & set(keywords):
        raise TypeError(f"got {sorted(twice)} twice, by position and by name")
    return {**named, **keywords}


def _resolve_objective(loss: Loss | str | None, args: Any) -> Loss | None:
    given = loss if loss is not None else getattr(args, "loss", None)
    if given is not None:
        if loss is not None and getattr(args, "loss", None) is not None:
            raise ValueError("the objective is given twice, as `loss` and as `args.loss`; leave one out")
        _refuse_trl_loss_options(args)
        return parse(given) if isinstance(given, str) else given
    expression = expression_from_trl_options(args)
    if expression is None:
        options = ", ".join(f"{name}={value!r}" for name, value in _changed_trl_options(args).items())
        logger.info("no prefopt expression for %s: TRL computes this objective itself", options)
        return None
    return parse(expression)


def _learns_prompts(model: Any) -> bool:
    configs = getattr(model, "peft_config", {}).values() if is_peft_model(model) else ()
    return any(config.is_prompt_learning for config in configs)


def _check_columns(objective: Loss, sample: Mapping[str, Any]) -> None:
    for column in objective.columns:
        if sample and column not in sample:
            raise ValueError(f"{objective} needs a numeric column {column!r}; the data has {sorted(sample)}")


def _row_groups(inputs: Mapping[str, Any]) -> RowGroups:
    """Who is who in a collated batch; collators other than ours put the chosen rows first and the rejected after."""
    columns = {k.removeprefix(COLUMN_PREFIX): v for k, v in inputs.items() if k.startswith(COLUMN_PREFIX)}
    if "roles" in inputs:
        return RowGroups(inputs["roles"], inputs["examples"], columns, bool(inputs["paired"]))
    ids = inputs["input_ids"]
    half = torch.arange(ids.shape[0] // 2, device=ids.device)
    return RowGroups(torch.cat([half * 0, half * 0 + 1]), torch.cat([half, half]), columns, paired=True)


def _by_row(groups: RowGroups, chosen: Tensor, rejected: Tensor) -> Tensor:
    """(R,) values from per-example ones of each role."""
    return torch.where(groups.roles == 0, chosen[groups.examples], rejected[groups.examples])


__all__ = ["LossMixin", "PreferenceConfig", "PreferenceTrainer", "expression_from_trl_options"]
