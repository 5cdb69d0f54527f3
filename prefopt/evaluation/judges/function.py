"""A judge that is a Python function, named as `module:function`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.evaluation.judges.base import Candidate, Choice, Contest, Judge, Verdict, choice_of, raised, verdict_of
from prefopt.safety.errors import UsageError, did_you_mean

_SCORED = ("prompt", "completion", "row")
_COMPARED = ("prompt", "first", "second", "row")


def function_judge(path: str, name: str = "", both_orders: bool = True, repeats: int = 1) -> Judge:
    """The judge that a function is.

    A function with a parameter `completion`, or with one parameter of any name, scores; one with `first` and `second`
    compares. Further parameters: `prompt`, `row` (the prompt row's columns as a mapping), or the name of a column.
    A scoring function returns a number, True or False; one that compares returns "first", "second", "tie" or the
    probability that the first is better. None abstains. An error that it raises is the reason of one missing
    judgement.

    Args:
        path: `package.module:function`; the module is imported from the Python path or the current folder.
        name: of the judge; the function's if left out.
        both_orders: for a function that compares.
        repeats: for a function that compares.
    """
    function = _imported(path)
    parameters = list(inspect.signature(function).parameters.values())
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    settings = {"function": path, "source": _source_digest(function)}
    name = name or path.rpartition(":")[2]
    if {"first", "second"} <= set(names):
        return _ComparingFunction(_call(function, parameters, _COMPARED), name, settings, both_orders, repeats)
    if "completion" not in names:
        needed = [one for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
        if len(needed) != 1:
            raise UsageError(
                f"the judge {path} has the parameters {', '.join(names) or 'none'}; it needs completion, or first and "
                "second; prompt, row and names of columns may be added"
            )
        return _ScoringFunction(lambda facts: function(facts["completion"]), name, settings)
    return _ScoringFunction(_call(function, parameters, _SCORED), name, settings)


class _ScoringFunction:
    cached = True

    def __init__(self, call: Callable[[Mapping[str, Any]], Any], name: str, settings: Mapping[str, Any]):
        self._call, self.name, self.settings = call, name, settings

    def score(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        return [self._verdict(candidate) for candidate in candidates]

    def _verdict(self, candidate: Candidate) -> Verdict:
        # A copy of the row: what a function changes in it must not reach the next sample.
        facts = {"prompt": candidate.prompt, "completion": candidate.completion, "row": dict(candidate.columns)}
        try:
            return verdict_of(self._call({**candidate.columns, **facts}))
        except Exception as error:
            return Verdict(None, raised(error))


class _ComparingFunction:
    cached = True

    def __init__(
        self,
        call: Callable[[Mapping[str, Any]], Any],
        name: str,
        settings: Mapping[str, Any],
        both_orders: bool,
        repeats: int,
    ):
        self._call, self.name, self.settings = call, name, settings
        self.both_orders, self.repeats = both_orders, repeats

    def compare(self, contests: Sequence[Contest]) -> list[Choice]:
        return [self._choice(contest) for contest in contests]

    def _choice(self, contest: Contest) -> Choice:
        row = dict(contest.columns)
        facts = {"prompt": contest.prompt, "first": contest.first, "second": contest.second, "row": row}
        try:
            return choice_of(self._call({**contest.columns, **facts}))
        except Exception as error:
            return Choice(None, reason=raised(error))


def _imported(path: str) -> Callable[..., Any]:
    module, colon, name = path.partition(":")
    if not (colon and module and name.isidentifier()):
        raise UsageError(f"{path!r} must be module:function, such as my_judges:is_short")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # at the end, so that no file there hides an installed package
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"the judge {path} cannot be imported: {error}. Its module must be in the current folder or installed"
        ) from error
    except Exception as error:
        raise UsageError(f"the judge {path}: its module raises {type(error).__name__}: {error}") from error
    function = getattr(imported, name, None)
    if not callable(function):
        file = getattr(imported, "__file__", None) or "a part of Python"
        near = did_you_mean(name, [word for word, value in vars(imported).items() if callable(value)])
        raise UsageError(f"the module {module} ({file}) has no function {name}.{near}")
    return function  # type: ignore[no-any-return]


def _call(
    function: Callable[..., Any], parameters: Sequence[inspect.Parameter], usual: Sequence[str]
) -> Callable[[Mapping[str, Any]], Any]:
    everything = any(one.kind is one.VAR_KEYWORD for one in parameters)
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    optional = {one.name for one in parameters if one.default is not one.empty}

    def call(facts: Mapping[str, Any]) -> Any:
        if everything:
            return function(**facts)
        missing = [name for name in names if name not in facts and name not in optional]
        if missing:
            raise UsageError(
                f"no column {missing[0]!r} in the prompt's row; there are {', '.join(sorted(set(facts) - set(usual)))}"
            )
        return function(**{name: facts[name] for name in names if name in facts})

    return call


def _source_digest(function: Callable[..., Any]) -> str:
    """Of the function's file, so that a judge that was edited is asked again."""
    try:
        file = inspect.getsourcefile(function)
        content = Path(file).read_bytes() if file else b""
    except (TypeError, OSError):
        return ""
    return hashlib.sha256(content).hexdigest()[:16]
