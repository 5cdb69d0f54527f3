"""What a paper claims, as data: `papers/NAME.yaml`, read and checked.

A claim has its statement and place in the paper, the paper's number, what counts as agreement, and the experiment that
measures it, or why none can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from prefopt.catalogue.papers import find
from prefopt.safety.errors import PrefoptError, UsageError, did_you_mean

T = TypeVar("T")

FOLDER = Path(__file__).parent / "papers"

RULES = ("above", "at_least", "at_most", "below", "near")


class PaperError(PrefoptError, ValueError):
    """A paper's file that cannot be read."""


@dataclass(frozen=True)
class Check:
    """What a measured number must be.

    Attributes:
        number: its name among the experiment's `numbers`.
        rule: one of `RULES`.
        value: what it is compared with: a number, or the name of another measured number, seed by seed.
        within: largest distance of `near`.
        of: whether every seed is compared, or the mean over seeds.
    """

    number: str
    rule: str
    value: float | str
    within: float = 0.0
    of: Literal["seeds", "mean"] = "seeds"


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, and how it is tested here.

    Attributes:
        id: names it within the paper.
        statement: what should hold.
        source: place in the paper; "derived" if the sentence follows from a formula alone.
        number: the paper's number, or that it gives none.
        tolerance: what counts as agreement, in words.
        scale: what the experiment trains, and on what.
        run: whether `--quick` runs it too.
        experiment: module and function in `experiments`; "" if it cannot be run.
        cannot: why it cannot be run here, or "".
        check: rules over the measured numbers; empty if the experiment decides.
        note: our explanation of the outcome, or a warning about it.
    """

    id: str
    statement: str
    source: str
    number: str
    tolerance: str = ""
    scale: str = ""
    run: Literal["quick", "full"] = "quick"
    experiment: str = ""
    cannot: str = ""
    check: tuple[Check, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class ByHand:
    """Something that no command does: what the reader must bring, and why."""

    bring: str
    why: str


@dataclass(frozen=True)
class Paper:
    """A paper and its claims.

    Attributes:
        name: of its file; what `prefopt reproduce` takes.
        short: its usual name.
        arxiv: id.
        mission: whether it is one of the 13 papers that this project is about.
        claims: in the paper's order.
        commands: that run it at full size.
        configs: the files that these commands read.
        by_hand: what is left to the reader at full size.
    """

    name: str
    short: str
    arxiv: str
    mission: bool
    claims: tuple[Claim, ...]
    commands: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    by_hand: tuple[ByHand, ...] = ()

    @property
    def title(self) -> str:
        known = find(self.arxiv)
        return self.short if known is None else known.title

    def experiments(self, quick: bool) -> list[str]:
        """The experiments of its claims, in order, each once."""
        named = (claim.experiment for claim in self.claims if claim.experiment and (claim.run == "quick" or not quick))
        return list(dict.fromkeys(named))


@cache
def read_papers() -> tuple[Paper, ...]:
    """Every paper, those of the mission first.

    Raises:
        PaperError: if a file cannot be read.
    """
    papers = [read_paper(file) for file in sorted(FOLDER.glob("*.yaml"))]
    return tuple(sorted(papers, key=lambda paper: (not paper.mission, paper.arxiv)))


def select(names: Sequence[str]) -> list[Paper]:
    """Papers by file name, usual name or arXiv id; all if none is named.

    Raises:
        UsageError: if a name is not known.
    """
    papers = read_papers()
    if not names:
        return list(papers)
    by_name = {key: paper for paper in papers for key in (paper.name, paper.short.lower(), paper.arxiv)}
    for name in names:
        if name.lower() not in by_name:
            raise UsageError(
                f"no paper is called {name!r}.{did_you_mean(name, by_name)} `prefopt reproduce` lists all names"
            )
    return list(dict.fromkeys(by_name[name.lower()] for name in names))


def read_paper(file: Path) -> Paper:
    """One file.

    Raises:
        PaperError: naming the file, the claim and the field that is wrong.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise PaperError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise PaperError(f"{file}: must hold a mapping with arxiv, short and claims")
    content = {"mission": False, **content}
    content["claims"] = tuple(_claim(row, file) for row in content.get("claims") or ())
    content["by_hand"] = tuple(_filled(ByHand, row, f"{file}: by_hand") for row in content.get("by_hand") or ())
    for field in ("commands", "configs"):
        content[field] = tuple(content.get(field) or ())
    paper = _filled(Paper, {"name": file.stem, **content}, str(file))
    twice = {claim.id for claim in paper.claims if [c.id for c in paper.claims].count(claim.id) > 1}
    if twice:
        raise PaperError(f"{file}: two claims have the id {sorted(twice)[0]!r}")
    return paper


def _claim(row: Any, file: Path) -> Claim:
    where = f"{file}: claim {row.get('id', '?') if isinstance(row, dict) else row!r}"
    if isinstance(row, dict):
        row = {**row, "check": tuple(_check(each, where) for each in row.get("check") or ())}
    claim = _filled(Claim, row, where)
    if bool(claim.experiment) == bool(claim.cannot):
        raise PaperError(f"{where}: needs either `experiment`, or `cannot` with the reason")
    if claim.run not in ("quick", "full"):
        raise PaperError(f"{where}: `run` is quick or full, not {claim.run!r}")
    if claim.experiment and not claim.tolerance:
        raise PaperError(f"{where}: needs `tolerance`: what counts as agreement")
    return claim


def _check(row: Any, where: str) -> Check:
    rules = [name for name in RULES if isinstance(row, dict) and name in row]
    if len(rules) != 1 or "number" not in row:
        raise PaperError(f"{where}: a check has `number` and one of {', '.join(RULES)}, got {row!r}")
    rest = {name: value for name, value in row.items() if name not in RULES}
    return _filled(Check, {**rest, "rule": rules[0], "value": row[rules[0]]}, where)


def _filled(kind: type[T], row: Any, where: str) -> T:
    """A dataclass of a mapping, with every problem of its names told."""
    if not isinstance(row, Mapping):
        raise PaperError(f"{where}: must be a mapping, got {row!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in row:
        if name not in fields:
            raise PaperError(f"{where}: no field is called {name!r}.{did_you_mean(str(name), fields)}")
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in row]:
        raise PaperError(f"{where}: {missing[0]!r} is missing")
    return kind(**row)
