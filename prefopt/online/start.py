"""The check before the first step of a round whose reference is another model than the one it starts from.

Where they are the same model, the trainer compares their log-probabilities. Where they are not, both must be the
models that the round's plan names: their weights are compared with those that drew samples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from prefopt.generation.samples import read_samples
from prefopt.models.load import adapter_base
from prefopt.online.folders import RoundFolder
from prefopt.online.policy import RoundPlan
from prefopt.safety.errors import UsageError
from prefopt.scoring.fingerprint import fingerprint

logger = logging.getLogger(__name__)


def drawn_by(run: Path, initial: str, plan: RoundPlan) -> dict[str, str]:
    """The digests of models by name, from the samples that the initial and the last model drew in memory."""
    files = {initial: RoundFolder(run, 1).samples, plan.sampler: RoundFolder(run, plan.number).samples}
    return {name: next(read_samples(file)).model for name, file in files.items()}


def check_models(trainer: Any, plan: RoundPlan, digests: Mapping[str, str]) -> None:
    """Refuse a policy or a reference with other weights than the model that the plan names.

    Does nothing where the reference is the start, and for sharded weights.

    Args:
        trainer: of the round; no step is done.
        plan: the round.
        digests: of models by name; others are not checked.

    Raises:
        UsageError: naming the model, unless `step0_check` is `warn` or `off`.
    """
    mode = trainer.args.step0_check
    if plan.reference is None or mode == "off" or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    for role, name, model in (("policy", plan.start, trainer.model), ("reference", plan.reference, trainer.ref_model)):
        if name not in digests or model is None:
            continue
        network = trainer.accelerator.unwrap_model(model)
        is_new = is_peft_model(network) and adapter_base(name) is None
        if fingerprint(network, trained_adapter="default" if is_new else None) == digests[name]:
            continue
        message = (
            f"the {role} of round {plan.number} should be {name}, but its weights are not those that {name} drew "
            "samples with: the folder was changed since, or something else was loaded. Restore the folder, or delete "
            f"the samples of round {plan.number} to draw them again. To continue anyway, set step0_check to 'warn' or "
            "'off'"
        )
        if mode == "error":
            raise UsageError(message)
        logger.warning(message)
