"""Checks before a model is loaded: options that cannot be combined, data that the objective cannot use.

A trainer's constructor, a recipe and its dry run all call `check_run`, so they refuse the same runs.
Nothing here loads a model, asks the Hub or writes a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from numpy.typing import NDArray
from transformers.integrations import integration_utils
from transformers.utils import is_liger_kernel_available

from prefopt.data.columns import column_names, kind_of_columns
from prefopt.losses import Loss, Need
from prefopt.losses.conflict import OwnGradient
from prefopt.losses.scores import EMBEDDINGS, REFERENCE_LOGPS
from prefopt.safety.errors import UsageError
from prefopt.scoring import extras_for
from prefopt.scoring.collate import number_problem
from prefopt.trainer.config import changed_trl_options, refuse_what_trl_refuses
from prefopt.trainer.options import refuse_options, refuse_sampling
from prefopt.trainer.paired import paired_rows
from prefopt.trainer.publishing import PushError

_ROWS_AT_ONCE = 65536
"""Rows of a numeric column that are checked together."""
_OF_TOKENS = Need.TOKENS | Need.FORWARD_KL | Need.REVERSE_KL | Need.DIVERGENCE | Need.STATES


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before its model is loaded.

    Attributes:
        objective: the loss; None where TRL computes it.
        args: the training arguments; None for TRL's defaults.
        train: the training rows, a data set or a stream.
        evaluation: the held-out rows, or a mapping of them by name, or None.
        reference: whether a reference model is passed in.
        previous: whether a previous iterate is passed in.
        adapter: whether the policy is, or will be, an adapter on a model.
        more_columns: columns that the data will have by the time of training.
    """

    objective: Loss | None
    args: Any
    train: Any
    evaluation: Any = None
    reference: bool = False
    previous: bool = False
    adapter: bool = False
    more_columns: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (*_names(self.train), *self.more_columns)

    @property
    def splits(self) -> dict[str, Any]:
        """The training and the evaluation data by name."""
        evaluation = self.evaluation if isinstance(self.evaluation, Mapping) else {"": self.evaluation}
        return {"train": self.train, **{f"eval {name}".strip(): rows for name, rows in evaluation.items()}}

    def option(self, name: str, default: Any = None) -> Any:
        """A training argument; the default where the arguments lack it."""
        return getattr(self.args, name, default)


def check_run(plan: RunPlan) -> None:
    """Refuse what cannot be trained as it is.

    Raises:
        ValueError: naming the option or the column, and what to do.
        PushError: where the result is to be pushed and cannot be.
    """
    for check in (_rows, _steps, _evaluation, _saving, _launch, _trackers, _push, _moving_reference):
        check(plan)
    if plan.objective is None and plan.args is not None:
        refuse_what_trl_refuses(plan.args)
    if plan.objective is not None:
        for look in (
            _options, _pairs, _other_models, _mismatched, _precomputed, _sampled, _needed_columns, _cache, _precision
        ):  # fmt: skip
            look(plan, plan.objective)


def check_data(objective: Loss, rows: Any) -> None:
    """Refuse rows that an objective cannot be trained on: of another kind, or without the columns that it needs.

    Embeddings may be missing, as they are computed when training starts.

    Raises:
        UsageError: naming the column, and what to do.
    """
    plan = RunPlan(objective, None, rows, more_columns=EMBEDDINGS)
    _pairs(plan, objective)
    _needed_columns(plan, objective)


def _names(data: Any) -> list[str]:
    if not isinstance(data, (Dataset, IterableDataset)) or (isinstance(data, Dataset) and len(data) == 0):
        return []
    return list(column_names(data)) or list(next(iter(data), {}))


# ---- any run -----------------------------------------------------------------------------------------------------


_NO_ROWS = "the training data has no rows: nothing can be trained"


