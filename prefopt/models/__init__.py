"""Models and tokenizers: resolving, checking, loading and merging them, and the bundled model."""

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
