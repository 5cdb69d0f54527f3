"""From tokenised examples to one padded batch of rows that says which row plays which role.

Every completion is a row of its own, prompt first: first all chosen rows, then all rejected ones, for pairs; in data
order for single labelled completions, and for groups, whose completions follow one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from prefopt.losses import Loss, Need
from prefopt.losses.scores import EMBEDDINGS, GIVEN_LOGPS, Role
from prefopt.safety.errors import UsageError
from prefopt.scoring.rows import COLUMN_PREFIX, OWN_COLLATOR, RowBatch

_Row = tuple[Role, int, list[int], list[int]]
"""Role, example, prompt and completion."""


@dataclass
class PreferenceCollator:
    """Pads tokenised examples into rows.

    Examples are dicts with `prompt_ids` and `chosen_ids` and `rejected_ids`, or `completion_ids` and `label`, or
    `completions_ids` (a list of lists) and `scores` (none if they are in order, the best first); the columns of
    `GIVEN_LOGPS` and numeric columns may be present too.

    Attributes:
        pad_token_id: token that fills rows up. May be set after construction, before the first batch.
        max_length: rows longer than this are cut.
        truncation_mode: "keep_start" cuts completions at their end, "keep_end" cuts prompts at their start.
        pad_to_multiple_of: row length is rounded up to a multiple of this.
        mismatched: also build, under every row's prompt, the completion of the example before.
        columns: numeric columns to pass on, as `column_<name>`; `weight` is passed on wherever it is present.
        limits: smallest and largest value of those that have limits.
        reads_scores: groups must have scores, their order is not enough.
        embeddings: pass the columns of `EMBEDDINGS` on.
        vocabulary: how many token ids the models know; others are refused here, where a GPU would end the process.
    """

    pad_token_id: int | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    mismatched: bool = False
    columns: tuple[str, ...] = ()
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    embeddings: bool = False
    reads_scores: bool = False
    vocabulary: int | None = None

    @classmethod
    def for_loss(
        cls,
        loss: Loss | None,
        pad_token_id: int | None,
        *,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        pad_to_multiple_of: int | None = None,
    ) -> PreferenceCollator:
        """The collator that hands on what a loss needs.

        Args:
            loss: None where only the rows are needed.
            pad_token_id: the tokenizer's. None if it has none: set `tokenizer.pad_token = tokenizer.eos_token` first.
            max_length, truncation_mode, pad_to_multiple_of: as the attributes.
        """
        needs = Need.NONE if loss is None else loss.needs
        return cls(
            pad_token_id,
            max_length,
            truncation_mode,
            pad_to_multiple_of,
            mismatched=Need.MISMATCHED in needs,
            columns=() if loss is None else loss.columns,
            limits={} if loss is None else dict(loss.limits),  # workers that are spawned get a pickled copy
            embeddings=Need.EMBEDDINGS in needs,
            reads_scores=loss is not None and loss.reads_scores,
        )

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        _refuse_without_ids(examples)
        paired, grouped = "chosen_ids" in examples[0], "completions_ids" in examples[0]
        rows = _pairs(examples) if paired else _candidates(examples) if grouped else _labelled(examples)
        # A single example has no other prompt to be moved to; its batch then adds nothing to the estimate.
        if self.mismatched and not grouped and len(examples) > 1:
            count, completions = len(examples), [completion for *_, completion in rows]
            # Blocks of as many rows as there are examples; within each, as TRL's KTO trainer moves them.
            rows += [
                (Role.MISMATCHED, i, prompt, completions[row - i + (i - 1) % count])
                for row, (_, i, prompt, _) in enumerate(rows)
            ]
        ids, masks = self._padded([([*p, *c], [0] * len(p) + [1] * len(c)) for *_, p, c in rows])
        return RowBatch(
            roles=torch.tensor([role for role, *_ in rows]),
            examples=torch.tensor([example for _, example, *_ in rows]),
            columns=collate_columns(examples, self.columns, self.limits),
            paired=paired or grouped,
            scores=_scores(examples, self.reads_scores) if grouped else None,
            ids=ids,
            attention=(masks >= 0).long(),
            completion=masks.clamp(min=0),
            given_logps={
                name: torch.tensor([float(example[name]) for example in examples])
                for name in GIVEN_LOGPS
                if name in examples[0] and not grouped
            },
            embeddings={name: collate_vectors(examples, name) for name in EMBEDDINGS if self.embeddings},
        ).inputs()

    def _padded(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """(R, T) token ids, and of each whether it belongs to a completion: 1 or 0, -1 where a row is filled up."""
        if self.pad_token_id is None:
            raise UsageError(
                "PreferenceCollator.pad_token_id is not set: give it the tokenizer's pad_token_id; if that is None, "
                "set tokenizer.pad_token = tokenizer.eos_token first"
            )
        cut = slice(None)
        if self.max_length is not None:
            if self.truncation_mode not in ("keep_start", "keep_end"):
                raise UsageError(f"truncation_mode must be 'keep_start' or 'keep_end', got {self.truncation_mode!r}")
            cut = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
        padded = [
            pad_sequence([torch.tensor(row[part][cut]) for row in rows], batch_first=True, padding_value=fill)
            for part, fill in ((0, self.pad_token_id), (1, -1))
        ]
        if self.vocabulary is not None and int(padded[0].max()) >= self.vocabulary:
            raise UsageError(
                f"token id {int(padded[0].max())} is beyond the vocabulary of {self.vocabulary} that the models have "
                "embeddings for: use the tokenizer that belongs to the model, or call "
                "model.resize_token_embeddings(len(tokenizer)) on policy and reference"
            )
        more = (0, -padded[0].shape[1] % (self.pad_to_multiple_of or 1))
        ids, masks = (pad(rows, more, value=fill) for rows, fill in zip(padded, (self.pad_token_id, -1), strict=True))
        return ids, masks


def _refuse_without_ids(examples: Sequence[dict[str, Any]]) -> None:
    columns = examples[0]
    sides = ({"chosen_ids", "rejected_ids"}, {"completion_ids"}, {"completions_ids"})
    if "prompt_ids" in columns and any(side <= set(columns) for side in sides):
        return
    raise UsageError(
        "PreferenceCollator takes rows of token ids, prompt_ids with chosen_ids and rejected_ids, with "
        f"completion_ids and label, or with completions_ids; these have {', '.join(columns)}. Tokenize them first: "
        "prefopt.data.tokenize_dataset(rows, tokenizer)"
    )


def _pairs(examples: Sequence[dict[str, Any]]) -> list[_Row]:
    return [
        (role, i, example["prompt_ids"], example[f"{role.field}_ids"])
        for role in (Role.CHOSEN, Role.REJECTED)
        for i, example in enumerate(examples)
    ]


def _labelled(examples: Sequence[dict[str, Any]]) -> list[_Row]:
    return [
        (Role.CHOSEN if _is_desirable(e["label"]) else Role.REJECTED, i, e["prompt_ids"], e["completion_ids"])
        for i, e in enumerate(examples)
    ]


def _candidates(examples: Sequence[dict[str, Any]]) -> list[_Row]:
    return [
        (Role.CANDIDATE, i, example["prompt_ids"], ids)
        for i, example in enumerate(examples)
        for ids in example["completions_ids"]
    ]


def _scores(examples: Sequence[dict[str, Any]], needed: bool) -> Tensor:
    """(R,) scores of candidates; for lists in order, how many completions are behind each."""
    scores: list[float] = []
    for example in examples:
        count, given = len(example["completions_ids"]), example.get("scores")
        if given is None and needed:
            raise UsageError(
                "the loss reads scores, and the data has no column 'scores', only completions in order: add it, "
                "or use a loss that needs their order alone, as plackett_luce"
            )
        if given is not None and len(given) != count:
            raise UsageError(f"column 'scores' must hold a number for each of {count} completions, found {given!r}")
        for score in range(count - 1, -1, -1) if given is None else given:
            if problem := number_problem("scores", score):
                raise UsageError(problem)
            scores.append(score)
    return torch.tensor(scores, dtype=torch.float32)


def _is_desirable(label: Any) -> bool:
    """A label as it is, never its truth value: `"false"` and -1 are true to Python.

    Raises:
        ValueError: for anything but true and false (or 1 and 0).
    """
    value = label.item() if hasattr(label, "item") else label
    if type(value) not in (bool, int) or value not in (0, 1):
        raise UsageError(f"column 'label' must hold true or false in every row, found {label!r}")
    return bool(value)


@dataclass
class WithColumns:
    """Adds the numeric columns to what another collator makes (a vision-language one, or the user's own).

    Attributes:
        given: whether it is the user's, who is told what is wrong with it.
    """

    inner: Any
    columns: tuple[str, ...] = ()
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    given: bool = False

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        # First, because some collators rewrite the examples they are given.
        added = collate_columns(examples, self.columns, self.limits)
        columns = ", ".join(examples[0])
        try:
            batch = self.inner(examples)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if not self.given:
                raise
            name = getattr(self.inner, "__name__", type(self.inner).__name__)
            raise UsageError(
                f"the data_collator {name} makes no batch of rows with the columns {columns} ({type(error).__name__}: "
                f"{error}): {OWN_COLLATOR}"
            ) from error
        batch.update({COLUMN_PREFIX + name: column for name, column in added.items()})
        return batch


def collate_columns(
    examples: Sequence[dict[str, Any]], columns: tuple[str, ...], limits: Mapping[str, tuple[float, float]]
) -> dict[str, Tensor]:
    """The numeric columns of a batch by name, (E,) float32 each.

    Raises:
        ValueError: if a value is missing, not a number, not finite or outside its limits.
    """
    names = dict.fromkeys([*columns, *(["weight"] if "weight" in examples[0] else [])])
    batch = {}
    for name in names:
        values = [example.get(name) for example in examples]
        for value in values:
            if problem := number_problem(name, value, limits.get(name)):
                raise UsageError(problem)
        batch[name] = torch.tensor(values, dtype=torch.float32)
    return batch


def collate_vectors(examples: Sequence[dict[str, Any]], name: str) -> Tensor:
    """(E, H) float32, a column of vectors.

    Raises:
        ValueError: if a row has none, or vectors differ in width.
    """
    vectors = [example.get(name) for example in examples]
    try:
        column = torch.tensor(vectors, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        column = torch.empty(0)
    if column.dim() != 2 or not bool(torch.isfinite(column).all()):
        widths = sorted({len(v) if isinstance(v, Sequence) else 0 for v in vectors})
        raise UsageError(
            f"column {name!r} must hold a list of finite numbers, of the same length in every row; lengths: {widths}"
        )
    return column


def number_problem(name: str, value: Any, limits: tuple[float, float] | None = None) -> str:
    """What is wrong with one value of a numeric column, and what to do; "" if nothing is.

    Args:
        name: of the column.
        value: of one row.
        limits: the smallest and the largest value allowed.
    """
    if not isinstance(value, int | float):
        return f"column {name!r} must hold a number in every row, found {value!r}"
    if not math.isfinite(value):
        return f"column {name!r} must hold a finite number in every row, found {value!r}"
    low, high = limits or (-math.inf, math.inf)
    if not low <= value <= high:
        return f"column {name!r} must hold numbers from {low:g} to {high:g}, found {value!r}"
    return ""
