"""The configuration: `trl.DPOConfig` with a loss expression, and what TRL's own loss options mean as one."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import DPOConfig

from prefopt.losses import Loss, parse

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


def changed_trl_options(args: DPOConfig) -> dict[str, Any]:
    """TRL's loss options that differ from their defaults."""
    changed = {}
    for option in dataclasses.fields(args):
        if option.name in TRL_LOSS_OPTIONS:
            factory = option.default_factory
            default = option.default if factory is dataclasses.MISSING else factory()
            if getattr(args, option.name) != default:
                changed[option.name] = getattr(args, option.name)
    return changed


def _refuse_trl_loss_options(args: DPOConfig) -> None:
    if changed := changed_trl_options(args):
        listed = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise ValueError(
            f"{listed} would have no effect beside a loss expression: write hyperparameters inside it, as in "
            "loss='dpo(beta=0.2, label_smoothing=0.1)', or leave `loss` out to use TRL's options"
        )


def expression_from_trl_options(args: DPOConfig) -> str | None:
    """The loss expression that TRL's own options ask for, or None where only TRL implements them."""
    changed = changed_trl_options(args)
    if set(changed) - {"loss_type", "loss_weights", "beta", "label_smoothing"}:
        return None
    beta = f"beta={float(args.beta)!r}"
    known = {
        # Unlike TRL since 0.29, which drops the option without a word, sigmoid honours label_smoothing.
        "sigmoid": f"dpo({beta}, label_smoothing={float(args.label_smoothing)!r})",
        "ipo": f"ipo({beta})",
        "hinge": f"hinge({beta})",
        "sft": "sft(nll='token')",
    }
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    if not set(types) <= set(known) or ("label_smoothing" in changed and "sigmoid" not in types):
        return None
    weights = [float(weight) for weight in args.loss_weights or [1.0] * len(types)]
    if weights == [1.0]:
        return known[types[0]]
    return " + ".join(f"{weight!r}*{known[name]}" for name, weight in zip(types, weights, strict=True))


def resolve_objective(loss: Loss | str | None, args: Any) -> Loss | None:
    """The objective that a trainer's `loss` and `args` ask for together; None where only TRL can compute it.

    Args:
        loss: a loss, an expression, or None for what `args` says.
        args: a `PreferenceConfig` or `trl.DPOConfig`, or None for TRL's defaults.
    """
    if loss is not None and not isinstance(loss, (Loss, str)):
        raise TypeError(f"loss must be a Loss or a loss expression such as 'dpo(beta=0.1)', got {loss!r}")
    if args is None:
        return parse("dpo(beta=0.1)" if loss is None else loss) if not isinstance(loss, Loss) else loss
    given = loss if loss is not None else getattr(args, "loss", None)
    if given is not None:
        if loss is not None and getattr(args, "loss", None) is not None:
            raise ValueError("the objective is given twice, as `loss` and as `args.loss`; leave one out")
        _refuse_trl_loss_options(args)
        return parse(given) if isinstance(given, str) else given
    expression = expression_from_trl_options(args)
    if expression is None:
        options = ", ".join(f"{name}={value!r}" for name, value in changed_trl_options(args).items())
        logger.info("no prefopt expression for %s: TRL computes this objective itself", options)
        return None
    return parse(expression)
