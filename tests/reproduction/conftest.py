"""A paper of stand-in experiments."""

from __future__ import annotations

import pytest

from prefopt.reproduction.paper import Check, Claim, Paper
from tests.reproduction.stand_in import quick

PACKAGE = "tests.reproduction.stand_in"


def claim(name: str, experiment: str = "", **rest) -> Claim:
    return Claim(name, f"about {name}", "section 1", "1", tolerance="as stated", experiment=experiment, **rest)


@pytest.fixture
def paper():
    quick.CALLS.clear()
    quick.STOPS.clear()
    claims = (
        claim("drawn", "quick.first", check=(Check("value", "at_least", 0.0),)),
        claim("never", "quick.first"),
        claim("half", "quick.second", check=(Check("value", "below", 1.0),)),
        claim("broken", "quick.failing"),
        claim("long", "quick.second", run="full"),
        Claim("headline", "about 7B models", "abstract", "88.7", cannot="needs GPUs"),
    )
    return Paper("stand_in", "Stand-in", "0000.00000", True, claims, commands=("prefopt train",))
