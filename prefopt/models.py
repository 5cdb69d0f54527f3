"""The models and tokenizers that a recipe names: whole models, saved adapters, frozen models to compare with.

Imports transformers and peft; what is trained on what is decided elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, get_peft_config


def adapter_base(name: str) -> str | None:
    """The model that a folder with a saved adapter belongs to; None where `name` is no such folder."""
    settings = Path(name) / "adapter_config.json"
    if not settings.is_file():
        return None
    base = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise SystemExit(f"{settings} does not say which model the adapter belongs to (base_model_name_or_path)")
    return str(base)


def adapter_settings(model: ModelConfig) -> Any:
    """The adapter that will be trained: the saved one, a new one, or None for all weights."""
    if model.model_name_or_path is not None and adapter_base(model.model_name_or_path) is not None:
        settings = PeftConfig.from_pretrained(model.model_name_or_path)
        settings.inference_mode = False
        return settings
    return get_peft_config(model)


def load_model(name: str, options: dict[str, Any], trainable: bool = False) -> Any:
    """A model, or a saved adapter on its model.

    Args:
        name: a Hub name, a model's folder or an adapter's.
        options: of `from_pretrained`.
        trainable: keep the adapter's weights trainable; a whole model's are left as they are.
    """
    base = adapter_base(name)
    loaded = AutoModelForCausalLM.from_pretrained(base or name, **options)
    return loaded if base is None else PeftModel.from_pretrained(loaded, name, is_trainable=trainable)


def load_tokenizer(
    name: str, *, revision: str = "main", trust_remote_code: bool = False, chat_template: str | None = None
) -> Any:
    """The tokenizer that belongs to a model or an adapter, with `chat_template` (Jinja, or a file) over its own."""
    base = adapter_base(name)
    if base is not None and not (Path(name) / "tokenizer_config.json").is_file():
        name = base
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        # A template of one line may be longer than the system lets a file name be.
        is_template = "{" in chat_template
        tokenizer.chat_template = chat_template if is_template else Path(chat_template).read_text(encoding="utf-8")
    return tokenizer
