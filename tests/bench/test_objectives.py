"""The benchmark of objectives: what it is asked to train, and how it prints what it found."""

from __future__ import annotations

import runpy

from prefopt.losses import available, parse, presets
from tests.processes import ROOT

BENCH = runpy.run_path(str(ROOT / "scripts" / "bench" / "objectives.py"))


def test_names_expressions_and_kernels_can_be_asked_for():
    expressions = BENCH["expressions"]
    assert set(expressions(None)) == {*available(), *presets()}
    assert any(parse(expression).grouped for expression in expressions(None).values())  # none lacks an argument
    assert expressions(["wpo", "ipo + 0.1*sft"]) == {"wpo": "wpo(dpo)", "ipo + 0.1*sft": "ipo + 0.1*sft"}
    kernels = expressions(["dpo"], kernels=True)
    assert len(kernels) == 1 + 1 + 28
    assert len({str(parse(expression)) for expression in kernels.values()}) == 30
    assert {parse(expression).kernel for name, expression in kernels.items() if name.startswith("kernel_dpo")} == {
        "polynomial", "rbf", "mahalanobis", "spectral"
    }  # fmt: skip


def test_the_table_has_short_names_and_says_what_falls():
    results = {
        "kernel_dpo(kernel='rbf', divergence='js')": {"first_pass": 0.5, "second_pass": 0.25, "over_dpo": 1.234},
        "aql": {"first_pass": 0.5, "second_pass": 0.6, "over_dpo": 1.0},
    }
    assert BENCH["table"](results).splitlines()[2:] == [
        "| `aql` | 0.5 | 0.6 | no | 1.00 |",
        "| `kernel_dpo('rbf', 'js')` | 0.5 | 0.25 | yes | 1.23 |",
    ]