def _rows(plan: RunPlan) -> None:
    if not isinstance(plan.train, (Dataset, IterableDataset)):
        return  # TRL reports the accepted types
    if isinstance(plan.train, IterableDataset):
        if plan.args is not None and plan.args.max_steps <= 0:
            raise UsageError(
                "the training data is a stream, whose length is unknown, so the number of steps must be given: set "
                "max_steps"
            )
        if next(iter(plan.train), None) is None:
            raise UsageError(_NO_ROWS)
    elif len(plan.train) == 0:
        raise UsageError(_NO_ROWS)
    elif plan.option("dataloader_drop_last", False):
        processes = PartialState().num_processes
        batches = {"per_device_train_batch_size": plan.train, "per_device_eval_batch_size": plan.evaluation}
        for option, rows in batches.items():
            if isinstance(rows, Dataset) and len(rows) < plan.option(option) * processes:
                raise UsageError(
                    f"dataloader_drop_last leaves nothing of {len(rows)} examples: they do not fill one batch of "
                    f"{option}={plan.option(option)} on {processes} process(es). Make it smaller, or leave the "
                    "option out"
                )


def _steps(plan: RunPlan) -> None:
    if plan.option("max_steps") == 0:
        raise UsageError(
            "max_steps=0 does not mean no steps: transformers would train "
            f"{plan.option('num_train_epochs'):g} epochs, as num_train_epochs says. Leave max_steps out if that is "
            "meant; to evaluate only, call evaluate() and not train()"
        )


def _evaluation(plan: RunPlan) -> None:
    strategy = getattr(plan.option("eval_strategy"), "value", plan.option("eval_strategy"))
    if strategy not in (None, "no") and plan.evaluation is None:
        raise UsageError(
            f"eval_strategy={strategy!r} needs held-out rows, but there are none: pass eval_dataset, or set "
            "eval_strategy='no'"
        )


def _saving(plan: RunPlan) -> None:
    strategy = getattr(plan.option("save_strategy"), "value", plan.option("save_strategy"))
    if strategy == "best":
        if plan.option("metric_for_best_model") is None:
            raise UsageError("save_strategy='best' needs a metric: set metric_for_best_model, for example to loss")
        if str(getattr(plan.option("eval_strategy"), "value", plan.option("eval_strategy"))) == "no":
            raise UsageError("save_strategy='best' saves after evaluations, and there are none: set eval_strategy")
    if strategy == "steps" and plan.option("save_steps") <= 0:
        raise UsageError(
            f"save_steps must be above 0, got {plan.option('save_steps')}; save_strategy='no' saves nothing"
        )


def _launch(plan: RunPlan) -> None:
    if plan.option("fsdp") and PartialState().num_processes == 1:
        raise UsageError(
            "fsdp needs several processes: start with accelerate launch --config_file configs/accelerate/fsdp2.yaml, "
            "or leave it out"
        )
    if plan.option("use_liger_kernel", False) and not is_liger_kernel_available():
        raise UsageError(
            "use_liger_kernel needs the package liger-kernel, which is not installed: pip install liger-kernel, or "
            "leave it out"
        )


def _moving_reference(plan: RunPlan) -> None:
    if not plan.option("sync_ref_model", False):
        if plan.option("sync_ref_before_step", False):
            raise UsageError("sync_ref_before_step has no effect without sync_ref_model: set both, or leave it out")
        return
    if plan.adapter:
        raise UsageError(
            "sync_ref_model cannot be used with an adapter, whose reference is the model without it: leave it out, or "
            "train all weights"
        )
    if plan.option("precompute_ref_log_probs", False):
        raise UsageError(
            "sync_ref_model changes the reference, so precompute_ref_log_probs cannot compute it ahead: leave one of "
            "them out"
        )


def _trackers(plan: RunPlan) -> None:
    for name in plan.option("report_to") or ():
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(integration_utils.INTEGRATION_TO_CALLBACK))
            raise UsageError(f"report_to={name!r}: there is no such tracker. There are: {known}, none")
        package = {"comet_ml": "comet_ml", "azure_ml": "azureml-mlflow", "flyte": "flytekit"}.get(name, name)
        if not _installed(name):
            ours = (
                ', or pip install "prefopt-trainer[trackers]",' if name in ("tensorboard", "wandb", "trackio") else ""
            )
            raise UsageError(
                f"report_to={name!r} needs the package {package}, which is not installed: pip install {package}{ours} "
                "or leave it out"
            )


