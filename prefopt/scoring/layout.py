"""Which layout a model can be scored in, found out once and said in one line.

The tree layout needs an attention that takes any mask, explicit positions, and a head that can be applied to chosen
positions only. What a model's code promises is not always what it does, so it is tried: two examples of the first
batch as the run scores them, and rows as long as the run's as `trial` compares them. Longer rows than any before are
tried when they come. What is faster is used only if it gives the same numbers.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefopt.safety.errors import UsageError
from prefopt.scoring import attention
from prefopt.scoring.call import Call
from prefopt.scoring.collate import select_rows
from prefopt.scoring.exact import peeled, undisturbed
from prefopt.scoring.logprobs import NOTHING, Extras, TokenScores
from prefopt.scoring.model import is_checkpointed, unwrapped
from prefopt.scoring.padded import score_rows
from prefopt.scoring.reach import Horizon, Reach
from prefopt.scoring.tree import Masks, Tree, plant, score_trees
from prefopt.scoring.trial import ERRORS, fails, tree_difference

logger = logging.getLogger(__name__)

LayoutName = Literal["auto", "tree", "padded"]
HALF = (torch.bfloat16, torch.float16)
TOKENS_ON_CPU = {True: 4096, False: 512}
"""Tokens that go through the model at once on a CPU, where a larger product is no faster than two smaller ones: of
trees packed in one row, and of trees in rows of their own, where padding costs as much as anything else."""


class Layout:
    """Scores collated rows in the best layout that the model can be scored in.

    Args:
        name: "auto" uses the tree layout where the model gives the same numbers in it, "tree" insists on it, "padded"
            never uses it.
        gather: what every process found, so that all take the same layout.
        one_call: whether the policy may be called only once per batch (DDP, DeepSpeed and FSDP count calls).
        compiled: whether the model is compiled, so that nothing in it may be replaced for a call.
        half: whether the model is run in half precision, whatever its weights are kept in.
        max_length: of the run's rows; None if there is no limit.

    Attributes:
        masks: how trees are scored, as in `score_trees`; None for the padded layout or while that is not known.
        reason: why not in trees, if only for some batches; "" while they are used for all.
    """

    def __init__(
        self,
        name: LayoutName,
        gather: Callable[[Any], Sequence[Any]] = lambda found: [found],
        one_call: bool = False,
        compiled: bool = False,
        half: bool = False,
        max_length: int | None = None,
    ):
        self.name = name
        self.one_call = one_call
        self.masks: Masks | None = None
        self.reason = ""
        self.call = Call(chunked_head=not compiled)
        self._compiled = compiled
        self._half = half
        self._gather = gather
        self._settled = False
        self._said = False
        self._horizon = Horizon(max_length, gather)

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
        in_parts_of: int | None = None,
    ) -> tuple[TokenScores, Any]:
        """Token scores of shape (R, T - 1), position t standing for token t + 1, and the model's output.

        Args:
            model: a causal language model, wrapped or not.
            inputs: a collated batch.
            model_inputs: what of it, and what else, the model takes.
            extras: what to compute besides log-probabilities.
            reference: the reference's scores of the same rows with their logits, for extras that compare.
            keep_logits: hand on with the scores what it takes to have the logits again.
            all_logits: keep the logits of every position in the model's output, which only the padded layout can.
            in_parts_of: most tokens of trees that go through the model at once, each part being computed again in the
                backward pass. None: as many as suit the device, and nothing twice.
        """
        mask = inputs["completion_mask"]
        trees = None if all_logits else self._trees(model, inputs, model_inputs, in_parts_of)
        # Only now, as the first batch settles how models are called.
        call = replace(self.call, recompute=in_parts_of is not None)
        options: dict[str, Any] = {"extras": extras, "reference": reference, "keep_logits": keep_logits}
        if trees is not None:
            assert self.masks is not None
            return self._score_trees(model, model_inputs, mask, self.masks, call, in_parts_of, trees=trees, **options)
        # Some models ask for "sdpa" by name. Checkpointed layers of trees before may yet be computed again.
        if not is_checkpointed(model):
            self.release(model)
        return score_rows(model, model_inputs, mask, all_logits=all_logits, call=call, **options)

    @staticmethod
    def release(model: nn.Module) -> None:
        """Give a model that has scored packed trees its own attention back."""
        inner: Any = unwrapped(model)
        if getattr(getattr(inner, "config", None), "_attn_implementation", None) == attention.NAME:
            inner.set_attn_implementation("sdpa")

    def meet(self, model: nn.Module, inputs: Mapping[str, Any], model_inputs: Mapping[str, Any]) -> None:
        """Try a model before another one is scored, since all of a batch is scored in one layout."""
        if not self._settled or (self.masks is not None and not self._horizon.knows(model)):
            self.in_trees(model, inputs, model_inputs)

    def in_trees(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        model_inputs: Mapping[str, Any],
        in_parts_of: int | None = None,
    ) -> bool:
        """Whether this batch is scored in trees; found out at the first batch that tells."""
        return self._trees(model, inputs, model_inputs, in_parts_of) is not None

    def _trees(
        self, model: nn.Module, inputs: Mapping[str, Any], model_inputs: Mapping[str, Any], in_parts_of: int | None
    ) -> list[Tree] | None:
        """The batch as trees; None where it is scored padded."""
        mask = inputs["completion_mask"]
        if not bool(mask.any()) or (self._settled and self.masks is None):
            return None
        trees = plant(inputs["input_ids"], inputs["attention_mask"], mask)
        if not self._settled:
            self._settle(model, inputs, model_inputs, trees, in_parts_of)
        if self.masks is None or not trees:
            return None
        masks = self.masks
        need = self._need(trees, masks, self._at_once(inputs["input_ids"].device, masks, in_parts_of))
        reason = self._horizon.reason(model, need, lambda *about: self._differs(inputs, masks, *about))
        if reason:
            self._say_padded(need, reason)
        return None if reason else trees

    def _at_once(self, device: torch.device, masks: Masks, tokens: int | None) -> int | None:
        """How many tokens of trees go through the model at once."""
        if tokens is None and device.type == "cpu":
            tokens = TOKENS_ON_CPU[not isinstance(masks, torch.dtype)]
        return None if self.one_call else tokens

    def _score_trees(
        self, model: nn.Module, model_inputs: Mapping[str, Any], mask: Tensor, masks: Masks, call: Call,
        tokens: int | None = None, **options: Any,
    ) -> tuple[TokenScores, Any]:  # fmt: skip
        inner: Any = unwrapped(model)
        if masks == "packed" and inner.config._attn_implementation == "sdpa":
            inner.set_attn_implementation(attention.NAME)
        return score_trees(
            model, model_inputs, mask, masks=masks, call=call,
            tokens=self._at_once(model_inputs["input_ids"].device, masks, tokens),
            model_options=_without_routers(inner), **options,
        )  # fmt: skip

    # ---- how far it holds ------------------------------------------------------------------------------------------

    @staticmethod
    def _need(trees: Sequence[Tree], masks: Masks, tokens: int | None) -> Reach:
        """How far the rows of a batch go."""
        sizes = [len(tree.tokens) for tree in trees]
        row = 2 + max(tree.positions[-1] if not tree.branches else max(tree.positions) for tree in trees)
        if isinstance(masks, torch.dtype):
            return Reach(row, max(sizes))
        return Reach(row, sum(sizes) if tokens is None else min(sum(sizes), max(tokens, *sizes)))

    def _differs(self, inputs: Mapping[str, Any], masks: Masks, model: nn.Module, reach: Reach, sharded: bool) -> str:
        """How trees that go so far differ; "" if they do not."""
        inner: Any = unwrapped(model)
        before = getattr(getattr(inner, "config", None), "_attn_implementation", None)

        def score(model_inputs: Mapping[str, Any], mask: Tensor, call: Call) -> TokenScores:
            floating = isinstance(masks, torch.dtype) and masks.is_floating_point
            kind = next(p.dtype for p in inner.parameters() if p.is_floating_point()) if floating else masks
            return self._score_trees(called, model_inputs, mask, kind, call)[0]

        called = model if sharded else peeled(model)
        try:
            self.release(model)
            return tree_difference(called, score, inputs, reach, _without_routers(inner), sharded)
        finally:
            self.release(model)
            if before == attention.NAME:
                inner.set_attn_implementation(before)

    def _say_padded(self, need: Reach, reason: str) -> None:
        if self.name == "tree":
            raise UsageError(f"layout='tree' cannot be used for rows of {need.row} tokens: {reason}")
        if not self._said:
            logger.warning("padded layout for some batches (rows of %d tokens): %s", need.row, reason)
        self.reason, self._said = reason, True

    # ---- what holds ------------------------------------------------------------------------------------------------

    def _settle(
        self, model: nn.Module, inputs: Mapping[str, Any], model_inputs: Mapping[str, Any], trees: Sequence[Tree],
        in_parts_of: int | None,
    ) -> None:  # fmt: skip
        """Find out what gives the model's own numbers: the head on its own, and trees."""
        self._settled = True
        if "roles" not in inputs:
            # Rows of other collators cannot be taken apart for a trial.
            self.call.chunked_head = False
            self.reason = "the batch comes from another collator"
        else:
            with undisturbed(model):
                self._try_out(model, inputs, model_inputs, trees, in_parts_of)
        if self.masks is not None or self.name == "padded":
            return
        if self.name == "tree":
            raise UsageError(f"layout='tree' cannot be used here: {self.reason}")
        logger.warning("padded layout (each prompt once per completion): %s", self.reason)

    def _try_out(
        self, model: nn.Module, inputs: Mapping[str, Any], model_inputs: Mapping[str, Any], trees: Sequence[Tree],
        in_parts_of: int | None,
    ) -> None:  # fmt: skip
        few = select_rows(inputs, _shortest(inputs, 2))
        kept = {**model_inputs, **{name: few[name] for name in ("input_ids", "attention_mask")}}
        mask = few["completion_mask"]
        truth, _ = score_rows(model, kept, mask, call=Call(chunked_head=False))
        if self.call.chunked_head:
            chunked = self._gap(truth, model, lambda call: score_rows(model, kept, mask, call=call)[0], Call())
            self.call.chunked_head = not any(self._gather(chunked))
        if self.name == "padded":
            return
        call = Call(chunked_head=self.call.chunked_head)
        for masks in self._candidates(model, inputs, model_inputs):

            def in_trees(call: Call, masks: Masks = masks) -> TokenScores:
                return self._score_trees(model, kept, mask, masks, call)[0]

            # In float32 what follows is the same and more.
            self.reason = self._agree(self._gap(truth, model, in_trees, call) if self._in_half(model) else "")
            self.release(model)
            if self.reason:
                continue
            tokens = self._at_once(inputs["input_ids"].device, masks, in_parts_of)
            short = plant(few["input_ids"], few["attention_mask"], mask)

            def trial(one: nn.Module, reach: Reach, sharded: bool, masks: Masks = masks) -> str:
                return self._differs(inputs, masks, one, reach, sharded)

            need = self._need(trees, masks, tokens)
            self.reason = self._horizon.settle(model, need, self._need(short, masks, tokens), trial)
            if not self.reason:
                self.masks = masks
                return
            self._horizon.forget()

    def _agree(self, reason: str) -> str:
        """Why any process cannot; "" if all can."""
        return next((reason for reason in self._gather(reason) if reason), "")

    def _candidates(self, model: nn.Module, inputs: Mapping[str, Any], model_inputs: Mapping[str, Any]) -> list[Masks]:
        """The ways of scoring trees that are worth a trial, the fastest first; `reason` says why if there are none."""
        inner: Any = unwrapped(model)
        reasons = [reason for reason in self._gather(self._unfit(model, model_inputs)) if reason]
        if reasons:
            self.reason = reasons[0]
            return []
        kind = inner.config._attn_implementation
        if kind == "eager":
            return [inner.dtype]
        if kind == "flex_attention":
            return ["block"]
        settable = getattr(inner, "_can_set_attn_implementation", lambda: False)()
        return ["packed", torch.bool] if settable and not self._compiled else [torch.bool]

    @staticmethod
    def _unfit(model: nn.Module, model_inputs: Mapping[str, Any]) -> str:
        """Why the tree layout is out of the question, from what can be read off; "" if it is not."""
        inner: Any = unwrapped(model)
        parameters = inspect.signature(inner.forward).parameters
        kind = getattr(inner.config, "_attn_implementation", None)
        if set(model_inputs) - {"input_ids", "attention_mask", "output_router_logits"}:
            return "the batch holds more than token ids"
        if model_inputs.get("output_router_logits"):
            return "the load-balancing loss of experts is computed over padded rows"
        for name in ("position_ids", "logits_to_keep"):
            if name not in parameters:
                return f"{type(inner).__name__} does not take {name}"
        if kind not in ("sdpa", "eager", "flex_attention", attention.NAME):
            return f"the attention implementation {kind!r} does not take a mask of any shape"
        if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
            return "prompt learning puts tokens of its own before every row"
        return ""

    def _in_half(self, model: nn.Module) -> bool:
        """Whether the run is in half precision."""
        parameter = next(model.parameters())
        autocast = torch.is_autocast_enabled(parameter.device.type)
        return self._half or autocast or any(p.dtype in HALF for p in model.parameters())

    def _gap(self, truth: TokenScores, model: nn.Module, score: Callable[[Call], TokenScores], call: Call) -> str:
        """How other scores of the same rows differ; "" if they do not."""
        name = type(unwrapped(model)).__name__
        try:
            scores = score(call)
        except ERRORS as error:
            return fails(model, error)
        gap = float((truth.logps - scores.logps).abs().max())
        if not gap <= (0.5 if self._in_half(model) else 1e-3):
            return f"{name} gives other log-probabilities in it (by up to {gap:.2g} nats)"
        return ""


def _without_routers(inner: Any) -> dict[str, Any]:
    """The load balancing of experts counts padded rows; asked for, it comes with the padded layout."""
    return {"output_router_logits": False} if hasattr(inner.config, "output_router_logits") else {}


def _shortest(inputs: Mapping[str, Any], count: int) -> Tensor:
    """(R,) bool, the rows of the examples with the shortest rows."""
    lengths, examples = inputs["attention_mask"].sum(-1), inputs["examples"]
    longest = lengths.new_zeros(int(examples.max()) + 1).scatter_reduce(0, examples, lengths, "amax")
    present = examples.unique()
    return torch.isin(examples, present[longest[present].argsort(stable=True)[:count]])
