"""Token ids of prepared data, before training: lengths of examples, and whether models have every id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, IterableDataset
from torch import nn

from prefopt.data.encodings import text_tokenizer
from prefopt.losses import Loss
from prefopt.safety.errors import UsageError
from prefopt.scoring import extras_for
from prefopt.scoring.model import positions_of, unwrapped
from prefopt.trainer.options import groups_by_length

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "completions_ids")


def lengths_to_sample_by(data: Any, args: Any) -> Any:
    """The data with the lengths that transformers' samplers need to group examples by length; other data unchanged."""
    if groups_by_length(args) and isinstance(data, Dataset) and "prompt_ids" in data.column_names:
        return Dataset.from_dict({args.length_column_name: example_lengths(data).tolist()})
    return data


def example_lengths(data: Dataset) -> np.ndarray[Any, Any]:
    """(N,) the number of tokens of each example, its prompt and all its completions."""
    parts = [sum(_lengths(table[name]) for name in _ids_of(data)) for table in _tables(data)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _lengths(ids: Any, most: bool = False) -> Any:
    """(N,) the number of tokens in each row of a column; of a list of completions, of all or of the longest."""
    column = ids.combine_chunks()
    lengths = pc.list_value_length(column).to_numpy()
    if not pa.types.is_list(column.type.value_type):
        return lengths
    inner = np.append(pc.list_value_length(column.flatten()).to_numpy(), 0)  # the last row may have no completion
    reduce = np.maximum if most else np.add
    return np.where(lengths > 0, reduce.reduceat(inner, np.cumsum(lengths) - lengths), 0)


def vocabulary_of(model: nn.Module) -> int | None:
    """How many token ids a model has embeddings for; None if unknown."""
    inner: Any = unwrapped(model)
    get = getattr(inner, "get_input_embeddings", None)
    try:
        embeddings = get() if callable(get) else None
    except NotImplementedError:
        embeddings = None
    # An adapter's layer wraps the model's own.
    for part in (embeddings, getattr(embeddings, "base_layer", None), getattr(embeddings, "original_module", None)):
        if isinstance(count := getattr(part, "num_embeddings", None), int):
            return count
    config = getattr(inner, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def check_vocabulary(datasets: dict[str, Any], models: dict[str, Any], tokenizer: Any) -> int | None:
    """Refuse token ids that a model has no embedding for.

    Args:
        datasets: prepared data by name; streams are checked batch by batch.
        models: by role; None for models that do not exist.
        tokenizer: of the ids.

    Returns:
        How many ids all models know; None if unknown.

    Raises:
        ValueError: naming the first row, the token and the model.
    """
    known = {role: count for role, model in models.items() if model is not None and (count := vocabulary_of(model))}
    if not known:
        return None
    role, limit = min(known.items(), key=lambda item: item[1])
    padding = tokenizer.pad_token_id
    if padding is not None and padding >= limit:
        raise UsageError(
            f"the padding token {tokenizer.pad_token!r} (id {padding}) is beyond {beyond(role, limit, tokenizer)}"
        )
    for name, data in datasets.items():
        if isinstance(data, IterableDataset) or not isinstance(data, Dataset):
            continue
        if (unknown := _first_beyond(data, limit)) is not None:
            row, column, token = unknown
            raise UsageError(
                f"{name} row {row}: {column.removesuffix('_ids')} holds token {token} "
                f"({tokenizer.convert_ids_to_tokens(token)!r}), which is beyond {beyond(role, limit, tokenizer)}"
            )
    return limit


def check_vocabularies(trainer: Any, objective: Loss, previous_model: Any) -> int | None:
    """Refuse token ids of a trainer's data that a model has no embedding for, and vocabularies that do not match.

    Returns:
        How many ids all models know; None if unknown.
    """
    if trainer.ref_model is not None and extras_for(objective).full_reference:
        check_same_vocabulary(objective, trainer.model, trainer.ref_model)
    models = {"policy": trainer.model, "reference": trainer.ref_model, "previous iterate": previous_model}
    return check_vocabulary(_sets_of(trainer), models, text_tokenizer(trainer.processing_class))


def check_same_vocabulary(objective: Any, policy: nn.Module, reference: nn.Module) -> None:
    """Refuse to compare distributions over different vocabularies.

    Raises:
        ValueError: naming the objective and both sizes.
    """
    mine, theirs = vocabulary_of(policy), vocabulary_of(reference)
    if mine and theirs and mine != theirs:
        raise UsageError(
            f"{objective} compares next-token distributions, but the policy has {mine} tokens and the reference "
            f"{theirs}: call resize_token_embeddings({max(mine, theirs)}) on the smaller one, or pass a reference "
            "with the policy's vocabulary"
        )


def check_positions(trainer: Any) -> None:
    """Refuse rows that are longer than the positions a model has learned, which end in an index error on a CPU.

    Models that compute their positions (rotary, ALiBi) read on, so their rows may be longer; streams are not checked.

    Raises:
        UsageError: naming the first row, its length and the limit.
    """
    limit = learned_positions(trainer.model)
    if limit is None or (trainer.args.max_length is not None and trainer.args.max_length <= limit):
        return
    for name, data in _sets_of(trainer).items():
        if isinstance(data, Dataset) and "prompt_ids" in data.column_names:
            lengths = np.concatenate([_longest(table) for table in _tables(data)] or [np.zeros(0, dtype=np.int64)])
            if (lengths > limit).any():
                row = int((lengths > limit).argmax())
                raise UsageError(
                    f"{name} row {row} has {lengths[row]} tokens, but the model has learned {limit} positions: set "
                    f"max_length to {limit} or less"
                )


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model has embeddings for, as GPT-2 and OPT do; None if it computes them."""
    limit = positions_of(model)
    if limit is None:
        return None
    for name, module in unwrapped(model).named_modules():
        kind = name.rpartition(".")[2]
        # OPT's table has two more rows than it has positions.
        if isinstance(module, nn.Embedding) and ("pos" in kind or kind == "wpe") and module.num_embeddings >= limit:
            return limit
    return None


def _longest(table: pa.Table) -> Any:
    """(N,) tokens of each row's prompt with its longest completion."""
    completions = [_lengths(table[name], most=True) for name in table.column_names if name != "prompt_ids"]
    return _lengths(table["prompt_ids"]) + np.max(completions or [np.zeros(table.num_rows, dtype=np.int64)], axis=0)


def _sets_of(trainer: Any) -> dict[str, Any]:
    """The training set and the held-out sets of a trainer, by name."""
    heldout = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"evaluation": trainer.eval_dataset}
    return {"train": trainer.train_dataset, **heldout}


def beyond(role: str, limit: int, tokenizer: Any) -> str:
    """The end of a message about an id that a model does not know."""
    return (
        f"the {role}'s vocabulary of {limit} (the tokenizer has {len(tokenizer)}): use the tokenizer that belongs to "
        "the model, or call model.resize_token_embeddings(len(tokenizer)) on policy and reference"
    )


def _first_beyond(data: Dataset, limit: int) -> tuple[int, str, int] | None:
    start = 0
    for table in _tables(data):
        for name in _ids_of(data):
            flat = pc.list_flatten(table[name])
            highest = pc.max(pc.list_flatten(flat) if pa.types.is_list(flat.type) else flat).as_py()
            if highest is not None and highest >= limit:
                rows = [[*_flat(ids or [])] for ids in table[name].to_pylist()]
                row = next(i for i, ids in enumerate(rows) if ids and max(ids) >= limit)
                return start + row, name, next(token for token in rows[row] if token >= limit)
        start += table.num_rows
    return None


def _flat(ids: list[Any]) -> Iterator[int]:
    for item in ids:
        yield from item if isinstance(item, list) else [item]


def _ids_of(data: Dataset) -> list[str]:
    return [name for name in ID_COLUMNS if name in data.column_names]


def _tables(data: Dataset) -> Iterator[pa.Table]:
    names = _ids_of(data)
    return iter(data.select_columns(names).with_format("arrow").iter(1000)) if names else iter(())
