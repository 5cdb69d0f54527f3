"""Which layout a model can be scored in, determined once and reported in one line.

The tree layout needs an attention that takes any mask, explicit positions, and a head that can be applied to chosen
positions only. A model's code does not always do what its signature says, so the layout is tried: on two examples of
the first batch, and by `trial` on rows as long as the run's. Rows longer than any tried before are tried when they
come. The faster layout is used only if it gives the same numbers.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefopt.losses.distributed import gather_objects, world_size
from prefopt.safety.errors import UsageError
from prefopt.scoring import attention
from prefopt.scoring.call import Call
from prefopt.scoring.exact import undisturbed
from prefopt.scoring.logprobs import TokenScores
from prefopt.scoring.measure import NOTHING, Extras
from prefopt.scoring.model import is_checkpointed, peeled, unwrapped
from prefopt.scoring.padded import score_rows
from prefopt.scoring.reach import Horizon, Reach
from prefopt.scoring.rows import RowBatch
from prefopt.scoring.tree import Masks, Tree, score_trees
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
        name: "auto" uses the tree layout if the model gives the same numbers in it, "tree" requires it, "padded"
            never uses it.
        gather: the results of all processes, so that all use the same layout; default: by torch.distributed.
        one_call: whether the policy may be called only once per batch (DDP, DeepSpeed and FSDP count calls); None:
            where there are several processes.
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
        gather: Callable[[Any], Sequence[Any]] = gather_objects,
        one_call: bool | None = None,
        compiled: bool = False,
        half: bool = False,
        max_length: int | None = None,
    ):
        self.name = name
        self._one_call = one_call
        self.masks: Masks | None = None
        self.reason = ""
        self.call = Call(chunked_head=not compiled)
        self._compiled = compiled
        self._half = half
        self.gather = gather
        self._settled = False
        self._said = False
        self._horizon = Horizon(max_length, gather)

    @property
    def one_call(self) -> bool:
        """Whether the policy may be called only once per batch."""
        return world_size() > 1 if self._one_call is None else self._one_call

    def score(
        self,
        model: nn.Module,
        rows: RowBatch,
        *,
        extras: Extras = NOTHING,
        reference: TokenScores | None = None,
        keep_logits: bool = False,
        all_logits: bool = False,
        model_options: Mapping[str, Any] | None = None,
    ) -> tuple[TokenScores, Any]:
        """Token scores of shape (R, T - 1), position t standing for token t + 1, and the model's output.

        Args:
            model: a causal language model, wrapped or not.
            rows: a collated batch.
            extras: what to compute besides log-probabilities.
            reference: the reference's scores of the same rows with their logits, for extras that compare.
            keep_logits: keep with the scores what is needed to compute the logits again.
            all_logits: keep the logits of every position in the model's output, which only the padded layout can.
            model_options: further keyword arguments of the model, in the padded layout.
        """
        trees = None if all_logits else self._trees(model, rows)
        # Only now, as the first batch settles how models are called.
        call = replace(self.call, recompute=rows.tokens_at_once is not None)
        options: dict[str, Any] = {"extras": extras, "reference": reference, "keep_logits": keep_logits, "call": call}
        if trees is not None and self.masks is not None:
            options |= self._prepared(model, rows, self.masks)
            return score_trees(model, rows.model_inputs, rows.completion, trees=trees, **options)
        # Some models ask for "sdpa" by name. Checkpointed layers of trees before may yet be computed again.
        if not is_checkpointed(model):
            self.release(model)
        inputs = {**rows.model_inputs, **(model_options or {})}
        return score_rows(model, inputs, rows.completion, all_logits=all_logits, targets=rows.targets, **options)

    @staticmethod
    def release(model: nn.Module) -> None:
        """Give a model that has scored packed trees its own attention back."""
        inner: Any = unwrapped(model)
        if getattr(getattr(inner, "config", None), "_attn_implementation", None) == attention.NAME:
            inner.set_attn_implementation("sdpa")

    def meet(self, model: nn.Module, rows: RowBatch) -> None:
        """Try a model before another one is scored, since all of a batch is scored in one layout."""
        if not self._settled or (self.masks is not None and not self._horizon.knows(model)):
            self.in_trees(model, rows)

    def in_trees(self, model: nn.Module, rows: RowBatch) -> bool:
        """Whether this batch is scored in trees; found out at the first batch that tells."""
        return self._trees(model, rows) is not None

    def _trees(self, model: nn.Module, rows: RowBatch) -> list[Tree] | None:
        """The batch as trees; None where it is scored padded."""
        if (self._settled and self.masks is None) or not rows.trees:
            return None
        if not self._settled:
            self._settle(model, rows)
        if self.masks is None:
            return None
        need, masks = self._need(rows, self.masks), self.masks
        reason = self._horizon.reason(model, need, lambda *about: self._differs(rows, masks, *about))
        if reason:
            self._say_padded(need, reason)
        return None if reason else rows.trees

    def _at_once(self, rows: RowBatch, masks: Masks) -> int | None:
        """Maximum tokens of trees per forward pass; None for no limit."""
        tokens = rows.tokens_at_once
        if tokens is None and rows.ids.device.type == "cpu":
            tokens = TOKENS_ON_CPU[not isinstance(masks, torch.dtype)]
        return None if self.one_call else tokens

    def _prepared(self, model: nn.Module, rows: RowBatch, masks: Masks) -> dict[str, Any]:
        """Give a model the attention that these masks are for; how `score_trees` calls it then."""
        inner: Any = unwrapped(model)
        if masks == "packed" and inner.config._attn_implementation == "sdpa":
            inner.set_attn_implementation(attention.NAME)
        return {"masks": masks, "tokens": self._at_once(rows, masks), "model_options": _without_routers(inner)}

    # ---- how far it holds ------------------------------------------------------------------------------------------

    def _need(self, rows: RowBatch, masks: Masks) -> Reach:
        """How far the rows of a batch go."""
        sizes = [len(tree.tokens) for tree in rows.trees]
        row = 2 + max(tree.positions[-1] if not tree.branches else max(tree.positions) for tree in rows.trees)
        if isinstance(masks, torch.dtype):
            return Reach(row, max(sizes))
        tokens = self._at_once(rows, masks)
        return Reach(row, sum(sizes) if tokens is None else min(sum(sizes), max(tokens, *sizes)))

    def _differs(self, rows: RowBatch, masks: Masks, model: nn.Module, reach: Reach, sharded: bool) -> str:
        """How trees that go so far differ; "" if they do not."""
        inner: Any = unwrapped(model)
        before = getattr(getattr(inner, "config", None), "_attn_implementation", None)
        called = model if sharded else peeled(model)
        together = replace(rows, tokens_at_once=None)

        def score(inputs: Mapping[str, Any], mask: Tensor, call: Call) -> TokenScores:
            floating = isinstance(masks, torch.dtype) and masks.is_floating_point
            kind = next(p.dtype for p in inner.parameters() if p.is_floating_point()) if floating else masks
            return score_trees(called, inputs, mask, call=call, **self._prepared(called, together, kind))[0]

        try:
            self.release(model)
            return tree_difference(called, score, rows, reach, _without_routers(inner))
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

    def _settle(self, model: nn.Module, rows: RowBatch) -> None:
        """Find out what gives the model's own numbers: the head on its own, and trees."""
        self._settled = True
        if rows.divisible:
            with undisturbed(model):
                self._try_out(model, rows)
        else:
            # Rows of other collators cannot be split for a trial.
            self.call.chunked_head = False
            self.reason = "the batch comes from another collator"
        if self.masks is not None or self.name == "padded":
            return
        if self.name == "tree":
            raise UsageError(f"layout='tree' cannot be used here: {self.reason}")
        logger.warning("padded layout (each prompt once per completion): %s", self.reason)

    def _try_out(self, model: nn.Module, rows: RowBatch) -> None:
        few = rows.select_rows(_shortest(rows, 2))
        inputs, mask = few.model_inputs, few.completion
        truth, _ = score_rows(model, inputs, mask, call=Call(chunked_head=False))
        if self.call.chunked_head:
            differs = self._gap(truth, model, lambda: score_rows(model, inputs, mask, call=Call())[0])
            self.call.chunked_head = not any(self.gather(differs))
        for masks in self._candidates(model, rows) if self.name != "padded" else ():

            def in_trees(masks: Masks = masks) -> TokenScores:
                call = Call(chunked_head=self.call.chunked_head)
                return score_trees(model, inputs, mask, call=call, **self._prepared(model, few, masks))[0]

            def trial(one: nn.Module, reach: Reach, sharded: bool, masks: Masks = masks) -> str:
                return self._differs(rows, masks, one, reach, sharded)

            # In float32 what follows is the same and more.
            self.reason = self._agree(self._gap(truth, model, in_trees) if self._in_half(model) else "")
            self.release(model)
            if self.reason:
                continue
            self.reason = self._horizon.settle(model, self._need(rows, masks), self._need(few, masks), trial)
            if not self.reason:
                self.masks = masks
                return
            self._horizon.forget()

    def _agree(self, reason: str) -> str:
        """The reason of the first process that cannot; "" if all can."""
        return next((reason for reason in self.gather(reason) if reason), "")

    def _candidates(self, model: nn.Module, rows: RowBatch) -> list[Masks]:
        """The ways of scoring trees that are worth a trial, the fastest first; `reason` says why if there are none."""
        inner: Any = unwrapped(model)
        self.reason = self._agree(_unfit(model, rows))
        if self.reason:
            return []
        kind = inner.config._attn_implementation
        if kind == "eager":
            return [inner.dtype]
        if kind == "flex_attention":
            return ["block"]
        settable = getattr(inner, "_can_set_attn_implementation", lambda: False)()
        return ["packed", torch.bool] if settable and not self._compiled else [torch.bool]

    def _in_half(self, model: nn.Module) -> bool:
        """Whether the run is in half precision."""
        parameter = next(model.parameters())
        autocast = torch.is_autocast_enabled(parameter.device.type)
        return self._half or autocast or any(p.dtype in HALF for p in model.parameters())

    def _gap(self, truth: TokenScores, model: nn.Module, score: Callable[[], TokenScores]) -> str:
        """How other scores of the same rows differ; "" if they do not."""
        name = type(unwrapped(model)).__name__
        try:
            scores = score()
        except ERRORS as error:
            return fails(model, error)
        gap = float((truth.logps - scores.logps).abs().max())
        if not gap <= (0.5 if self._in_half(model) else 1e-3):
            return f"{name} gives other log-probabilities in it (by up to {gap:.2g} nats)"
        return ""


