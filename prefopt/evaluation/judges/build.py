"""Judges from texts (`--judge number,column=gold`) or mappings (a configuration's `{judge: number, column: gold}`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.evaluation.judges.answers import AnswerJudge
from prefopt.evaluation.judges.base import Judge
from prefopt.evaluation.judges.function import function_judge
from prefopt.evaluation.judges.labels import LabelsJudge
from prefopt.evaluation.judges.llm import llm_judge
from prefopt.generation.samples import Generator, SamplingSettings
from prefopt.safety.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class JudgeSpec:
    """Which judge, and how it is set.

    Attributes:
        kind: one of `KINDS`.
        value: what follows the kind: a function, a pattern, a file.
        options: of the kind.
        weight: of its scores among those of several judges.
    """

    kind: str
    value: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class _Kind:
    value: str  # what it is; "" where there is none
    options: Mapping[str, Callable[[str], Any]]
    make: Callable[[str, Mapping[str, Any]], Judge]


def _yes(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise ValueError("must be yes or no")
    return text.lower() in ("yes", "true", "1")


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise ValueError("must be at least 1")
    return int(text)


def _reward_model(value: str, options: Mapping[str, Any]) -> Judge:
    from prefopt.evaluation.judges.reward_model import RewardModelJudge

    return RewardModelJudge(value, **options)


def _preference_model(value: str, options: Mapping[str, Any]) -> Judge:
    from prefopt.evaluation.judges.preference_model import PreferenceModelJudge

    return PreferenceModelJudge(value, **options)


def _language_model(
    rubric: str, *, model: str = "", url: str = "", key_variable: str = "OPENAI_API_KEY", concurrency: int = 16,
    **options: Any,
) -> Judge:  # fmt: skip
    if not model:
        raise UsageError("the judge llm needs model=..., the server's name for it, or a folder if there is no url=...")
    if url:
        from prefopt.generation.endpoint import Endpoint
        from prefopt.generation.server import ServerGenerator

        endpoint = Endpoint(url, key_variable=key_variable, concurrency=concurrency)
        return _written(rubric, ServerGenerator(endpoint, model), **options)
    from accelerate import PartialState

    from prefopt.generation.transformers import TransformersGenerator
    from prefopt.models.load import load_model, load_tokenizer

    network = load_model(model, {"dtype": "auto"}).to(PartialState().device)
    return _written(rubric, TransformersGenerator(network, load_tokenizer(model)), **options)


def _written(
    rubric: str, generator: Generator, *, name: str = "llm", both_orders: bool = True, repeats: int = 1,
    temperature: float = 0.0, max_new_tokens: int = 512,
) -> Judge:  # fmt: skip
    settings = SamplingSettings(repeats, temperature, max_new_tokens=max_new_tokens)
    return llm_judge(Path(rubric), generator, settings, name, both_orders)


def _no_policy() -> Judge:
    raise UsageError("the judge policy is the model of a run of rounds; elsewhere use llm:RUBRIC,model=...")


_ANSWER = {"name": str, "column": str}
_WRITING: dict[str, Callable[[str], Any]] = {
    "name": str, "both_orders": _yes, "repeats": _at_least_one, "temperature": float, "max_new_tokens": _at_least_one,
}  # fmt: skip
_KINDS: dict[str, _Kind] = {
    "exact": _Kind("", _ANSWER, lambda value, options: AnswerJudge("exact", **options)),
    "number": _Kind("", _ANSWER, lambda value, options: AnswerJudge("number", **options)),
    "math": _Kind("", _ANSWER, lambda value, options: AnswerJudge("math", **options)),
    "regex": _Kind("PATTERN", _ANSWER, lambda value, options: AnswerJudge("regex", pattern=value, **options)),
    "function": _Kind(
        "MODULE:FUNCTION", {"name": str, "both_orders": _yes, "repeats": _at_least_one},
        lambda value, options: function_judge(value, **options),
    ),
    "reward": _Kind("MODEL", {"name": str, "batch_size": _at_least_one, "device": str}, _reward_model),
    "preference": _Kind(
        "MODEL",
        {"rubric": str, "name": str, "batch_size": _at_least_one, "device": str, "both_orders": _yes},
        _preference_model,
    ),
    "llm": _Kind(
        "RUBRIC",
        {**_WRITING, "model": str, "url": str, "key_variable": str, "concurrency": _at_least_one},
        lambda value, options: _language_model(value, **options),
    ),
    "policy": _Kind("RUBRIC", _WRITING, lambda value, options: _no_policy()),
    "labels": _Kind("FILE", {"name": str}, lambda value, options: LabelsJudge(Path(value), **options)),
}  # fmt: skip
KINDS = tuple(_KINDS)


def parse_judge(spec: str | Mapping[str, Any]) -> JudgeSpec:
    """Read `KIND`, `KIND:VALUE` or `module:function`, with options after commas: `regex:(\\d+)$,column=gold,weight=2`.

    A mapping has the same text under `judge`, and the options beside it.

    Raises:
        UsageError: for an unknown kind or option, or a value that is missing or not read.
    """
    text, given = (spec, {}) if isinstance(spec, str) else (str(spec.get("judge", "")), dict(spec))
    given.pop("judge", None)
    text, *parts = re.split(r",(?=[a-z_]+=)", text)
    given.update(dict(part.split("=", 1) for part in parts))
    kind, _, value = text.partition(":")
    if kind not in _KINDS and value:
        kind, value = "function", text
    if kind not in _KINDS:
        raise UsageError(
            f"no judge {text!r}.{did_you_mean(kind, KINDS)} There are {', '.join(map(_usage, KINDS))}, and "
            "module:function"
        )
    if bool(value) != bool(_KINDS[kind].value):
        raise UsageError(f"the judge {text!r} must be written as {_usage(kind)}")
    weight = _read(text, "weight", given.pop("weight", 1.0), float)
    readers = _KINDS[kind].options
    for name in given:
        if name not in readers:
            raise UsageError(
                f"the judge {text!r} has no option {name!r}.{did_you_mean(name, readers)} It has "
                f"{', '.join((*readers, 'weight'))}"
            )
    return JudgeSpec(kind, value, {name: _read(text, name, v, readers[name]) for name, v in given.items()}, weight)


def make_judge(spec: JudgeSpec, policy: Generator | None = None) -> Judge:
    """The judge, with its function imported, its model loaded and its files read.

    Args:
        spec: from `parse_judge`.
        policy: what the judge `policy` asks: the model that is trained.
    """
    if spec.kind == "policy" and policy is not None:
        return _written(spec.value, policy, **{"name": "policy", **spec.options})
    return _KINDS[spec.kind].make(spec.value, spec.options)


def _usage(kind: str) -> str:
    return f"{kind}:{_KINDS[kind].value}" if _KINDS[kind].value else kind


def _read(judge: str, name: str, value: Any, reader: Callable[[str], Any]) -> Any:
    try:
        return reader(str(value))
    except ValueError as error:
        raise UsageError(f"{name}={value} of the judge {judge!r} cannot be read: {error}") from None
