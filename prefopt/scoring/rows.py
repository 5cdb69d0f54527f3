"""Typed batches: which rows there are, which role each plays, and for which example.

A batch of R rows holds every completion once; row r plays a role for example e, so rows may come in any order and
roles may have different sizes. Collators give mappings, because data loaders move those between devices; `RowBatch.of`
turns one into a `RowBatch`, and nothing behind it reads a key.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefopt.losses.scores import EMBEDDINGS, GIVEN_LOGPS, Role
from prefopt.safety.errors import UsageError
from prefopt.scoring.device import on_device, places_of
from prefopt.scoring.padded import Targets, targets_of
from prefopt.scoring.tree import Tree, plant

ROLES = tuple(role.field for role in Role)
"""Role names by their number in `RowGroups.roles`."""
COLUMN_PREFIX = "column_"
"""Prefix of per-example columns inside a mapping, so that none can be mistaken for a model input."""
COUNTED = "counted_examples"
"""How many of a batch's examples count, the first ones; the others fill up the last batch of an evaluation."""
SIZES = "role_sizes"
"""(2,) mean number of chosen and of rejected rows in the micro-batches of a step, where more than one make it up."""
CANDIDATE_SCORES = "candidate_scores"
"""(R,) scores from the data, where rows are candidates."""
SHARE, TOKENS_AT_ONCE = "share_of_batch", "tokens_at_once"
"""How parts of a batch are marked, as in `RowBatch`."""
OWN_COLLATOR = "leave data_collator out, or derive yours from trl.trainer.dpo_trainer.DataCollatorForPreference"
"""What to do where a collator of the user's makes other batches."""
_KEYS = {
    "ids": "input_ids",
    "attention": "attention_mask",
    "completion": "completion_mask",
    "roles": "roles",
    "examples": "examples",
    "paired": "paired",
    "counted": COUNTED,
    "scores": CANDIDATE_SCORES,
    "share": SHARE,
    "tokens_at_once": TOKENS_AT_ONCE,
}
"""What fields of `RowBatch` are called in a mapping."""