def _unfit(model: nn.Module, rows: RowBatch) -> str:
    """Why the tree layout is out of the question, from what can be read off; "" if it is not."""
    inner: Any = unwrapped(model)
    parameters = inspect.signature(inner.forward).parameters
    kind = getattr(inner.config, "_attn_implementation", None)
    if rows.extra:
        return "the batch holds more than token ids"
    for name in ("position_ids", "logits_to_keep"):
        if name not in parameters:
            return f"{type(inner).__name__} does not take {name}"
    if kind not in ("sdpa", "eager", "flex_attention", attention.NAME):
        return f"the attention implementation {kind!r} does not take a mask of any shape"
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "prompt learning adds its own tokens before every row"
    return ""


def _without_routers(inner: Any) -> dict[str, Any]:
    """The load balancing of experts counts padded rows; asked for, it comes with the padded layout."""
    return {"output_router_logits": False} if hasattr(inner.config, "output_router_logits") else {}


def _shortest(rows: RowBatch, count: int) -> Tensor:
    """(R,) bool, the rows of the examples with the shortest rows."""
    lengths = rows.attention.sum(-1)
    longest = lengths.new_zeros(int(rows.examples.max()) + 1).scatter_reduce(0, rows.examples, lengths, "amax")
    present = torch.unique(rows.examples)
    return torch.isin(rows.examples, present[longest[present].argsort(stable=True)[:count]])
