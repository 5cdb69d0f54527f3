"""The tree layout: every prompt once, its completions as branches of one row.

    trunk = prompt[:-1]  |  prompt[-1:] + chosen[:-1]  |  prompt[-1:] + rejected[:-1]  |  ...

Each branch sees the trunk and itself, and its positions go on from the trunk's, so a token's log-probability is what
it is in a row of its own. A branch starts with its own copy of the last prompt token, so every branch position
predicts exactly one completion token, and the head is applied to nothing else. Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.scoring.logprobs import NOTHING, Extras, TokenScores, token_scores

PADDING = -1
TRUNK = 0


@dataclass
class Tree:
    """One prompt and the completions of it, as plain lists.

    Attributes:
        tokens: the row; trunk first, then branch after branch.
        positions: position of each token in its own sequence.
        branches: 0 for the trunk, then 1, 2, ...
        targets: (row of the batch, place in `TokenScores`, token) predicted by each branch position, in order.
    """

    tokens: list[int]
    positions: list[int]
    branches: list[int]
    targets: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def trunk(self) -> int:
        return len(self.tokens) - len(self.targets)

    def add(self, row: int, ids: list[int], start: int) -> None:
        """Add the completion that begins at `start` of a row."""
        number = self.branches[-1] + 1 if self.branches else 1
        self.tokens += ids[start - 1 : -1]
        self.positions += range(start - 1, len(ids) - 1)
        self.branches += [number] * (len(ids) - start)
        self.targets += [(row, place, ids[place + 1]) for place in range(start - 1, len(ids) - 1)]


def plant(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> list[Tree]:
    """Trees of padded rows; rows with the same prompt become branches of one tree.

    Args:
        input_ids: (R, T) prompt and completion, padded on the right.
        attention_mask: (R, T), true at real tokens.
        completion_mask: (R, T), true from a completion's first token to its last.
    """
    trees: dict[tuple[int, ...], Tree] = {}
    lengths = attention_mask.sum(-1).tolist()
    rows = input_ids.tolist()
    scored = completion_mask.bool().clone()
    scored[:, 0] = False  # nothing predicts a row's first token
    starts = [int(row.nonzero()[0]) if bool(row.any()) else None for row in scored]
    for row, (ids, length, start) in enumerate(zip(rows, lengths, starts, strict=True)):
        if start is None:
            continue
        prompt = tuple(ids[:start])
        if prompt not in trees:
            trunk = list(prompt[:-1])
            trees[prompt] = Tree(trunk, list(range(len(trunk))), [TRUNK] * len(trunk))
        trees[prompt].add(row, ids[:length], start)
    return list(trees.values())


def group(trees: Sequence[Tree], tokens: int | None, waste: float = 0.1) -> list[list[Tree]]:
    """Trees that go through the model together: of similar length, at most `tokens` of them; all in one if None."""
    if tokens is None:
        return [list(trees)] if trees else []
    groups: list[list[Tree]] = []
    for tree in sorted(trees, key=lambda tree: -len(tree.tokens)):
        if groups:
            longest = len(groups[-1][0].tokens)
            padding = longest * (len(groups[-1]) + 1) - sum(len(t.tokens) for t in [*groups[-1], tree])
            fits = longest * (len(groups[-1]) + 1) <= tokens
            if fits and padding <= waste * longest * (len(groups[-1]) + 1):
                groups[-1].append(tree)
                continue
        groups.append([tree])
    return groups


def tree_inputs(
    trees: Sequence[Tree], pad_token_id: int, device: torch.device, mask_dtype: torch.dtype
) -> dict[str, Any]:
    """Model inputs for trees side by side, padded on the left so that branches end at the last column.

    Returns:
        `input_ids` and `position_ids` (B, T), `attention_mask` (B, 1, T, T), boolean or additive as `mask_dtype` says.
    """
    longest = max(len(tree.tokens) for tree in trees)

    def stacked(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([[fill] * (longest - len(row)) + row for row in rows], device=device)

    branches = stacked([tree.branches for tree in trees], PADDING)
    before = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    of, by = branches.unsqueeze(1), branches.unsqueeze(2)
    # Padding sees itself, since a row of the softmax must not be empty.
    seen = before & ((of == by) | ((of == TRUNK) & (by != PADDING)))
    mask = seen.unsqueeze(1)
    if mask_dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=mask_dtype, device=device).masked_fill(~mask, torch.finfo(mask_dtype).min)
    return {
        "input_ids": stacked([tree.tokens for tree in trees], pad_token_id),
        "position_ids": stacked([tree.positions for tree in trees], 0),
        "attention_mask": mask,
    }


def score_trees(
    model: nn.Module,
    inputs: Mapping[str, Any],
    completion_mask: Tensor,
    *,
    extras: Extras = NOTHING,
    reference: TokenScores | None = None,
    keep_logits: bool = False,
    tokens: int | None = None,
    mask_dtype: torch.dtype = torch.bool,
    model_options: Mapping[str, Any] | None = None,
) -> tuple[TokenScores, Any]:
    """Score the completion tokens of padded rows in the tree layout.

    Args:
        model: a causal language model, wrapped or not, that takes 4-D masks, position ids and `logits_to_keep`.
        inputs: `input_ids` and `attention_mask` (R, T), padded on the right.
        completion_mask: (R, T), true at completion tokens.
        extras: what to compute besides log-probabilities.
        reference: the reference's scores of the same rows with their logits, for extras that compare distributions.
        keep_logits: hand the logits on with the scores, in this layout's own form.
        tokens: how many tokens go through the model at once; all of them if None.
        mask_dtype: bool for SDPA, the model's own dtype for eager attention, which adds its mask.
        model_options: further keyword arguments of the model.

    Returns:
        Token scores of shape (R, T - 1), position t standing for token t + 1, and the last output of the model.
    """
    ids = inputs["input_ids"]
    trees = plant(ids, inputs["attention_mask"], completion_mask)
    kept: list[Tensor] = []
    parts: list[TokenScores] = []
    rows: list[int] = []
    places: list[int] = []
    outputs: Any = None
    for number, together in enumerate(group(trees, tokens)):
        arguments = tree_inputs(together, 0, ids.device, mask_dtype)
        window = max(len(tree.targets) for tree in together)
        outputs = model(**arguments, **(model_options or {}), logits_to_keep=window, use_cache=False)
        # Branches end at the last column: the last len(targets) logits of each row are its own.
        pieces = [outputs.logits[i, -len(tree.targets) :] for i, tree in enumerate(together)]
        logits = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).unsqueeze(0)
        targets = [target for tree in together for target in tree.targets]
        labels = torch.tensor([[token for _, _, token in targets]], device=ids.device)
        ref_logits = None if reference is None or reference.logits is None else reference.logits[number]
        parts.append(token_scores(logits, labels, torch.ones_like(labels), extras, ref_logits))
        rows += [row for row, _, _ in targets]
        places += [place for _, place, _ in targets]
        if keep_logits:
            kept.append(logits)
    where = (torch.tensor(rows, device=ids.device), torch.tensor(places, device=ids.device))
    scores = _scatter(parts, where, (ids.shape[0], ids.shape[1] - 1), ids[:, 1:])
    return (TokenScores(**scores, logits=kept) if keep_logits else TokenScores(**scores)), outputs


_SCATTERED = (
    "logps", "entropy", "is_top1", "top_logps", "top_ids", "collision", "forward_kl", "reverse_kl", "ref_entropy",
)  # fmt: skip


def _scatter(
    parts: Sequence[TokenScores], where: tuple[Tensor, Tensor], shape: tuple[int, int], tokens: Tensor
) -> dict[str, Any]:
    """Values of packed tokens at their rows and places."""
    made: dict[str, Any] = {"tokens": tokens}
    mask = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    if not parts:
        zeros = torch.zeros(shape, device=tokens.device)
        return made | {"logps": zeros, "entropy": zeros, "is_top1": mask, "mask": mask}
    mask[where] = True
    made["mask"] = mask
    for name in _SCATTERED:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            continue
        joined = torch.cat([value[0] for value in values])
        made[name] = joined.new_zeros((*shape, *joined.shape[1:])).index_put(where, joined)
    return made
