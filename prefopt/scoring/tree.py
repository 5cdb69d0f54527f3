"""The tree layout: every prompt once, its completions as branches of one row.

    trunk = prompt[:-1]  |  prompt[-1:] + chosen[:-1]  |  prompt[-1:] + rejected[:-1]  |  ...

Each branch sees the trunk and itself, and its positions go on from the trunk's, so a token's log-probability is what
it is in a row of its own. A branch starts with its own copy of the last prompt token, so every branch position
predicts exactly one completion token, and the head is applied to nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefopt.scoring.attention import Plan, Span, block_mask, encode
from prefopt.scoring.call import Call, Pool, Request
from prefopt.scoring.device import on_device
from prefopt.scoring.logprobs import TokenScores, spread
from prefopt.scoring.measure import NOTHING, Extras, Measured, joined

Masks = Literal["packed", "block"] | torch.dtype
PADDING = -1
TRUNK = 0


@dataclass
class Tree:
    """One prompt and the completions of it, as plain lists.

    Attributes:
        tokens: the row; trunk first, then branch after branch.
        positions: position of each token in its own sequence.
        branches: 0 for the trunk, then 1, 2, ...
        targets: (rows of the batch, place in `TokenScores`, token) predicted by each branch position, in order.
    """

    tokens: list[int]
    positions: list[int]
    branches: list[int]
    targets: list[tuple[tuple[int, ...], int, int]] = field(default_factory=list)

    @property
    def trunk(self) -> int:
        return len(self.tokens) - len(self.targets)

    def spans(self) -> list[Span]:
        """Start and end of each branch."""
        starts = [i for i in range(self.trunk, len(self.tokens)) if i == 0 or self.branches[i] != self.branches[i - 1]]
        return list(zip(starts, [*starts[1:], len(self.tokens)], strict=True))

    def add(self, rows: tuple[int, ...], ids: list[int], start: int) -> None:
        """Add the completion that begins at `start` of these rows, which are the same."""
        number = self.branches[-1] + 1 if self.branches else 1
        self.tokens += ids[start - 1 : -1]
        self.positions += range(start - 1, len(ids) - 1)
        self.branches += [number] * (len(ids) - start)
        self.targets += [(rows, place, ids[place + 1]) for place in range(start - 1, len(ids) - 1)]


def plant(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> list[Tree]:
    """Trees of padded rows; rows with the same prompt become branches of one tree, equal rows one branch.

    Args:
        input_ids: (R, T) prompt and completion, padded on the right.
        attention_mask: (R, T), true at real tokens.
        completion_mask: (R, T), true from a completion's first token to its last.
    """
    # Read from the device at once.
    everything = torch.stack([input_ids, attention_mask.to(input_ids), completion_mask.to(input_ids)]).tolist()
    same: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for row, (ids, real, scored) in enumerate(zip(*everything, strict=True)):
        # Nothing predicts a row's first token.
        start = next((place for place, one in enumerate(scored) if one and place), None)
        if start is not None:
            same.setdefault((tuple(ids[: sum(real)]), start), []).append(row)
    trees: dict[tuple[int, ...], Tree] = {}
    for (ids, start), rows in same.items():
        prompt = ids[:start]
        if prompt not in trees:
            trunk = list(prompt[:-1])
            trees[prompt] = Tree(trunk, list(range(len(trunk))), [TRUNK] * len(trunk))
        trees[prompt].add(tuple(rows), list(ids), start)
    return list(trees.values())


def group(trees: Sequence[Tree], tokens: int | None, waste: float = 0.1) -> list[list[Tree]]:
    """Trees of one forward pass: of similar length, at most `tokens` tokens; all in one if None."""
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


def first_fit(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Which of some things go together so that their sizes add up to at most `most`, the largest first.

    Returns:
        Their numbers. One that is larger is alone.
    """
    together: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        place = next((place for place, left in enumerate(room) if left >= sizes[number]), None)
        if place is None:
            together.append([number])
            room.append(most - sizes[number])
        else:
            together[place].append(number)
            room[place] -= sizes[number]
    return together


def pack(trees: Sequence[Tree], tokens: int | None) -> list[list[Tree]]:
    """Trees that share one row: at most `tokens` of them together, unless one alone is longer; all if None."""
    if tokens is None:
        return [list(trees)] if trees else []
    return [[trees[i] for i in some] for some in first_fit([len(tree.tokens) for tree in trees], tokens)]


