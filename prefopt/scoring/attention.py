"""Attention over a row of packed trees, cut at their branches, so that nothing is computed that no token sees.

A mask of such a row would be mostly empty, and kernels compute a mask's whole square. Here every tree's trunk and
first branch go through the kernel as the causal sequence that they are, every further branch with the trunk before it.
Registered with transformers under a name of its own; for everything that is not a packed row it is plain SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefopt.safety.errors import UsageError
from prefopt.scoring.device import on_device

NAME = "tree_sdpa"

Span = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """How a row of packed trees is cut.

    Attributes:
        trunks: start and end of every tree's trunk; branches follow it, the first one at its end.
        branches: start and end of every tree's branches.
    """

    trunks: tuple[Span, ...]
    branches: tuple[tuple[Span, ...], ...]
    masks: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def queries(self) -> list[Span]:
        """Spans of the row, in order, that are queries together."""
        spans = []
        for (start, _), ((_, first_end), *others) in zip(self.trunks, self.branches, strict=True):
            spans += [(start, first_end), *others]
        return spans

    def keys(self) -> list[tuple[Span, ...]]:
        """What each of them attends to, causally from its end: the trunk and itself."""
        spans: list[tuple[Span, ...]] = []
        for trunk, ((_, first_end), *others) in zip(self.trunks, self.branches, strict=True):
            spans.append(((trunk[0], first_end),))
            spans += [(trunk, branch) if trunk[0] < trunk[1] else (branch,) for branch in others]
        return spans

    def mask(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """(queries, keys) additive mask in which the last query sees all keys; kept for the other layers."""
        key = (queries, keys, like.dtype, like.device)
        if key not in self.masks:
            hidden = torch.ones(queries, keys, dtype=torch.bool, device=like.device).triu(keys - queries + 1)
            self.masks[key] = torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(
                hidden, -torch.inf
            )
        return self.masks[key]


def encode(plan: Plan, device: torch.device) -> Tensor:
    """The plan as a four-dimensional tensor of integers, which models hand to their attention as they got it.

    Args:
        plan: of a row.
        device: the model's, so that no wrapper moves the tensor and loses its attribute.
    """
    rows = []
    for (start, end), branches in zip(plan.trunks, plan.branches, strict=True):
        rows.append([start, end, 0])
        rows += [[*branch, 1] for branch in branches]
    code = on_device(rows, device)[None, None]
    code.plan = plan  # type: ignore[attr-defined]  # saves the decoding where the very tensor arrives
    return code


def decode(code: Tensor) -> Plan:
    """The plan of a tensor that `encode` made."""
    plan: Plan | None = getattr(code, "plan", None)
    if plan is not None:
        return plan
    trunks: list[Span] = []
    branches: list[list[Span]] = []
    for start, end, is_branch in code[0, 0].tolist():
        if is_branch:
            branches[-1].append((start, end))
        else:
            trunks.append((start, end))
            branches.append([])
    return Plan(tuple(trunks), tuple(tuple(spans) for spans in branches))


def block_mask(plan: Plan, device: torch.device) -> Any:
    """The plan for FlexAttention: blocks of the row that no token sees are not computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    trees: list[int] = []
    branches: list[int] = []
    for number, ((start, end), spans) in enumerate(zip(plan.trunks, plan.branches, strict=True)):
        trees += [number] * (spans[-1][1] - start)
        branches += [0] * (end - start)
        for branch, (first, last) in enumerate(spans, start=1):
            branches += [branch] * (last - first)
    tree, branch_of = on_device(trees, device), on_device(branches, device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = tree[query] == tree[key]
        return same & (query >= key) & ((branch_of[key] == 0) | (branch_of[key] == branch_of[query]))

    return create_block_mask(sees, None, None, len(trees), len(trees), device=device)


def is_code(mask: Any) -> bool:
    """Whether a mask argument is a plan: real masks are boolean or floating."""
    return isinstance(mask, Tensor) and mask.dtype == torch.long and mask.dim() == 4


class _Stretches(torch.autograd.Function):
    """(1, H, T, D) -> one tensor per stretch of it. Autograd's own slices would each get a gradient of full size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stretches: Sequence[tuple[Span, ...]]) -> tuple[Tensor, ...]:
        ctx.stretches, ctx.shape = stretches, x.shape
        parts = ([x[:, :, start:end] for start, end in spans] for spans in stretches)
        return tuple(torch.cat(spans, dim=2) if len(spans) > 1 else spans[0].view_as(spans[0]) for spans in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        batch, heads, length, width = ctx.shape
        # Laid out as projections make their heads, so that no copy follows.
        total = grads[0].new_zeros((batch, length, heads, width)).transpose(1, 2)
        for spans, grad in zip(ctx.stretches, grads, strict=True):
            offset = 0
            for start, end in spans:
                total[:, :, start:end] += grad[:, :, offset : offset + end - start]
                offset += end - start
        return total, None


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: SDPA, cut along the plan where the mask is one.

    Args:
        module: the attention layer; its `num_key_value_groups` says how many query heads share a key.
        query: (1, H, T, D).
        key, value: (1, H / groups, T, D).
        attention_mask: what `encode` made, or an ordinary mask.
        dropout: probability.
        scaling: of the scores; 1/sqrt(D) if None.

    Returns:
        (1, T, H, D), as transformers wants it, and None.
    """
    if not is_code(attention_mask):
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output
    assert attention_mask is not None
    unknown = [name for name in ("softcap", "position_bias", "s_aux") if options.get(name) is not None]
    if unknown:
        raise UsageError(f"packed trees cannot be scored with an attention that uses {unknown[0]}")
    plan = decode(attention_mask)
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    queries, stretches = plan.queries(), plan.keys()
    parts = []
    for q, k, v in zip(
        torch.split(query, [end - start for start, end in queries], dim=2),
        _Stretches.apply(key, stretches),  # type: ignore[no-untyped-call]
        _Stretches.apply(value, stretches),  # type: ignore[no-untyped-call]
        strict=True,
    ):
        alone = q.shape[2] == k.shape[2]
        part = scaled_dot_product_attention(
            q, k, v,
            attn_mask=None if alone else plan.mask(q.shape[2], k.shape[2], q),
            dropout_p=dropout, scale=scaling, is_causal=alone,
        )  # fmt: skip
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1), None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
