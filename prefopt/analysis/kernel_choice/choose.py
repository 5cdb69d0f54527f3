"""Which kernel and divergence suit a preference set: embeddings, measures, the choice, and its trial.

What `prefopt select-kernel` does, for use without a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset

from prefopt.analysis.kernel_choice.measures import FEWEST, Measures, Triplets, measure
from prefopt.analysis.kernel_choice.selection import Selection, select
from prefopt.analysis.kernel_choice.states import States, states_of
from prefopt.analysis.kernel_choice.trial import PAIRS, STEPS, Outcome, Trial, expression, ranked, run_trial
from prefopt.data import DataError, kind, tokenize_dataset, validate
from prefopt.data.embed import DEFAULT, Encoder, embed, width_of
from prefopt.losses.scores import EMBEDDINGS
from prefopt.safety.errors import UsageError

ROWS = 1000
STATE_ROWS = 240
"""Maximum number of pairs with states in memory: enough for a trial, few enough for minutes on a CPU."""
HIDDEN = "hidden"
GIVEN = "columns"


@dataclass(frozen=True)
class Choice:
    """The result of `choose`.

    Attributes:
        embeddings: "hidden", "columns" or the encoder's name.
        usable: pairs of the set that can be measured; `measures.rows` of them were measured.
        measures: on embeddings.
        selection: by the rules.
        trial: of all pairs; None without `verify`.
    """

    embeddings: str
    usable: int
    measures: Measures
    selection: Selection
    trial: Trial | None

    @property
    def loss(self) -> str:
        """The selected objective as text."""
        kernel, divergence = self.selection.kernel, self.selection.divergence
        return expression(kernel, divergence, "hidden" if self.embeddings == HIDDEN else "given")

    @property
    def outcome(self) -> Outcome | None:
        """Of the selected pair in the trial."""
        return None if self.trial is None else self.trial.find(self.selection.kernel, self.selection.divergence)

    def as_dict(self) -> dict[str, Any]:
        made = {
            "embeddings": self.embeddings, "usable": self.usable, "loss": self.loss,
            "measures": self.measures.as_dict(), "selection": asdict(self.selection),
        }  # fmt: skip
        if self.trial is not None and self.outcome is not None:
            made["trial"] = asdict(self.trial) | {
                "rank": self.trial.rank(self.outcome),
                "accuracy_rank": self.trial.accuracy_rank(self.outcome),
                "seeds": len(self.outcome.losses),
                "steps": STEPS,
            }
        return made


def choose(
    dataset: Dataset,
    embeddings: str = DEFAULT,
    *,
    rows: int | None = None,
    model: Callable[[], tuple[Any, Any]] | None = None,
    verify: bool = False,
    seed: int = 0,
    shown: Callable[[Iterable[Outcome], int], Iterable[Outcome]] = lambda outcomes, _: outcomes,
) -> Choice:
    """Measure a normalised preference set, select a pair, and with `verify` try all of them.

    Args:
        dataset: pairs, as `prefopt.data.normalise` makes them.
        embeddings: an encoder as `prefopt.data.embed` finds it; "columns" for embeddings in the data; "hidden"
            for the mean last hidden states of `model`.
        rows: pairs to measure, drawn at random; `ROWS` if None. Of "hidden" states `STATE_ROWS` at most.
        model: gives a model and its tokenizer; called only for "hidden" or `verify`.
        verify: train all pairs briefly on `model`'s states.
        seed: of the draw.
        shown: wraps the iterator of the trial's outcomes; gets their number too. For a progress bar.

    Raises:
        DataError: for data without pairs, too few pairs, or missing columns.
        ValueError: for a model that a trial cannot use, or more rows than `STATE_ROWS`.
    """
    most = STATE_ROWS if embeddings == HIDDEN else ROWS
    rows = most if rows is None else rows
    if embeddings == HIDDEN and rows > most:
        raise UsageError(
            f"rows is {rows}, but of hidden states at most {most} pairs are kept: leave it out or lower it"
        )
    if embeddings == GIVEN:
        _check_columns(dataset)
    elif own := sorted(set(EMBEDDINGS) & set(dataset.column_names)):
        raise DataError(
            f"the data already has a column {own[0]!r}: measure such vectors with --embeddings {GIVEN}, or drop "
            "the column"
        )
    pairs = _usable(dataset)
    drawn = pairs.shuffle(seed=seed).select(range(min(rows, len(pairs))))
    states = None
    if embeddings == HIDDEN or verify:
        if model is None:
            raise UsageError("hidden states and the trial need a model")
        network, tokenizer = model()
        drawn = _readable(drawn, tokenizer)
        states = _states(drawn.select(range(min(STATE_ROWS, len(drawn)))), network, tokenizer)
    triplets = _triplets(drawn, embeddings, states)
    measures = measure(triplets)
    trial = None
    if verify and states is not None:
        kept = slice(len(states))
        some = Triplets(triplets.prompt[kept], triplets.chosen[kept], triplets.rejected[kept])
        outcomes = run_trial(states, None if embeddings == HIDDEN else some)
        trial = ranked(list(shown(outcomes, len(PAIRS) + 1)), states)
    return Choice(embeddings, len(pairs), measures, select(measures), trial)


def _usable(dataset: Dataset) -> Dataset:
    if kind(dataset) != "pair":
        raise DataError("a kernel compares the two completions of a pair; these rows are single completions")
    bad = set(validate(dataset).bad_rows)
    kept = _without(dataset, bad)
    if len(kept) < FEWEST:
        without = f" ({len(bad)} more cannot be trained on: prefopt check)" if bad else ""
        raise DataError(f"{len(kept)} pairs are too few to measure; it takes {FEWEST}{without}")
    return kept


def _check_columns(dataset: Dataset) -> None:
    if missing := [name for name in EMBEDDINGS if name not in dataset.column_names]:
        raise DataError(
            f"the data has no column {missing[0]!r}: name an encoder with --embeddings, or add the columns "
            f"{', '.join(EMBEDDINGS)}"
        )
    width_of(dataset)


def _readable(pairs: Dataset, tokenizer: Any) -> Dataset:
    """The pairs that a model's tokenizer can read."""
    if not isinstance(pairs[0]["chosen"], str) and not tokenizer.chat_template:
        raise DataError(
            "the rows are conversations, but the model's tokenizer has no chat template: name a chat model (--model)"
        )
    bad = set(validate(pairs, tokenizer=tokenizer).bad_rows)
    if len(pairs) - len(bad) < FEWEST:
        raise DataError(
            f"{len(bad)} of {len(pairs)} pairs cannot be read by the model's tokenizer, and it takes {FEWEST}: "
            "`prefopt check` with --model says which and why"
        )
    return _without(pairs, bad)


def _without(dataset: Dataset, bad: set[int]) -> Dataset:
    return dataset.select([row for row in range(len(dataset)) if row not in bad])


def _states(pairs: Dataset, network: Any, tokenizer: Any) -> States:
    tokenized = tokenize_dataset(pairs, tokenizer, desc="Tokenizing")
    return states_of(network, tokenized.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list())


def _triplets(pairs: Dataset, embeddings: str, states: States | None) -> Triplets:
    if embeddings == HIDDEN:
        assert states is not None
        return Triplets(states.prompt, states.chosen.pooled, states.rejected.pooled)
    if embeddings != GIVEN:
        pairs = embed(pairs, Encoder(embeddings))
    return Triplets(*(torch.tensor(pairs[name]) for name in EMBEDDINGS))