def tree_inputs(
    trees: Sequence[Tree], pad_token_id: int, device: torch.device, masks: Masks, trunks_too: bool = False
) -> dict[str, Any]:
    """Model inputs for some trees: a row each, or one row for all, as the kind of mask asks for.

    Returns:
        `input_ids` and `position_ids` (B, T) and `attention_mask`; for one row also, as `logits_to_keep`, the places
        of its branches, in the order of the trees' targets, or of everything with `trunks_too`. Rows of their own are
        padded on the left, so that their branches end at the last column.
    """
    if isinstance(masks, torch.dtype):
        return _rows_of_their_own(trees, pad_token_id, device, masks)
    trunks: list[Span] = []
    branches: list[tuple[Span, ...]] = []
    kept: list[int] = []
    offset = 0
    for tree in trees:
        trunks.append((offset, offset + tree.trunk))
        branches.append(tuple((offset + start, offset + end) for start, end in tree.spans()))
        kept += range(offset + (0 if trunks_too else tree.trunk), offset + len(tree.tokens))
        offset += len(tree.tokens)
    plan = Plan(tuple(trunks), tuple(branches))
    return {
        "input_ids": on_device([[token for tree in trees for token in tree.tokens]], device),
        "position_ids": on_device([[place for tree in trees for place in tree.positions]], device),
        "attention_mask": encode(plan, device) if masks == "packed" else block_mask(plan, device),
        "logits_to_keep": on_device(kept, device),
    }


def _rows_of_their_own(
    trees: Sequence[Tree], pad_token_id: int, device: torch.device, mask_dtype: torch.dtype
) -> dict[str, Any]:
    longest = max(len(tree.tokens) for tree in trees)

    def stacked(rows: list[list[int]], fill: int) -> Tensor:
        return on_device([[fill] * (longest - len(row)) + row for row in rows], device)

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
    masks: Masks = torch.bool,
    model_options: Mapping[str, Any] | None = None,
    call: Call | None = None,
    trees: Sequence[Tree] | None = None,
) -> tuple[TokenScores, Any]:
    """Score the completion tokens of padded rows in the tree layout.

    Args:
        model: a causal language model, wrapped or not, that takes position ids, `logits_to_keep` and such masks.
        inputs: `input_ids` and `attention_mask` (R, T), padded on the right.
        completion_mask: (R, T), true at completion tokens.
        extras: what to compute besides log-probabilities.
        reference: the reference's scores of the same rows with their logits, for extras that compare distributions.
        keep_logits: hand on with the scores what it takes to have the logits again, in this layout's own form.
        tokens: maximum tokens per forward pass; None for no limit.
        masks: what the attention takes: "packed" (`prefopt.scoring.attention`) or "block" (FlexAttention) for many
            trees in one row, or the type of a four-dimensional mask: bool for SDPA, the model's own for eager
            attention, which adds its mask.
        model_options: further keyword arguments of the model.
        call: how the model is called; the default computes the head on completion tokens only.
        trees: what `plant` made of the rows, where that is known.

    Returns:
        Token scores of shape (R, T - 1), position t standing for token t + 1, and the last output of the model.
    """
    ids = inputs["input_ids"]
    trees = plant(ids, inputs["attention_mask"], completion_mask) if trees is None else trees
    together = group(trees, tokens) if isinstance(masks, torch.dtype) else pack(trees, tokens)
    parts: list[Measured] = []
    requests: list[Request] = []
    outputs: Any = None
    for number, some in enumerate(together):
        arguments, request = _call_of(some, masks, extras, ids.device)
        request.keep = keep_logits
        request.reference = None if reference is None or reference.logits is None else reference.logits[number]
        arguments |= {**(model_options or {}), "use_cache": False}
        measured, outputs = (call or Call())(model, arguments, request)
        parts.append(measured)
        requests.append(request)
    scored = [tree for some in together for tree in some]
    scores = _scatter(parts, [target for tree in scored for target in tree.targets], ids[:, 1:])
    if pooled := [request.pooled for request in requests if request.pooled is not None]:
        hidden, prompt_hidden = _of_rows(torch.cat(pooled), scored, ids.shape[0])
        scores = replace(scores, quantities={**scores.quantities, "hidden": hidden, "prompt_hidden": prompt_hidden})
    return (replace(scores, logits=[request.kept for request in requests]) if keep_logits else scores), outputs


