"""The stages: questions about passages, the same in other words, wrong answers. Each stores the generator's replies.

Replies are samples (`prefopt.generation.stage`): a job that was killed continues after its last whole chunk, and ends
with the same rows. All checks are made again from the stored replies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prefopt.generation.from_file import FileGenerator
from prefopt.generation.samples import Generator, PromptRow, Sample, SamplingSettings, by_prompt, read_samples
from prefopt.generation.stage import sample_to_file
from prefopt.unlearning.metrics.rouge import AnyScript
from prefopt.unlearning.prepare.documents import Passage
from prefopt.unlearning.prepare.prompts import Prompts
from prefopt.unlearning.prepare.replies import Parsed, bare, key, numbered, one_line, question_pairs

K = TypeVar("K")

_ASKS = ("?", "？", "؟")

STAGES = ("questions", "paraphrases", "wrong answers")


@dataclass(frozen=True)
class Wanted:
    """What to write.

    Attributes:
        questions: about each passage, at most.
        wrong: wrong answers of each row, exactly.
        attempts: how often a request is made whose reply cannot be used; each draws another reply.
        prompts: the templates.
        chat: whether prompts are messages, or texts to continue for models without a chat template.
    """

    questions: int = 3
    wrong: int = 5
    attempts: int = 3
    prompts: Prompts = field(default_factory=Prompts.read)
    chat: bool = True


@dataclass(frozen=True)
class Refusal:
    """A text of the generator, or the lack of one, that stands in no row.

    Attributes:
        stage: of `STAGES`.
        place: the document and the passage.
        reason: why it is not used, the same words for all of a kind.
        text: what the generator wrote; for rows that lack something, their question and answer.
    """

    stage: str
    place: str
    reason: str
    text: str


@dataclass
class _Row:
    """A row while it grows."""

    place: str
    question: str
    answer: str
    rephrased: str = ""
    paraphrase: str = ""
    wrong: list[str] = field(default_factory=list)

    def line(self) -> dict[str, Any]:
        return {
            "question": self.question, "answer": self.answer, "paraphrased_question": self.rephrased,
            "paraphrased_answer": self.paraphrase, "perturbed_answer": self.wrong, "source": self.place,
        }  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What came of it.

    Attributes:
        rows: as `prefopt.unlearning.data` reads them, and `source`: the document and the passage.
        refusals: everything that is in no row.
        asked: requests of each stage, repeated ones included.
        unanswered: of each stage, prompts that the file of another program lacks.
    """

    rows: list[dict[str, Any]]
    refusals: list[Refusal]
    asked: Mapping[str, int]
    unanswered: Mapping[str, list[PromptRow]]

    def counts(self) -> Counter[tuple[str, str]]:
        """How often each reason came in each stage, in the order of stages."""
        return Counter((refusal.stage, refusal.reason) for refusal in self.refusals)


def prepare(
    passages: Sequence[Passage],
    generator: Generator,
    settings: SamplingSettings,
    folder: Path,
    wanted: Wanted | None = None,
    shown: Callable[[str, int, int], None] = lambda stage, total, done: None,
) -> Prepared:
    """Rows of questions with paraphrases and wrong answers about the passages.

    Under `accelerate launch` every process must call this.

    Args:
        passages: each once.
        generator: writes.
        settings: how it draws; one sample of each prompt.
        folder: for its replies; those of an earlier call with the same arguments are used again.
        wanted: how many of what.
        shown: called with the stage, how many prompts it has, and how many are done.

    Raises:
        UsageError: if the folder holds replies to other prompts, settings or models.
    """
    work = _Work(generator, settings, folder, wanted or Wanted(), shown)
    rows = work.questions(passages)
    rows = work.paraphrases(rows)
    rows = work.wrong_answers(rows)
    return Prepared([row.line() for row in rows], work.refusals, work.asked, work.unanswered)


