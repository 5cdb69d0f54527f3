"""A batch split into parts within a maximum number of tokens.

Examples with the same prompt stay together, so that it is computed once. Examples of similar length share a part, so
that there is little padding. The set of examples in a step does not change.
"""

from __future__ import annotations

from prefopt.scoring.rows import RowBatch
from prefopt.scoring.tree import first_fit, plant


def cut(rows: RowBatch, tokens: int, in_trees: bool) -> list[list[int]]:
    """The examples of each part, the longest first; every example is in one of them.

    Args:
        rows: a batch of `PreferenceCollator`.
        tokens: maximum of a part, as the layout counts them: each prompt once in trees, else rows padded to the
            longest. A longer example is a part by itself.
        in_trees: which layout.
    """
    if in_trees:
        bundles = _bundles(rows)
        parts = first_fit([size for size, _ in bundles], tokens)
        return [[example for i in part for example in bundles[i][1]] for part in parts]
    return _rows_of_like_length(rows, tokens)


def _bundles(rows: RowBatch) -> list[tuple[int, list[int]]]:
    """Tokens and examples of each group of examples that share a prompt."""
    examples = rows.examples.tolist()
    joined = list(range(max(examples) + 1))

    def root(example: int) -> int:
        while joined[example] != example:
            example = joined[example]
        return example

    trees = plant(rows.ids, rows.attention, rows.completion)
    members = [sorted({examples[row] for same, _, _ in tree.targets for row in same}) for tree in trees]
    for first, *others in members:
        for other in others:
            joined[max(root(first), root(other))] = min(root(first), root(other))
    sizes = dict.fromkeys((root(example) for example in joined), 0)
    for tree, (first, *_) in zip(trees, members, strict=True):
        sizes[root(first)] += len(tree.tokens)
    return [(size, [e for e in range(len(joined)) if root(e) == top]) for top, size in sizes.items()]


def _rows_of_like_length(rows: RowBatch, tokens: int) -> list[list[int]]:
    lengths = rows.attention.sum(-1).tolist()
    longest: dict[int, int] = {}
    rows_of: dict[int, int] = {}
    for example, length in zip(rows.examples.tolist(), lengths, strict=True):
        longest[example] = max(longest.get(example, 0), length)
        rows_of[example] = rows_of.get(example, 0) + 1
    parts: list[list[int]] = []
    count = width = 0
    for example in sorted(longest, key=lambda example: -longest[example]):
        if parts and (count + rows_of[example]) * width <= tokens:
            parts[-1].append(example)
            count += rows_of[example]
        else:
            parts.append([example])
            count, width = rows_of[example], longest[example]
    return parts
