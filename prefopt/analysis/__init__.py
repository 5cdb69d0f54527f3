"""Analysis of a preference set before training: today, which kernel and divergence suit it.

Uses data, scoring and losses; none of these imports it.
"""

from prefopt.analysis.kernel_choice.measures import Distribution, Geometry, Measures, Triplets, measure
from prefopt.analysis.kernel_choice.selection import Selection, Thresholds, select
from prefopt.analysis.kernel_choice.states import States, states_of
from prefopt.analysis.kernel_choice.trial import PAIRS, Outcome, Trial, expression, ranked, run_trial

__all__ = [
    "PAIRS",
    "Distribution",
    "Geometry",
    "Measures",
    "Outcome",
    "Selection",
    "States",
    "Thresholds",
    "Trial",
    "Triplets",
    "expression",
    "measure",
    "ranked",
    "run_trial",
    "select",
    "states_of",
]