def _installed(tracker: str) -> bool:
    names = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
    available: Callable[[], Any] | None = getattr(
        integration_utils, f"is_{names.get(tracker, tracker)}_available", None
    )
    return available is None or bool(available())


def _push(plan: RunPlan) -> None:
    if not plan.option("push_to_hub", False):
        return
    repository = plan.option("hub_model_id")
    if constants.HF_HUB_OFFLINE:
        raise PushError("push_to_hub: HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or push later")
    if repository is not None:
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise PushError(
                f"push_to_hub: hub_model_id={repository!r} is not a valid repository name on the Hub: {error}"
            ) from None
    if not (plan.option("hub_token") or get_token()):
        raise PushError(
            "push_to_hub: no write token was found: log in with `hf auth login`, set HF_TOKEN, give hub_token, "
            "or leave push_to_hub out and push the saved folder later"
        )


# ---- runs on an objective of ours --------------------------------------------------------------------------------


def _options(plan: RunPlan, objective: Loss) -> None:
    if plan.args is not None:
        refuse_options(plan.args)
        refuse_sampling(plan.args, plan.train, plan.columns)
        paired_rows(plan.train, plan.args)


def _pairs(plan: RunPlan, objective: Loss) -> None:
    for name, rows in plan.splits.items():
        names = _names(rows)
        grouped = kind_of_columns(names) == "group" or "completions_ids" in names
        if grouped and not objective.grouped:
            raise UsageError(
                f"{objective} compares no groups, but the {name} set holds several completions a prompt (prompt, "
                "completions): make pairs of them first, with prefopt pair DATA --builder all_pairs --out "
                "pairs.jsonl, or use a loss on groups, as plackett_luce"
            )
        if objective.grouped and names and not grouped:
            raise UsageError(
                f"{objective} compares the completions of a group, but the {name} set holds none (prompt, completions "
                "and scores): make groups with prefopt pair DATA --lists --out groups.jsonl, or use a loss on "
                "pairs, as dpo"
            )
        if grouped and objective.reads_scores and "scores" not in names:
            raise UsageError(
                f"{objective} reads scores, but the {name} set has completions in order alone: add a column 'scores', "
                "or use a loss that needs no scores, as plackett_luce"
            )
    if not objective.paired:
        return
    for name, rows in plan.splits.items():
        if kind_of_columns(_names(rows)) == "unpaired":
            raise UsageError(
                f"{objective} compares two completions of one prompt, but the {name} set holds single labelled "
                "completions (prompt, completion, label); use a loss for unpaired data, as kto"
            )


def _other_models(plan: RunPlan, objective: Loss) -> None:
    # With loss_type sft, TRL accepts a reference and ignores it.
    of_trl = plan.args is not None and bool(changed_trl_options(plan.args))
    if plan.reference and not objective.needs.frozen and not of_trl:
        raise UsageError(f"ref_model would have no effect: {objective} compares with no reference; leave it out")
    if plan.previous and Need.PREVIOUS not in objective.needs:
        raise UsageError(f"previous_model would have no effect: {objective} does not compare with one")


def _mismatched(plan: RunPlan, objective: Loss) -> None:
    if Need.MISMATCHED not in objective.needs:
        return
    for option in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if plan.option(option, 2) < 2:
            raise UsageError(
                f"{objective} moves completions to other examples' prompts within a batch: {option} must be at least 2"
            )
    if plan.option("precompute_ref_log_probs", False):
        raise UsageError(
            f"{objective} scores other completions of the batch under the reference at every step, which cannot be "
            "precomputed: set precompute_ref_log_probs=False"
        )


