"""Judges of samples, and the measures that evaluation reports.

The measures are functions of lists, arrays or tensors; judges and the files of judgements are in modules of their own.
"""

from prefopt.evaluation.accuracy import majority_vote, pass_at_k
from prefopt.evaluation.intervals import Interval, bootstrap
from prefopt.evaluation.texts import distinct_n, meteor, repetition, sampled_kl, similarity
from prefopt.evaluation.win_rates import length_controlled_win_rate, win_rate

__all__ = [
    "Interval",
    "bootstrap",
    "distinct_n",
    "length_controlled_win_rate",
    "majority_vote",
    "meteor",
    "pass_at_k",
    "repetition",
    "sampled_kl",
    "similarity",
    "win_rate",
]
