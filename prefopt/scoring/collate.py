"""From tokenised examples to one padded batch of rows that says which row plays which role.

Every completion is a row of its own, prompt first: first all chosen rows, then all rejected ones, for pairs; in data
order for single labelled completions. Imports torch and `rows` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefopt.losses.scores import EMBEDDINGS, GIVEN_LOGPS
from prefopt.safety.errors import UsageError
from prefopt.scoring.rows import RowGroups

CHOSEN, REJECTED, MISMATCHED, SAMPLED = range(4)
ROW_TENSORS = ("input_ids", "attention_mask", "completion_mask")
COLUMN_PREFIX = "column_"
"""What per-example columns are called inside a batch, so that none can be taken for a model input."""
COUNTED = "counted_examples"
"""How many of a batch's examples count, the first ones; the others fill up the last batch of an evaluation."""

SIZES = "role_sizes"
"""(2,) mean number of chosen and of rejected rows in the micro-batches of a step, where more than one make it up."""


@dataclass
class PreferenceCollator:
    """Pads tokenised examples into rows.

    Examples are dicts with `prompt_ids` and either `chosen_ids` and `rejected_ids`, or `completion_ids` and `label`;
    the columns of `GIVEN_LOGPS` and numeric columns may stand beside them.

    Attributes:
        pad_token_id: token that fills rows up. May be set after construction, before the first batch.
        max_length: rows longer than this are cut.
        truncation_mode: "keep_start" cuts completions at their end, "keep_end" cuts prompts at their start.
        pad_to_multiple_of: row length is rounded up to a multiple of this.
        mismatched: also build, under every row's prompt, the completion of the example before.
        columns: numeric columns to pass on, as `column_<name>`; `weight` is passed on wherever it is present.
        embeddings: pass the columns of `EMBEDDINGS` on.
        vocabulary: how many token ids the models know; others are refused here, where a GPU would end the process.
    """

    pad_token_id: int | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    mismatched: bool = False
    columns: tuple[str, ...] = ()
    embeddings: bool = False
    vocabulary: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows: list[tuple[int, int, list[int], list[int]]] = []  # role, example, prompt, completion
        paired = "chosen_ids" in examples[0]
        if paired:
            for role, key in ((CHOSEN, "chosen_ids"), (REJECTED, "rejected_ids")):
                rows += [(role, i, example["prompt_ids"], example[key]) for i, example in enumerate(examples)]
        else:
            for i, example in enumerate(examples):
                role = CHOSEN if _is_desirable(example["label"]) else REJECTED
                rows.append((role, i, example["prompt_ids"], example["completion_ids"]))
        # A lone example has no other prompt to be put under; its batch then adds nothing to the estimate.
        if self.mismatched and len(examples) > 1:
            count, completions = len(examples), [completion for *_, completion in rows]
            # Blocks of as many rows as there are examples; within each, as TRL's KTO trainer moves them.
            rows += [
                (MISMATCHED, i, prompt, completions[row - i + (i - 1) % count])
                for row, (_, i, prompt, _) in enumerate(rows)
            ]
        batch = self._pad(rows)
        batch["roles"] = torch.tensor([role for role, *_ in rows])
        batch["examples"] = torch.tensor([i for _, i, *_ in rows])
        batch["paired"] = torch.tensor(paired)
        for name in GIVEN_LOGPS:
            if name in examples[0]:
                batch[name] = torch.tensor([float(example[name]) for example in examples])
        batch.update(collate_columns(examples, self.columns))
        if self.embeddings:
            batch.update({name: collate_vectors(examples, name) for name in EMBEDDINGS})
        return batch

    def _pad(self, rows: list[tuple[int, int, list[int], list[int]]]) -> dict[str, Tensor]:
        if self.pad_token_id is None:
            raise UsageError("PreferenceCollator.pad_token_id is not set; give it the tokenizer's pad_token_id")
        cut = slice(None)
        if self.max_length is not None:
            if self.truncation_mode not in ("keep_start", "keep_end"):
                raise UsageError(f"truncation_mode must be 'keep_start' or 'keep_end', got {self.truncation_mode!r}")
            cut = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
        ids = [torch.tensor((prompt + completion)[cut]) for *_, prompt, completion in rows]
        masks = [torch.tensor(([0] * len(prompt) + [1] * len(completion))[cut]) for *_, prompt, completion in rows]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
        attention_mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        completion_mask = pad_sequence(masks, batch_first=True)
        if self.vocabulary is not None and int(input_ids.max()) >= self.vocabulary:
            raise UsageError(
                f"token id {int(input_ids.max())} is beyond the vocabulary of {self.vocabulary} that the models have "
                "embeddings for: use the tokenizer that belongs to the model, or call "
                "model.resize_token_embeddings(len(tokenizer)) on policy and reference"
            )
        if self.pad_to_multiple_of:
            more = (0, -input_ids.shape[1] % self.pad_to_multiple_of)
            input_ids = torch.nn.functional.pad(input_ids, more, value=self.pad_token_id)
            attention_mask = torch.nn.functional.pad(attention_mask, more)
            completion_mask = torch.nn.functional.pad(completion_mask, more)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


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
    """Adds the numeric columns to what another collator makes (a vision-language one, or the user's own)."""

    inner: Any
    columns: tuple[str, ...] = ()

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        # First, because some collators rewrite the examples they are given.
        added = collate_columns(examples, self.columns)
        batch = self.inner(examples)
        batch.update(added)
        return batch


