"""The judges of a run of rounds, with their weights. Those with a model are in memory only while they judge."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prefopt.evaluation.cache import JudgementCache, cache_file
from prefopt.evaluation.judges.base import Judge, settings_hash
from prefopt.evaluation.judges.build import JudgeSpec, make_judge, parse_judge
from prefopt.evaluation.stage import ALL_PAIRS, Comparisons, judge_to_file
from prefopt.generation.memory import free_memory
from prefopt.generation.samples import PromptRow, Sample
from prefopt.safety.errors import UsageError


@dataclass
class Judges:
    """Judges of samples.

    Attributes:
        specs: which judges, and their weights.
        cache: the file of earlier answers.
    """

    specs: Sequence[JudgeSpec]
    cache: Path = field(default_factory=cache_file)
    _open: list[Judge] = field(default_factory=list, repr=False)
    _names: list[str] = field(default_factory=list, repr=False)

    @property
    def digest(self) -> str:
        """Of which judges there are, and their weights."""
        return settings_hash({str(number): asdict(spec) for number, spec in enumerate(self.specs)})

    @property
    def names(self) -> Sequence[str]:
        """Of the judges; known without their models once they were opened."""
        if not self._names:
            self.opened()
        return self._names

    @property
    def weights(self) -> Mapping[str, float] | None:
        """By the judge's name; None if all count equally."""
        if len({spec.weight for spec in self.specs}) == 1:
            return None
        return {name: spec.weight for name, spec in zip(self.names, self.specs, strict=True)}

    def opened(self) -> Sequence[Judge]:
        """The judges, their models loaded.

        Raises:
            UsageError: for a judge that cannot be used, or two of one name.
        """
        if not self._open:
            judges = [make_judge(spec) for spec in self.specs]
            names = [judge.name for judge in judges]
            if len(set(names)) < len(names):
                raise UsageError(f"judges must have different names, got {', '.join(names)}: add name=...")
            self._open, self._names = judges, names
        return self._open

    def close(self) -> None:
        """Give the memory of their models back."""
        self._open = []
        free_memory()

    def to_file(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[PromptRow],
        path: Path,
        comparisons: Comparisons = ALL_PAIRS,
        shown: Callable[[int], None] = lambda prompts: None,
    ) -> None:
        """Write the judgements of samples; a file that was begun is continued. Every process must call this."""
        with contextlib.closing(JudgementCache(self.cache)) as cache:
            rows = {row.id: row for row in prompts}
            judge_to_file(samples, self.opened(), path, rows=rows, cache=cache, pairing=comparisons, shown=shown)


def judges_of(texts: Sequence[str]) -> Judges | None:
    """The judges that options name, such as `number,column=answer,weight=2`; None for no judges.

    Raises:
        UsageError: for a judge that cannot be used, a weight that is not positive, or two judges of one name.
    """
    specs = [parse_judge(text) for text in texts]
    for spec, text in zip(specs, texts, strict=True):
        if not spec.weight > 0:
            raise UsageError(f"judge {text}: its weight must be more than 0")
    if not specs:
        return None
    judges = Judges(specs)
    judges.opened()  # wrong options are reported before anything is sampled
    judges.close()
    return judges
