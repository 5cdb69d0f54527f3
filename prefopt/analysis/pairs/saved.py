"""A finished run loaded again with pairs to look at: for `prefopt health RUN --pairs DATA`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from prefopt.analysis.gradients.entangled import Entanglement, entanglement
from prefopt.analysis.gradients.probes import draw_probes
from prefopt.analysis.pairs.table import PairTable, score_pairs
from prefopt.data import read_preferences, tokenize_dataset
from prefopt.losses import Loss, parse
from prefopt.models.load import adapter_base, load_model, load_tokenizer
from prefopt.report.folder import LOG, read_log
from prefopt.safety.errors import UsageError

PAIRS = 200
"""Default number of pairs: a share of a half has a standard error of 0.035."""


@dataclass(frozen=True)
class SavedPairs:
    """The model of a run and pairs.

    Attributes:
        model: with its adapter, if it has one.
        reference: a model of its own, or None.
        loss: of the run.
        pad_token_id: of its tokenizer.
        rows: tokenized pairs, the first ones of the set.
    """

    model: Any
    reference: Any
    loss: Loss
    pad_token_id: int
    rows: list[dict[str, Any]]

    def table(self) -> PairTable:
        return score_pairs(self.model, self.rows, self.loss, self.pad_token_id, reference=self.reference)

    def entanglement(self, probes: int) -> Entanglement:
        """On pairs drawn from the rows."""
        drawn = draw_probes(self.rows, self.loss, self.pad_token_id, count=probes)
        return entanglement(self.model, drawn.batch, self.loss, reference=self.reference)


def load_pairs(
    run: Path,
    data: str,
    *,
    loss: str | None = None,
    reference: str | None = None,
    split: str = "train",
    count: int = PAIRS,
    max_length: int = 1024,
) -> SavedPairs:
    """Load the model of a run, its reference and pairs.

    Args:
        run: a folder with a model or an adapter.
        data: a file or a Hub name, as `prefopt check` takes it.
        loss: the expression; by default that of the run's log.
        reference: a model to compare with; by default the model below the adapter.
        split: of the data.
        count: how many pairs at most, the first ones that fit.
        max_length: tokens of a row; longer ones are left out.

    Raises:
        UsageError: where the loss or the reference is not known, or no pair fits.
        ModelError, DataError: where they cannot be read.
    """
    objective = parse(loss or _loss_of(run))
    if reference is None and objective.needs.compares and adapter_base(str(run)) is None:
        raise UsageError(
            f"{run} is a whole model, and {objective} compares with a reference: name it with --reference"
        )
    tokenizer = load_tokenizer(str(run))
    read = read_preferences(data, split=split)
    if not isinstance(read, Dataset) or "chosen" not in read.column_names:
        raise UsageError(f"{data} has no pairs of chosen and rejected answers")
    rows = tokenize_dataset(read.select(range(min(len(read), 2 * count))), tokenizer)
    fitting = [row for row in rows if _longest(row) <= max_length][:count]
    if not fitting:
        raise UsageError(f"no pair of {data} has rows of at most {max_length} tokens")
    frozen = None if reference is None else load_model(reference, {}).eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return SavedPairs(load_model(str(run), {}, trainable=True), frozen, objective, pad, fitting)


def _longest(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _loss_of(run: Path) -> str:
    file, content, _ = read_log(run)
    known = content.get("settings") or {}
    if file.name != LOG or not known.get("loss"):
        raise UsageError(f"{file} does not say which loss {run} was trained with: name it with --loss")
    return str(known["loss"])