def _precomputed(plan: RunPlan, objective: Loss) -> None:
    if plan.option("precompute_ref_log_probs", False) and objective.grouped:
        raise UsageError(
            f"{objective} is about groups, and precompute_ref_log_probs keeps two sums an example: set it to False; "
            "reference_cache='auto' computes the reference once, too"
        )
    if plan.option("precompute_ref_log_probs", False) and objective.needs & _OF_TOKENS and objective.needs.compares:
        raise UsageError(f"{objective} needs per-token values, but precompute_ref_log_probs keeps sums only")
    if plan.option("precompute_ref_log_probs", False) and (present := sorted({*plan.columns} & {*REFERENCE_LOGPS})):
        raise UsageError(
            f"precompute_ref_log_probs=True computes {' and '.join(present)}, which the data already has: remove them "
            f"with train_dataset.remove_columns({present})"
        )


def _sampled(plan: RunPlan, objective: Loss) -> None:
    if "sampled" not in objective.roles:
        return
    if plan.option("precompute_ref_log_probs", False):
        raise UsageError(
            f"{objective} learns from completions sampled during training, which cannot be scored ahead: set "
            "precompute_ref_log_probs=False"
        )
    if {"image", "images"} & set(plan.columns):
        raise UsageError(f"{objective} samples completions during training, which works for text only so far")


def _needed_columns(plan: RunPlan, objective: Loss) -> None:
    columns = plan.columns
    if not columns:
        return
    if Need.EMBEDDINGS in objective.needs and (missing := set(EMBEDDINGS) - set(columns)):
        raise UsageError(
            f"{objective} needs columns of embeddings; the data lacks {', '.join(sorted(missing))}: add them with "
            "`prefopt.data.embed`, or use the policy's hidden states with embeddings='hidden'"
        )
    for column in objective.columns:
        if column not in columns:
            raise UsageError(f"{objective} needs a numeric column {column!r}; the data has {sorted(columns)}")
    for split, rows in plan.splits.items():
        has = _names(rows)
        for column in objective.columns:
            if has and column not in (*has, *plan.more_columns):
                raise UsageError(f"{objective} needs a numeric column {column!r}, which the {split} set lacks: {has}")
            if problem := _first_number_problem(rows, column, objective.limits.get(column)):
                raise UsageError(f"{objective}: {problem}, in the {split} set")


def _first_number_problem(rows: Any, column: str, limits: tuple[float, float] | None) -> str:
    """The first problem of a numeric column, with its row; "" if there is none. Streams are checked as rows arrive."""
    if not isinstance(rows, Dataset) or column not in rows.column_names:
        return ""
    start = 0
    for table in rows.select_columns(column).with_format("arrow").iter(_ROWS_AT_ONCE):
        values = table[column]
        if (bad := _not_within(values, limits)).any():
            row = int(bad.argmax())
            return f"{number_problem(column, values[row].as_py(), limits)} in row {start + row} (from 0)"
        start += len(values)
    return ""


def _not_within(values: Any, limits: tuple[float, float] | None) -> NDArray[np.bool_]:
    """(N,) which values of an Arrow column `number_problem` finds wrong, without making Python objects of them."""
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return np.ones(len(values), dtype=bool)
    numbers: NDArray[np.float64] = values.cast(pa.float64(), safe=False).to_numpy()  # nulls become NaN
    low, high = limits or (-np.inf, np.inf)
    return ~np.isfinite(numbers) | (numbers < low) | (numbers > high)


def _cache(plan: RunPlan, objective: Loss) -> None:
    where = plan.option("reference_cache", "off")
    if where == "off":
        return
    if not objective.needs.compares or extras_for(objective).beside_reference:
        what = "more of the reference than log-probabilities" if objective.needs.compares else "no reference"
        raise UsageError(f"reference_cache={where!r} would have no effect: {objective} needs {what}")
    for option in ("sync_ref_model", "precompute_ref_log_probs"):
        if plan.option(option, False):
            raise UsageError(f"reference_cache={where!r} cannot be used with {option}=True")


def _precision(plan: RunPlan, objective: Loss) -> None:
    if not plan.option("fp16", False):
        return
    if isinstance(objective, OwnGradient):
        raise UsageError(f"{objective.name} does not work with fp16, whose loss scale changes between steps: use bf16")
    if any(parameter.requires_grad for parameter in objective.parameters()):
        raise UsageError(f"{objective} has its own parameters, which are not trained in fp16: use bf16")
