"""`prefopt check --displacement`: the pairs whose chosen answers may lose likelihood, and a filter."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from prefopt.cli.app import console, fail, say

SHOWN = 10
_WIDTH = 60


def show_displacement(
    pairs: Any, bad_rows: Collection[int], network: tuple[Any, Any], keep: float | None, out: Path | None
) -> None:
    """Print the pairs with the highest CHES scores; write those with the lowest to `out`.

    Args:
        pairs: a normalised data set.
        bad_rows: the rows that cannot be trained on, which are left out.
        network: the model that will be trained, and its tokenizer.
        keep: share of the pairs to write.
        out: JSONL file to write.
    """
    from rich.text import Text

    from prefopt.analysis.displacement import ches
    from prefopt.data import tokenize_dataset
    from prefopt.data.messages import plain_text
    from prefopt.safety.jsonl import write_jsonl
    from prefopt.safety.tables import table

    model, tokenizer = network
    bad = set(bad_rows)
    numbers = [number for number in range(len(pairs)) if number not in bad]
    rows = pairs.select(numbers).add_column("row", numbers)
    tokenized = tokenize_dataset(rows, tokenizer)
    scores = ches(model, [tokenized[number] for number in range(len(tokenized))])
    low, high = float(scores.averaged.min()), float(scores.averaged.max())
    say(
        f"CHES of {len(scores)} pairs, averaged over tokens: mean {float(scores.averaged.mean()):.4g}, from {low:.4g} "
        f"to {high:.4g}. The higher, the likelier the chosen answer loses likelihood in training with this model:"
    )
    worst = table("row", "score", "chosen", "rejected", right=("row", "score"))
    for number in scores.worst(SHOWN):
        texts = (Text(" ".join(plain_text(rows[number][side]).split())[:_WIDTH]) for side in ("chosen", "rejected"))
        worst.add_row(str(rows[number]["row"]), f"{float(scores.averaged[number]):.4g}", *texts)
    console().print(worst)
    if keep is not None and out is not None:
        kept = rows.select(scores.lowest(keep)).remove_columns("row")
        write_jsonl(out, kept)
        say(f"{out}: the {len(kept)} pairs with the lowest scores.")


def check_options(displacement: bool, model: str | None, keep: float | None, out: Path | None) -> None:
    """Refuse combinations of options that have no effect."""
    if not displacement and (keep is not None or out is not None):
        fail("--keep and --out write the pairs with the lowest scores of --displacement: add it")
    if displacement and model is None:
        fail("--displacement scores pairs with the model that will be trained: name it with --model")
    if (keep is None) != (out is None):
        fail("--keep SHARE and --out FILE belong together: the share of the pairs to keep, and where to write them")
    if keep is not None and not 0 < keep <= 1:
        fail(f"--keep is the share of the pairs to keep, above 0 and at most 1, got {keep:g}")
