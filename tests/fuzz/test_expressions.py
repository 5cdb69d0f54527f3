"""Loss expressions of every kind: a loss that prints as it was read, or an error that shows the column."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.losses import LossSyntaxError, available, parse
from prefopt.losses.parse import MAX_LENGTH
from prefopt.losses.registry import arguments_of, makers, presets
from tests.fuzz.hostile import NASTY, examples, no_hang

NAMES = [*available(), *presets()]
ARGUMENTS = sorted({name for loss in makers().values() for name in arguments_of(loss)})
NUMBERS = (
    *("0", "1", "0.1", "-1", "1e-400", "1e400", "1e308", "-0.0", "1_000", "0x" + "F" * 900, "9" * 400, "1e-320"),
    *("inf", "nan", "1j", "10**10**10", "True", "None", "'mean'", "b'x'", "...", "''", "'sum'"),
)
GLUE = (
    "+",
    "-",
    "*",
    "/",
    "(",
    ")",
    ",",
    "=",
    " ",
    "\n",
    "\t",
    "**",
    "[",
    "]",
    ".",
    "__class__",
    "lambda:",
    ":=",
    "#",
    ";",
)


def _call(name: str, arguments: list[tuple[str, str]]) -> str:
    return f"{name}({', '.join(key + '=' + value if key else value for key, value in arguments)})"


CALLS = st.builds(
    _call,
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.sampled_from(["", *ARGUMENTS]), st.sampled_from([*NUMBERS, "dpo", "sft"])), max_size=3),
)
EXPRESSIONS = st.recursive(
    st.sampled_from(NAMES) | CALLS,
    lambda inner: st.one_of(
        st.builds("{} + {}".format, inner, inner),
        st.builds("{} - {}".format, inner, inner),
        st.builds("{}*{}".format, st.sampled_from(NUMBERS), inner),
        st.builds("{}/{}".format, inner, st.sampled_from(NUMBERS)),
        st.builds("-({})".format, inner),
        st.builds("{}({})".format, st.sampled_from(NAMES), inner),
    ),
    max_leaves=6,
)
SOUP = st.lists(st.sampled_from([*NAMES[:8], *ARGUMENTS[:6], *NUMBERS, *GLUE, *NASTY]), max_size=12).map("".join)
DEEP = st.builds(
    lambda opening, count, closing: opening * count + "dpo" + closing * count,
    st.sampled_from(["(", "-", "+", "noise_robust(", "1*", "dpo+", "[", "f(", "2*("]),
    st.integers(1, 1000),
    st.sampled_from(["", ")", "]", "*1", "/2"]),
)


@given(st.one_of(EXPRESSIONS, EXPRESSIONS, SOUP, DEEP, st.text(max_size=60)))
@examples(25)
def test_any_expression_is_a_loss_or_our_error(text):
    with no_hang():
        try:
            loss = parse(text)
        except LossSyntaxError as error:
            message, column = str(error), error.column
            assert 1 <= column <= len(text) + 1
            assert f"column {column}" in message
            assert len(message) < 4000
            message.encode()
            return
        # With every argument written out it may be too long to be read again.
        assert len(str(loss)) > MAX_LENGTH or str(parse(str(loss))) == str(loss)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("dpo(beta='\ud800')", 11, "'\\ud800' does not belong here"),
        ("dpo\u00a0+ sft", 4, "'\\xa0' does not belong here"),
        ("dpo(beta=0x" + "F" * 900 + ")", 10, "the number is too large"),
        ("1e308*(1e308*dpo)", 1, "the factors multiply to more than a number can hold"),
        ("sft + dpo/1e-320", 7, "the factors multiply to more than a number can hold"),
    ],
)
def test_what_the_fuzzing_found(text, column, message):
    with pytest.raises(LossSyntaxError) as caught:
        parse(text)
    assert caught.value.column == column
    assert message in str(caught.value)
