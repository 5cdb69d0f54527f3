"""The stage that samples: prompts from a file, samples into a file that grows chunk by chunk and can be resumed."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from prefopt.data.messages import as_messages
from prefopt.data.problems import KINDS
from prefopt.data.row import text_problems
from prefopt.generation.from_file import FileGenerator
from prefopt.generation.samples import (
    NO_PROMPT,
    Generator,
    PromptRow,
    Sample,
    SamplingSettings,
    is_prompt,
    prompt_id,
    read_samples,
    sample_seed,
    stored_settings,
)
from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import JsonlWriter, read_jsonl


def read_prompts(path: Path) -> tuple[list[PromptRow], int]:
    """The prompts of a file of JSON lines, each once, and how many lines repeated an earlier prompt.

    Raises:
        UsageError: naming the file and the line that has no prompt.
    """
    return prompts_of(read_jsonl(path), str(path))


def prompts_of(lines: Iterable[Mapping[str, Any]], where: str) -> tuple[list[PromptRow], int]:
    """As `read_prompts`, of rows with a column `prompt`; `where` is their name in messages."""
    rows: dict[str, PromptRow] = {}
    count = 0
    for count, line in enumerate(lines, start=1):
        prompt = as_messages(line.get("prompt"))
        if not prompt or not is_prompt(prompt):
            there = f"{str(prompt)[:100]!r}" if "prompt" in line else f"it has the columns {', '.join(line) or 'none'}"
            raise UsageError(f"{where}, object {count}: {NO_PROMPT}; here {there}")
        for problem in text_problems(prompt, "prompt"):
            kind = KINDS[problem]
            raise UsageError(f"{where}, object {count}: {kind.explanation} {kind.advice} Here {str(prompt)[-100:]!r}")
        columns = {name: value for name, value in line.items() if name != "prompt"}
        rows.setdefault(prompt_id(prompt), PromptRow(prompt, columns))
    if not rows:
        raise UsageError(f"{where} has no prompts")
    return list(rows.values()), count - len(rows)


def sample_to_file(
    generator: Generator,
    prompts: Sequence[PromptRow],
    settings: SamplingSettings,
    path: Path,
    round_number: int = 0,
    shown: Callable[[int], None] = lambda prompts: None,
) -> None:
    """Write the samples of all prompts; a file that was begun is continued after its last whole chunk.

    Under `accelerate launch` every process must call this; the main process writes, and all see the whole file.

    Args:
        generator: draws the samples.
        prompts: each once.
        settings: how samples are drawn.
        path: of the file.
        round_number: from 1; 0 outside of rounds.
        shown: called with how many prompts are done.

    Raises:
        UsageError: if the file holds samples of other prompts, settings, rounds or models.
    """
    processes = PartialState()
    done = [0]
    with contextlib.ExitStack() as stack:
        if processes.is_main_process:
            done = [_resume(generator, prompts, settings, path, round_number)]
            file = stack.enter_context(JsonlWriter(path))
        broadcast_object_list(done)
        shown(done[0])
        rest = generator.sample(prompts[done[0] :], settings, round_number)
        while groups := list(islice(rest, generator.chunk_prompts)):
            if processes.is_main_process:
                file.write(sample.line() for group in groups for sample in group)
            done[0] += len(groups)
            shown(done[0])
    processes.wait_for_everyone()


def _resume(
    generator: Generator, prompts: Sequence[PromptRow], settings: SamplingSettings, path: Path, round_number: int
) -> int:
    """How many prompts are done, a multiple of the chunk; the file is cut behind them."""
    if isinstance(generator, FileGenerator) and path.exists():
        for _ in read_samples(path):  # refuses a file of something else, which would be lost
            pass
        path.unlink()  # copied again: that takes no time, and prompts may have fewer samples
    if not path.exists():
        return 0
    wanted = ((row.id, index) for row in prompts for index in range(settings.samples))
    facts = stored_settings(settings)
    count = 0
    for count, sample in enumerate(read_samples(path), start=1):
        seed = sample_seed(settings.seed, round_number, sample.prompt_id, sample.index)
        drawn = {**sample.sampling, "seed": sample.seed, "round": sample.round, "model": sample.model}
        expected = {**facts, "seed": seed, "round": round_number, "model": generator.name}
        where = f"{path}, object {count}"
        if (sample.prompt_id, sample.index) != next(wanted, None):
            raise UsageError(f"{where}: a sample of another prompt than expected. Delete {path} or name another file")
        if differing := [name for name in expected if drawn.get(name) != expected[name]]:
            name = differing[0]
            raise UsageError(
                f"{where} was drawn with another {name} ({drawn.get(name)!r}, now {expected[name]!r}). Delete {path}, "
                "name another file, or repeat the earlier settings"
            )
    done = count // settings.samples
    whole = done if done == len(prompts) else done - done % generator.chunk_prompts
    _cut(path, whole * settings.samples)
    return whole


def _cut(path: Path, lines: int) -> None:
    with open(path, "r+b") as stream:
        left = lines
        while left and (line := stream.readline()):
            left -= bool(line.strip())
        stream.truncate(stream.tell())
        os.fsync(stream.fileno())


@dataclass(frozen=True)
class SampleCounts:
    """What there is to know of a file of samples before anybody judges them.

    Attributes:
        prompts: how many.
        samples: how many.
        cut: samples that reached the maximum length.
        empty: samples without text.
        duplicates: samples whose text an earlier sample of the same prompt has.
        tokens: of all samples.
    """

    prompts: int
    samples: int
    cut: int
    empty: int
    duplicates: int
    tokens: int

    @property
    def mean_tokens(self) -> float:
        return self.tokens / self.samples if self.samples else 0.0

    def __str__(self) -> str:
        return (
            f"{self.samples} samples of {self.prompts} prompts, {self.mean_tokens:.1f} tokens on average; "
            f"{self.samples - self.cut} finished, {self.cut} cut, {self.duplicates} duplicates, {self.empty} empty"
        )


def count_samples(samples: Iterable[Sample]) -> SampleCounts:
    texts: Counter[tuple[str, str]] = Counter()
    names, cut, empty, tokens = set(), 0, 0, 0
    for sample in samples:
        names.add(sample.prompt_id)
        texts[sample.prompt_id, sample.completion] += 1
        cut += not sample.finished
        empty += not sample.completion.strip()
        tokens += sample.token_count
    total = texts.total()
    return SampleCounts(len(names), total, cut, empty, total - len(texts), tokens)
