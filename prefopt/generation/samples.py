"""Samples: the completions of a model to prompts, as they are stored, one a line.

The generators make them, judges score them, pair builders choose among them. Another program can write the same lines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import read_flag, read_jsonl

SCHEMA = "prefopt.samples/1"

Text = str | list[dict[str, Any]]
"""A prompt: a text, or messages with `role` and `content`."""


NO_PROMPT = "prompt must be a text, or messages with role and content"


def is_prompt(value: Any) -> bool:
    """Whether a value is a text, or messages with `role` and `content` (or `tool_calls`)."""
    if isinstance(value, list):
        return all(
            isinstance(one, Mapping) and isinstance(one.get("role"), str) and ("content" in one or "tool_calls" in one)
            for one in value
        )
    return isinstance(value, str)


def prompt_id(prompt: Text) -> str:
    """A name for a prompt that depends on nothing but the prompt, so that it is the same in every round and run."""
    words = json.dumps(prompt, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def sample_seed(seed: int, round_number: int, name: str, index: int) -> int:
    """The seed of one sample: that of the run, the round, the prompt's id and the sample's number among the prompt's.

    Returns:
        A number of 63 bits.
    """
    facts = f"{seed}/{round_number}/{name}/{index}".encode()
    return int.from_bytes(hashlib.sha256(facts).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn.

    Attributes:
        samples: completions of each prompt (K).
        temperature: 0 takes the likeliest token each time.
        top_p: draw among the likeliest tokens that have this much probability together.
        top_k: draw among this many likeliest tokens; 0 for all.
        max_new_tokens: where a completion is cut.
        stop: texts that end a completion; they are not part of it.
        seed: of the run; each sample has its own, from `sample_seed`.

    Raises:
        UsageError: for a value out of its range.
    """

    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("samples", 1), ("max_new_tokens", 1), ("top_k", 0)):
            if getattr(self, name) < lowest:
                raise UsageError(f"{name} must be {lowest} or more, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature must be a number of 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if "" in self.stop:
            raise UsageError("stop has an empty text, which would end every completion before its first word")


def stored_settings(settings: SamplingSettings) -> dict[str, Any]:
    """What `Sample.sampling` holds: the settings without the run's seed, since each sample has its own."""
    facts = asdict(settings)
    del facts["seed"]
    return {**facts, "stop": list(settings.stop)}


@dataclass(frozen=True)
class PromptRow:
    """A prompt and what else its row holds (`answer`, `chosen`, ...), for judges and pair builders.

    Attributes:
        prompt: a text or messages.
        columns: the row's other columns.
    """

    prompt: Text
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return prompt_id(self.prompt)


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        prompt_id: `prompt_id(prompt)`.
        prompt: a text or messages.
        index: 0 to K - 1, among the samples of its prompt in this round.
        completion: the text, without special tokens.
        token_count: of the completion, its end of text included.
        finished: False if it was cut at `max_new_tokens`.
        round: the number of the round, from 1; 0 outside of rounds.
        seed: of this sample.
        sampling: the settings it was drawn with (`SamplingSettings`, without its seed).
        model: what drew it: a hash of the weights, or a name.
    """

    prompt_id: str
    prompt: Text
    index: int
    completion: str
    token_count: int
    finished: bool
    round: int = 0
    seed: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""

    def line(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


class Generator(Protocol):
    """Draws completions: the same for the same prompts, settings, round and model.

    Attributes:
        name: what stands in `Sample.model`.
        chunk_prompts: prompts that are drawn together. A list that is asked for from a multiple of it on gives the
            same samples as the whole list.
    """

    name: str
    chunk_prompts: int

    def sample(
        self, prompts: Sequence[PromptRow], settings: SamplingSettings, round_number: int = 0
    ) -> Iterator[list[Sample]]:
        """The K samples of each prompt, prompt by prompt in the order given."""
        ...

    def close(self) -> None:
        """Free memory and connections; the generator is not used after it."""
        ...


_NEEDED = ("prompt", "completion")


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of a file. `prompt` and `completion` are enough: what is missing or null gets its usual value.

    Raises:
        UsageError: naming the file, the line and the field; also for two prompts with one id, and two samples of a
            prompt with one index.
    """
    counts: dict[str, int] = {}
    prompts: dict[str, Text] = {}
    numbers: set[tuple[int, str, int]] = set()
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{path}, object {number}"
        sample = _sample(where, row, counts)
        name, place = sample.prompt_id, (sample.round, sample.prompt_id, sample.index)
        if prompts.setdefault(name, sample.prompt) != sample.prompt:
            raise UsageError(
                f"{where}: prompt_id {name!r} stands for another prompt in an earlier line. Give each prompt an id of "
                "its own, or leave prompt_id out"
            )
        if place in numbers:
            raise UsageError(
                f"{where}: a second sample with index {sample.index} of prompt {name}. Number the samples of a prompt "
                "from 0, or leave index out"
            )
        numbers.add(place)
        yield sample


def _sample(where: str, row: Mapping[str, Any], counts: dict[str, int]) -> Sample:
    if str(row.get("schema", SCHEMA)) != SCHEMA:
        raise UsageError(f"{where}: schema is {row['schema']!r}; this version of prefopt reads {SCHEMA}")
    for name in _NEEDED:
        if name not in row:
            raise UsageError(f"{where} has no {name}; a sample needs {' and '.join(_NEEDED)}")
    if not isinstance(row["completion"], str):
        raise UsageError(f"{where}: completion must be a text, not a {type(row['completion']).__name__}")
    if not is_prompt(row["prompt"]):
        raise UsageError(f"{where}: {NO_PROMPT}, not {str(row['prompt'])[:100]!r}")
    sampling = row.get("sampling") or {}
    if not isinstance(sampling, Mapping):
        raise UsageError(f"{where}: sampling must be an object with the settings, not {sampling!r}"[:300])
    name = str(row.get("prompt_id") or prompt_id(row["prompt"]))
    index = _whole(where, row, "index", counts.get(name, 0))
    counts[name] = max(counts.get(name, 0), index + 1)
    return Sample(
        prompt_id=name,
        prompt=row["prompt"],
        index=index,
        completion=row["completion"],
        token_count=_whole(where, row, "token_count"),
        finished=read_flag(row, "finished", where, usual=True),
        round=_whole(where, row, "round"),
        seed=_whole(where, row, "seed"),
        sampling=sampling,
        model=str(row.get("model") or ""),
    )


def _whole(where: str, row: Mapping[str, Any], name: str, usual: int = 0) -> int:
    """A whole number of 0 or more; tables that once had gaps write 3 as 3.0."""
    value = row.get(name)
    if value is None:
        return usual
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0 or value != value // 1:
        raise UsageError(f"{where}: {name} must be a whole number of 0 or more, not {value!r}")
    return int(value)


def by_prompt(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples by the id of their prompt, in the order of their index; prompts in the order of their first sample."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt_id, []).append(sample)
    return {name: sorted(group, key=lambda sample: sample.index) for name, group in groups.items()}
