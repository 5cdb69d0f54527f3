"""Preference structures: the rows that a core formula, a condition and an addition count on each side.

Imports torch and `prefopt.losses.logic`; sympy only to write a formula for rows that have none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prefopt.logic.formula import Formula, FormulaError, parse_formula
from prefopt.losses.logic import MODEL, MOST, WITH_REFERENCE, Logic, propositions, rows_of
from prefopt.safety.errors import UsageError


@dataclass(frozen=True)
class Structure:
    """A preference structure: which rows of the truth table count for the true side, and which for the false one.

    A row in both counts on each side (the addition), a row in neither is excluded (the condition).

    Attributes:
        T: rows of the true side, such as `11,10`, in falling order.
        B: rows of the false side.
        over: the propositions, first digit first, as `Logic` takes them.
    """

    T: str
    B: str
    over: str = MODEL

    def __post_init__(self) -> None:
        for side in ("T", "B"):
            bits = rows_of(side, getattr(self, side), self.count)
            object.__setattr__(self, side, _written(bits, self.count))
        object.__setattr__(self, "over", ", ".join("&".join(part) for part in propositions(self.over)))

    @classmethod
    def of(cls, core: str, given: str = "", also: str = "", over: str | None = None) -> Structure:
        """The structure of a core formula.

        Args:
            core: what the models should predict.
            given: the condition: rows where it is false are excluded.
            also: the addition: rows where it is true count on both sides.
            over: the propositions, where a formula's atoms and their order are not to decide; a proposition of
                several atoms, `M(w)&Ref(l)`, is then what formulas call by its first atom.

        Raises:
            FormulaError: if a formula cannot be read, or names a prediction that `over` does not hold.
        """
        formulas = [parse_formula(text) if text.strip() else None for text in (core, given, also)]
        if formulas[0] is None:
            raise FormulaError("the core formula is empty: say what the models should predict, such as M(l) -> M(w)")
        atoms = list(dict.fromkeys(atom for formula in formulas if formula is not None for atom in formula.atoms))
        if over is None:
            # The chosen completion's digit comes first, as in the literature's tables; models before references.
            over = ", ".join(sorted(atoms, key=lambda atom: ("MRP".index(atom[0]), "wls".index(atom[-2])))) or MODEL
        names = [part[0] for part in propositions(over)]
        for atom in atoms:
            if atom not in names:
                raise FormulaError(f"{atom} is not among the propositions {', '.join(names)}")
        return cls(*_sides(formulas, names), over)

    @property
    def count(self) -> int:
        """How many propositions there are."""
        return len(propositions(self.over))

    @property
    def names(self) -> list[str]:
        """The names of the propositions in formulas."""
        return [part[0] for part in propositions(self.over)]

    @property
    def rows(self) -> tuple[int, int]:
        """The sides as bits, true and false."""
        return rows_of("T", self.T, self.count), rows_of("B", self.B, self.count)

    @property
    def trivial(self) -> bool:
        """Whether a side is empty, so that nothing can be learned."""
        return not self.T or not self.B

    @property
    def core(self) -> str:
        """A formula that is true on the rows of T alone and false on those of B alone."""
        if name := name_of_rows(self):
            return _renamed(NAMED[name][0], self.names)
        true, false = self.rows
        return _formula(self, true & ~false, self._every & ~(true ^ false))

    @property
    def given(self) -> str:
        """The condition; empty if no row is excluded."""
        if name := name_of_rows(self):
            return _renamed(NAMED[name][1], self.names)
        true, false = self.rows
        return "" if true | false == self._every else _formula(self, true | false, 0)

    @property
    def also(self) -> str:
        """The addition; empty if no row counts on both sides."""
        if name := name_of_rows(self):
            return _renamed(NAMED[name][2], self.names)
        true, false = self.rows
        return _formula(self, true & false, 0) if true & false else ""

    @property
    def odds(self) -> str:
        """The odds of T against B in closed form, P(w) for the probability of M(w), R and V for Ref and Prev."""
        true, false = (_closed(bits, [_symbol(part) for part in propositions(self.over)]) for bits in self.rows)
        return true if false == "1" else f"{_factor(true)}/{_factor(false, below=True)}"

    @property
    def _every(self) -> int:
        return (1 << (1 << self.count)) - 1

    def at_least_as_demanding_as(self, other: Structure) -> bool:
        """Whether this one's loss is never below the other's, for any prediction: fewer true rows, more false ones."""
        if propositions(self.over) != propositions(other.over):
            return False
        (true, false), (their_true, their_false) = self.rows, other.rows
        return true & ~their_true == 0 and their_false & ~false == 0

    def loss(self, **options: Any) -> Logic:
        """The structure as a loss; options are those of `Logic`: beta, gamma, link, average."""
        return Logic(self.T, self.B, self.over, **options)


def from_formula(core: str, given: str = "", also: str = "", over: str | None = None, **options: Any) -> Logic:
    """A loss from logic: `from_formula("M(l) -> M(w)", given="M(w) or M(l)", beta=1.0)`.

    Args:
        core: what the models should predict; see `prefopt.logic.formula` for the grammar.
        given: the condition under which it counts.
        also: what counts on both sides.
        over: the propositions; by default the formulas' atoms.
        options: of `Logic`: beta, gamma, link, average.

    Raises:
        FormulaError: with the column, if a formula cannot be read.
        ValueError: if nothing could be learned, or an option is out of range.
    """
    structure = Structure.of(core, given, also, over)
    if structure.trivial:
        side = "true" if not structure.T else "false"
        raise UsageError(
            f"no row is on the {side} side of {core!r}{f' given {given!r}' if given else ''}, so there is nothing to "
            "learn: the formula always holds or never does"
        )
    return structure.loss(**options)


# ---- the paper's names -------------------------------------------------------------------------------------------

NAMED: dict[str, tuple[str, str, str, str]] = {
    "CE": ("M(w)", "", "", ""),
    "CEUnl": ("M(w) and not M(l)", "", "", ""),
    "CPO": ("M(l) -> M(w)", "M(w) or M(l)", "M(w) and M(l)", ""),
    "ORPO": ("M(l) -> M(w)", "M(w) xor M(l)", "", ""),
    "unCPO": ("M(l) -> M(w)", "", "", ""),
    "cCPO": ("M(l) -> M(w)", "M(w) or M(l)", "", ""),
    "fUNL": ("not M(l)", "", "", "our reading"),
    "qfUNL": ("not M(l)", "not (M(w) and M(l))", "", "an uncertain reading"),
    "cfUNL": ("not M(l)", "M(w) or M(l)", "", "an uncertain reading"),
}
"""Core, condition, addition and a remark, by the paper's name."""


