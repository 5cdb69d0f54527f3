"""Analysis of a preference set before training (which kernel and divergence suit it), of what training does and did.

Uses data, scoring and losses; none of these imports it. Names are imported on first use: the log of a run is read
without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.analysis.displacement import Ches, ches
    from prefopt.analysis.gradients.callback import EntanglementCallback
    from prefopt.analysis.gradients.entangled import Entanglement, entanglement
    from prefopt.analysis.gradients.probes import Probes, draw_probes
    from prefopt.analysis.gradients.push import pushes
    from prefopt.analysis.health.callback import HealthCallback
    from prefopt.analysis.health.finding import Finding
    from prefopt.analysis.health.history import Settings
    from prefopt.analysis.health.saved import examine_saved
    from prefopt.analysis.health.watch import examine
    from prefopt.analysis.kernel_choice.measures import Distribution, Geometry, Measures, Triplets, measure
    from prefopt.analysis.kernel_choice.selection import Selection, Thresholds, select
    from prefopt.analysis.kernel_choice.states import States, states_of
    from prefopt.analysis.kernel_choice.trial import PAIRS, Outcome, Trial, expression, ranked, run_trial
    from prefopt.analysis.pairs.rules import examine_pairs
    from prefopt.analysis.pairs.table import PairTable, score_pairs

__all__ = [
    "PAIRS",
    "Ches",
    "Distribution",
    "Entanglement",
    "EntanglementCallback",
    "Finding",
    "Geometry",
    "HealthCallback",
    "Measures",
    "Outcome",
    "PairTable",
    "Probes",
    "Selection",
    "Settings",
    "States",
    "Thresholds",
    "Trial",
    "Triplets",
    "ches",
    "draw_probes",
    "entanglement",
    "examine",
    "examine_pairs",
    "examine_saved",
    "expression",
    "measure",
    "pushes",
    "ranked",
    "run_trial",
    "score_pairs",
    "select",
    "states_of",
]

_MODULES = {
    "displacement": ("Ches", "ches"),
    "gradients.callback": ("EntanglementCallback",),
    "gradients.entangled": ("Entanglement", "entanglement"),
    "gradients.probes": ("Probes", "draw_probes"),
    "gradients.push": ("pushes",),
    "health.callback": ("HealthCallback",),
    "health.finding": ("Finding",),
    "health.history": ("Settings",),
    "health.saved": ("examine_saved",),
    "health.watch": ("examine",),
    "kernel_choice.measures": ("Distribution", "Geometry", "Measures", "Triplets", "measure"),
    "kernel_choice.selection": ("Selection", "Thresholds", "select"),
    "kernel_choice.states": ("States", "states_of"),
    "kernel_choice.trial": ("PAIRS", "Outcome", "Trial", "expression", "ranked", "run_trial"),
    "pairs.rules": ("examine_pairs",),
    "pairs.table": ("PairTable", "score_pairs"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