class _Work:
    """One call of `prepare`."""

    def __init__(
        self, generator: Generator, settings: SamplingSettings, folder: Path, wanted: Wanted,
        shown: Callable[[str, int, int], None],
    ):  # fmt: skip
        self._generator, self._settings, self._folder = generator, settings, folder
        self._wanted, self._shown = wanted, shown
        # A file has one reply to a prompt, and the likeliest reply is always the same.
        repeats = isinstance(generator, FileGenerator) or settings.temperature == 0
        self._attempts = 1 if repeats else wanted.attempts
        self._copied = {key(bare(line)) for line in wanted.prompts.lines()}
        self.refusals: list[Refusal] = []
        self.asked: Counter[str] = Counter()
        self.unanswered: dict[str, list[PromptRow]] = {}

    def questions(self, passages: Sequence[Passage]) -> list[_Row]:
        """The rows with questions and answers, in the order of the passages."""
        stage, template, most = STAGES[0], self._wanted.prompts.questions, self._wanted.questions
        rows: dict[int, list[_Row]] = {number: [] for number in range(len(passages))}
        before: set[str] = set()

        def take(number: int, sample: Sample) -> bool:
            place = passages[number].place
            parsed = question_pairs(sample.completion, sample.finished)
            self._faults(stage, place, sample, parsed)
            for question, answer in parsed.items:
                reason = self._wrong_with(question, before, "a question that was there before")
                reason = reason or ("an answer equal to its question" if key(question) == key(answer) else "")
                reason = reason or ("a question beyond the number asked for" if len(rows[number]) >= most else "")
                if reason:
                    self._refuse(stage, place, reason, question)
                    continue
                before.add(key(question))
                rows[number].append(_Row(place, question, answer))
            return bool(rows[number])

        jobs = {
            number: template.substitute(passage=passage.text, title=passage.title, count=most)
            for number, passage in enumerate(passages)
        }
        for number in self._ask(stage, jobs, take):
            self._refuse(stage, passages[number].place, "a passage without a question", passages[number].text)
        return [row for of_passage in rows.values() for row in of_passage]

    def paraphrases(self, rows: Sequence[_Row]) -> list[_Row]:
        """The rows that have their question and their answer in other words."""
        stage, prompts = STAGES[1], self._wanted.prompts
        jobs = {("question", n): prompts.paraphrased_question.substitute(question=r.question) for n, r in _each(rows)}
        jobs |= {
            ("answer", n): prompts.paraphrased_answer.substitute(question=r.question, answer=r.answer)
            for n, r in _each(rows)
        }

        def take(job: tuple[str, int], sample: Sample) -> bool:
            what, row = job[0], rows[job[1]]
            parsed = one_line(sample.completion, sample.finished)
            self._faults(stage, row.place, sample, parsed)
            original = row.question if what == "question" else row.answer
            for text in parsed.items:
                reason = self._wrong_with(text, {key(original)}, f"a paraphrase equal to the {what}")
                if reason := reason or _unrelated(text, original):
                    self._refuse(stage, row.place, reason, text)
                elif what == "question":
                    row.rephrased = text
                else:
                    row.paraphrase = text
            return bool(row.rephrased if what == "question" else row.paraphrase)

        lacking = self._ask(stage, jobs, take)
        for what, number in lacking:
            self._refuse_row(stage, rows[number], f"a row whose {what} has no paraphrase")
        without = {number for _, number in lacking}
        return [row for number, row in _each(rows) if number not in without]

    def wrong_answers(self, rows: Sequence[_Row]) -> list[_Row]:
        """The rows that have as many wrong answers as wanted."""
        stage, most = STAGES[2], self._wanted.wrong
        jobs = {
            number: self._wanted.prompts.wrong_answers.substitute(
                question=row.question, answer=row.paraphrase, count=most
            )
            for number, row in _each(rows)
        }

        def take(number: int, sample: Sample) -> bool:
            row = rows[number]
            parsed = numbered(sample.completion, sample.finished)
            self._faults(stage, row.place, sample, parsed)
            for text in parsed.items:
                true = {key(row.answer), key(row.paraphrase)}
                reason = self._wrong_with(text, true, "a wrong answer equal to the right one")
                reason = reason or self._wrong_with(text, set(map(key, row.wrong)), "a repeated wrong answer")
                reason = reason or ("a wrong answer beyond the number asked for" if len(row.wrong) >= most else "")
                if reason:
                    self._refuse(stage, row.place, reason, text)
                else:
                    row.wrong.append(text)
            return len(row.wrong) >= most

        lacking = self._ask(stage, jobs, take)
        for number in lacking:
            self._refuse_row(stage, rows[number], f"a row with fewer than {most} wrong answers")
        return [row for number, row in _each(rows) if number not in lacking]

    def _ask(self, stage: str, jobs: Mapping[K, str], take: Callable[[K, Sample], bool]) -> list[K]:
        """Ask until `take` says that a job is done, or the attempts are used up; the jobs that are not done."""
        left = dict(jobs)
        for attempt in range(1, self._attempts + 1):
            if not left:
                break
            rows = {job: self._prompt(text) for job, text in left.items()}
            prompts = list({row.id: row for row in rows.values()}.values())
            path = self._folder / f"{stage.replace(' ', '-')}-{attempt}.jsonl"
            sample_to_file(
                self._generator, prompts, self._settings, path, attempt, partial(self._shown, stage, len(prompts))
            )
            replies = by_prompt(read_samples(path))
            self.asked[stage] += len(prompts)
            self.unanswered.setdefault(stage, []).extend(row for row in prompts if row.id not in replies)
            left = {
                job: text
                for job, text in left.items()
                if rows[job].id not in replies or not take(job, replies[rows[job].id][0])
            }
        return list(left)

    def _prompt(self, text: str) -> PromptRow:
        return PromptRow([{"role": "user", "content": text}] if self._wanted.chat else text)

    def _wrong_with(self, text: str, others: set[str], words: str) -> str:
        """Why a text cannot be used; `words` if it is one of the others."""
        if not key(text):
            return "a line without words"
        if key(text) in self._copied:
            return "a line copied from the prompt"
        return words if key(text) in others else ""

    def _faults(self, stage: str, place: str, sample: Sample, parsed: Parsed[Any]) -> None:
        if not parsed.items:
            self._refuse(stage, place, "a reply with nothing in the form asked for", sample.completion)
            return
        for reason, text in parsed.faults:
            self._refuse(stage, place, reason, text)

    def _refuse(self, stage: str, place: str, reason: str, text: str) -> None:
        self.refusals.append(Refusal(stage, place, reason, text))

    def _refuse_row(self, stage: str, row: _Row, reason: str) -> None:
        self._refuse(stage, row.place, reason, f"{row.question}\n{row.answer}")


def _unrelated(text: str, original: str) -> str:
    """Why one line cannot be a paraphrase of another, such as an excuse ("I am sorry ..."); nothing if it can."""
    if original.endswith(_ASKS) and not any(mark in text for mark in _ASKS):
        return "a paraphrase of a question that is no question"
    words = AnyScript().tokenize
    return "" if set(words(text)) & set(words(original)) else "a paraphrase that shares no word with the original"


def _each(rows: Sequence[_Row]) -> list[tuple[int, _Row]]:
    return list(enumerate(rows))
