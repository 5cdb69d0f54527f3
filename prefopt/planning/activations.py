"""Bytes that a model's layers keep for the backward pass, counted without computing anything.

One and two layers of the model are called on fake tensors, which have shapes but no values, with the very rows,
adapters and precision of the run, and autograd is asked what it keeps. Imports transformers, peft and the scoring
package; no weights are loaded.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from prefopt.scoring.adapters import fuse_lora
from prefopt.scoring.attention import NAME as TREE_ATTENTION
from prefopt.scoring.tree import Tree, first_fit, tree_inputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass.

    Attributes:
        trees: prompts with their completions; None where each completion is a row of its own.
        count: number of padded rows.
        length: tokens of a padded row.
        scored: completion tokens, which the head is computed for.
    """

    trees: tuple[Tree, ...] | None
    count: int
    length: int
    scored: int

    @property
    def tokens(self) -> int:
        return self.count * self.length if self.trees is None else sum(len(tree.tokens) for tree in self.trees)

    def padded(self) -> Rows:
        """The same completions as rows of their own."""
        return Rows(None, self.count, self.length, self.scored)

    def within(self, budget: int | None) -> Rows:
        """The largest part of a batch that a token budget lets through at once."""
        if budget is None or self.tokens <= budget:
            return self
        if self.trees is None:
            # The rows of an example stay together.
            count = min(self.count, max(budget // self.length, 2))
            return Rows(None, count, self.length, self.scored * count // self.count)
        sizes = [len(tree.tokens) for tree in self.trees]
        parts = [tuple(self.trees[i] for i in some) for some in first_fit(sizes, budget)]
        most = max(parts, key=lambda part: sum(len(tree.tokens) for tree in part))
        return Rows(most, len(most), self.length, sum(len(tree.targets) for tree in most))


def made_up_rows(examples: int, prompt: int, completion: int, completions: int, padded: bool) -> Rows:
    """Rows of equal lengths.

    Args:
        examples: prompts.
        prompt: tokens of each.
        completion: tokens of each completion.
        completions: of each prompt.
        padded: a row for each completion.
    """
    scored = examples * completions * completion
    if padded:
        return Rows(None, examples * completions, prompt + completion, scored)
    trees = []
    for _ in range(examples):
        tree = Tree([0] * (prompt - 1), list(range(prompt - 1)), [0] * (prompt - 1))
        for row in range(completions):
            tree.add((row,), [0] * (prompt + completion), prompt)
        trees.append(tree)
    return Rows(tuple(trees), examples * completions, prompt + completion, scored)


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps.

    Attributes:
        rows: of the forward pass.
        layer: by one layer, without checkpointing; autocast's copies of its weights included.
        around: by everything before and after the layers, without the head.
        entering: the hidden states that enter a layer, which is all that a checkpointed layer keeps.
        counted: False for a rule of thumb, where the model could not be called on fake tensors.
    """

    rows: Rows
    layer: int
    around: int
    entering: int
    counted: bool = True

    def kept(self, layers: int, checkpointed: bool) -> int:
        """By the whole model at the end of the forward pass."""
        return self.around + layers * (self.entering if checkpointed else self.layer)


def activations(
    config: Any, rows: Rows, *, dtype: torch.dtype, autocast: bool, adapter: Any = None, fused: bool = True
) -> Activations:
    """Count them, or fall back to a rule of thumb.

    Args:
        config: of the model.
        rows: of one forward pass.
        dtype: of its weights as the engine keeps them for the computation.
        autocast: whether operations are cast to bfloat16.
        adapter: a PEFT configuration, or None where all weights train.
        fused: LoRA layers compute in one go, as they do on a CPU with whole weights.
    """
    hidden = config.get_text_config().hidden_size
    for some in (rows, rows.padded()) if rows.trees is not None else (rows,):
        try:
            # With two layers their difference is one layer, free of what surrounds them.
            one, two = (_kept(_shortened(config, n), some, dtype, autocast, adapter, fused) for n in (1, 2))
        # Whatever an unusual model raises on fake tensors, a rough estimate is better than none.
        except Exception as error:
            logger.debug("%s: %s", type(error).__name__, error)
        else:
            # A residual stream is in the weights' own type.
            return Activations(some, two - one, max(2 * one - two, 0), some.tokens * hidden * dtype.itemsize)
    return _rule_of_thumb(config, rows, 2 if autocast or dtype.itemsize == 2 else 4)


def _shortened(config: Any, layers: int) -> Any:
    """The configuration of the same model with fewer layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(text, name, None), list):
            setattr(text, name, getattr(text, name)[:layers])
    return short


def _kept(config: Any, rows: Rows, dtype: torch.dtype, autocast: bool, adapter: Any, fused: bool) -> int:
    """Bytes of the distinct storages that one call of the model keeps, its own weights not counted."""
    if rows.trees is not None:
        config._attn_implementation = TREE_ATTENTION
    # What fails here is not for the screen; the caller falls back.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with torch.device("meta"):
        model = causal_model(config, dtype)
        if adapter is not None:
            model = get_peft_model(model, copy.deepcopy(adapter))
    if adapter is not None and fused:
        fuse_lora(model)
    with FakeTensorMode():
        _put_on_cpu(model)
        inner = model.get_base_model() if adapter is not None else model
        # Above the head: what that keeps depends on its chunks and is counted apart.
        body = getattr(inner, inner.base_model_prefix)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        seen: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage.nbytes()
            return tensor

        arguments = _inputs(rows)
        model.train()
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            # Bound while it is counted: a storage that is freed could lend its address to another.
            output = body(**arguments, use_cache=False)
        total = sum(seen.values())
        del output
    return total


def _put_on_cpu(model: torch.nn.Module) -> None:
    """Fake weights on a CPU in place of those on the meta device, where autocast does nothing."""
    fakes: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
                module._parameters[name] = fakes.setdefault(id(weight), fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _inputs(rows: Rows) -> dict[str, Any]:
    if rows.trees is not None:
        inputs = tree_inputs(rows.trees, 0, torch.device("cpu"), "packed")
        return {name: inputs[name] for name in ("input_ids", "position_ids", "attention_mask")}
    ids = torch.zeros(rows.count, rows.length, dtype=torch.long)
    return {"input_ids": ids, "position_ids": torch.arange(rows.length).expand(rows.count, -1)}


def _rule_of_thumb(config: Any, rows: Rows, width: int) -> Activations:
    """Seven hidden-sized, four query-sized and four MLP-sized tensors a token, as a Llama keeps."""
    text = config.get_text_config()
    hidden = rows.tokens * text.hidden_size * width
    experts = (getattr(text, "num_experts_per_tok", None) or 1) * (getattr(text, "moe_intermediate_size", None) or 0)
    inner = experts or getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    heads = getattr(text, "num_attention_heads", None) or 1
    queries = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    layer = rows.tokens * width * (7 * text.hidden_size + 4 * queries + 4 * inner)
    return Activations(rows, layer, 3 * hidden, hidden, counted=False)


def causal_model(config: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A model from its configuration, with its own class, on the device and in the mode of the caller."""
    kind = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0], AutoModelForCausalLM)
    options = options if dtype is None else {**options, "dtype": dtype}
    make = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
    return make(config, **options)
