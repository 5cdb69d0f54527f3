"""The models and tokenizers that a recipe names: whole models, saved adapters, frozen models to compare with.

Weights are read only from safetensors, and code that comes with a model runs only with `trust_remote_code`. Imports
transformers and peft; which model is trained is decided elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from prefopt.data.template_defaults import set_template_defaults
from prefopt.data.templates import check_template
from prefopt.models.causal import why_not_causal
from prefopt.safety.errors import PrefoptError, UsageError, retold
from prefopt.safety.files import is_file
from prefopt.safety.folders import check_one_model
from prefopt.safety.shipped import find_shipped
from prefopt.safety.weights import check_folder


class ModelError(PrefoptError, OSError):
    """A model, adapter or tokenizer cannot be loaded; says which and why."""


def adapter_base(name: str) -> str | None:
    """The model that a folder with a saved adapter belongs to; None if `name` is not such a folder.

    Raises:
        ValueError: for a folder that holds whole weights as well.
        ModelError: where the adapter's settings cannot be read or name no model.
    """
    check_one_model(name)
    settings = Path(name) / "adapter_config.json"
    if not is_file(settings):
        return None
    try:
        base = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{settings} cannot be read: {error}. Save the adapter again") from None
    if not isinstance(base, str) or not base:
        raise ModelError(f"{settings} does not say which model the adapter belongs to (base_model_name_or_path)")
    return base


def check_weights(name: str) -> None:
    """Refuse what cannot or must not be loaded, by looking at a local folder's files; Hub names are let through.

    Raises:
        ValueError: for a folder (or, for an adapter, its model's) that holds pickled weights alone, or weights that
            are not safetensors.
    """
    folder = Path(name)
    base = adapter_base(name)
    if base is not None:
        check_folder(folder, "adapter_model.safetensors")
        check_weights(base)
    elif is_file(folder / "config.json"):
        check_folder(folder)


@dataclass(frozen=True)
class Limits:
    """What a model cannot take, whatever its weights.

    Attributes:
        vocabulary: tokens that it has embeddings for; None where its configuration does not say.
        positions: longest row, where positions are learned one by one; None for all others, which have no such end.
        images: whether it reads images.
        processor: whether it may come with a processor, which reads more than text.
    """

    vocabulary: int | None
    positions: int | None
    images: bool = False
    processor: bool = True


def limits_of(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> Limits:
    """The limits of a model or of an adapter's model, from its configuration alone.

    Raises:
        ModelError: if it cannot be read, or is that of another kind of model.
    """
    base = adapter_base(name) or name
    with retold(ModelError, f"no configuration can be loaded from {base!r}", (Exception,)):
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    if reason := why_not_causal(config):
        raise ModelError(f"the model {base} {reason}")
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)
    positions = None if rotary or getattr(config, "auto_map", None) else _learned_positions(config)
    return Limits(
        getattr(text, "vocab_size", None),
        positions,
        images=getattr(config, "vision_config", None) is not None,
        processor=config.model_type in PROCESSOR_MAPPING_NAMES or bool(getattr(config, "auto_map", None)),
    )


_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
"""What models call the embedding of their positions."""


def _learned_positions(config: Any) -> int | None:
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError):
        return None  # no text model of transformers' own
    sizes = [
        module.num_embeddings - int(getattr(module, "offset", 0))  # OPT keeps two places for itself
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
    ]
    return min(sizes, default=None)


def load_model(name: str, options: dict[str, Any], trainable: bool = False) -> Any:
    """A model, or a saved adapter on its model.

    Args:
        name: a Hub name, a model's folder or an adapter's.
        options: of `from_pretrained`.
        trainable: keep the adapter's weights trainable; a whole model's are left as they are.

    Raises:
        ValueError: for pickled or damaged weights.
        ModelError: if the model does not exist, is not causal, or cannot be read by transformers or PEFT.
    """
    check_weights(name)
    base = adapter_base(name)
    safe = {"trust_remote_code": False, **options, "use_safetensors": True}
    from_hub = {option: safe[option] for option in ("revision", "trust_remote_code") if option in safe}
    with retold(ModelError, f"no model can be loaded from {name!r}"):
        config = AutoConfig.from_pretrained(base or name, **from_hub)
        reason = why_not_causal(config)
        if not reason and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
            reason = f"is of type {config.model_type!r}, of which transformers has no causal language model"
        if reason:
            raise UsageError(f"it {reason}")
        loaded = AutoModelForCausalLM.from_pretrained(base or name, **safe)
        return loaded if base is None else PeftModel.from_pretrained(loaded, name, is_trainable=trainable)


def load_tokenizer(
    name: str,
    *,
    revision: str = "main",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The tokenizer that belongs to a model or an adapter, with `chat_template` (Jinja, or a file) over its own.

    `chat_template_kwargs` are the template's arguments wherever a row has none of its own.

    Raises:
        ModelError: if there is none, naming the model.
        ValueError: for a chat template that is not valid Jinja, or a file with one that cannot be read.
    """
    if not is_file(Path(name) / "tokenizer_config.json"):
        name = adapter_base(name) or name
    with retold(ModelError, f"no tokenizer can be loaded from {name!r}", (Exception,)):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template)
    set_template_defaults(tokenizer, chat_template_kwargs)
    check_template(tokenizer, name if chat_template is None else "--chat_template")
    return tokenizer


def _template(given: str) -> str:
    # A template of one line may be longer than the system lets a file name be.
    if "{" in given:
        return given
    try:
        file = Path(given) if is_file(Path(given)) else find_shipped(given, "configs", ".jinja")
        return (file or Path(given)).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--chat_template {given}: byte {error.start} is not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--chat_template {given}: neither a template (it holds no {{) nor a file that can be read ({error})"
        ) from None
