"""`PreferenceTrainer`: `LossMixin` on `trl.DPOTrainer`, its arguments written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from trl import DPOConfig, DPOTrainer

from prefopt.losses import Loss
from prefopt.trainer.mixin import LossMixin

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
