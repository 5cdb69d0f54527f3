"""The vectors that losses with `embeddings='given'` compare: the data's own, or those of `--embeddings`.

The encoder computes them once, before any model is loaded. Encoders and their cache are in `prefopt.data.embed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset

from prefopt.data.columns import column_names
from prefopt.data.embed import Encoder, embed, texts_of, width_of
from prefopt.data.errors import DataError
from prefopt.losses.scores import EMBEDDINGS
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.arguments.checks import REMEDY, compares_given
from prefopt.trainer import PreferenceConfig


def with_vectors(
    recipe: Recipe, train: dict[str, Any], heldout: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training and held-out sources, by name, with the vectors of `--embeddings` if that is set.

    On a dry run nothing is computed: a line says how many would be.

    Raises:
        DataError: if a source already has vectors, or its rows are not pairs.
    """
    name = recipe.script.embeddings
    if name is None:
        return train, heldout
    state = PartialState()
    # One process per machine computes the vectors; the others read them from its disk.
    with state.local_main_process_first(), loaded_whole(recipe.training):
        encoder = Encoder(name, device=recipe.training.device)
        texts = {text for part in (train, heldout) for source in part.items() for text in _texts(*source)}
        new = encoder.missing(sorted(texts))
        share = f"{len(new)} of {len(texts)} texts"
        if recipe.script.dry_run:
            recipe.console.print(f"Embeddings: {share} would be computed by {name}.", soft_wrap=True)
            return train, heldout
        if new and not state.is_local_main_process:
            raise DataError(
                f"--embeddings: {share} have no vector in {encoder.kept_in}, though another process computed them: "
                "set PREFOPT_CACHE to a folder that all processes of a machine can write to and read"
            )
        encoder.compute(new)
        train, heldout = ({key: embed(rows, encoder) for key, rows in part.items()} for part in (train, heldout))
    recipe.console.print(f"Embeddings: {share} computed by {name}; stored in {encoder.kept_in}", soft_wrap=True)
    return train, heldout


@contextmanager
def loaded_whole(training: PreferenceConfig) -> Iterator[None]:
    """Context in which models load unsharded: under ZeRO-3 transformers shards them, but one process works here."""
    plugin = training.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(getattr(training, "hf_deepspeed_config", None) or plugin.dschf)


def _texts(name: str, source: Dataset) -> list[str]:
    """Every text of a source that needs a vector."""
    try:
        return [text for texts in texts_of(source).values() for text in texts]
    except DataError as error:
        raise DataError(f"--embeddings: {name}: {error}") from None


def check_vectors(recipe: Recipe, sources: Mapping[str, Dataset | IterableDataset], part: str) -> None:
    """Check that the data has the vectors that the loss compares, unless an encoder computes them.

    Row numbers are those of `sources`, so call this before anything is split or mixed. For a stream, only the columns
    are checked.

    Raises:
        DataError: naming the source, and the column or row without a vector.
    """
    if recipe.script.embeddings is not None or not compares_given(recipe):
        return
    widths = {}
    for name, source in sources.items():
        if missing := [column for column in EMBEDDINGS if column not in column_names(source)]:
            raise DataError(
                f"The loss compares embeddings that come with the data, but the {part} rows of {name} have no column "
                f"{', '.join(missing)}: {REMEDY}"
            )
        if isinstance(source, Dataset):
            try:
                widths[name] = width_of(source)
            except DataError as error:
                raise DataError(f"The {part} rows of {name}: {error}") from None
    if len(set(widths.values())) > 1:
        raise DataError(
            f"Vectors that the loss compares must have the same size in every source; the {part} rows have "
            f"{', '.join(f'{width} in {name}' for name, width in widths.items())}: compute them with one encoder"
        )