def collate_columns(examples: Sequence[dict[str, Any]], columns: tuple[str, ...]) -> dict[str, Tensor]:
    """The numeric columns of a batch, (E,) float32 each.

    Raises:
        ValueError: if a value is missing or no number.
    """
    names = dict.fromkeys([*columns, *(["weight"] if "weight" in examples[0] else [])])
    batch = {}
    for name in names:
        values = [example.get(name) for example in examples]
        if not all(isinstance(value, (int, float)) for value in values):
            bad = next(value for value in values if not isinstance(value, (int, float)))
            raise UsageError(f"column {name!r} must hold a number in every row, found {bad!r}")
        batch[COLUMN_PREFIX + name] = torch.tensor(values, dtype=torch.float32)
    return batch


def collate_vectors(examples: Sequence[dict[str, Any]], name: str) -> Tensor:
    """(E, H) float32, a column of vectors.

    Raises:
        ValueError: if a row has none, or vectors differ in width.
    """
    vectors = [example.get(name) for example in examples]
    try:
        made = torch.tensor(vectors, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        made = torch.empty(0)
    if made.dim() != 2 or not bool(torch.isfinite(made).all()):
        widths = sorted({len(v) if isinstance(v, Sequence) else 0 for v in vectors})
        raise UsageError(
            f"column {name!r} must hold a list of finite numbers, as many in every row; numbers here: {widths}"
        )
    return made


def groups_of(batch: Mapping[str, Any]) -> RowGroups:
    """Who is who in a collated batch; collators other than ours put the chosen rows first and the rejected after."""
    columns = {k.removeprefix(COLUMN_PREFIX): v for k, v in batch.items() if k.startswith(COLUMN_PREFIX)}
    if "roles" in batch:
        embeddings = {name: batch[name] for name in EMBEDDINGS if name in batch}
        paired, counted = bool(batch["paired"]), batch.get(COUNTED)
        sizes = dict(zip(("chosen", "rejected"), batch[SIZES], strict=True)) if SIZES in batch else None
        return RowGroups(batch["roles"], batch["examples"], columns, paired, counted, embeddings, sizes)
    ids = batch["input_ids"]
    half = torch.arange(ids.shape[0] // 2, device=ids.device)
    roles = torch.cat([torch.full_like(half, CHOSEN), torch.full_like(half, REJECTED)])
    return RowGroups(roles, torch.cat([half, half]), columns, True, batch.get(COUNTED))


def select_rows(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """The batch with some of its rows, no longer than the longest of them.

    Args:
        batch: a batch of `PreferenceCollator`.
        rows: (R,) bool.
    """
    kept = {name: value[rows] for name, value in batch.items() if name in (*ROW_TENSORS, "roles", "examples")}
    length = max(int(kept["attention_mask"].sum(-1).max()), 1) if bool(rows.any()) else 1
    kept |= {name: kept[name][:, :length] for name in ROW_TENSORS}
    return {**batch, **kept}


def select_examples(batch: Mapping[str, Any], examples: Sequence[int]) -> dict[str, Any]:
    """The batch with some of its examples, in the order that they have in it.

    Args:
        batch: a batch of `PreferenceCollator`.
        examples: which of them.
    """
    wanted = torch.tensor(sorted(examples), device=batch["examples"].device)
    made = select_rows(batch, torch.isin(batch["examples"], wanted))
    made["examples"] = torch.searchsorted(wanted, made["examples"])
    of_examples = [name for name in batch if name in (*GIVEN_LOGPS, *EMBEDDINGS) or name.startswith(COLUMN_PREFIX)]
    return {**made, **{name: batch[name][wanted] for name in of_examples}}


def append_rows(
    batch: Mapping[str, Any], prompts: Sequence[Tensor], completions: Sequence[Tensor], pad_token_id: int
) -> dict[str, Any]:
    """The batch with a row for each example's sampled completion after its own rows.

    Args:
        batch: a batch of `PreferenceCollator`.
        prompts: (P_i,) token ids of each example.
        completions: (C_i,) token ids of each example's sample.
        pad_token_id: fills rows up.
    """
    ids = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
    masks = [torch.arange(len(row), device=row.device) >= len(p) for row, p in zip(ids, prompts, strict=True)]
    old = batch["input_ids"]
    length = max(old.shape[1], *(len(row) for row in ids))

    def joined(name: str, rows: list[Tensor], fill: int) -> Tensor:
        parts = [torch.nn.functional.pad(row.to(batch[name]), (0, length - len(row)), value=fill) for row in rows]
        return torch.cat(
            [torch.nn.functional.pad(batch[name], (0, length - old.shape[1]), value=fill), torch.stack(parts)]
        )

    count = len(ids)
    examples = torch.arange(count, device=old.device)
    return {
        **batch,
        "input_ids": joined("input_ids", ids, pad_token_id),
        "attention_mask": joined("attention_mask", [torch.ones_like(row) for row in ids], 0),
        "completion_mask": joined("completion_mask", masks, 0),
        "roles": torch.cat([batch["roles"], torch.full_like(batch["roles"][:1], SAMPLED).expand(count)]),
        "examples": torch.cat([batch["examples"], examples.to(batch["examples"])]),
    }


def by_row(groups: RowGroups, chosen: Tensor, rejected: Tensor) -> Tensor:
    """(R,) values of each row from the per-example values of its role."""
    return torch.where(groups.roles == CHOSEN, chosen[groups.examples], rejected[groups.examples])
