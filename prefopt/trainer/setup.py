"""The arguments of a trainer's constructor: bound to names, and checked before TRL loads anything."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from prefopt.data.encodings import text_tokenizer
from prefopt.data.unused import without_empty_media
from prefopt.losses import Loss
from prefopt.safety.errors import UsageError
from prefopt.safety.folders import check_one_model
from prefopt.scoring.collate import PreferenceCollator, WithColumns
from prefopt.trainer import adapters
from prefopt.trainer.checks import RunPlan, check_run
from prefopt.trainer.collator import collator_for
from prefopt.trainer.config import resolve_objective
from prefopt.trainer.dropout import turn_off_dropout
from prefopt.trainer.options import refuse_images, refuse_model, refuse_nameless
from prefopt.trainer.start import check_separate
from prefopt.trainer.tokens import check_positions, check_vocabularies


class Setup:
    """The arguments of a trainer.

    Args:
        init: the constructor that they are passed on to.
        arguments, keywords: for it, as they were passed.
        loss, previous_model: as `LossMixin` takes them.

    Attributes:
        bound: what `init` is called with, by name.
        args: the training arguments; None for TRL's defaults.
        objective: the loss; None where TRL computes it.
        previous_model: the previous iterate, if one was passed.
        sample: the first training row; empty if there are none.
        collator: ours, if it makes the batches.
    """

    def __init__(
        self, init: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], loss: Any, previous_model: Any
    ) -> None:
        self.bound, self._takes_collator = _bind(init, arguments, keywords)
        self.args: Any = next((value for value in self.bound.values() if isinstance(value, DPOConfig)), None)
        self.loss, self.previous_model = loss, previous_model
        self.objective: Loss | None = resolve_objective(loss, self.args)
        self.collator: PreferenceCollator | None = None
        # A subclass with its own constructor may add its own held-out rows.
        self._brings_heldout = getattr(init, "__func__", None) is not DPOTrainer.__init__
        bound = self.bound
        for name, value in bound.items():
            if isinstance(value, (Dataset, IterableDataset)):
                bound[name] = without_empty_media(value)  # TRL looks only at a column's name
            elif name == "eval_dataset" and isinstance(value, dict):
                bound[name] = type(value)({key: without_empty_media(rows) for key, rows in value.items()})
        rows = next((v for v in bound.values() if isinstance(v, (Dataset, IterableDataset))), None)
        self._train = bound.get("train_dataset", rows)
        train = self._train if isinstance(self._train, (Dataset, IterableDataset)) else ()
        self.sample: dict[str, Any] = next(iter(train), {})

    @property
    def own_reference(self) -> bool:
        """Whether TRL makes the reference because none was passed."""
        return self.bound.get("ref_model") is None

    @property
    def _adapter(self) -> bool:
        return self.bound.get("peft_config") is not None or isinstance(self.bound.get("model"), PeftModel)

    def check_run(self) -> None:
        """Refuse options and data that cannot be trained as they are."""
        for model in (self.bound.get("model"), self.bound.get("ref_model")):
            if isinstance(model, str):
                check_one_model(model)
        heldout = self.bound.get("eval_dataset", {} if self._brings_heldout else None)
        references = (not self.own_reference, self.previous_model is not None)
        check_run(RunPlan(self.objective, self.args, self._train, heldout, *references, self._adapter))

    def refuse_models(self) -> None:
        """Refuse models that the objective cannot be computed with."""
        if self.objective is None:
            return
        model, args = self.bound.get("model"), self.args
        models = {"model": model, "ref_model": self.bound.get("ref_model"), "previous_model": self.previous_model}
        for role, one in models.items():
            if one is not None:
                refuse_model(one, args, role)
        if self.own_reference and not self._adapter and not getattr(args, "precompute_ref_log_probs", False):
            refuse_nameless(model, self.objective)
        refuse_images(model, args, self.bound.get("processing_class"), self.sample)
        adapters.check_adapters(model, self.bound.get("peft_config"), self.own_reference)

    def prepare(self) -> None:
        """Set what TRL's constructor would set differently: the seed, how batches are handed on, the collator."""
        args = self.args
        if self.objective is None:
            return
        if args is not None:
            # An adapter's random weights are drawn while TRL sets up; TRL seeds that itself since 1.15 only.
            set_seed(args.seed)
            # `StepGuard` stops at a loss that is not finite; the filter would look for it again, and wait for the GPU.
            args.logging_nan_inf_filter = False
        if args is not None and args.accelerator_config is not None:
            # Dispatching joins and slices batches by their first dimension, here rows instead of examples. TRL turns
            # it off for a streamed training set only.
            args.accelerator_config.dispatch_batches = False
            # Batches in pinned memory are copied while the GPU works; elsewhere such copies may be read too early.
            args.accelerator_config.non_blocking |= args.dataloader_pin_memory and args.device.type == "cuda"
        if self.bound.get("data_collator") is None and not {"image", "images"} & set(self.sample):
            self.collator = collator_for(self.objective, args)
            if self._takes_collator:
                self.bound["data_collator"] = self.collator

    def around_trl(self) -> contextlib.AbstractContextManager[None]:
        """Context for TRL's constructor."""
        if self.objective is None:
            return contextlib.nullcontext()
        return adapters.set_up(self.bound.get("model"), self.own_reference)

    def check_result(self, trainer: Any) -> None:
        """Refuse what only the finished trainer shows.

        Raises:
            UsageError: if a constructor has made arguments with another objective, or if the reference or previous
                model would be trained along with the policy.
        """
        if self.loss is None and str(resolve_objective(None, trainer.args)) != str(self.objective):
            raise UsageError(
                f"{type(trainer).__name__} makes its own configuration, so the objective could not be read from it "
                "ahead: pass loss=... as well"
            )
        reference = None if self.own_reference else trainer.ref_model
        for role, other in (("ref_model", reference), ("previous_model", self.previous_model)):
            if other is not None:
                check_separate(trainer.model, other, role)

    def settle_models(self, trainer: Any) -> None:
        """Prepare TRL's models for the objective: adapters, dropout, and a reference only if needed."""
        assert self.objective is not None
        if self.own_reference and adapters.changes_base(self.bound.get("peft_config")):
            adapters.keep_first_adapter(trainer.model, trainer.args.precompute_ref_log_probs)
        for model in (trainer.model, trainer.ref_model):
            if model is not None and trainer.args.disable_dropout:
                turn_off_dropout(model)
        # Without a previous iterate, the reference takes its place.
        previous = self.previous_model is not None or "prev_chosen_logps" in self.sample
        compared = self.objective.needs.compares if previous else self.objective.needs.frozen
        if self.own_reference and not compared and not trainer.args.sync_ref_model:
            trainer.ref_model = None  # TRL loads one whatever the objective

    def reference_is_initial_policy(self, trainer: Any) -> bool:
        # Prompt learning adds its own tokens before every row, so its policy never starts as the reference.
        return self.own_reference and not adapters.learns_prompts(trainer.model)

    def settle_batches(self, trainer: Any) -> None:
        """The collator of the trainer, and the padding token of its models."""
        assert self.objective is not None
        tokenizer = text_tokenizer(trainer.processing_class)
        # One padding token for policy and reference: some multimodal models embed images through it.
        for model in (trainer.model, trainer.ref_model if self.own_reference else None):
            if model is not None and hasattr(model, "config"):
                inner = trainer.accelerator.unwrap_model(model)  # a DeepSpeedEngine has a config of its own
                inner.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if self.collator is not None:
            self.collator.vocabulary = check_vocabularies(trainer, self.objective, self.previous_model)
            check_positions(trainer)
            trainer.data_collator = self.collator
            return
        given = self.bound.get("data_collator") is not None
        if given or self.objective.columns or "weight" in self.sample:
            columns, limits = self.objective.columns, dict(self.objective.limits)
            trainer.data_collator = WithColumns(trainer.data_collator, columns, limits, given)


