"""Tests whether a model gives the same hidden states in trees as in rows, for rows as long as the run's.

Two branches of a tree, far apart in it, are compared with separate rows of the run's length. This shows leaks between
branches, windows counted in positions of the packed row, and thresholds on its length. It runs in float32, on a model
that `exact` prepares, so that rounding hides nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from prefopt.scoring.call import Call, Request
from prefopt.scoring.exact import awake, called_so, undisturbed, ways_to_call
from prefopt.scoring.logprobs import TokenScores
from prefopt.scoring.measure import Measured
from prefopt.scoring.model import head_layer, replaced_forward, unwrapped
from prefopt.scoring.padded import score_rows
from prefopt.scoring.reach import Reach
from prefopt.scoring.rows import RowBatch

EXACT = 5e-5
"""Relative difference of a hidden state in float32, above which it is another one. Rounding is 1e-7 to 1e-6; the
smallest that leaves a branch, in small random models, is 1e-3."""
ROUNDED = 0.03
"""Mean relative difference in half precision, where weights cannot be cast for the trial."""
FEW = 0.05
"""Share of positions that a choice of a router can change."""
ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    IndexError,
    AttributeError,
    KeyError,
    AssertionError,
    NotImplementedError,
)
"""Errors that models raise for arguments they do not support."""


# ---- what is scored ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Two completions of one prompt, as rows and as branches with others between them.

    Attributes:
        rows: (2, T) the compared rows, whole; nothing is padded.
        tree: (3, P) the same rows, padded, and one whose branch comes between theirs; (2, P) where that has no room.
        attention: (3, P) which tokens are there.
        mask: (3, P) which tokens are completions.
        prompt: tokens of the prompt.
    """

    rows: Tensor
    tree: Tensor
    attention: Tensor
    mask: Tensor
    prompt: int

    def with_other_branches(self) -> Rows:
        """The same last branch after others that are new."""
        tree = self.tree.clone()
        for row in range(len(tree) - 1):
            ids = tree[row, self.prompt : int(self.attention[row].sum())]
            ids.copy_(ids.flip(0))
            ids[0] = (self.tree[-1, self.prompt] + 1 + row) % (self.tree.max() + 1)
        return replace(self, tree=tree)


