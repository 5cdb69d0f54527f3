"""Preference-optimization objectives as small modules over scored completions.

    from prefopt.losses import DPO, SFT, PreferenceBatch, Scores, parse

    loss = DPO(beta=0.1) + 0.2 * SFT()              # or parse("dpo(beta=0.1) + 0.2*sft")
    output = loss(PreferenceBatch(chosen=Scores(...), rejected=Scores(...)))
    output.loss.backward()

This package imports torch and nothing else.
"""

from prefopt.losses import presets as _presets  # noqa: F401  (registers them)
from prefopt.losses.base import Loss, LossOutput, PairLoss, WeightedSum
from prefopt.losses.batchwise import AOT, AlphaDPO, AOTUnpaired, BetaDPO
from prefopt.losses.binary import KTO
from prefopt.losses.conflict import ConflictFree, PairNormalized
from prefopt.losses.cringe import Cringe, PairwiseCringe
from prefopt.losses.direct import (
    DPO,
    EXO,
    HDPO,
    IPO,
    Hinge,
    MarginDPO,
    NormalizedDPO,
    ReferencePairLoss,
    Robust,
    paired_roles,
)
from prefopt.losses.discovered import AQFL, AQL, CELL, DBAQL, PADLL, PFL, DiscoPOP
from prefopt.losses.divergences import Divergence
from prefopt.losses.errors import LossError
from prefopt.losses.from_file import LossFile, register_file
from prefopt.losses.grouped import GroupLoss, Groups
from prefopt.losses.kernel import HMK, KernelDPO
from prefopt.losses.kernel_functions import RBF, Mahalanobis, Polynomial, Spectral
from prefopt.losses.likelihood import SFT
from prefopt.losses.listwise import GVPO, TPO, AStarPO, InfoNCA, LiPOLambda, NCAScores, PlackettLuce
from prefopt.losses.logic import Logic
from prefopt.losses.needs import Need
from prefopt.losses.online import INPO, KLOnline, KLPrior, XPOBonus
from prefopt.losses.parse import LossSyntaxError, UnknownLossError, parse
from prefopt.losses.penalised import DPOP, FDPO, LDDPO, RDPO, ChiPO, DPOShift, RainbowPO, SamPO
from prefopt.losses.pointwise import BCO, NCA, SPPO, APODown, APOZero, BCOPair, CalDPO
from prefopt.losses.reference_free import ASFT, CPO, ORPO, RRHF, AlphaPO, SimPER, SimPO, SLiC
from prefopt.losses.registry import Preset, available, preset, presets, register
from prefopt.losses.scored import REBEL, MaPPO, RewardAware, SoftSPPO
from prefopt.losses.scores import PreferenceBatch, Scores
from prefopt.losses.shapes import GPO, SurrogateEnsemble
from prefopt.losses.tokenwise import TDPO
from prefopt.losses.unlearning import NPO, GradientAscent, KLRetain, KTOForget, SimNPO
from prefopt.losses.unlearning_parts import OnForget, OnRetain
from prefopt.losses.unlearning_states import RMU, RMURetain
from prefopt.losses.unlearning_tokens import CEU, UNDIAL, WGA, Flatten, SatImp
from prefopt.losses.wrappers import WPO, Dual, LengthNormalized, NoiseRobust, Reweighted
from prefopt.losses.wrappers_tokens import Humanline

__all__ = [
    "AOT",
    "AQFL",
    "AQL",
    "ASFT",
    "BCO",
    "CELL",
    "CEU",
    "CPO",
    "DBAQL",
    "DPO",
    "DPOP",
    "EXO",
    "FDPO",
    "GPO",
    "GVPO",
    "HDPO",
    "HMK",
    "INPO",
    "IPO",
    "KTO",
    "LDDPO",
    "NCA",
    "NPO",
    "ORPO",
    "PADLL",
    "PFL",
    "RBF",
    "RDPO",
    "REBEL",
    "RMU",
    "RRHF",
    "SFT",
    "SPPO",
    "TDPO",
    "TPO",
    "UNDIAL",
    "WGA",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "AStarPO",
    "AlphaDPO",
    "AlphaPO",
    "BCOPair",
    "BetaDPO",
    "CalDPO",
    "ChiPO",
    "ConflictFree",
    "Cringe",
    "DPOShift",
    "DiscoPOP",
    "Divergence",
    "Dual",
    "Flatten",
    "GradientAscent",
    "GroupLoss",
    "Groups",
    "Hinge",
    "Humanline",
    "InfoNCA",
    "KLOnline",
    "KLPrior",
    "KLRetain",
    "KTOForget",
    "KernelDPO",
    "LengthNormalized",
    "LiPOLambda",
    "Logic",
    "Loss",
    "LossError",
    "LossFile",
    "LossOutput",
    "LossSyntaxError",
    "MaPPO",
    "Mahalanobis",
    "MarginDPO",
    "NCAScores",
    "Need",
    "NoiseRobust",
    "NormalizedDPO",
    "OnForget",
    "OnRetain",
    "PairLoss",
    "PairNormalized",
    "PairwiseCringe",
    "PlackettLuce",
    "Polynomial",
    "PreferenceBatch",
    "Preset",
    "RMURetain",
    "RainbowPO",
    "ReferencePairLoss",
    "RewardAware",
    "Reweighted",
    "Robust",
    "SLiC",
    "SamPO",
    "SatImp",
    "Scores",
    "SimNPO",
    "SimPER",
    "SimPO",
    "SoftSPPO",
    "Spectral",
    "SurrogateEnsemble",
    "UnknownLossError",
    "WeightedSum",
    "XPOBonus",
    "available",
    "paired_roles",
    "parse",
    "preset",
    "presets",
    "register",
    "register_file",
]
