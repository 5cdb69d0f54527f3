"""The overridden methods: those of `trl.DPOTrainer` that have kept still between releases.

They are `compute_loss`, `log`, dataset preparation, the collator and `compute_ref_log_probs`. Scoring lives in
`prefopt.scoring`, objectives in `prefopt.losses`, saving in `publishing`; nothing here computes either.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from prefopt.data import drop_overlong, normalise
from prefopt.data.prepare import check_ids, silent, tokenize_checked, without_tensors
from prefopt.data.prompts import refuse_to_guess
from prefopt.data.template_defaults import set_template_defaults
from prefopt.data.unused import MEDIA, without_empty_media
from prefopt.losses import ConflictFree, Loss, LossOutput
from prefopt.losses.scores import EMBEDDINGS, PREVIOUS_LOGPS, Role
from prefopt.safety.errors import UsageError
from prefopt.safety.folders import check_one_model
from prefopt.safety.weights import check_folder
from prefopt.scoring.collate import PreferenceCollator, WithColumns
from prefopt.scoring.rows import RowBatch
from prefopt.scoring.scorer import Scored, Scorer
from prefopt.trainer import adapters, overrides
from prefopt.trainer.accumulation import AccumulationMixin
from prefopt.trainer.adapters import AdaptersMixin
from prefopt.trainer.budget import Parts, TokenBudgetMixin
from prefopt.trainer.checks import RunPlan, check_run
from prefopt.trainer.collator import collator_for
from prefopt.trainer.config import resolve_objective
from prefopt.trainer.dropout import DropoutMixin
from prefopt.trainer.evaluation import EvaluationMixin
from prefopt.trainer.finite import FiniteMixin, StepGuard
from prefopt.trainer.learned import LearnedLoss
from prefopt.trainer.metrics import RunningMeans, batch_metrics, rewards_not_logged
from prefopt.trainer.options import OptionsMixin, refuse_images, refuse_model, refuse_nameless
from prefopt.trainer.publishing import PublishingMixin
from prefopt.trainer.saving.mixin import CheckpointMixin
from prefopt.trainer.scoring import ScoringMixin
from prefopt.trainer.start import StartCheck, StartMixin, check_separate
from prefopt.trainer.term_gradients import ConflictFreeMixin
from prefopt.trainer.tokens import LengthsMixin
from prefopt.trainer.trackers import track

if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import (
        BitsAndBytesConfig,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )

    # So that type checkers accept a user's `class Mine(LossMixin, TheirTrainer)`.
    from trl import DPOTrainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)


class LossMixin(
    AdaptersMixin,
    DropoutMixin,
    OptionsMixin,
    PublishingMixin,
    CheckpointMixin,
    AccumulationMixin,
    TokenBudgetMixin,
    ConflictFreeMixin,
    EvaluationMixin,
    ScoringMixin,
    LengthsMixin,
    StartMixin,
    FiniteMixin,
    _Trainer,
):
    """Gives a `trl.DPOTrainer` subclass a `loss` argument: `class Mine(LossMixin, TheirTrainer): ...`.

    Args:
        loss: a `Loss` or a loss expression. Without one, `args.loss` is used, then TRL's options in `args`; options
            that name an objective only TRL has are left to TRL altogether, its logging included.
        previous_model: the previous iterate of the policy, for objectives that compare with it (`inpo`); frozen. Its
            log-probabilities may stand in the data instead (`prev_chosen_logps`, `prev_rejected_logps`). Without
            either it is the reference, as in a first iteration.
    """

    objective: Loss | None
    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    state: Any
    data_collator: Any
    processing_class: Any
    _signature_columns: Any
    hub_model_id: Any
    if TYPE_CHECKING:
        create_model_card = PublishingMixin.create_model_card

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        overrides.check_order(cls, LossMixin)

    def __init__(
        self, *arguments: Any, loss: Loss | str | None = None, previous_model: Any = None, **keywords: Any
    ) -> None:
        self._wrapped = overrides.check(type(self), LossMixin)
        self._scored = False
        bound, takes_collator = _bind(super().__init__, arguments, keywords)
        args = next((value for value in bound.values() if isinstance(value, DPOConfig)), None)
        self.objective = resolve_objective(loss, args)
        self._train_means, self._eval_means = RunningMeans(), RunningMeans()
        self._tokens_seen: Any = 0
        self._start_checked = False
        self._own_collator: PreferenceCollator | None = None
        self._previous_model: Any = None
        self._scorer: Scorer | None = None
        self._parts: Parts | None = None
        self._guard = StepGuard(self)
        self._terms, self._term_gradients = (), []
        self._learned: LearnedLoss | None = None
        for name, value in bound.items():
            if isinstance(value, (Dataset, IterableDataset)):
                bound[name] = without_empty_media(value)  # TRL goes by a column's name alone
            elif name == "eval_dataset" and isinstance(value, dict):
                bound[name] = type(value)({key: without_empty_media(rows) for key, rows in value.items()})
        data = next((v for v in bound.values() if isinstance(v, (Dataset, IterableDataset))), None)
        data = bound.get("train_dataset", data)
        sample: dict[str, Any] = next(iter(data), {}) if isinstance(data, (Dataset, IterableDataset)) else {}
        # A subclass with a constructor of its own may bring held-out rows of its own.
        plain = getattr(super().__init__, "__func__", None) is DPOTrainer.__init__
        heldout = bound.get("eval_dataset") if plain else bound.get("eval_dataset", {})
        references = (bound.get("ref_model") is not None, previous_model is not None)
        for model in (bound.get("model"), bound.get("ref_model")):
            if isinstance(model, str):
                check_one_model(model)
        adapter = bound.get("peft_config") is not None or isinstance(bound.get("model"), PeftModel)
        check_run(RunPlan(self.objective, args, data, heldout, *references, adapter))
        if self.objective is not None:
            models = {
                "model": bound.get("model"),
                "ref_model": bound.get("ref_model"),
                "previous_model": previous_model,
            }
            for role, model in models.items():
                if model is not None:
                    refuse_model(model, args, role)
            if models["ref_model"] is None and not adapter and not getattr(args, "precompute_ref_log_probs", False):
                refuse_nameless(models["model"], self.objective)
            refuse_images(models["model"], args, bound.get("processing_class"), sample)
            adapters.check_adapters(models["model"], bound.get("peft_config"), models["ref_model"] is None)
            if args is not None:
                # An adapter's random weights are drawn while TRL sets up; TRL seeds that itself since 1.15 only.
                set_seed(args.seed)
            if args is not None and args.accelerator_config is not None:
                # Dispatching joins and slices batches by their first dimension, here rows instead of examples. TRL
                # turns it off for a streamed training set only.
                args.accelerator_config.dispatch_batches = False
            if bound.get("data_collator") is None and not {"image", "images"} & set(sample):
                self._own_collator = collator_for(self.objective, args)
                if takes_collator:
                    bound["data_collator"] = self._own_collator
        model, own_reference = bound.get("model"), bound.get("ref_model") is None
        with contextlib.nullcontext() if self.objective is None else adapters.set_up(model, own_reference):
            super().__init__(**bound)
        # Sets with images are not prepared ahead.
        set_template_defaults(self.processing_class, getattr(self.args, "chat_template_kwargs", None))
        self.add_callback(StartCheck(self))
        self._note_base()
        if self.objective is None:
            self._set_up_checkpoints()
            if "weight" in sample:
                logger.warning("the weight column has no effect: TRL computes this objective itself")
            return
        if loss is None and str(resolve_objective(None, self.args)) != str(self.objective):
            raise UsageError(
                f"{type(self).__name__} makes its own configuration, so the objective could not be read from it "
                "ahead: pass loss=... as well"
            )
        for role, other in (
            ("ref_model", None if own_reference else self.ref_model),
            ("previous_model", previous_model),
        ):
            if other is not None:
                check_separate(self.model, other, role)
        self._previous_model = self._make_previous(self.objective, previous_model)
        if own_reference and adapters.changes_base(bound.get("peft_config")):
            self._keep_first_adapter()
        self._after_trl(self.objective, own_reference, sample)
        self._set_up_checkpoints()

    def _keep_first_adapter(self) -> None:
        if self.args.precompute_ref_log_probs:
            raise UsageError(
                "precompute_ref_log_probs=True computes the reference with the adapter put aside, which is not the "
                "initial model with an init_lora_weights that changes the base: set it to False, or pass ref_model=..."
            )
        adapters.keep_first_adapter(self.model)

    def _after_trl(self, objective: Loss, own_reference: bool, sample: Mapping[str, Any]) -> None:
        objective.to(self.accelerator.device)
        layout = self._make_layout()
        if (budget := getattr(self.args, "token_budget", None)) is not None:
            self._parts = Parts(budget, objective, layout, self.accelerator)
            self._parts.check(self._own_collator is not None, getattr(self, "aux_loss_enabled", False))
        self._check_conflict_free(objective)
        self._check_overrides(objective)
        # First, since what is learned inside the loss takes its step with the same call.
        self.add_callback(self._guard)
        if any(parameter.requires_grad for parameter in objective.parameters()):
            self._learned = self._make_learned(objective)
            self.add_callback(self._learned)
        cache = self._open_cache(objective)
        if self.accelerator.is_main_process and (line := rewards_not_logged(objective)) is not None:
            logger.warning(line)
        if (tracked := track(objective, self.callback_handler.callbacks, self.args.output_dir)) is not None:
            self.add_callback(tracked)
        self._turn_off_dropout()
        # Prompt learning puts tokens of its own before every row, so its policy never starts as the reference.
        self._reference_is_initial_policy = own_reference and not _learns_prompts(self.model)
        # Without a previous iterate the reference stands for it.
        previous = self._previous_model is not None or "prev_chosen_logps" in sample
        kept = objective.needs.compares if previous else objective.needs.frozen
        if own_reference and not kept and not self.args.sync_ref_model:
            self.ref_model = None  # TRL loads one whatever the objective
        self._scorer = self._make_scorer(objective, layout, cache)
        self._align_padding(own_reference)
        if self._own_collator is not None:
            self._own_collator.vocabulary = self._check_vocabulary()
            self.data_collator = self._own_collator
        elif objective.columns or "weight" in sample:
            self.data_collator = WithColumns(self.data_collator, objective.columns)

    def _check_overrides(self, objective: Loss) -> None:
        own = [
            c for c in overrides.own_classes(type(self), LossMixin) if {"compute_loss", "_compute_loss"} & {*vars(c)}
        ]
        if isinstance(objective, ConflictFree) and own:
            raise UsageError(
                f"{objective.name} takes the gradients of its own terms, so what {own[0].__name__}.compute_loss adds "
                "would have no effect: write that as a prefopt Loss and make it one of the terms"
            )

    def _make_learned(self, objective: Loss) -> LearnedLoss:
        if self.accelerator.mixed_precision == "fp16":  # asked for by `accelerate launch`, not by the arguments
            raise UsageError(f"{objective} has parameters of its own, which are not trained in fp16: use bf16")
        rate = getattr(self.args, "loss_learning_rate", None)
        return LearnedLoss(objective, self.args.learning_rate if rate is None else rate)

    def _align_padding(self, own_reference: bool) -> None:
        """One padding token for policy and reference: some multimodal models embed images by way of it."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        for model in (self.model, self.ref_model if own_reference else None):
            if model is not None and hasattr(model, "config"):
                inner = self.accelerator.unwrap_model(model)  # a DeepSpeedEngine has a config of its own
                inner.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    # ---- data -----------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        set_template_defaults(processing_class, getattr(args, "chat_template_kwargs", None))
        if self.objective is None:
            refuse_to_guess(dataset)
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self._own_collator is not None:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            if getattr(args, "pad_token", None) is not None:
                if args.pad_token not in tokenizer.get_vocab():
                    raise UsageError(f"pad_token {args.pad_token!r} is not in the tokenizer's vocabulary")
                tokenizer.pad_token = args.pad_token
            self._own_collator.pad_token_id = tokenizer.pad_token_id
        with args.main_process_first(local=False, desc=f"preparing the {dataset_name} set"):
            dataset = without_tensors(dataset)
            told = dataset_name == "train" and args.should_log
            common = {
                "max_length": args.max_length,
                "truncation_mode": args.truncation_mode,
                "name": dataset_name,
                "roles": self.objective.roles,
                "say": logger.warning if told else silent,
            }
            if "prompt_ids" in next(iter(dataset)):
                if self._own_collator is None or not isinstance(dataset, Dataset | IterableDataset):
                    return dataset
                dataset = check_ids(dataset, **common)
                return drop_overlong(dataset, args.max_length, args.truncation_mode, dataset_name)
            used = (*self.objective.columns, *(() if self._own_collator is not None else MEDIA))
            dataset = normalise(dataset, transcripts=False, used=used, say=common["say"])
            processes = getattr(args, "dataset_num_proc", None)
            dataset = tokenize_checked(dataset, processing_class, num_proc=processes, **common)
            return drop_overlong(dataset, args.max_length, args.truncation_mode, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh and self.objective is not None and self._signature_columns is not None:
            more = ["completion_ids", "label", "weight", *PREVIOUS_LOGPS, *EMBEDDINGS, *self.objective.columns]
            self._signature_columns += [name for name in more if name not in self._signature_columns]

    # ---- the loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.objective is None:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not self._wrapped:
            return self._compute_loss(model, inputs, return_outputs)
        self._scored = False
        made = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not self._scored:
            raise UsageError(
                f"{self._wrapped[0].__name__}.compute_loss does not call super().compute_loss, so {self.objective} "
                "has no effect: call it and change what it returns, or leave `loss` out"
            )
        return made

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        """The objective's loss. TRL's `compute_loss` calls this, so overrides between the two wrap around it."""
        if self.objective is None:
            return super()._compute_loss(model, inputs, return_outputs)
        self._scored = True
        rows = RowBatch.of(inputs)
        self._check_causal(model, rows)
        try:
            scored = self._score(model, rows, all_logits=return_outputs)
        except ValueError as error:
            if "mage features and image tokens do not match" not in str(error) or self.args.max_length is None:
                raise
            raise UsageError(
                f"max_length={self.args.max_length} cuts off image tokens while the image stays whole; raise "
                "max_length, or set it to None"
            ) from error
        batch, outputs = scored.batch, scored.outputs
        if rows.share > 0:
            self._record_tokens(scored)
        self._check_start(batch)
        self.objective.train(self.model.training)
        output: LossOutput = self.objective(batch)
        loss = output.loss
        if getattr(self, "aux_loss_enabled", False):
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            self._means.add("aux_loss", outputs.aux_loss.reshape(1))
        if self.model.training and torch.is_grad_enabled() and not loss.requires_grad:
            raise UsageError(
                f"{self.objective} returns values without a gradient, so nothing would be trained: compute them from "
                "the scores with torch operations, without detach(), no_grad() or comparisons"
            )
        self._refuse_non_finite(loss, batch, output, rows)
        if rows.share > 0:
            self._means.add_all(batch_metrics(batch, output))
        if not self.model.training:
            self._evaluated = output
        loss = loss * rows.share
        if isinstance(self.objective, ConflictFree):
            self._terms = [term * rows.share for term in output.terms]
        return (loss, outputs) if return_outputs else loss

    def _row_texts(self, rows: RowBatch) -> dict[str, list[str]]:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        return {
            role.field: [
                tokenizer.decode(rows.ids[row][rows.attention[row].bool()]) for row in rows.rows_of(role).tolist()
            ]
            for role in (Role.CHOSEN, Role.REJECTED)
        }

    # ---- metrics --------------------------------------------------------------------------------------------------

    @property
    def _means(self) -> RunningMeans:
        return self._train_means if self.model.training else self._eval_means

    def _record_tokens(self, scored: Scored) -> None:
        policy, rows = scored.tokens, scored.rows
        chosen = rows.rows_of(Role.CHOSEN)
        given = torch.cat([chosen, rows.rows_of(Role.REJECTED)])
        self._means.add("entropy", policy.entropy[given], policy.mask[given].sum())
        self._means.add("mean_token_accuracy", policy.is_top1[chosen], policy.mask[chosen].sum())
        if self.model.training:
            self._tokens_seen = self._tokens_seen + rows.attention[given].sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.objective is not None:
            # An evaluation of a named set logs under eval_<name>_; its own keys tell the prefix.
            prefix = next((key.removesuffix("runtime") for key in logs if key.endswith("_runtime")), "")
            if self.model.training or prefix == "train_":
                prefix, means = "", self._train_means.drain()
            else:
                prefix, means = prefix or "eval_", self._eval_means.drain()
            if means and self._learned is not None and not prefix:
                means |= self._learned.logs()
            if means:
                means["num_tokens"] = sum(gather_object([int(self._tokens_seen)]))
            logs.update({f"{prefix}{name}": value for name, value in means.items()})
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            check_folder(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, *arguments, **keywords)
        finally:
            if self._scorer is not None:
                self._scorer.release()


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

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | Mapping[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        loss: Loss | str | None = None,
        previous_model: PreTrainedModel | PeftModel | None = None,
    ) -> None:
        # TRL's own arguments in its order, written out for editors and type checkers; a test compares the two.
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            loss=loss,
            previous_model=previous_model,
        )


def _bind(init: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Arguments by name, however a subclass orders them, and whether it takes a `data_collator`."""
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
    takes_collator = "data_collator" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {**named, **keywords}, takes_collator


def _learns_prompts(model: Any) -> bool:
    configs = getattr(model, "peft_config", {}).values() if is_peft_model(model) else ()
    return any(config.is_prompt_learning for config in configs)
