"""Which models predict the next token of one row, told from a configuration; all others are refused by name."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

_NOT_CAUSAL = (
    "ForMaskedLM", "ForMultipleChoice", "ForPreTraining", "ForQuestionAnswering", "ForSequenceClassification",
    "ForTokenClassification",
)  # fmt: skip


def why_not_causal(config: Any, architecture: str | None = None) -> str:
    """What a model is instead, and what to do: words that follow its name. Empty for a causal language model.

    Args:
        config: of the model; None if it is not known.
        architecture: the model's class; if left out, the first that the configuration names.
    """
    if architecture is None:
        architecture = str(next(iter(getattr(config, "architectures", None) or ()), ""))
    if getattr(config, "is_encoder_decoder", False):
        return (
            f"is an encoder-decoder ({architecture or config.model_type}), which reads prompt and completion "
            "separately; every objective here scores them as one row. Use a decoder-only (causal) language model"
        )
    if architecture.endswith(_NOT_CAUSAL):
        return (
            f"is a {architecture}, which does not predict the next token. Use a causal language model (an "
            "architecture that ends in ForCausalLM)"
        )
    if architecture in _names(MODEL_MAPPING, config) - _names(MODEL_FOR_CAUSAL_LM_MAPPING, config):
        return (
            f"is a {architecture}, which has no language-model head. Load it with AutoModelForCausalLM, from weights "
            "that were saved with their head"
        )
    return ""


def _names(mapping: Any, config: Any) -> set[str]:
    """The names of transformers' classes for a configuration."""
    classes = mapping.get(type(config), ())
    return {one.__name__ for one in (classes if isinstance(classes, tuple) else (classes,))}
