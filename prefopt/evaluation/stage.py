"""The stage that judges: samples in, a file of judgements out that grows prompt by prompt and can be resumed."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from prefopt.evaluation.cache import JudgementCache, cache_key
from prefopt.evaluation.judgements import Judgement, Preference, Score, read_judgements, text_hash
from prefopt.evaluation.judges.base import (
    Candidate,
    Choice,
    Contest,
    Judge,
    PairJudge,
    Verdict,
    raised,
    settings_hash,
)
from prefopt.generation.samples import PromptRow, Sample
from prefopt.safety.errors import UsageError, is_ours
from prefopt.safety.jsonl import JsonlWriter

CHUNK_PROMPTS = 16
"""Prompts that a judge sees at once, so that a model judges in batches; a killed run judges its last ones again."""

Asked = Candidate | Contest
Answer = Verdict | Choice


@dataclass(frozen=True)
class _Question:
    """What a judge is asked, and the judgement that its answer completes."""

    judge: Judge
    asked: Asked
    blank: Judgement

    @property
    def identity(self) -> tuple[Any, ...]:
        return (*self.blank.key, self.blank.judge_hash, self.blank.text_hash)

    def judgement(self, answer: Answer) -> Judgement:
        facts: dict[str, Any] = {"abstain": answer.abstain, "reason": answer.reason, "raw": answer.raw}
        if isinstance(self.blank, Score):
            assert isinstance(answer, Verdict)
            return replace(self.blank, score=answer.score, **facts)
        assert isinstance(answer, Choice)
        if answer.first is None:
            return replace(self.blank, **facts)
        first, second = self.blank.indices
        facts["winner"] = None if answer.first == 0.5 else first if answer.first > 0.5 else second
        facts["probability"] = answer.first if answer.is_probability else None
        return replace(self.blank, tie=answer.first == 0.5, **facts)


class Comparisons(Protocol):
    """Which pairs of a prompt's samples are compared."""

    def pairs(self, group: Sequence[Sample], earlier: Sequence[Preference]) -> list[tuple[Sample, Sample]]:
        """The pairs to compare next, the lower index first; it is asked again until there are none.

        Args:
            group: the samples of a prompt.
            earlier: what came of the pairs that it named before, in both orders and by every judge.
        """
        ...


@dataclass(frozen=True)
class Pairing:
    """Compare all pairs at once, or `at_most` drawn by `seed`."""

    at_most: int | None = None
    seed: int = 0

    def pairs(self, group: Sequence[Sample], earlier: Sequence[Preference]) -> list[tuple[Sample, Sample]]:
        if earlier:
            return []
        pairs = list(itertools.combinations(group, 2))
        if self.at_most is None or len(pairs) <= self.at_most:
            return pairs
        draw = random.Random(f"{self.seed}/{group[0].round}/{group[0].prompt_id}")
        return [pairs[number] for number in sorted(draw.sample(range(len(pairs)), self.at_most))]


ALL_PAIRS, NO_PAIRS = Pairing(), Pairing(at_most=0)


def judge_to_file(
    samples: Sequence[Sample],
    judges: Sequence[Judge],
    path: Path,
    *,
    rows: Mapping[str, PromptRow] | None = None,
    cache: JudgementCache | None = None,
    pairing: Comparisons = ALL_PAIRS,
    shown: Callable[[int], None] = lambda prompts: None,
) -> None:
    """Write the judgements of all samples; a file that was begun is continued, and ends as if never interrupted.

    Lines follow the samples: prompt by prompt, judge by judge. A sample that a judge cannot judge gets a line with the
    reason. Errors meant for the user (a missing column, a server that does not answer) end the stage. A file in which
    every judgement failed is written from its start: the judge may work by now.

    Under `accelerate launch` every process must call this; the main process asks the judges and writes.

    Args:
        samples: of one or more rounds.
        judges: with different names.
        path: of the file.
        rows: the prompts' rows by id; judges that check answers read their columns.
        cache: of earlier answers.
        pairing: which pairs of a prompt's samples are compared.
        shown: called with how many prompts are done.

    Raises:
        UsageError: if the file holds judgements of other samples or judges.
    """
    names = [judge.name for judge in judges]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"judges must have different names, got {', '.join(names) or 'none'}; add name=...")
    groups, asker = _by_round_and_prompt(samples), _Asker(judges, cache)
    processes = PartialState()
    with contextlib.ExitStack() as stack:
        stored = [list(read_judgements(path)) if path.exists() else []]
        if processes.is_main_process and nothing_judged(stored[0]):
            path.unlink()
            stored = [[]]
        file = stack.enter_context(JsonlWriter(path)) if processes.is_main_process else None
        broadcast_object_list(stored)
        lines = _Lines(path, stored[0], file)
        for at in range(0, len(groups), CHUNK_PROMPTS):
            _judge_chunk(groups[at : at + CHUNK_PROMPTS], asker, rows or {}, pairing, lines)
            shown(min(at + CHUNK_PROMPTS, len(groups)))
        lines.refuse_more()
    processes.wait_for_everyone()


