"""`prefopt merge`: fold an adapter into the model it belongs to, and check that the result gives the same numbers.

Imports transformers and peft. Runs no code from a model's repository and reads no pickled weights.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefopt.models import base_sample
from prefopt.models.load import adapter_base, load_tokenizer
from prefopt.report.card import code, is_hub_id, loading
from prefopt.report.versions import version_of
from prefopt.safety.errors import PrefoptError, retold
from prefopt.safety.folders import check_one_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TOLERANCE = {torch.float32: 1e-3}
"""Largest accepted mean difference of a token's log-probability, in nats; what rounding to half precision may cost."""
HALF_TOLERANCE = 0.05

_TEXTS = (
    "How does a bridge carry its load? It passes it on to the ground through its piers and abutments.",
    "The capital of France is Paris; seven times six is forty-two.\n\ndef double(x):\n    return 2 * x",
)


class MergeError(PrefoptError, ValueError):
    """The adapter cannot be folded into its base; says why and what to do."""


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        folder: with the merged model.
        base: the model that the adapter was folded into.
        dtype: of the saved weights.
        tokens: how many tokens were compared.
        largest: largest difference between adapter and merged model in a token's log-probability, in nats.
        mean: mean of these differences.
        moved: largest difference between base and adapter, for scale; 0 where the adapter does nothing.
    """

    folder: Path
    base: str
    dtype: torch.dtype
    tokens: int
    largest: float
    mean: float
    moved: float


def merge(adapter: str, output: str | None = None, base: str | None = None, dtype: str | None = None) -> Merged:
    """Fold an adapter into its base and save the whole: safetensors, tokenizer, generation config, model card.

    Args:
        adapter: its folder, as a run saved it.
        output: where to save; a folder that is empty or does not exist. If None, the adapter's name and `-merged`.
        base: the model to fold into. If None, the one that the adapter's configuration names.
        dtype: of the merged weights: a key of `DTYPES`. If None, the base's own.

    Raises:
        MergeError: if that cannot be done, or if the merged model's log-probabilities differ from base and adapter.
    """
    folder = _adapter_folder(adapter)
    target = Path(output) if output is not None else folder.with_name(f"{folder.absolute().name}-merged")
    _refuse_used(target)
    config = _adapter_config(folder)
    name = base or str(config.base_model_name_or_path or "")
    _check_base(name, folder, base is not None)
    tokenizer = _tokenizer(folder, name)
    model = _adapted(name, folder, dtype)
    if differ := base_sample.differing(folder, model):
        raise MergeError(
            f"{name} is not the model that the adapter was trained on: {len(differ)} of its weights differ "
            f"({differ[0]} first). If the adapter was trained on a model that another adapter had been merged into, "
            f"save that model and pass it with --base; if the weights are known to be right, delete "
            f"{folder / base_sample.FILE}"
        )
    ids = _some_ids(tokenizer, model)
    with_adapter = _log_probabilities(model, ids)
    with model.disable_adapter():
        moved = float((_log_probabilities(model, ids) - with_adapter).abs().max())
    _untie(model)
    whole = _fold(model, config)
    gaps = (_log_probabilities(whole, ids) - with_adapter).abs()
    merged = Merged(target, name, whole.dtype, gaps.numel(), float(gaps.max()), float(gaps.mean()), moved)
    tolerance = TOLERANCE.get(whole.dtype, HALF_TOLERANCE)
    if not merged.mean <= tolerance:
        raise MergeError(
            f"the merged model differs from base and adapter by {merged.mean:.3g} nats a token on average "
            f"({tolerance:g} accepted), at most {merged.largest:.3g}: nothing was saved. Merge in float32 "
            "(--dtype float32), and check that the base is the one that the adapter was trained on"
        )
    _save(whole, tokenizer, folder, merged)
    return merged


# ---- what is refused ---------------------------------------------------------------------------------------------


def _adapter_folder(adapter: str) -> Path:
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise MergeError(
            f"{adapter!r} is not a folder. Pass the folder of a saved adapter; download one from the Hub with "
            f"`hf download {adapter} --local-dir ADAPTER`"
        )
    try:
        check_one_model(folder)
    except ValueError as error:
        raise MergeError(error) from None
    if not (folder / "adapter_config.json").is_file():
        nested = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        hint = f" There are adapters in {', '.join(nested)}." if nested else ""
        whole = " It holds whole weights, which need no merging." if (folder / "config.json").is_file() else ""
        raise MergeError(f"{folder} holds no adapter: there is no adapter_config.json.{whole}{hint}")
    if (folder / "adapter_model.safetensors").is_file():
        return folder
    if (folder / "adapter_model.bin").is_file():
        raise MergeError(
            f"{folder} holds pickled weights (adapter_model.bin), which can run code when they are read: save the "
            "adapter again as safetensors where you trust it, then merge that"
        )
    raise MergeError(f"{folder} holds an adapter's configuration but no adapter_model.safetensors")


def _refuse_used(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MergeError(f"{target} is not empty: give another --output, or delete it first")


def _adapter_config(folder: Path) -> Any:
    unreadable = (OSError, ValueError, TypeError, KeyError)
    with retold(MergeError, f"{folder / 'adapter_config.json'} cannot be read", unreadable):
        config = PeftConfig.from_pretrained(str(folder))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise MergeError(
            f"{folder} is a {kind} adapter: it adds learned tokens before every prompt and has no weights that could "
            "be added to the model's. Load it with peft instead"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise MergeError(
            f"{folder} is an activated LoRA, which acts only after its invocation tokens; merged, it would act on "
            "everything. Load it with peft instead"
        )
    return config


def _check_base(name: str, folder: Path, given: bool) -> None:
    option = "--base" if given else f"{folder / 'adapter_config.json'} (base_model_name_or_path)"
    if not name:
        raise MergeError(f"{option} does not name the adapter's base model: give it with --base")
    if Path(name).is_dir():
        if adapter_base(name) is not None:
            raise MergeError(
                f"the base, {name}, is an adapter itself: merge that into its own base first, then give the result "
                "with --base"
            )
    elif not is_hub_id(name):
        raise MergeError(f"{option} names {name!r}, which is not on this machine: give the base model with --base")
    with _loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if (method := getattr(config, "quantization_config", None)) is not None:
        kind = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", "")
        raise MergeError(
            f"the base, {name}, is quantised ({getattr(kind, 'value', kind) or 'unknown method'}), and its rounded "
            "weights cannot hold an adapter's small changes. Give the model that it was quantised from with --base"
        )


@contextlib.contextmanager
def _loading(base: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        why = f"cannot be loaded: {error}"
        if "trust_remote_code" in str(error):
            why = "needs its own code, and merge does not run code from a model's repository"
        elif "safetensors" in str(error):
            why = (
                "has no safetensors weights, and pickled ones can run code when they are read: save it again as "
                "safetensors where you trust it, and give that with --base"
            )
        raise MergeError(f"the base, {base}, {why}") from None


# ---- the work ----------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, base: str) -> Any:
    """The adapter's own tokenizer, else its base's; None if neither has one.

    Raises:
        MergeError: if the adapter's own cannot be read: its base's may lack tokens or a template that were trained.
    """
    if (folder / "tokenizer_config.json").is_file():
        try:
            return load_tokenizer(str(folder))
        except (OSError, ValueError) as error:
            raise MergeError(
                f"the tokenizer in {folder} cannot be read: {error}. Save it again, or delete its files there to use "
                "the base's instead"
            ) from None
    try:
        return load_tokenizer(base)
    except (OSError, ValueError):
        return None


def _adapted(base: str, folder: Path, dtype: str | None) -> Any:
    """The base with the adapter on it, on the CPU."""
    if dtype is not None and dtype not in DTYPES:
        raise MergeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config = AutoConfig.from_pretrained(base)
    kind = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    with _loading(base):
        model = kind.from_pretrained(base, dtype=DTYPES.get(dtype or "", "auto"), use_safetensors=True)
    unfit = f"the adapter in {folder} does not fit {base}. Is it the right base? peft's error"
    with retold(MergeError, unfit, (RuntimeError, ValueError, KeyError)):
        return PeftModel.from_pretrained(model, str(folder)).eval()


def _some_ids(tokenizer: Any, model: Any) -> list[list[int]]:
    """Tokens to compare on: text where there is a tokenizer, else ids spread over the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    rows = [] if tokenizer is None else [tokenizer(text)["input_ids"][:64] for text in _TEXTS]
    rows = [row for row in rows if len(row) > 1 and max(row) < size]
    return rows or [[(17 * i * i + 5) % size for i in range(48)]]


