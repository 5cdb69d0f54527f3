"""The grammar: what formulas mean, how they are written again, and errors that show the column."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.logic import FormulaError, parse_formula
from prefopt.logic.formula import Formula

ATOMS = ("M(w)", "M(l)", "Ref(w)")
leaves = st.sampled_from([*ATOMS, "true", "false"]).map(Formula)
formulas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        inner.map(lambda part: Formula("not", (part,))),
        st.tuples(st.sampled_from(["and", "or", "xor", "->", "<->"]), inner, inner).map(
            lambda made: Formula(made[0], made[1:])
        ),
    ),
    max_leaves=12,
)


def table(formula: Formula) -> list[bool]:
    return [formula.holds(dict(zip(ATOMS, row, strict=True))) for row in itertools.product([True, False], repeat=3)]


@given(formulas)
@settings(max_examples=200, deadline=None)
def test_a_formula_means_the_same_when_it_is_written_and_read_again(formula):
    assert table(parse_formula(str(formula))) == table(formula)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("M(w) and M(l) or Ref(w)", "(M(w) and M(l)) or Ref(w)"),
        ("M(w) or M(l) xor Ref(w)", "M(w) or (M(l) xor Ref(w))"),
        ("M(w) xor M(l) and Ref(w)", "M(w) xor (M(l) and Ref(w))"),
        ("M(w) -> M(l) -> Ref(w)", "M(w) -> (M(l) -> Ref(w))"),
        ("M(w) or M(l) -> Ref(w)", "(M(w) or M(l)) -> Ref(w)"),
        ("M(w) -> M(l) <-> Ref(w)", "(M(w) -> M(l)) <-> Ref(w)"),
        ("not M(w) and M(l)", "(not M(w)) and M(l)"),
        ("~M(w) & !M( l ) | Ref(w)^true", "(not M(w) and not M(l)) or (Ref(w) xor true)"),
    ],
)
def test_connectives_bind_as_people_expect(text, plain):
    assert table(parse_formula(text)) == table(parse_formula(plain))


def test_implication_fails_only_where_the_premise_holds_and_the_conclusion_does_not():
    rule = parse_formula("M(l) -> M(w)")
    rows = [dict(zip(["M(w)", "M(l)"], row, strict=True)) for row in itertools.product([True, False], repeat=2)]
    assert [rule.holds(row) for row in rows] == [True, True, False, True]


@pytest.mark.parametrize(
    ("text", "problem", "column"),
    [
        ("M(w) and", "found 'the end'", 9),
        ("M(w) M(l)", "expected a connective", 6),
        ("(M(w) or M(l)", "expected '\\)' for the '\\(' at column 1", 14),
        ("M(w) and P(l)", "'P' is not a prediction", 10),
        ("M(x)", "'M' is not a prediction", 1),
        ("M(w) # M(l)", "unexpected character '#'", 6),
        ("and M(w)", "found 'and'", 1),
        ("__import__", "'__import__' is not a prediction", 1),
        (")", "found '\\)'", 1),
    ],
)
def test_errors_show_the_column(text, problem, column):
    with pytest.raises(FormulaError, match=f"{problem}.*at column {column}:") as error:
        parse_formula(text)
    shown, mark = str(error.value).splitlines()[1:]
    assert shown.strip() == text.strip()
    assert mark.index("^") == column + 1


@pytest.mark.parametrize("text", ["(" * 400, "not " * 240 + "M(w)", "M(w)" + " -> M(w)" * 120, "M(w) and " * 400])
def test_formulas_that_are_too_long_or_too_deep_are_refused(text):
    with pytest.raises(FormulaError, match=r"at most|nested more than"):
        parse_formula(text)


def test_a_long_chain_is_read():
    chain = parse_formula(" and ".join(["M(w)"] * 110))
    assert str(chain).count("and") == 109