def named(name: str, reference: bool = False) -> Structure:
    """A structure of the paper; with `reference` that of policy and reference together, as `dpo` is CPO's."""
    core, given, also, _ = NAMED[name]
    return Structure.of(core, given, also, WITH_REFERENCE if reference else MODEL)


def name_of(structure: Structure) -> str:
    """The paper's name for a structure, or ""."""
    for name in NAMED:
        for reference in (False, True):
            if named(name, reference) == structure:
                return f"{name} over policy and reference" if reference else name
    # The same shape over other propositions: NPO is CPO's with the reference's prediction for the chosen completion's.
    if name := name_of_rows(structure):
        return f"{name} with {structure.names[0]} for M(w) and {structure.names[1]} for M(l)"
    return ""


def name_of_rows(structure: Structure) -> str:
    """The paper's name for the rows, for any two propositions; or ""."""
    sides = (structure.T, structure.B)
    return _named_rows().get(sides, "") if structure.count == 2 else ""


@functools.cache
def _named_rows() -> dict[tuple[str, str], str]:
    return {(structure.T, structure.B): name for name in NAMED for structure in (named(name),)}


def _renamed(formula: str, names: list[str]) -> str:
    """A formula of the paper over other propositions."""
    return re.sub(r"M\((w|l)\)", lambda atom: names["wl".index(atom[1])], formula)


# ---- rows, formulas and closed forms -----------------------------------------------------------------------------