def _call_of(
    trees: Sequence[Tree], masks: Masks, extras: Extras, device: torch.device
) -> tuple[dict[str, Any], Request]:
    """What a model is called with for some trees, and what is read off."""
    arguments = tree_inputs(trees, 0, device, masks, trunks_too=extras.hidden)
    width = None
    if isinstance(masks, torch.dtype):
        width = max(len(tree.tokens if extras.hidden else tree.targets) for tree in trees)
        # Branches end at the last column of a row of their own; of a packed row their places are picked.
        arguments["logits_to_keep"] = width
    labels, places = _labels(trees, width, device, trunks_too=extras.hidden)
    pool = _pool(trees, width, device) if extras.hidden else None
    return arguments, Request(labels.clamp(min=0), labels != PADDING, places, extras, pool=pool)


def _pool(trees: Sequence[Tree], width: int | None, device: torch.device) -> Pool:
    """Averages over each tree's prompt, then over each of its branches, tree after tree.

    Args:
        trees: a row each, or all in one row if `width` is None; trunks are among the kept positions.
        width: of a row, which ends with its tree.
        device: of the tensors.
    """
    places: list[int] = []
    vectors: list[int] = []
    offset = count = 0
    for row, tree in enumerate(trees):
        start = offset if width is None else (row + 1) * width - len(tree.tokens)
        # Every branch begins with a copy of the prompt's last token; only the first copy is used.
        spans = [(0, tree.trunk + 1), *tree.spans()]
        for number, (first, end) in enumerate(spans, count):
            places += range(start + first, start + end)
            vectors += [number] * (end - first)
        offset += len(tree.tokens)
        count += len(spans)
    return Pool(on_device(places, device), on_device(vectors, device), count)


def _of_rows(pooled: Tensor, trees: Sequence[Tree], rows: int) -> tuple[Tensor, Tensor]:
    """(R, H) vectors of each row's completion and prompt, of those that `_pool` asked for; zero where it has none."""
    none = pooled.shape[0]
    completions, prompts = [none] * rows, [none] * rows
    start = 0
    for tree in trees:
        spans = tree.spans()
        for number, (first, _) in enumerate(spans, start + 1):
            for row in tree.targets[first - tree.trunk][0]:
                completions[row], prompts[row] = number, start
        start += 1 + len(spans)
    padded = torch.cat([pooled, torch.zeros_like(pooled[:1])])
    return padded[completions], padded[prompts]


def _labels(
    trees: Sequence[Tree], width: int | None, device: torch.device, trunks_too: bool = False
) -> tuple[Tensor, Tensor]:
    """(B, K) tokens that the kept positions predict, `PADDING` for non-targets, and (M,) the targets' places.

    Args:
        trees: a row each, or all in one row if `width` is None.
        width: of a row; its targets are at its end.
        device: of the tensors.
        trunks_too: whether trunks are among the kept positions of one row.
    """
    rows: list[list[int]] = []
    for tree in trees:
        before = (tree.trunk if trunks_too else 0) if width is None else width - len(tree.targets)
        rows.append([PADDING] * before + [token for _, _, token in tree.targets])
    rows = [[token for row in rows for token in row]] if width is None else rows
    places = [place for place, token in enumerate(token for row in rows for token in row) if token != PADDING]
    return on_device(rows, device), on_device(places, device)


def _scatter(
    parts: Sequence[Measured], targets: Sequence[tuple[tuple[int, ...], int, int]], tokens: Tensor
) -> TokenScores:
    """Values of the targets at their rows and places; a branch that several rows share goes to all of them."""
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    if not parts:
        zeros = torch.zeros(tokens.shape, device=tokens.device)
        return TokenScores(zeros, zeros, mask, mask, tokens)
    places = [(row, place, i) for i, (rows, place, _) in enumerate(targets) for row in rows]
    rows, columns, sources = on_device(places, tokens.device).unbind(1)
    mask[rows, columns] = True
    picked = {name: value[sources] for name, value in joined(parts).items()}
    return spread(picked, mask, tokens, (rows, columns))