def _bind(init: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Arguments by name, however a subclass orders them, and whether it takes a `data_collator`."""
    parameters = inspect.signature(init).parameters
    positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < len(arguments) and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        # A subclass that takes *args passes them on to DPOTrainer unchanged.
        positional = [name for name in inspect.signature(DPOTrainer.__init__).parameters if name != "self"]
    if len(arguments) > len(positional):
        raise TypeError(f"got {len(arguments)} positional arguments, at most {len(positional)} are accepted")
    named = dict(zip(positional, arguments, strict=False))
    if twice := set(named) & set(keywords):
        raise TypeError(f"got {sorted(twice)} twice, by position and by name")
    takes_collator = "data_collator" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {**named, **keywords}, takes_collator


def remaker(kind: type, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Callable[[DPOConfig], Any]:
    """A function that makes the same trainer again with other training arguments.

    It raises `UsageError` where that is impossible: a model that was passed has been trained or wrapped since.
    """

    def remake(args: DPOConfig) -> Any:
        values = [*arguments, *keywords.values()]
        if any(isinstance(value, nn.Module) for value in values if not isinstance(value, Loss)):
            raise UsageError(
                "hyperparameter_search starts each trial from the model as it was, and this trainer was given a model "
                "that it trains: pass the model's name or folder instead, and peft_config for an adapter"
            )
        replaced = [args if isinstance(value, DPOConfig) else value for value in arguments]
        named = {name: args if isinstance(value, DPOConfig) else value for name, value in keywords.items()}
        if not any(value is args for value in (*replaced, *named.values())):
            raise UsageError("hyperparameter_search needs the trainer's args: pass args=PreferenceConfig(...)")
        return kind(*replaced, **{name: value for name, value in named.items() if value is not None})

    return remake
