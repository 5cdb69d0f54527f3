"""Objectives as logic: the formula that a loss asks the models to satisfy, and formulas as losses.

    from prefopt.logic import from_formula, decompile

    loss = from_formula("M(l) -> M(w)", given="M(w) or M(l)")      # a Loss like any other
    decompile(loss).structure.core                                 # and back

`formula` is the grammar, `structure` the meaning of a formula and the comparison of two, `decompile` finds the
structure of a loss, `lattice` draws their order. The loss itself is `prefopt.losses.logic.Logic`. Imports torch and
`prefopt.losses`; sympy and matplotlib only to write formulas and to draw.
"""

from prefopt.logic.decompile import Decompiled, decompile
from prefopt.logic.formula import FormulaError, parse_formula
from prefopt.logic.structure import NAMED, Structure, from_formula, named

__all__ = [
    "NAMED",
    "Decompiled",
    "FormulaError",
    "Structure",
    "decompile",
    "from_formula",
    "named",
    "parse_formula",
]