def nothing_judged(judgements: Sequence[Judgement]) -> str:
    """Why judges that failed on all that they were asked did so, with counts; "" if any answered or abstained."""
    if any(one.abstain or not one.reason for one in judgements):
        return ""
    reasons = Counter(one.reason for one in judgements).most_common(3)
    return "; ".join(f"{count} {reason}" for reason, count in reasons)


def _judge_chunk(
    groups: Sequence[Sequence[Sample]],
    asker: _Asker,
    rows: Mapping[str, PromptRow],
    pairing: Comparisons,
    lines: _Lines,
) -> None:
    """Judge the samples of some prompts: scores and the first comparisons, then those that follow from them."""
    earlier: list[list[Preference]] = [[] for _ in groups]
    questions = [list(asker.scores(group, rows)) for group in groups]
    while True:
        for number, group in enumerate(groups):
            questions[number] += asker.contests(group, rows, pairing.pairs(group, earlier[number]))
        asked = [one for of_group in questions for one in of_group]
        if not asked:
            return
        judgements = iter(lines.add(asked, asker))
        for number, of_group in enumerate(questions):
            of_prompt = [next(judgements) for _ in of_group]
            earlier[number] += (one for one in of_prompt if isinstance(one, Preference))
        questions = [[] for _ in groups]


class _Lines:
    """The file of judgements: what it had when the stage began is used, and the rest is asked and written.

    Args:
        path: of the file.
        stored: what it has.
        file: to write to; None in processes that do not write.
    """

    def __init__(self, path: Path, stored: list[Judgement], file: JsonlWriter | None):
        self._path, self._stored, self._file = path, stored, file
        self._position = 0

    def add(self, questions: Sequence[_Question], asker: _Asker) -> list[Judgement]:
        """The judgements of these questions, on every process."""
        present = self._stored[self._position : self._position + len(questions)]
        self._check_same(present, questions)
        self._position += len(questions)
        if len(present) == len(questions):
            return present
        rest = questions[len(present) :]
        answers = asker.answers(rest)
        new = [[one.judgement(answer) for one, answer in zip(rest, answers, strict=True)] if self._file else []]
        if self._file is not None:
            self._file.write(judgement.line() for judgement in new[0])
        broadcast_object_list(new)
        return present + new[0]

    def refuse_more(self) -> None:
        if len(self._stored) > self._position:
            raise UsageError(
                f"{self._path} has judgements of more samples than there are. Delete it or name another file"
            )

    def _check_same(self, present: Sequence[Judgement], questions: Sequence[_Question]) -> None:
        for number, (one, question) in enumerate(zip(present, questions, strict=False), start=self._position + 1):
            if (*one.key, one.judge_hash, one.text_hash) != question.identity:
                raise UsageError(
                    f"{self._path}, object {number} is not a judgement of these samples by these judges with these "
                    "settings. Delete the file or name another one; what was judged before comes from the cache"
                )


