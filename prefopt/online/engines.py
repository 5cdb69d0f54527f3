"""DeepSpeed and FSDP shard the model that trains. The models that sample, judge and are scored stay whole.

Every process has such a model, and works on prompts of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState

from prefopt.recipe.vectors import loaded_whole
from prefopt.trainer import PreferenceConfig

_ONE_READS = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""While this is true (`cpu_ram_efficient_loading` of --fsdp_config), transformers gives empty weights to all processes
but one, for FSDP to fill them."""


def is_sharded(training: PreferenceConfig) -> bool:
    """Whether training will use DeepSpeed or FSDP, as far as it is known before a trainer is made."""
    asks_fsdp = bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return training.deepspeed_plugin is not None or (asks_fsdp and PartialState().use_distributed)


@contextmanager
def whole_models(training: PreferenceConfig) -> Iterator[None]:
    """Context in which every process loads whole models; not to be nested."""
    before = os.environ.get(_ONE_READS)
    with loaded_whole(training):
        if before is not None:
            os.environ[_ONE_READS] = "false"
        try:
            yield
        finally:
            if before is not None:
                os.environ[_ONE_READS] = before
