"""Verdicts follow from numbers alone."""

from __future__ import annotations

import math

import pytest

from prefopt.reproduction.experiments.outcome import Outcome
from prefopt.reproduction.paper import Check, PaperError
from prefopt.reproduction.verdict import interval, spread, verdict_of
from tests.reproduction.conftest import claim


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (Check("a", "below", 4.0), "holds"),
        (Check("a", "below", 2.5), "partly"),
        (Check("a", "below", 1.0), "does not hold"),
        (Check("a", "at_most", 3.0), "holds"),
        (Check("a", "above", "b"), "partly"),
        (Check("a", "at_least", "b"), "holds"),
        (Check("a", "near", 2.0, within=1.0), "holds"),
        (Check("a", "near", 2.0, within=0.5), "partly"),
        (Check("a", "near", 2.0, within=0.01, of="mean"), "holds"),
        (Check("a", "above", "b", of="mean"), "holds"),
        (Check("nan", "above", 0.0), "does not hold"),
        (Check("nan", "below", 0.0), "does not hold"),
    ],
)
def test_rules_over_seeds(check, verdict):
    numbers = {"a": [1.0, 2.0, 3.0], "b": [1.0, 1.0, 2.0], "nan": [math.nan]}
    assert verdict_of(claim("x", "e.f", check=(check,)), Outcome("x", "", numbers=numbers)) == verdict


def test_a_claim_of_two_rules_holds_partly_if_one_does():
    rules = (Check("a", "above", 0.0), Check("a", "above", 2.0))
    assert verdict_of(claim("x", "e.f", check=rules), Outcome("x", "", numbers={"a": [1.0]})) == "partly"


def test_the_rules_outweigh_what_the_experiment_says():
    outcome = Outcome("x", "", holds=True, numbers={"a": [1.0]})
    assert verdict_of(claim("x", "e.f", check=(Check("a", "below", 0.0),)), outcome) == "does not hold"


@pytest.mark.parametrize("numbers", [{}, {"b": [1.0]}, {"a": []}])
def test_a_rule_about_what_was_not_measured_is_an_error(numbers):
    with pytest.raises(PaperError, match="'a' was not measured"):
        verdict_of(claim("x", "e.f", check=(Check("a", "below", 0.0),)), Outcome("x", "", numbers=numbers))


def test_seeds_must_match():
    with pytest.raises(PaperError, match="2 seeds"):
        verdict_of(
            claim("x", "e.f", check=(Check("a", "below", "b"),)),
            Outcome("x", "", numbers={"a": [1.0, 2.0], "b": [1.0, 2.0, 3.0]}),
        )


def test_nothing_that_decides_is_an_error():
    with pytest.raises(PaperError, match="does not decide"):
        verdict_of(claim("x", "e.f"), Outcome("x", ""))


def test_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)
    with pytest.raises(ValueError, match="two seeds"):
        interval([1.0])


def test_spread_names_every_number_that_has_seeds():
    assert spread({"a": [1.0, 1.0], "one": [3.0]}) == "a 1 ± 0 (2 seeds)"
    assert spread({"one": [3.0]}) == ""