def _sides(formulas: list[Formula | None], names: list[str]) -> tuple[str, str]:
    core, given, also = formulas
    assert core is not None
    if len(names) > MOST:
        raise FormulaError(f"{len(names)} different predictions are named, at most {MOST} are possible")
    true = false = 0
    for number in range(1 << len(names)):
        row = dict(zip(names, (digit == "1" for digit in f"{number:0{len(names)}b}"), strict=True))
        if given is not None and not given.holds(row):
            continue
        both = also is not None and also.holds(row)
        holds = core.holds(row)
        true |= (both or holds) << number
        false |= (both or not holds) << number
    return _written(true, len(names)), _written(false, len(names))


def _written(bits: int, count: int) -> str:
    return ",".join(f"{row:0{count}b}" for row in reversed(range(1 << count)) if bits >> row & 1)


def _formula(structure: Structure, true: int, free: int) -> str:
    """A short formula that is true on some rows and may have any value on free ones."""
    if structure.count == 2 and (found := _familiar(structure, true, free)):
        return found
    from sympy import Symbol
    from sympy.logic import SOPform

    def digits(bits: int) -> list[list[int]]:
        rows = (row for row in range(1 << structure.count) if bits >> row & 1)
        return [[int(digit) for digit in f"{row:0{structure.count}b}"] for row in rows]

    symbols = [Symbol(f"p{i}") for i in range(structure.count)]
    text = str(SOPform(symbols, digits(true), digits(free)))
    for i in reversed(range(structure.count)):
        text = text.replace(f"p{i}", structure.names[i])
    return str(parse_formula(text.replace("True", "true").replace("False", "false")))


def _familiar(structure: Structure, true: int, free: int) -> str:
    """The usual formula for two propositions: the first of a list that fits."""
    w, l = structure.names  # noqa: E741
    shapes = (
        f"{l} -> {w}", w, f"not {l}", f"{w} and not {l}", f"{w} or {l}", f"{w} and {l}", f"{w} xor {l}",
        f"{w} -> {l}", l, f"not {w}", f"{l} and not {w}", f"{w} <-> {l}", f"not ({w} and {l})",
        f"not ({w} or {l})", "true", "false",
    )  # fmt: skip
    made = {text: rows_of("T", _sides([parse_formula(text), None, None], structure.names)[0], 2) for text in shapes}
    fits = [text for text, rows in made.items() if (rows ^ true) & ~free == 0]
    # Prefer one that is true on no free row.
    return next((text for text in fits if made[text] == true), fits[0] if fits else "")


def _symbol(part: Iterable[str]) -> str:
    return "".join(f"{ {'M': 'P', 'Ref': 'R', 'Prev': 'V'}[atom[:-3]] }{atom[-3:]}" for atom in part)


def _closed(rows: int, symbols: list[str], turned: bool = False) -> str:
    """A weighted model count as text: of the rows or, if shorter, one minus that of the others."""
    if not symbols:
        return "1" if rows else "0"
    half = 1 << (len(symbols) - 1)
    without, given = rows & ((1 << half) - 1), rows >> half
    if without == given:
        return _closed(given, symbols[1:])
    sides = [(symbols[0], given), (f"(1-{symbols[0]})", without)]
    terms = []
    for weight, side in sides:
        count = _closed(side, symbols[1:])
        if count != "0":
            terms.append(weight if count == "1" else weight + _factor(count))
    direct = " + ".join(terms)
    if turned:
        return direct
    complement = ((1 << (1 << len(symbols))) - 1) & ~rows
    other = f"1 - {_factor(_closed(complement, symbols, turned=True))}"
    if direct == f"(1-{symbols[0]})" or len(direct) <= len(other):
        return direct
    return other


def _factor(text: str, below: bool = False) -> str:
    """A closed form as a factor of a product, or below a fraction bar, in parentheses where it needs them."""
    alone = re.fullmatch(r"[PRV]\([wls]\)|\(1-[PRV]\([wls]\)\)|\d", text)
    return text if alone or (" " not in text and not below) else f"({text})"
