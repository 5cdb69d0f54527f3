"""The configuration: `trl.DPOConfig` with a loss expression, and what TRL's own loss options mean as one."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer

from prefopt.losses import Loss, parse
from prefopt.safety.errors import UsageError, did_you_mean
from prefopt.safety.redaction import redacted

logger = logging.getLogger(__name__)

TRL_LOSS_OPTIONS = (
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

SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}
"""Loss types that TRL's `label_smoothing` acts on."""

_LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
_WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""Loss types for which TRL accepts another divergence than the reverse KL."""

DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
"""TRL's `f_divergence_type` and the name that `f_dpo` has for it."""


@dataclass
class PreferenceConfig(DPOConfig):
    """`trl.DPOConfig` with an objective. On a machine without an accelerator `bf16` is off unless asked for.

    Args:
        loss: a loss expression such as `dpo(beta=0.1) + 0.2*sft` (see `prefopt losses`), hyperparameters included.
            Without one, TRL's own options (`loss_type`, `beta`, ...) choose the objective as they do in TRL.
        step0_check: the first training batch is scored before any update, when the policy must equal the reference.
            If it does not, "error" stops the run and "warn" logs a warning; "off" skips the check. It applies if the
            reference is the initial policy, not to a `ref_model` that is passed in. The same setting decides about
            models whose tokens attend to later ones, and about weights that the first updates do not change.
        step0_tolerance: largest accepted difference of mean per-token log-probabilities, in nats. If None, 1e-3 in
            float32 and 0.05 in half precision.
        reference_cache: where per-token log-probabilities of the reference are stored, so that they are computed once
            over epochs, runs and losses: "off", "auto" (`reference` in `PREFOPT_CACHE`, `XDG_CACHE_HOME/prefopt` or
            `~/.cache/prefopt`, the first that is set) or a folder.
        layout: how rows are scored: "auto" computes each prompt once for all its completions if the model gives the
            same numbers that way, "tree" requires it, "padded" computes a row per completion.
        token_budget: maximum tokens per forward pass in training, prompts counted once. Larger batches are split into
            parts: the gradient stays the same, and memory does not grow with `per_device_train_batch_size`. None: no
            limit.
        loss_learning_rate: for parameters inside the loss, if it has any; follows the model's schedule. None: the
            value of `learning_rate`.
        chat_template_kwargs: arguments of the chat template, such as `{"enable_thinking": False}`, for rows without a
            column of that name. They become part of the tokenizer's template, the saved one too.
        sample_max_new_tokens: maximum length, in tokens, of completions that an online objective samples.
        sync_ref_before_step: `sync_ref_model` moves the reference right before the optimizer's step instead of after
            it, so that it stays one step behind the policy: `humanline` with `ref_model_sync_steps=1` and
            `ref_model_mixup_alpha=1.0`. Not under DeepSpeed.
        paired_retain: for unlearning: half of each batch are rows to forget (label false, or true in a column
            `forget`), half rows to retain. An epoch goes over the rows to forget once, and draws other rows to retain
            than the epoch before.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]  # noqa: RUF012

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

    reference_cache: str = field(
        default="off",
        metadata={
            "help": "Keep the reference's log-probabilities on disk and compute each once, over epochs and runs: "
            "'off', 'auto' (~/.cache/prefopt/reference) or a folder."
        },
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "How rows are scored: each prompt once (tree), once per completion (padded), or tree if the model "
            "supports it (auto).",
            "choices": ["auto", "tree", "padded"],
        },
    )
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Maximum tokens per forward pass in training (prompts counted once). Larger batches are split "
            "into parts, with the same gradient. Not set: no limit."
        },
    )
    loss_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of parameters inside the loss (a kernel mixture's weights). Not set: learning_rate."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the chat template for every row, as JSON, e.g. '{\"enable_thinking\": false}'. A "
            "row's own column chat_template_kwargs wins."
        },
    )
    sample_max_new_tokens: int = field(
        default=64,
        metadata={"help": "Maximum length, in tokens, of completions that objectives such as hypo sample."},
    )
    sync_ref_before_step: bool = field(
        default=False,
        metadata={
            "help": "sync_ref_model moves the reference right before the optimizer's step instead of after it, so "
            "that it stays one step behind the policy (Humanline)."
        },
    )
    paired_retain: bool = field(
        default=False,
        metadata={
            "help": "For unlearning: draw one row to retain (label true) with each row to forget (label false). An "
            "epoch goes over the rows to forget once."
        },
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not torch.accelerator.is_available():
            # TRL's default, bf16, is a hundred times slower than float32 on CPUs without bf16 units.
            self.bf16 = False
        for name in ("checkpointing", "checkpointing_kwargs"):
            # TRL sets the old names, for which newer transformers releases warn.
            if getattr(self, f"activation_{name}", True) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        super().__post_init__()
        if not isinstance(self.chat_template_kwargs, (dict, NoneType)):
            raise UsageError(
                f'chat_template_kwargs must be a mapping, as in {{"enable_thinking": false}}, got '
                f"{self.chat_template_kwargs!r}"
            )
        if self.layout not in ("auto", "tree", "padded"):
            raise UsageError(f"layout must be 'auto', 'tree' or 'padded', got {self.layout!r}")
        if self.token_budget is not None and self.token_budget < 1:
            raise UsageError(f"token_budget must be at least 1 token, got {self.token_budget}")
        if self.loss_learning_rate is not None and not self.loss_learning_rate >= 0:
            raise UsageError(f"loss_learning_rate must be 0 or more, got {self.loss_learning_rate}")
        if self.step0_check not in ("error", "warn", "off"):
            raise UsageError(f"step0_check must be 'error', 'warn' or 'off', got {self.step0_check!r}")
        if self.loss is not None:
            parse(self.loss)
            _refuse_trl_loss_options(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings as experiment trackers store them; tokens inside mappings and URLs are masked too."""
        settings: dict[str, Any] = redacted(super().to_dict())
        return settings


