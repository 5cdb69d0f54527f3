"""The judges of a run of rounds, with their weights. Those with a model are in memory only while they judge."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prefopt.evaluation.cache import JudgementCache, cache_file
from prefopt.evaluation.head_to_head import Groups, compare_models
from prefopt.evaluation.judges.base import Judge, PairJudge, settings_hash
from prefopt.evaluation.judges.build import JudgeSpec, make_judge, parse_judge
from prefopt.evaluation.stage import ALL_PAIRS, Comparisons, judge_to_file
from prefopt.generation.memory import free_memory
from prefopt.generation.samples import Generator, PromptRow, Sample, SamplingSettings
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
    _open: dict[int, Judge] = field(default_factory=dict, repr=False)
    _names: list[str] = field(default_factory=list, repr=False)
    _compares: bool = field(default=False, repr=False)

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
    def compares(self) -> bool:
        """Whether any judge but the policy compares two completions; known as `names` are."""
        return bool(self.names) and self._compares

    @property
    def answer_column(self) -> str:
        """The prompts' column with the right number, as the first judge that reads one names it."""
        columns = (spec.options["column"] for spec in self.specs if "column" in spec.options)
        return str(next(columns, "answer"))

    @property
    def weights(self) -> Mapping[str, float] | None:
        """By the judge's name; None if all count equally."""
        if len({spec.weight for spec in self.specs}) == 1:
            return None
        return {name: spec.weight for name, spec in zip(self.names, self.specs, strict=True)}

    @property
    def has_others(self) -> bool:
        """Whether any judge is another one than the policy itself."""
        return any(spec.kind != "policy" for spec in self.specs)

    def opened(self, policy: Generator | None = None) -> Sequence[Judge]:
        """The judges, their models loaded.

        Args:
            policy: what the judge `policy` asks; None leaves that judge out.

        Raises:
            UsageError: for a judge that cannot be used, or two of one name.
        """
        judges: dict[int, Judge] = {}
        for number, spec in enumerate(self.specs):
            if spec.kind == "policy":
                judges[number] = make_judge(spec, policy or _Unnamed())  # another model in each round
            else:
                judges[number] = self._open[number] if number in self._open else make_judge(spec)
                self._open[number] = judges[number]
        self._names = [judge.name for judge in judges.values()]
        others = (judge for number, judge in judges.items() if self.specs[number].kind != "policy")
        self._compares = any(isinstance(judge, PairJudge) for judge in others)
        if len(set(self._names)) < len(self._names):
            raise UsageError(f"judges must have different names, got {', '.join(self._names)}: add name=...")
        return [judge for number, judge in judges.items() if policy or self.specs[number].kind != "policy"]

    def close(self) -> None:
        """Give the memory of their models back."""
        self._open = {}
        free_memory()

    def to_file(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[PromptRow],
        path: Path,
        comparisons: Comparisons = ALL_PAIRS,
        policy: Callable[[], Generator] | None = None,
    ) -> None:
        """Write the judgements of samples; a file that was begun is continued. Every process must call this.

        Args:
            samples: to judge.
            prompts: with the columns that judges read.
            path: of the file.
            comparisons: which pairs are compared.
            policy: makes the generator that the judge `policy` asks; without it that judge is left out.
        """
        asks_policy = policy is not None and any(spec.kind == "policy" for spec in self.specs)
        judges = self.opened(policy() if policy is not None and asks_policy else None)
        with contextlib.closing(JudgementCache(self.cache)) as cache:
            rows = {row.id: row for row in prompts}
            judge_to_file(samples, judges, path, rows=rows, cache=cache, pairing=comparisons)

    def compare_models(self, ours: Groups, theirs: Groups, prompts: Sequence[PromptRow], path: Path) -> None:
        """Write what the judges that compare say of two models' answers, as the function of this name does."""
        judges = [judge for judge in self.opened() if isinstance(judge, PairJudge)]
        with contextlib.closing(JudgementCache(self.cache)) as cache:
            compare_models(ours, theirs, judges, path, rows={row.id: row for row in prompts}, cache=cache)


class _Unnamed:
    """Stands for the policy before there is one, to check a judge's options."""

    name, chunk_prompts = "", 1

    def sample(
        self, prompts: Sequence[PromptRow], settings: SamplingSettings, round_number: int = 0
    ) -> Iterator[list[Sample]]:
        raise AssertionError("the policy is not known yet")

    def close(self) -> None:
        pass


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
