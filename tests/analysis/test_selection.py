"""The rules: every kernel and divergence can be chosen, by the measure that its reason names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefopt.analysis.kernel_choice.measures import Distribution, Geometry, Measures
from prefopt.analysis.kernel_choice.selection import Thresholds, select
from prefopt.losses.divergences import NAMES
from prefopt.losses.kernel_functions import KERNELS

TIGHT = Geometry(pnd=0.5, pnav=0.0001, pad=0.3, nad=0.6, tat=0.0, nag=0.3, nag_error=0.01)
CLOSE = Distribution(overlap=0.95, drift=0.1, kurtosis=0.0, roughness=1.0)

BY_KERNEL = {
    "polynomial": ({}, "triplets are tight"),
    "spectral": ({"tat": 0.2}, "TAT 0.200"),
    "rbf": ({"pnd": 0.1}, "PND 0.10"),
    "mahalanobis": ({"pnav": 0.09}, "spread 0.67"),
}
BY_DIVERGENCE = {
    "kl": ({}, "overlap 0.95"),
    "js": ({"overlap": 0.85}, "overlap 0.85"),
    "bhattacharyya": ({"overlap": 0.7}, "overlap 0.70"),
    "hellinger": ({"roughness": 3.0}, "roughness 3.00"),
    "f": ({"kurtosis": 2.0}, "kurtosis 2.00"),
    "renyi": ({"drift": 1.0}, "drift 1.00"),
    "wasserstein": ({"overlap": 0.3}, "0.30"),
}


def choose(geometry=TIGHT, distribution=CLOSE, thresholds=None):
    return select(Measures(100, geometry, distribution), thresholds)


def test_all_are_here():
    assert set(BY_KERNEL) == set(KERNELS)
    assert set(BY_DIVERGENCE) == set(NAMES)


@pytest.mark.parametrize("kernel", BY_KERNEL)
def test_each_kernel_and_its_reason(kernel):
    changed, reason = BY_KERNEL[kernel]
    found = choose(geometry=replace(TIGHT, **changed))
    assert found.kernel == kernel
    assert reason in found.kernel_reason


@pytest.mark.parametrize("name", BY_DIVERGENCE)
def test_each_divergence_and_its_reason(name):
    changed, reason = BY_DIVERGENCE[name]
    found = choose(distribution=replace(CLOSE, **changed))
    assert found.divergence == name
    assert reason in found.divergence_reason


def test_thresholds_are_the_callers_to_change():
    assert choose(thresholds=Thresholds(near=0.6)).kernel == "rbf"
    assert choose(thresholds=Thresholds(same=0.99)).divergence == "js"


@pytest.mark.parametrize(("nag", "words"), [(0.3, ""), (0.01, "no closer"), (-0.3, "speaks against the preference")])
def test_doubt_where_the_embeddings_do_not_order_the_pairs(nag, words):
    doubt = choose(geometry=replace(TIGHT, nag=nag)).doubt
    assert words in doubt
    assert bool(doubt) == bool(words)
