"""The garbage collector rests while large libraries are imported, and works afterwards as before."""

from __future__ import annotations

import gc

import pytest

from prefopt.safety.imports import collector_paused


def test_the_collector_rests_inside_and_works_again_after_an_error() -> None:
    def fails() -> None:
        with collector_paused():
            inside.append(gc.isenabled())
            raise ImportError

    inside = [gc.isenabled()]
    with pytest.raises(ImportError):
        fails()
    assert [*inside, gc.isenabled()] == [True, False, True]


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