@torch.inference_mode()
def _log_probabilities(model: Any, rows: list[list[int]]) -> Tensor:
    """(T,) log-probability of every token but the first of each row, in float32."""
    logps = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        logps.append(torch.log_softmax(logits, dim=-1).gather(-1, ids[0, 1:, None]).squeeze(-1))
    return torch.cat(logps)


def _untie(model: Any) -> None:
    """Give embeddings and head weights of their own where an adapter changes one of two that are one tensor."""
    base = model.get_base_model()
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    ends = [layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in layers]
    tied = all(hasattr(end, "weight") for end in ends) and ends[0].weight is ends[1].weight
    if tied and any(isinstance(layer, LoraLayer) for layer in layers):
        ends[1].weight = torch.nn.Parameter(ends[1].weight.detach().clone())
        for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def _fold(model: Any, config: Any) -> PreTrainedModel:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise MergeError(f"{kind} adapters cannot be merged: peft has no way to. Load it with peft instead")
    unable = (ValueError, NotImplementedError, AttributeError)
    with retold(MergeError, f"this {kind} adapter cannot be merged", unable):
        whole: PreTrainedModel = model.merge_and_unload(safe_merge=True)
        return whole


def _save(model: PreTrainedModel, tokenizer: Any, adapter: Path, merged: Merged) -> None:
    """Save into a folder beside the target first, so that a full disk leaves no partial model."""
    unfinished = merged.folder.with_name(f"{merged.folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        card = merged_card(adapter, merged, bool(getattr(tokenizer, "chat_template", None)))
        (unfinished / "README.md").write_text(str(card), encoding="utf-8")
        if merged.folder.is_dir():
            merged.folder.rmdir()
        os.replace(unfinished, merged.folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def merged_card(adapter: Path, merged: Merged, chat: bool) -> ModelCard:
    """The merged model's card from the adapter's: how it is loaded, and how it was merged."""
    base = merged.base if is_hub_id(merged.base) else Path(merged.base).name
    use = f"## Use\n\n{loading(merged.folder.absolute().name, None, None, chat)}\n\n"
    use += (
        f"## Merged\n\nThe adapter {code(adapter.absolute().name)} folded into {code(base)} by `prefopt merge` "
        f"{version_of('prefopt')}, in {code(str(merged.dtype).removeprefix('torch.'))}. On {merged.tokens} "
        f"tokens the merged model's log-probabilities differ from the adapter's by {merged.largest:.2g} nats at "
        "most.\n\n"
    )
    path = adapter / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    section = re.search(r"^## Use\n.*?(?=^## )", text, re.DOTALL | re.MULTILINE)
    if section is not None and "- prefopt\n" in text:
        whole = text[: section.start()] + use + text[section.end() :]
        # What came before is the introduction, and the metadata, which is set below.
        card = ModelCard(re.sub(r"^An adapter \(\w+\) of", "A fine-tuned version of", whole, flags=re.MULTILINE))
    else:
        card = ModelCard(f"---\ntags:\n- prefopt\n---\n\n# Merged model\n\n{use}")
    data: Any = card.data
    data.library_name, data.pipeline_tag = "transformers", "text-generation"
    if is_hub_id(merged.base):
        data.base_model = merged.base
    if getattr(data, "base_model", None):  # the adapter's card may know the Hub's name of a local base
        data.base_model_relation = "finetune"
    return card
