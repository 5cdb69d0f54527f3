"""The search: propose, check, train on the toy, keep. It stops at a time or a number, and continues where it stopped.

Candidates come in generations. All that pass the checks of `checks` are screened; the better half of a generation is
trained at more betas, seeds and steps, and becomes the parents of the next ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from prefopt.discovery.archive import Archive, Candidate
from prefopt.discovery.checks import fault, signature
from prefopt.discovery.evolve import Member, Proposal, propose
from prefopt.discovery.grammar import Node
from prefopt.discovery.levels import SCREEN, TOY, ToyLevel
from prefopt.discovery.ranking import Score, ranking, scores
from prefopt.discovery.read import ExpressionError, read
from prefopt.discovery.workers import Workers
from prefopt.losses.shapes import SHAPES
from prefopt.safety.errors import UsageError, did_you_mean

SEEDS = {
    "dpo": "softplus(-x)",
    "hinge": "relu(1 - x)",
    "ipo": "square(x / beta - 1 / (2 * beta))",
    **{name: f"{name}(x)" for name in SHAPES if name != "hinge"},
}
"""What a search can start from; IPO with summed log-ratios."""

LRML = "(1 - sigmoid(x / 0.05)) * softplus(-x) + sigmoid(x / 0.05) * exp(-x)"
"""DiscoPOP's winner; it does not pass the checks, since its slope at 0 has the wrong sign."""

_POPULATION = 60
"""Best candidates that can become parents."""

Say = Callable[[str], None]


class Proposer(Protocol):
    """Proposes from outside, besides evolution."""

    share: float

    def ask(self, archive: Archive, members: Sequence[Member], numbers: Sequence[int]) -> dict[int, Proposal]:
        """One proposal for each number; an empty text where nothing came."""


@dataclass(frozen=True)
class SearchOptions:
    """What a search does.

    Attributes:
        out: folder of the archive.
        minutes: of searching, over all starts of the command; None for no limit.
        candidates: how many at most; None for no limit.
        seeds: names in `SEEDS`.
        seed: of all that is drawn.
        generation: candidates in a generation.
        batchwise: whether statistics of the batch are allowed.
        workers: processes that train. The archive does not depend on it.
    """

    out: Path
    minutes: float | None = None
    candidates: int | None = None
    seeds: tuple[str, ...] = ("dpo", "hinge", "ipo")
    seed: int = 0
    generation: int = 16
    batchwise: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        for name in self.seeds:
            if name not in SEEDS:
                raise UsageError(f"--seeds: no {name!r}.{did_you_mean(name, SEEDS)} There are {', '.join(SEEDS)}")
        if not self.seeds:
            raise UsageError("--seeds: name at least one loss to start from")
        if self.minutes is None and self.candidates is None:
            raise UsageError("a search needs an end: --minutes, --candidates, or both")
        if self.generation < 2:
            raise UsageError(f"--generation must be at least 2, got {self.generation}")
        if self.workers < 1:
            raise UsageError(f"--workers must be at least 1, got {self.workers}")