def default_of(option: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass option."""
    factory = option.default_factory
    return option.default if factory is dataclasses.MISSING else factory()


def changed_trl_options(args: DPOConfig) -> dict[str, Any]:
    """TRL's loss options that differ from their defaults."""
    changed = {}
    for option in dataclasses.fields(args):
        if option.name in TRL_LOSS_OPTIONS and getattr(args, option.name) != default_of(option):
            changed[option.name] = getattr(args, option.name)
    return changed


def _refuse_trl_loss_options(args: DPOConfig) -> None:
    if changed := changed_trl_options(args):
        listed = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise UsageError(
            f"{listed} would have no effect beside a loss expression: write hyperparameters inside it, as in "
            "loss='dpo(beta=0.2, label_smoothing=0.1)', or leave `loss` out to use TRL's options"
        )


def expression_from_trl_options(args: DPOConfig) -> str | None:
    """The loss expression for TRL's own options, or None if only TRL implements them.

    Every `loss_type` has an expression, alone and in weighted sums. Two things differ from TRL. `sigmoid` applies
    `label_smoothing`, which TRL silently ignores since 0.29, unless it belongs to another term of the sum. And on
    several processes `aot`, `aot_unpaired` and `sft` act on the global batch, not on each process's own.

    TRL computes these itself:
        ld_alpha with a loss type other than sigmoid, robust or sft, or outside [0, 1], or with an f-divergence.
        f_divergence_type with a loss type other than sigmoid, robust or sft.
        use_weighting with aot, aot_unpaired or sft, at which TRL fails too.
        ld_alpha with precompute_ref_log_probs, as it acts on single tokens.
        exo_pair without label_smoothing (infinite; TRL refuses it too).
        exo_pair, aot or aot_unpaired with label_smoothing above 1/2, robust with 1/2 or more.
        loss types that only a later TRL has.
    """
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    terms = []
    for loss_type in types:
        if (term := _term(loss_type, types, args)) is None:
            return None
        terms.append(term)
    weights = [float(weight) for weight in args.loss_weights or [1.0] * len(types)]
    if weights == [1.0]:
        return terms[0]
    return " + ".join(f"{weight!r}*{term}" for weight, term in zip(weights, terms, strict=True))


def _term(loss_type: str, types: list[str], args: DPOConfig) -> str | None:
    """The expression of one of TRL's loss types under the options in `args`."""
    if loss_type == "sft":
        # It uses the chosen completions only; TRL fails if it should be weighted.
        return None if args.use_weighting else "sft(nll='token')"
    if args.precompute_ref_log_probs and args.ld_alpha is not None:
        return None
    smoothing = float(args.label_smoothing)
    if loss_type == "sigmoid" and SMOOTHED.intersection(types):
        smoothing = 0.0
    divergence = DIVERGENCES.get(args.f_divergence_type)
    if args.ld_alpha is None and divergence == "reverse_kl":
        term = _plain_term(loss_type, smoothing, args)
    else:
        term = _reshaped_term(loss_type, smoothing, divergence, args)
    if term is None or not args.use_weighting:
        return term
    # TRL sorts examples in these, so weights no longer match them.
    return None if loss_type in ("aot", "aot_unpaired") else f"wpo({term})"


def _plain_term(loss_type: str, smoothing: float, args: DPOConfig) -> str | None:
    """The expression of a loss type on the sums of log-ratios."""
    beta = f"beta={float(args.beta)!r}"
    smoothed = f"{beta}, label_smoothing={smoothing!r}"
    possible = {"exo_pair": 0 < smoothing <= 0.5, "robust": 0 <= smoothing < 0.5}
    if loss_type in SMOOTHED and not possible.get(loss_type, 0 <= smoothing <= 0.5):
        return None
    return {
        "sigmoid": f"dpo({smoothed})",
        "hinge": f"hinge({beta})",
        "ipo": f"ipo({beta})",
        "exo_pair": f"exo({smoothed})",
        "nca_pair": f"nca({beta})",
        "robust": f"robust({smoothed})",
        "bco_pair": f"bco_pair({beta})",
        "sppo_hard": f"sppo({beta}, reduction='sum')",
        "aot": f"aot({smoothed})",
        "aot_unpaired": f"aot_unpaired({smoothed})",
        "apo_zero": f"apo_zero({beta})",
        "apo_down": f"apo_down({beta})",
        "discopop": f"discopop({beta}, tau={float(args.discopop_tau)!r})",
        "sigmoid_norm": f"dpo_norm({beta})",
    }.get(loss_type)


def _reshaped_term(loss_type: str, smoothing: float, divergence: str | None, args: DPOConfig) -> str | None:
    """The expression of a loss type with LD-DPO's log-ratios or with another divergence."""
    beta = f"beta={float(args.beta)!r}"
    if loss_type not in ("sigmoid", "robust") or (loss_type == "robust" and not 0 <= smoothing < 0.5):
        return None
    if args.ld_alpha is None:
        if divergence is None:
            return None
        coefficient = f", alpha={float(args.f_alpha_divergence_coef)!r}" if divergence == "alpha" else ""
        term = f"f_dpo({beta}, divergence={divergence!r}{coefficient})"
    elif divergence == "reverse_kl" and 0 <= args.ld_alpha <= 1:
        term = f"ld_dpo({beta}, alpha={float(args.ld_alpha)!r})"
    else:
        return None
    if smoothing == 0:
        return term
    method = "unbiased" if loss_type == "robust" else "smoothed"
    return f"noise_robust({term}, method={method!r}, rate={smoothing!r})"


def refuse_what_trl_refuses(args: DPOConfig) -> None:
    """Refuse loss options that TRL, left to compute them, refuses once the model is loaded.

    Raises:
        ValueError: naming the options and what to do.
    """
    types = {args.loss_type} if isinstance(args.loss_type, str) else set(args.loss_type)
    source = inspect.getsource(DPOTrainer)  # names every loss type; a later TRL may have more
    for unknown in sorted(name for name in types if f'"{name}"' not in source):
        raise UsageError(f"there is no loss_type {unknown!r}.{did_you_mean(unknown, _LOSS_TYPES)}")
    if "exo_pair" in types and not args.label_smoothing:
        raise UsageError("loss_type exo_pair needs label_smoothing above 0; its paper has 0.001")
    if args.use_weighting and (others := types & {"aot", "aot_unpaired", "sft"}):
        raise UsageError(
            f"use_weighting cannot be used with {', '.join(sorted(others))}: it weights pairs, which aot and "
            "aot_unpaired sort and sft does not use"
        )
    if args.f_divergence_type != "reverse_kl" and (others := types - _WITH_DIVERGENCE):
        raise UsageError(
            f"f_divergence_type {args.f_divergence_type} cannot be used with loss_type {', '.join(sorted(others))}, "
            f"only with {', '.join(sorted(_WITH_DIVERGENCE))}: leave it out"
        )


def resolve_objective(loss: Loss | str | None, args: Any) -> Loss | None:
    """The objective that a trainer's `loss` and `args` ask for together; None where only TRL can compute it.

    Args:
        loss: a loss, an expression, or None for what `args` says.
        args: a `PreferenceConfig` or `trl.DPOConfig`, or None for TRL's defaults.
    """
    if loss is not None and not isinstance(loss, (Loss, str)):
        raise TypeError(
            f"loss must be a Loss or a loss expression such as 'dpo(beta=0.1)', got {loss!r}; for your own class pass "
            "an object, loss=Mine(...)"
        )
    if isinstance(loss, Loss) and "_modules" not in vars(loss):
        raise TypeError(f"{type(loss).__name__}.__init__ must call super().__init__() before anything else")
    if args is None:
        return parse("dpo(beta=0.1)" if loss is None else loss) if not isinstance(loss, Loss) else loss
    asked = loss if loss is not None else getattr(args, "loss", None)
    if asked is not None:
        if loss is not None and getattr(args, "loss", None) is not None:
            raise UsageError("the objective is given twice, as `loss` and as `args.loss`; leave one out")
        _refuse_trl_loss_options(args)
        return parse(asked) if isinstance(asked, str) else asked
    expression = expression_from_trl_options(args)
    if expression is None:
        options = ", ".join(f"{name}={value!r}" for name, value in changed_trl_options(args).items())
        logger.info("no prefopt expression for %s: TRL computes this objective itself", options)
        return None
    return parse(expression)