def trial_rows(batch: RowBatch, reach: Reach, turn: int = 0) -> Rows:
    """Rows of a batch's own tokens, as long as asked for.

    Args:
        batch: whose tokens are used.
        reach: length of the rows, and of the tree.
        turn: another number, other rows.
    """
    tokens = batch.ids[batch.attention.bool()]
    # Half is prompt where there is room, so that the later branch is far from the places of its row. A prime number of
    # tokens is no number of whole blocks, so a block that models compress has tokens of prompt and branch.
    most = max(min(reach.places - reach.row + 1, reach.row - reach.row // 2 + 2), reach.row // 4, 1)
    completion = next((count for count in range(most, 0, -1) if _is_prime(reach.row - count)), most)
    prompt = max(reach.row - completion, 1)
    # The tree holds the prompt but for its last token, and that one before each branch but for the branch's own last.
    between = max(reach.places - (prompt - 1) - 2 * completion, 0)

    def some(count: int, start: int) -> Any:
        index = (torch.arange(count, device=tokens.device) + start) % len(tokens)
        return tokens[index]

    step = max(len(tokens) // 4, 1)
    trunk = some(prompt, turn * 7)
    counts = (completion, between, completion) if between else (completion, completion)
    branches = [some(count, turn * 7 + (i + 1) * step + i) for i, count in enumerate(counts)]
    # A batch may repeat itself; branches that were the same would be one.
    for number, branch in enumerate(branches):
        branch[0] = (branches[0][0] + number) % (tokens.max() + 1)
    rows = [torch.cat([trunk, branch]) for branch in branches]
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device).unsqueeze(-1)
    places = torch.arange(int(lengths.max()), device=tokens.device)
    return Rows(
        rows=torch.stack([rows[0], rows[-1]]),
        tree=pad_sequence(rows, batch_first=True),
        attention=(places < lengths).long(),
        mask=((places >= prompt) & (places < lengths)).long(),
        prompt=prompt,
    )


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


class HiddenStates(Call):
    """Calls a model for what its head is given at the scored positions, in place of `top_logps`."""

    def __init__(self) -> None:
        super().__init__(chunked_head=False)
        self.exact = True

    def __call__(
        self, model: nn.Module, arguments: Mapping[str, Any], request: Request, *, whole_logits: bool = False
    ) -> tuple[Measured, Any]:
        head = head_layer(unwrapped(model))
        seen: list[Tensor] = []

        def look(_: nn.Module, given: tuple[Any, ...]) -> None:
            seen.append(given[0])
            self.exact &= given[0].dtype == torch.float32 and not torch.is_autocast_enabled(given[0].device.type)

        with contextlib.ExitStack() as stack:
            if isinstance(head, nn.Module):
                stack.callback(head.register_forward_pre_hook(look).remove)
            if type(head) is nn.Linear and "forward" not in vars(head):
                # Its product is the larger part of the work in a small model.
                stack.enter_context(replaced_forward(head, lambda hidden: hidden[..., :1]))
            outputs = model(**arguments)
        states = seen[-1] if seen else outputs.logits
        states = states[:, states.shape[1] - request.mask.shape[1] :][request.mask].float()
        return {"logps": states.new_zeros(len(states)), "top_logps": states}, outputs


# ---- the comparison ------------------------------------------------------------------------------------------------

Score = Callable[[Mapping[str, Any], Tensor, Call], TokenScores]


def tree_difference(
    model: nn.Module,
    score: Score,
    batch: RowBatch,
    reach: Reach,
    options: Mapping[str, Any],
) -> str:
    """How a model's hidden states in trees differ from those in rows; "" if they do not.

    Args:
        model: as one process alone can call it, or the wrapper that spreads its weights over processes.
        score: scores rows in trees, calling that model.
        batch: whose tokens are used.
        reach: how long rows and trees are.
        options: further keyword arguments of the model.
    """
    reason = ""
    with undisturbed(model), awake(model):
        for way in ways_to_call(model):
            try:
                with called_so(model, way):
                    return _compared(model, score, batch, reach, options)
            except ERRORS as error:
                reason = reason or fails(model, error)
    return reason


def fails(model: nn.Module, error: Exception) -> str:
    """The message for a model that cannot be called in trees."""
    text = (str(error) or type(error).__name__).splitlines()[0][:120]
    return f"{type(unwrapped(model)).__name__} fails on it ({text})"


def _compared(model: nn.Module, score: Score, batch: RowBatch, reach: Reach, options: Mapping[str, Any]) -> str:
    name, reason = type(unwrapped(model)).__name__, ""
    # A router's choice may depend on rounding with some tokens; a mixing of branches shows with any tokens.
    for turn in range(2):
        rows = trial_rows(batch, reach, turn)
        truth, exact = _in_rows(model, rows, options)
        states = _in_tree(score, rows)
        gap = _gap(truth, states)
        if exact:
            same = bool(gap.max() <= EXACT)
        else:
            other = _in_tree(score, rows.with_other_branches())
            leak = _gap(states, other)[-1]
            same = bool(gap.mean(-1).max() <= ROUNDED) and bool(leak.max() <= EXACT)
        if same:
            return ""
        reason = reason or (
            f"{name} gives other log-probabilities in it (its hidden states differ by up to {float(gap.max()):.1%} "
            f"in rows of {reach.row} tokens)"
        )
        if bool((gap > EXACT).float().mean() > FEW):
            break
    return reason


def _of_both(rows: Rows, scored: TokenScores) -> Tensor:
    """(2, C, H) hidden states that predict the completions of the two compared rows."""
    return scored.quantities["top_logps"][[0, -1], rows.prompt - 1 : rows.rows.shape[1] - 1]


def _in_rows(model: nn.Module, rows: Rows, options: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """The states as the model's own rows have them, and whether all of it was float32."""
    mask = torch.zeros_like(rows.rows)
    mask[:, rows.prompt :] = 1
    call = HiddenStates()
    inputs = {**options, "input_ids": rows.rows, "attention_mask": torch.ones_like(rows.rows)}
    return _of_both(rows, score_rows(model, inputs, mask, call=call)[0]), call.exact


def _in_tree(score: Score, rows: Rows) -> Tensor:
    """The same states as a tree has them."""
    inputs = {"input_ids": rows.tree, "attention_mask": rows.attention}
    return _of_both(rows, score(inputs, rows.mask, HiddenStates()))


def _gap(truth: Tensor, states: Tensor) -> Tensor:
    """(2, C) differences of hidden states, as a share of their length."""
    length: Tensor = truth.norm(dim=-1)
    gap: Tensor = (truth - states).norm(dim=-1) / length.clamp(min=float(length.median()) * 1e-3 + 1e-30)
    return gap