@dataclass
class Search:
    """A search in a folder; `run` starts or continues it.

    Attributes:
        options: of it.
        archive: in its folder.
        proposer: a proposer from outside, or None.
        say: called with a line for each generation.
    """

    options: SearchOptions
    archive: Archive
    proposer: Proposer | None = None
    say: Say = print
    _members: list[Member] = field(default_factory=list)
    _scored: dict[int, Score] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)
    _spent: float = 0.0
    _since: float = field(default_factory=time.monotonic)
    _workers: Workers = field(init=False)

    def __post_init__(self) -> None:
        self._workers = Workers(self.options.workers)

    def run(self) -> list[Member]:
        """Search until the time or the number is reached.

        Returns:
            The population of the finished generations, best first.

        Raises:
            UsageError: if the folder holds a search with other settings, or another process searches there.
        """
        lock = FileLock(self.options.out / "archive.lock")
        try:
            with lock.acquire(timeout=0), self._workers:
                self._check_settings()
                self._spent, self._since = float(self.archive.settings().get("seconds", 0.0)), time.monotonic()
                generation = 0
                while self._generation(generation):
                    generation += 1
                return self._members
        except Timeout:
            raise UsageError(f"another process searches in {self.options.out}: name another --out") from None

    def _numbers(self, generation: int) -> range:
        """The candidates of a generation; the first one is the seeds."""
        seeds, size = len(self.options.seeds), self.options.generation
        return range(seeds + (generation - 1) * size, seeds + generation * size) if generation else range(seeds)

    def _check_settings(self) -> None:
        names = {"seeds": list(self.options.seeds), "seed": self.options.seed, "generation": self.options.generation,
                 "batchwise": self.options.batchwise}  # fmt: skip
        stored = self.archive.settings()
        for name, value in names.items():
            if stored.get(name, value) != value:
                raise UsageError(
                    f"{self.options.out} holds a search with --{name} {stored[name]}, not {value}: repeat its options "
                    "to continue it, or name another --out"
                )
            self.archive.store_setting(name, value)

    def _is_over(self, number: int) -> bool:
        seconds = self._spent + time.monotonic() - self._since
        limit, most = self.options.minutes, self.options.candidates
        return (limit is not None and seconds >= 60 * limit) or (most is not None and number >= most)

    # ---- a generation ---------------------------------------------------------------------------------------------

    def _generation(self, generation: int) -> bool:
        """Run a generation, or what is missing of it; False if the search is over."""
        numbers = self._numbers(generation)
        stored = {row.id: row for row in self.archive.candidates("generation = ?", [generation])}
        missing = [number for number in numbers if number not in stored]
        finished = not missing and not any(_waits(row) for row in stored.values())
        proposals = self._asked(missing) if generation and missing and not self._is_over(missing[0]) else {}
        for number in numbers:
            if number not in stored:
                if self._is_over(number):
                    break
                proposal = proposals.get(number) or self._proposal(generation, number)
                stored[number] = self._check(proposal, generation, number)
            self._known.add(stored[number].expression or stored[number].text)
        if not finished:
            self._train(SCREEN, [row for row in stored.values() if row.level == "static" and not row.reason])
            if self._is_over(numbers[-1]):
                return False
            self._promote(generation, numbers)
        self._select(numbers)
        if not finished:
            self.say(self._line(generation, numbers))
        return True

    def _select(self, numbers: range) -> None:
        """Let a finished generation join the population, of which the best stay."""
        self._scored |= scores(self.archive.results(TOY.name, numbers))
        rows = self.archive.candidates("id BETWEEN ? AND ?", [numbers[0], numbers[-1]])
        nodes = {member.number: member.node for member in self._members} | nodes_of(rows)
        order = ranking({number: score for number, score in self._scored.items() if number in nodes})
        self._members = [Member(number, nodes[number], rank) for rank, number in enumerate(order[:_POPULATION])]

    def _asked(self, missing: Sequence[int]) -> dict[int, Proposal]:
        """Proposals from outside, for the share of the numbers that is theirs."""
        if self.proposer is None:
            return {}
        share, most = self.proposer.share, self.options.candidates
        wanted = [number for number in missing if most is None or number < most]
        theirs = [number for number in wanted if int((number + 1) * share) > int(number * share)]
        return self.proposer.ask(self.archive, self._members, theirs) if theirs else {}

    def _proposal(self, generation: int, number: int) -> Proposal:
        if generation == 0:
            name = self.options.seeds[number]
            return Proposal(SEEDS[name], f"seed: {name}")
        return propose(self._members, self._known, self.options.seed, number, self.options.batchwise)

    def _check(self, proposal: Proposal, generation: int, number: int) -> Candidate:
        """Read and check a proposal, and store it, whatever it is."""
        started = time.process_time()
        expression, digits, level, reason = None, None, "text", ""
        try:
            node = read(proposal.text)
        except ExpressionError as error:
            reason = str(error) if proposal.text.strip() else proposal.reason or "the proposer answered nothing"
        else:
            expression, level = str(node), "static"
            reason = fault(node, self.options.batchwise) or ""
            if not reason:
                digits = signature(node)
                same = self.archive.candidates("signature = ? AND id < ?", [digits, number])
                reason = f"trains like candidate {same[0].id}" if same else ""
        row = Candidate(
            number, generation, proposal.proposer, proposal.parents, proposal.text, expression, digits, level, reason,
            f"{self.options.seed}:{number}", time.process_time() - started,
        )  # fmt: skip
        self.archive.add(row)
        if generation == 0 and reason:
            raise UsageError(f"--seeds: {self.options.seeds[number]} is refused: {reason}")
        return row

    def _train(self, level: ToyLevel, rows: Sequence[Candidate]) -> None:
        """Train candidates at a level and store each result as it comes. A generation that is screened is finished,
        even if the time ends; the screen itself stops.
        """
        for trained in self._workers.train(level, rows):
            broken = [result for result in trained.results if result.reward is None]
            reason = f"training at beta = {broken[0].beta:g} became NaN or infinite" if broken else ""
            self.archive.reached(trained.number, level.name, reason, trained.results, trained.seconds)
            self.archive.store_setting("seconds", self._spent + time.monotonic() - self._since)
            if level is SCREEN and self._is_over(-1):
                return

    def _promote(self, generation: int, numbers: range) -> None:
        """Train the better half of a generation further; seeds all."""
        rows = {row.id: row for row in self.archive.candidates("generation = ?", [generation])}
        order = ranking(scores(self.archive.results(SCREEN.name, numbers)))
        half = len(order) if generation == 0 else (len(order) + 1) // 2
        self._train(TOY, [rows[number] for number in order[:half] if _waits(rows[number])])
        for number in order[half:]:
            if _waits(rows[number]):
                self.archive.reached(number, SCREEN.name, "not in the better half of its generation")

    def _line(self, generation: int, numbers: range) -> str:
        reward = max(self._scored, key=lambda n: self._scored[n].reward)
        value = max(self._scored, key=lambda n: self._scored[n].value)
        return (
            f"generation {generation}: {numbers.stop} candidates, {len(self._scored)} of them trained on the toy; at "
            f"their worst beta the highest value is {self._scored[value].value:.3f} (candidate {value}), the highest "
            f"reward {self._scored[reward].reward:.3f} (candidate {reward})"
        )


def _waits(row: Candidate) -> bool:
    """Whether a candidate has not been refused, and not reached the toy."""
    return not row.reason and row.level in ("static", SCREEN.name)


def nodes_of(rows: Sequence[Candidate]) -> dict[int, Node]:
    """The expressions of candidates that have one."""
    return {row.id: read(row.expression) for row in rows if row.expression is not None}
