"""Samples that another program drew: a file of them, read by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prefopt.generation.processes import from_main
from prefopt.generation.samples import PromptRow, Sample, SamplingSettings, by_prompt, read_samples
from prefopt.safety.errors import UsageError

_NAMED = 5


@dataclass(frozen=True)
class Coverage:
    """What a file has for a list of prompts.

    Attributes:
        missing: ids of prompts without a sample.
        short: ids of prompts with fewer samples than asked for.
        unused: samples of other prompts, of other rounds, or beyond the number asked for.
    """

    missing: tuple[str, ...]
    short: tuple[str, ...]
    unused: int

    def __str__(self) -> str:
        parts = [
            f"{len(ids)} prompts {what} ({', '.join(ids[:_NAMED])}{', ...' if len(ids) > _NAMED else ''})"
            for ids, what in ((self.missing, "without a sample"), (self.short, "with fewer samples than asked for"))
            if ids
        ]
        return ", ".join([*parts, *([f"{self.unused} samples not used"] if self.unused else [])])


class FileGenerator:
    """Gives out the samples of a file; `prompt` and `completion` are all that a line needs.

    A sample with a round belongs to that round, one without to every round. A prompt that the file lacks has no
    samples, and `coverage` names it.

    Args:
        path: a file of JSON lines, schema `prefopt.samples/1`.
    """

    chunk_prompts = 1024

    def __init__(self, path: Path):
        self.path = path
        self.name = f"file:{path.name}"
        self._samples = by_prompt(read_samples(path))

    def coverage(self, prompts: Sequence[PromptRow], settings: SamplingSettings, round_number: int = 0) -> Coverage:
        """What there is for these prompts.

        Raises:
            UsageError: if there is no sample for any of them.
        """
        counts = {row.id: len(self._of(row.id, round_number)) for row in prompts}
        if not any(counts.values()):
            raise UsageError(
                f"{self.path} has no sample for any of the {len(counts)} prompts: its prompts must be the same, "
                "character by character, or have the same prompt_id"
            )
        used = sum(min(count, settings.samples) for count in counts.values())
        return Coverage(
            tuple(name for name, count in counts.items() if not count),
            tuple(name for name, count in counts.items() if 0 < count < settings.samples),
            sum(map(len, self._samples.values())) - used,
        )

    def sample(
        self, prompts: Sequence[PromptRow], settings: SamplingSettings, round_number: int = 0
    ) -> Iterator[list[Sample]]:
        """The first K samples of each prompt that the file has, numbered from 0; an empty list for a missing one."""

        def groups() -> Iterator[list[Sample]]:
            for row in prompts:
                samples = self._of(row.id, round_number)[: settings.samples]
                yield [
                    replace(
                        sample, prompt=row.prompt, index=index, round=round_number, model=sample.model or self.name
                    )
                    for index, sample in enumerate(samples)
                ]

        yield from from_main(groups)

    def close(self) -> None:
        self._samples = {}

    def _of(self, name: str, round_number: int) -> list[Sample]:
        return [sample for sample in self._samples.get(name, []) if sample.round in (0, round_number)]
