"""Which layout a model can be scored in, found out once and said in one line.

The tree layout needs an attention that takes any mask, explicit positions, and a head that can be applied to the last
positions only. What a model's code promises is not always what it does, so the first batch is scored in both layouts
and the tree layout is used only if they agree.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefopt.scoring.collate import select_rows
from prefopt.scoring.logprobs import NOTHING, Extras, TokenScores
from prefopt.scoring.padded import score_rows, unwrapped
from prefopt.scoring.tree import score_trees

logger = logging.getLogger(__name__)

LayoutName = Literal["auto", "tree", "padded"]
TOKENS_ON_CPU = 512
"""Tokens that go through the model at once on a CPU, where a larger product is no faster than two smaller ones, and
padding costs as much as anything else."""


class Layout:
    """Scores collated rows in the best layout that the model can be scored in.

    Args:
        name: "auto" uses the tree layout where the model gives the same numbers in it, "tree" insists on it, "padded"
            never uses it.
        agree: joins the finding of every process, so that all take the same layout.
        one_call: whether the policy may be called only once per batch (DDP, DeepSpeed and FSDP count calls).
    """

    def __init__(self, name: LayoutName, agree: Callable[[str], str] = str, one_call: bool = False):
        self.name = name
        self.one_call = one_call
        self._agree = agree
        self._found: str | None = None  # why not the tree layout; "" if it is fit

    def score(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        model_inputs: Mapping[str, Any],
        *,
        extras: Extras = NOTHING,
        reference: TokenScores | None = None,
        keep_logits: bool = False,
        all_logits: bool = False,
    ) -> tuple[TokenScores, Any]:
        """Token scores of shape (R, T - 1), position t standing for token t + 1, and the model's output.

        Args:
            model: a causal language model, wrapped or not.
            inputs: a collated batch.
            model_inputs: what of it, and what else, the model takes.
            extras: what to compute besides log-probabilities.
            reference: the reference's scores of the same rows with their logits, for extras that compare.
            keep_logits: hand the logits on with the scores.
            all_logits: keep the logits of every position in the model's output, which only the padded layout can.
        """
        mask = inputs["completion_mask"]
        if all_logits or not self._fits(model, inputs, model_inputs):
            return score_rows(
                model, model_inputs, mask,
                extras=extras, reference=reference, keep_logits=keep_logits, all_logits=all_logits,
            )  # fmt: skip
        return self._in_trees(model, model_inputs, mask, extras=extras, reference=reference, keep_logits=keep_logits)

    def _in_trees(
        self, model: nn.Module, model_inputs: Mapping[str, Any], mask: Tensor, **options: Any
    ) -> tuple[TokenScores, Any]:
        config = unwrapped(model).config
        eager = getattr(config, "_attn_implementation", "eager") == "eager"
        on_cpu = model_inputs["input_ids"].device.type == "cpu"
        return score_trees(
            model, model_inputs, mask,
            tokens=TOKENS_ON_CPU if on_cpu and not self.one_call else None,
            mask_dtype=unwrapped(model).dtype if eager else torch.bool,  # type: ignore[arg-type]
            # The load balancing of experts counts padded rows; asked for, it comes with the padded layout.
            model_options={"output_router_logits": False} if hasattr(config, "output_router_logits") else None,
            **options,
        )  # fmt: skip

    def _fits(self, model: nn.Module, inputs: Mapping[str, Any], model_inputs: Mapping[str, Any]) -> bool:
        if self.name == "padded" or not bool(inputs["completion_mask"].any()):
            return False
        if self._found is None:
            reason = self._unfit(model, inputs, model_inputs) or self._disagreement(model, inputs, model_inputs)
            self._found = self._agree(reason)
            if self._found and self.name == "tree":
                raise ValueError(f"layout='tree' cannot be used here: {self._found}")
            if self._found:
                logger.warning("padded layout (each prompt once per completion): %s", self._found)
        # Within the window of a sliding attention every token sees all before it, as the tree's mask has it.
        config: Any = unwrapped(model).config
        window = getattr(config.get_text_config(), "sliding_window", None)
        return not self._found and (window is None or int(inputs["attention_mask"].sum(-1).max()) <= window)

    @staticmethod
    def _unfit(model: nn.Module, inputs: Mapping[str, Any], model_inputs: Mapping[str, Any]) -> str:
        """Why the tree layout is out of the question, from what can be read off; "" if it is not."""
        inner = unwrapped(model)
        parameters = inspect.signature(inner.forward).parameters
        attention = getattr(inner.config, "_attn_implementation", None)
        if "roles" not in inputs or set(model_inputs) - {"input_ids", "attention_mask", "output_router_logits"}:
            return "the batch holds more than token ids, or comes from another collator"
        if model_inputs.get("output_router_logits"):
            return "the load-balancing loss of experts is computed over padded rows"
        for name in ("position_ids", "logits_to_keep"):
            if name not in parameters:
                return f"{type(inner).__name__} does not take {name}"
        if attention not in ("sdpa", "eager"):
            return f"the attention implementation {attention!r} does not take a mask of any shape"
        if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
            return "prompt learning puts tokens of its own before every row"
        return ""

    def _disagreement(self, model: nn.Module, inputs: Mapping[str, Any], model_inputs: Mapping[str, Any]) -> str:
        """Score two examples in both layouts; what is different, or ""."""
        few = select_rows(inputs, inputs["examples"] <= 1)
        kept = {**model_inputs, **{name: few[name] for name in ("input_ids", "attention_mask")}}
        mask, was_training = few["completion_mask"], model.training
        model.eval()  # dropout would make any two passes differ
        try:
            with torch.no_grad():
                padded, _ = score_rows(model, kept, mask)
                trees, _ = self._in_trees(model, kept, mask)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"{type(unwrapped(model)).__name__} fails on it ({str(error).splitlines()[0][:120]})"
        finally:
            model.train(was_training)
        half = unwrapped(model).dtype != torch.float32 or torch.is_autocast_enabled(mask.device.type)
        gap = float((padded.logps - trees.logps).abs().max())
        if not gap <= (0.5 if half else 1e-3):
            return f"{type(unwrapped(model)).__name__} gives other log-probabilities in it (by up to {gap:.2g} nats)"
        return ""
