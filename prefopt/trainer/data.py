"""A trainer's data, prepared as the objective needs it."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.table import ConcatenationTable

from prefopt.data import DataError, drop_overlong, normalise
from prefopt.data.encodings import text_tokenizer
from prefopt.data.maps import python_rows
from prefopt.data.prepare import check_ids, silent, tokenize_checked
from prefopt.data.unused import MEDIA
from prefopt.losses import Loss
from prefopt.losses.scores import EMBEDDINGS, PREVIOUS_LOGPS
from prefopt.safety.errors import UsageError
from prefopt.scoring.collate import PreferenceCollator

logger = logging.getLogger(__name__)


def _set_padding(collator: PreferenceCollator, processing_class: Any, args: Any) -> None:
    tokenizer = text_tokenizer(processing_class)
    if getattr(args, "pad_token", None) is not None:
        if args.pad_token not in tokenizer.get_vocab():
            raise UsageError(f"pad_token {args.pad_token!r} is not in the tokenizer's vocabulary")
        tokenizer.pad_token = args.pad_token
    collator.pad_token_id = tokenizer.pad_token_id


def prepare(
    dataset: Any, processing_class: Any, args: Any, name: str, objective: Loss, collator: PreferenceCollator | None
) -> Any:
    """Token ids of a data set's rows, without those that are too long.

    Args:
        dataset: rows of text or of token ids.
        processing_class: the tokenizer or processor.
        args: the training arguments.
        name: of the set, "train" for the one whose findings are logged.
        objective: which columns and roles are used.
        collator: ours, if it makes the batches; its padding token is set.
    """
    if collator is not None:
        _set_padding(collator, processing_class, args)
    say = logger.warning if name == "train" and args.should_log else silent
    cut = {"max_length": args.max_length, "truncation_mode": args.truncation_mode, "name": name}
    common = {**cut, "roles": objective.roles, "say": say}
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"the {name} set has no rows: pass None, or check how it was made")
    if "prompt_ids" not in first:
        used = (*objective.columns, *(MEDIA if collator is None else ()))
        desirable = objective.roles == ("chosen",)
        dataset = normalise(dataset, transcripts=False, used=used, unlabelled=desirable, say=say)
        processes = getattr(args, "dataset_num_proc", None)
        dataset = tokenize_checked(dataset, processing_class, num_proc=processes, **common)
    else:
        dataset = python_rows(dataset)
        if collator is None or not isinstance(dataset, Dataset | IterableDataset):
            return dataset
        dataset = check_ids(dataset, **common)
    return drop_overlong(dataset, args.max_length, args.truncation_mode, name)


def without_empty_tables(dataset: Dataset) -> Dataset:
    """The set after columns were removed, as a spawned worker can read it.

    `datasets` puts new columns into a table beside the old ones. Once all columns of one of the tables are removed, a
    pickled copy of the set cannot be loaded.
    """
    table = dataset.data
    if isinstance(table, ConcatenationTable):
        blocks = [[block for block in row if block.column_names] for row in table.blocks]
        if any(blocks) and blocks != table.blocks:
            dataset._data = ConcatenationTable.from_blocks(blocks)
    return dataset


def columns_of_batches(objective: Loss) -> list[str]:
    """Columns passed to the collator in addition to those that TRL keeps."""
    return [
        "completion_ids",
        "completions_ids",
        "scores",
        "label",
        "weight",
        *PREVIOUS_LOGPS,
        *EMBEDDINGS,
        *objective.columns,
    ]