@dataclass(frozen=True)
class RowGroups:
    """Which row is what.

    Attributes:
        roles: (R,) a `Role` each.
        examples: (R,) index of the example (pair, or single labelled completion) that a row belongs to.
        columns: per-example columns of the data set, (E,) each.
        paired: whether examples are whole: one chosen and one rejected row each, in the same order, or all candidates
            of a prompt, one after the other. Not so for single labelled completions.
        counted: how many examples count, the first ones; the others only fill the batch up. All if None.
        embeddings: (E, H) each, by the name of the column that they came in: those of prompts and of each role.
        sizes: as in `PreferenceBatch`.
        scores: (R,) of candidates, from the data; None where there are none.
    """

    roles: Tensor
    examples: Tensor
    columns: Mapping[str, Tensor]
    paired: bool
    counted: int | None = None
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    sizes: Mapping[str, Tensor] | None = None
    scores: Tensor | None = None

    @functools.cached_property
    def _on_host(self) -> list[list[int]]:
        """Roles and examples, read from the device once."""
        both: list[list[int]] = torch.stack([self.roles, self.examples]).tolist()
        return both

    @property
    def alone(self) -> bool:
        """Whether there is one example, so that its completions have no other prompt to be moved to."""
        return len(set(self._on_host[1])) <= 1

    def rows_of(self, role: int) -> Tensor:
        """The rows that play a role in an example that counts."""
        # Where rows were left out, the numbers of the remaining examples may exceed the number of rows.
        counted = math.inf if self.counted is None else self.counted
        wanted = [own == role and example < counted for own, example in zip(*self._on_host, strict=True)]
        return places_of(wanted, self.roles.device)

    @property
    def example_count(self) -> int:
        """How many examples count."""
        count = max(self._on_host[1], default=-1) + 1
        return count if self.counted is None else min(count, self.counted)

    def group_sizes(self) -> tuple[int, ...]:
        """How many candidates each example that counts has."""
        counted = math.inf if self.counted is None else self.counted
        sizes: dict[int, int] = {}
        for role, example in zip(*self._on_host, strict=True):
            if role == Role.CANDIDATE and example < counted:
                sizes[example] = sizes.get(example, 0) + 1
        return tuple(sizes.values())

    def playing(self, roles: Sequence[int]) -> list[bool]:
        """Of each row, whether it plays one of these roles."""
        return [role in roles for role in self._on_host[0]]

    def by_row(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(R,) values of each row from the (E,) values of chosen and rejected completions."""
        return torch.where(self.roles == Role.CHOSEN, chosen[self.examples], rejected[self.examples])


@dataclass(frozen=True)
class RowBatch(RowGroups):
    """A collated batch: R rows of T tokens, prompt first.

    Attributes:
        ids: (R, T) tokens, padded on the right.
        attention: (R, T) true at real tokens.
        completion: (R, T) true at completion tokens.
        given_logps: (E,) log-probabilities that came with the data, by the name of their column (`GIVEN_LOGPS`).
        extra: what else the model takes, such as images.
        divisible: whether rows can be taken out. Not where another collator made them: which of its further inputs
            (images, say) belong to a row is not known.
        share: the fraction of a batch's examples that this part of it holds; 0 for a part that only fills up.
        tokens_at_once: maximum tokens of trees per forward pass, with each call repeated in the backward pass. None:
            as many as suit the device, and no call is repeated.
    """

    ids: Tensor = field(kw_only=True)
    attention: Tensor = field(kw_only=True)
    completion: Tensor = field(kw_only=True)
    given_logps: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    extra: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    divisible: bool = field(default=True, kw_only=True)
    share: float = field(default=1.0, kw_only=True)
    tokens_at_once: int | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> RowBatch:
        """The rows of a mapping, from whichever collator; others than ours put chosen rows first, rejected after.

        Raises:
            UsageError: if keys of a batch are missing, because a collator of the user's is for other data.
        """
        if missing := [key for key in ("input_ids", "attention_mask", "completion_mask") if key not in inputs]:
            raise UsageError(
                f"the data_collator's batch has no {' and no '.join(missing)}, but {', '.join(map(str, inputs))}: "
                f"{OWN_COLLATOR}"
            )
        values = {name: inputs[key] for name, key in _KEYS.items() if key in inputs}
        if "roles" in values:
            values["paired"] = bool(values["paired"])
        else:
            examples = torch.arange(len(inputs["input_ids"]) // 2, device=inputs["input_ids"].device)
            roles = torch.cat([torch.full_like(examples, role) for role in (Role.CHOSEN, Role.REJECTED)])
            values |= {"roles": roles, "examples": examples.repeat(2), "paired": True, "divisible": False}
        if SIZES in inputs:
            values["sizes"] = dict(zip(ROLES, inputs[SIZES], strict=False))
        known = {*_KEYS.values(), SIZES, *GIVEN_LOGPS, *EMBEDDINGS}
        return cls(
            **values,
            columns={k.removeprefix(COLUMN_PREFIX): v for k, v in inputs.items() if k.startswith(COLUMN_PREFIX)},
            given_logps={name: inputs[name] for name in GIVEN_LOGPS if name in inputs},
            embeddings={name: inputs[name] for name in EMBEDDINGS if name in inputs},
            extra={k: v for k, v in inputs.items() if k not in known and not k.startswith(COLUMN_PREFIX)},
        )

    def inputs(self) -> dict[str, Any]:
        """The mapping that `of` reads, for what is between a collator and the trainer's loss."""
        values = {key: getattr(self, name) for name, key in _KEYS.items()}
        values |= {COLUMN_PREFIX + name: column for name, column in self.columns.items()}
        if self.sizes is not None:
            values[SIZES] = torch.stack([self.sizes[role] for role in ROLES[:2]])
        values["paired"] = torch.tensor(self.paired)  # people's own compute_loss may move all entries to a device
        if self.share == 1.0:
            del values[SHARE]
        values = {key: value for key, value in values.items() if value is not None}
        return {**values, **self.given_logps, **self.embeddings, **self.extra}

    @functools.cached_property
    def trees(self) -> list[Tree]:
        """The rows in the tree layout, as lists: those that are scored have to be known to the host."""
        return plant(self.ids, self.attention, self.completion)

    @functools.cached_property
    def targets(self) -> Targets:
        """The scored tokens in the padded layout."""
        return targets_of(self.completion)

    @property
    def model_inputs(self) -> dict[str, Any]:
        """What the model is called with, in the padded layout."""
        return {"input_ids": self.ids, "attention_mask": self.attention, **self.extra}

    def select_rows(self, wanted: Sequence[bool] | Tensor) -> RowBatch:
        """The batch with some of its rows, no longer than the longest of them.

        Args:
            wanted: (R,) bool.
        """
        rows = places_of(wanted.tolist() if isinstance(wanted, Tensor) else wanted, self.ids.device)
        attention = self.attention[rows]
        length = max(int(attention.sum(-1).max()), 1) if len(attention) else 1
        return replace(
            self, ids=self.ids[rows, :length], attention=attention[:, :length],
            completion=self.completion[rows, :length], roles=self.roles[rows], examples=self.examples[rows],
            scores=None if self.scores is None else self.scores[rows],
        )  # fmt: skip

    def select_examples(self, examples: Sequence[int]) -> RowBatch:
        """The batch with some of its examples, in the order that they have in it."""
        wanted = on_device(sorted(examples), self.examples.device, torch.long)
        rows = self.select_rows(torch.isin(self.examples, wanted))
        per_example: dict[str, Any] = {
            name: {key: value[wanted] for key, value in getattr(self, name).items()}
            for name in ("columns", "given_logps", "embeddings")
        }
        return replace(rows, examples=torch.searchsorted(wanted, rows.examples), **per_example)

    def append(self, prompts: Sequence[Tensor], completions: Sequence[Tensor], pad_token_id: int) -> RowBatch:
        """The batch with a row for each example's sampled completion after its own rows.

        Args:
            prompts: (P_i,) token ids of each example.
            completions: (C_i,) token ids of each example's sample.
            pad_token_id: fills rows up.
        """
        ids = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
        masks = [torch.arange(len(row), device=row.device) >= len(p) for row, p in zip(ids, prompts, strict=True)]
        length = max(self.ids.shape[1], *(len(row) for row in ids))

        def joined(old: Tensor, rows: list[Tensor], fill: int) -> Tensor:
            new = [pad(row.to(old), (0, length - len(row)), value=fill) for row in rows]
            return torch.cat([pad(old, (0, length - old.shape[1]), value=fill), torch.stack(new)])

        examples = torch.arange(len(ids), device=self.examples.device)
        more = None if self.scores is None else self.scores.new_zeros(len(ids))
        return replace(
            self,
            scores=None if self.scores is None or more is None else torch.cat([self.scores, more]),
            ids=joined(self.ids, ids, pad_token_id),
            attention=joined(self.attention, [torch.ones_like(row) for row in ids], 0),
            completion=joined(self.completion, masks, 0),
            roles=torch.cat([self.roles, torch.full_like(examples, Role.SAMPLED).to(self.roles)]),
            examples=torch.cat([self.examples, examples.to(self.examples)]),
        )
