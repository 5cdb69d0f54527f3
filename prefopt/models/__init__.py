"""Models and tokenizers: found, checked, loaded, merged, and the bundled one."""

from prefopt.models.load import (
    Limits,
    adapter_base,
    check_weights,
    limits_of,
    load_model,
    load_tokenizer,
)

__all__ = [
    "Limits",
    "adapter_base",
    "check_weights",
    "limits_of",
    "load_model",
    "load_tokenizer",
]
