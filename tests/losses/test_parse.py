"""The expression reader: what it accepts, and what its errors say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.losses import LossSyntaxError, parse


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("dpo", "dpo(beta=0.1, label_smoothing=0.0)"),
        ("dpo()", "dpo(beta=0.1, label_smoothing=0.0)"),
        ("dpo(0.3)", "dpo(beta=0.3, label_smoothing=0.0)"),
        ("  dpo(beta=1)\n+ 0.2*sft ", "dpo(beta=1, label_smoothing=0.0) + 0.2*sft(nll='mean')"),
        ("sft*0.2", "0.2*sft(nll='mean')"),
        ("-sft", "-sft(nll='mean')"),
        ("hinge - sft/2", "hinge(beta=0.1) - 0.5*sft(nll='mean')"),
        ("2*(hinge + sft(nll='sum'))", "2.0*hinge(beta=0.1) + 2.0*sft(nll='sum')"),
        ("simpo(gamma=-0.5)", "simpo(beta=2.0, gamma=-0.5)"),
    ],
)
def test_reads(text, canonical):
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "the expression is empty"),
        ("dop(beta=1)", 1, "did you mean 'dpop' or 'dpo'?"),
        ("dpo + sfft", 7, "did you mean 'sft'"),
        ("dpo(bta=0.1)", 5, "did you mean 'beta'? Its arguments: beta=0.1, label_smoothing=0.0"),
        ("sft(beta=1)", 5, "Its arguments: nll='mean'"),
        ("dpo(beta=0)", 10, "beta must be a positive finite number, got 0"),
        ("dpo(beta='x')", 10, "dpo's beta must be a number, got 'x'"),
        ("dpo(beta=True)", 10, "must be a number, got True"),
        ("ipo(average=1)", 13, "must be True or False"),
        ("sft(nll='men')", 9, "must be 'mean' or 'sum' or 'token'"),
        ("dpo(0.1, 0.0, 3)", 15, "takes at most 2 arguments"),
        ("dpo(0.1, beta=0.1)", 10, "got 'beta' twice"),
        ("dpo(**{})", 5, "must be written out"),
        ("dpo(beta=0.1", 4, "was never closed"),
        ("dpo;sft", 4, "not a loss expression"),
        ("0.2", 1, "alone is not a loss"),
        ("dpo*sft", 1, "one side of * must be a number"),
        ("dpo/0", 5, "divided by zero"),
        ("1e400*dpo", 1, "too large"),
        ("é + dpo(bta=1)", 1, "no loss is named 'é'"),
        ("dpo(\n  beta=-1)", 13, "beta must be a positive finite number"),
    ],
)
def test_errors_show_the_column_and_the_way_out(text, column, message):
    with pytest.raises(LossSyntaxError) as caught:
        parse(text)
    assert caught.value.column == column
    assert message in str(caught.value)
    assert f"column {column}" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "__import__('os').system('true')",
        "dpo.__class__",
        "dpo.__init__(beta=1)",
        "(lambda: dpo)()",
        "[dpo for dpo in ()]",
        "dpo if True else sft",
        "dpo(beta=__import__('os'))",
        "dpo(beta=(1).__class__)",
        "f'{dpo}'",
        "dpo**2",
        "(dpo := sft)",
        "eval('dpo')",
        "dpo(beta=10**10**10)",
        "open('/etc/passwd')",
        "dpo\0",
        "(" * 5000,
        "+".join(["dpo"] * 5000),
        "-" * 1500 + "dpo",
    ],
)
def test_nothing_but_losses_gets_through(text):
    with pytest.raises(LossSyntaxError):
        parse(text)


@given(st.text(alphabet="dposfti(+-*/)=,.'0123456789 beta\n\\\"é", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_loss_or_our_error(text):
    loss = None
    column = 1
    try:
        loss = parse(text)
    except LossSyntaxError as error:
        column = error.column
    assert 1 <= column <= len(text) + 1
    assert loss is None or str(parse(str(loss))) == str(loss)


def test_only_text_is_read():
    with pytest.raises(TypeError, match="a loss expression is a string, got int"):
        parse(3)
