"""Preference-optimization objectives as small modules over scored completions.

    from prefopt.losses import DPO, SFT, PreferenceBatch, Scores, parse

    loss = DPO(beta=0.1) + 0.2 * SFT()              # or parse("dpo(beta=0.1) + 0.2*sft")
    output = loss(PreferenceBatch(chosen=Scores(...), rejected=Scores(...)))
    output.loss.backward()

This package imports torch and nothing else.
"""

from prefopt.losses.base import Loss, LossOutput, Need, PairLoss, WeightedSum
from prefopt.losses.binary import KTO
from prefopt.losses.direct import DPO, IPO, Hinge
from prefopt.losses.likelihood import SFT
from prefopt.losses.parse import LossSyntaxError, parse
from prefopt.losses.reference_free import SimPO
from prefopt.losses.registry import available, register
from prefopt.losses.scores import PreferenceBatch, Scores

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "SFT",
    "Hinge",
    "Loss",
    "LossOutput",
    "LossSyntaxError",
    "Need",
    "PairLoss",
    "PreferenceBatch",
    "Scores",
    "SimPO",
    "WeightedSum",
    "available",
    "parse",
    "register",
]