class _Asker:
    """Asks the judges, each question once, and keeps the cache."""

    def __init__(self, judges: Sequence[Judge], cache: JudgementCache | None):
        self._judges = {judge.name: judge for judge in judges}
        self._hashes = {judge.name: settings_hash(judge.settings) for judge in judges}
        self._cache = cache

    def scores(self, group: Sequence[Sample], rows: Mapping[str, PromptRow]) -> Iterator[_Question]:
        """About each sample of one prompt, judge by judge."""
        columns = _columns(group, rows)
        for judge in self._judges.values():
            if isinstance(judge, PairJudge):
                continue
            for sample in group:
                blank = Score(
                    sample.prompt_id, sample.index, judge.name, None, judge_hash=self._hashes[judge.name],
                    text_hash=text_hash(sample.completion), round=sample.round,
                )  # fmt: skip
                yield _Question(judge, Candidate(sample.prompt, sample.completion, columns), blank)

    def contests(
        self, group: Sequence[Sample], rows: Mapping[str, PromptRow], pairs: Sequence[tuple[Sample, Sample]]
    ) -> Iterator[_Question]:
        """About these pairs of one prompt's samples, judge by judge."""
        columns = _columns(group, rows)
        for judge in self._judges.values():
            if isinstance(judge, PairJudge):
                for pair in pairs:
                    yield from self._contests(judge, pair, columns)

    def _contests(
        self, judge: PairJudge, pair: tuple[Sample, Sample], columns: Mapping[str, Any]
    ) -> Iterator[_Question]:
        for order in range(2 if judge.both_orders else 1):
            first, second = pair[::-1] if order else pair
            for repeat in range(judge.repeats):
                blank = Preference(
                    first.prompt_id, (first.index, second.index), judge.name, None, order=order, repeat=repeat,
                    judge_hash=self._hashes[judge.name], round=first.round,
                    text_hash=text_hash(*(sample.completion for sample in pair)),
                )  # fmt: skip
                contest = Contest(first.prompt, first.completion, second.completion, columns, repeat)
                yield _Question(judge, contest, blank)

    def answers(self, questions: Sequence[_Question]) -> list[Answer]:
        """In the order of the questions; none in processes that do not write."""
        answers: dict[str, Answer] = {}
        keys = [cache_key(question.blank.judge_hash, question.asked) for question in questions]
        for judge in self._judges.values():
            asked = {k: q.asked for k, q in zip(keys, questions, strict=True) if q.judge is judge}
            answers.update(self._of_judge(judge, asked))
        return [answers[key] for key in keys] if PartialState().is_main_process else []

    def _of_judge(self, judge: Judge, asked: Mapping[str, Asked]) -> dict[str, Answer]:
        is_main, every_process = PartialState().is_main_process, getattr(judge, "every_process", False)
        if not (is_main or every_process):
            return {}
        cache = self._cache if judge.cached and is_main else None
        known: dict[str, Answer] = cache.get(list(asked)) if cache else {}
        if every_process:
            # All must ask the same questions.
            known = broadcast_object_list([known])[0]
        known.update({key: Choice(0.5) for key, one in asked.items() if _is_same_text(one)})
        rest = {key: one for key, one in asked.items() if key not in known}
        new = dict(zip(rest, _asked(judge, list(rest.values())), strict=True))
        if cache and new:
            cache.put(new)
        return {**known, **new}


def _is_same_text(asked: Asked) -> bool:
    return isinstance(asked, Contest) and asked.first == asked.second


def _asked(judge: Judge, asked: Sequence[Any]) -> list[Answer]:
    """The judge's answers; if it raises, it is asked one by one, so that only the ones that it fails on are lost."""
    if not asked:
        return []
    try:
        answers: list[Answer] = [*(judge.compare(asked) if isinstance(judge, PairJudge) else judge.score(asked))]
    except Exception as error:
        if is_ours(error):
            raise
        if len(asked) > 1:
            return [answer for one in asked for answer in _asked(judge, [one])]
        reason = raised(error)
        return [Choice(None, reason=reason) if isinstance(judge, PairJudge) else Verdict(None, reason)]
    if len(answers) != len(asked):
        raise UsageError(f"judge {judge.name} gave {len(answers)} answers to {len(asked)} questions")
    return answers


def _by_round_and_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.round, sample.prompt_id), []).append(sample)
    return [sorted(group, key=lambda sample: sample.index) for group in groups.values()]


def _columns(group: Sequence[Sample], rows: Mapping[str, PromptRow]) -> Mapping[str, Any]:
    row = rows.get(group[0].prompt_id)
    return {} if row is None else row.columns
