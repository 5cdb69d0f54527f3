"""A pair builder as it stands in a config or on a command line: `round_robin(pairs=10, min_margin=0.5)`."""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from prefopt.online.pairs import (
    NO_LIMITS,
    Candidate,
    Choice,
    Compare,
    Limits,
    adjacent,
    against_gold,
    all_pairs,
    best_worst,
    correct_incorrect,
    groups,
    random_pair,
    round_robin,
    top_k,
    tournament,
)
from prefopt.safety.errors import UsageError, did_you_mean

BUILDERS: dict[str, Callable[..., Choice]] = {
    function.__name__: function
    for function in (
        best_worst,
        all_pairs,
        adjacent,
        correct_incorrect,
        round_robin,
        tournament,
        random_pair,
        against_gold,
        top_k,
        groups,
    )
}
"""Pair builders by name."""

_BY_THE_STAGE = ("candidates", "limits", "rng", "compare")
"""Arguments of builders that do not stand in an expression."""

_ROWS = {"top_k": "rows", "groups": "groups"}
"""What builders make that do not make pairs. They take no limits, which are about pairs."""

_WITH_GOLD = ("correct_incorrect", "round_robin", "against_gold")

_LIMITS = tuple(limit.name for limit in fields(Limits))


@dataclass(frozen=True)
class PairBuilder:
    """A pair builder with its options.

    Attributes:
        name: in `BUILDERS`.
        options: of the function.
        limits: on its pairs.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = NO_LIMITS

    @property
    def supervised(self) -> bool:
        """Whether it makes rows for supervised training instead of pairs."""
        return self.name == "top_k"

    @property
    def grouped(self) -> bool:
        """Whether it makes groups, rows with several completions, instead of pairs."""
        return self.name == "groups"

    @property
    def rows(self) -> str:
        """What its rows are called: pairs, groups, or rows (of supervised training)."""
        return _ROWS.get(self.name, "pairs")

    @property
    def needs_scores(self) -> bool:
        return self.name != "against_gold"

    @property
    def uses_gold(self) -> bool:
        """Whether a gold answer may be in its pairs; other builders choose by scores, which it has none of."""
        return self.name in _WITH_GOLD

    def __call__(self, candidates: Sequence[Candidate], seed: str = "", compare: Compare | None = None) -> Choice:
        """The pairs of one prompt.

        Args:
            candidates: of the prompt.
            seed: of what is drawn at random.
            compare: a judge of two completions, for a tournament; default: the scores.
        """
        more: dict[str, Any] = dict(self.options)
        if self.name not in _ROWS:
            more["limits"] = self.limits
        if self.name == "random_pair":
            more["rng"] = random.Random(seed)
        if self.name == "tournament":
            more["compare"] = compare
        return BUILDERS[self.name](candidates, **more)

    def __str__(self) -> str:
        limits = {name: getattr(self.limits, name) for name in _LIMITS}
        changed = {name: value for name, value in limits.items() if value != getattr(NO_LIMITS, name)}
        words = ", ".join(f"{name}={value!r}" for name, value in {**self.options, **changed}.items())
        return f"{self.name}({words})" if words else self.name


def parse_builder(text: str) -> PairBuilder:
    """The builder that an expression names.

    Raises:
        UsageError: naming the builder, the option and what there is.
    """
    name, words = _call(text)
    if name not in BUILDERS:
        raise UsageError(
            f"there is no pair builder {name!r}.{did_you_mean(name, BUILDERS)} There are: {', '.join(BUILDERS)}"
        )
    known = [word for word in inspect.signature(BUILDERS[name]).parameters if word not in _BY_THE_STAGE]
    limits = {} if name in _ROWS else {word: value for word, value in words.items() if word in _LIMITS}
    options = {word: value for word, value in words.items() if word not in limits}
    there = [*known, *(() if name in _ROWS else _LIMITS)]
    for word in options:
        if word not in known:
            raise UsageError(
                f"pair builder {name} has no option {word!r}.{did_you_mean(word, there)} It has: {', '.join(there)}"
            )
    builder = PairBuilder(name, options, Limits(**limits))
    _check_values(builder)
    return builder


def _call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of `name` or `name(option=value, ...)`; only literal values are read."""
    wrong = f"{text!r} is no pair builder: write it as best_worst or round_robin(pairs=10)"
    try:
        tree = ast.parse(" ".join(text.split()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UsageError(wrong) from None
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
        raise UsageError(wrong)
    words: dict[str, Any] = {}
    for keyword in tree.keywords:
        try:
            value = ast.literal_eval(keyword.value)
        except ValueError:
            value = None
        if keyword.arg is None or not isinstance(value, (bool, int, float)):
            raise UsageError(f"{wrong}. The value of {keyword.arg} must be a number or True or False")
        words[keyword.arg] = value
    return tree.func.id, words


def _check_values(builder: PairBuilder) -> None:
    for word, value in builder.options.items():
        default = inspect.signature(BUILDERS[builder.name]).parameters[word].default
        if isinstance(default, bool) != isinstance(value, bool):
            raise UsageError(f"pair builder {builder.name}: {word} must be like {default!r}, got {value!r}")
        if isinstance(default, int) and not isinstance(default, bool) and (value != int(value) or value < 1):
            raise UsageError(f"pair builder {builder.name}: {word} must be a whole number of 1 or more, got {value}")
