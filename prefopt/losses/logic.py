"""Losses compiled from logic: the odds that what the models predict satisfies one side of a preference structure.

Lives here: the loss, its weighted model count, and the named structures of the paper. Formulas, decompiling and the
order of structures are in `prefopt.logic`. Imports torch and its neighbours alone.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.base import ROLES, Loss, PairLoss
from prefopt.losses.checks import finite, positive
from prefopt.losses.direct import paired_roles
from prefopt.losses.errors import LossError
from prefopt.losses.needs import Need
from prefopt.losses.numerics import log1mexp
from prefopt.losses.registry import preset, register
from prefopt.losses.scores import PreferenceBatch, Scores

MODEL = "M(w), M(l)"
"""The policy predicts the chosen completion; it predicts the rejected one."""

WITH_REFERENCE = "M(w)&Ref(l), M(l)&Ref(w)"
"""The same for policy and reference together: turns a structure's reference-free loss into its DPO-like loss."""

MOST = 6
"""Maximum number of propositions of a structure; each doubles its rows."""

_SOURCES = {"M": "logps", "Ref": "ref_logps", "Prev": "prev_logps"}
_ROLES = {"w": "chosen", "l": "rejected", "s": "sampled"}
_ATOM = re.compile(r"(M|Ref|Prev)\((w|l|s)\)")


def propositions(over: str) -> tuple[tuple[str, ...], ...]:
    """The atoms of every proposition in a text such as `M(w)&Ref(l), M(l)&Ref(w)`.

    Raises:
        ValueError: naming what is not an atom, or an atom that two propositions share: they would not be independent.
    """
    found = tuple(tuple(atom.strip() for atom in part.split("&")) for part in over.split(","))
    atoms = [atom for part in found for atom in part]
    for atom in atoms:
        if not _ATOM.fullmatch(atom):
            raise LossError(
                f"over has {atom!r}, which is not a prediction: write M(w), M(l) or M(s) for what the policy makes of "
                "the chosen, rejected or sampled completion, Ref(...) or Prev(...) for the reference or the previous "
                "iterate, joined by & within a proposition and by commas between them"
            )
        if atoms.count(atom) > 1:
            raise LossError(f"over uses {atom} twice: propositions must be independent of one another")
    if len(found) > MOST:
        raise LossError(f"over has {len(found)} propositions, at most {MOST} are possible")
    return found


def rows_of(name: str, text: str, count: int) -> int:
    """A set of truth-table rows as bits, from text such as `11,10`: bit i is the row that spells i in binary.

    Raises:
        ValueError: naming the row that does not have one 0 or 1 for each of the `count` propositions.
    """
    bits = 0
    for row in filter(None, (part.strip() for part in text.split(","))):
        if len(row) != count or set(row) - {"0", "1"}:
            raise LossError(f"{name} holds the row {row!r}: write a 0 or 1 for each of the {count} propositions")
        bits |= 1 << int(row, 2)
    return bits


def log_count(rows: int, log_weights: list[Tensor]) -> Tensor | float:
    """Logarithm of a weighted model count, (N,); plain 0 or -inf where it is 1 or 0 for all weights.

    The sum over the rows of the product of w_i where proposition i is true and 1 - w_i where it is not, expanded one
    proposition at a time, so that a part that does not depend on a proposition never contains it: the closed form.

    Args:
        rows: bits as from `rows_of`.
        log_weights: (N,) log w_i of each proposition, first proposition first.
    """
    if not log_weights:
        return 0.0 if rows else -math.inf
    half = 1 << (len(log_weights) - 1)
    without, given = rows & ((1 << half) - 1), rows >> half
    first, rest = log_weights[0], log_weights[1:]
    if without == given:
        return log_count(given, rest)
    sides = [(first, given)] if given else []
    if without:
        sides.append((log1mexp(first), without))
    terms = [weight + log_count(side, rest) for weight, side in sides]
    return terms[0] if len(terms) == 1 else torch.logaddexp(terms[0], terms[1])


@register("logic")
class Logic(PairLoss):
    """Any preference structure as a loss: the log-odds of its true rows against its false ones.

    loss = -log sigmoid(beta rho - gamma),  rho = log WMC(T) - log WMC(B)

    WMC(S) sums, over the rows of S, the product of each proposition's probability where the row has a 1 and of its
    complement where it has a 0. Rows in both T and B are compatible with either side; rows in neither are excluded.
    With two propositions there are 256 structures. `prefopt.logic.from_formula` makes a loss from a formula;
    `prefopt logic` explains one.

    Args:
        T: rows of the true side, such as "11,10". The default is cCPO: not (rejected without chosen), given either.
        B: rows of the false side.
        over: the propositions, in the order of a row's digits. M(w), M(l), M(s): the policy predicts the chosen, the
            rejected, a sampled completion; Ref(...), Prev(...) likewise; & joins atoms into one proposition.
        beta: scale of the log-odds.
        gamma: target margin in units of the logit; SimPO's is 1.
        link: "logistic"; "hinge" is relu(1 - (beta rho - gamma)); "squared" is (rho - gamma - 1/(2 beta))^2.
        average: use log-probabilities per token. Sums of long completions are so low that every complement is 1
            and has gradient 0.

    Needs: sums and lengths; reference, previous iterate or samples if `over` mentions them.
    Limits: T="11,10", B="11,01" is `cpo` if not averaged, `simpo` if averaged, `dpo` over M(w)&Ref(l), M(l)&Ref(w);
        T="10", B="01" is `orpo`; T="10", B="11,01,00" with beta = 1 is `asft`. More rows in T or fewer in B never
        raise the loss.
    Numerics: probabilities are clamped to 1 - 1e-6 before complements; everything stays in log space.
    Reference: Richardson et al. 2024, arXiv 2412.17696, from memory; the authors' code was not found. The two-sided
        count is theirs; the links but the first, gamma and previous iterates are ours.
    """

    formula = "-log sigmoid(beta*(log WMC(T) - log WMC(B)) - gamma)"
    paper = "2412.17696"
    batchwise = False

    def __init__(
        self,
        T: str = "11,10",
        B: str = "01",
        over: str = MODEL,
        beta: float = 1.0,
        gamma: float = 0.0,
        link: Literal["logistic", "hinge", "squared"] = "logistic",
        average: bool = True,
    ):
        super().__init__()
        self._propositions = propositions(over)
        count = len(self._propositions)
        self._true, self._false = rows_of("T", T, count), rows_of("B", B, count)
        if link not in ("logistic", "hinge", "squared"):
            raise LossError(f"link must be 'logistic', 'hinge' or 'squared', got {link!r}")
        self.T, self.B, self.over, self.link, self.average = T, B, over, link, average
        self.beta = positive("beta", beta)
        self.gamma = finite("gamma", gamma)
        atoms = [atom for part in self._propositions for atom in part]
        self.needs = Need.NONE
        if any(atom.startswith("Ref") for atom in atoms):
            self.needs |= Need.REFERENCE
        if any(atom.startswith("Prev") for atom in atoms):
            self.needs |= Need.PREVIOUS
        used = {"chosen", "rejected"} | {_ROLES[atom[-2]] for atom in atoms}
        self.roles = tuple(role for role in ROLES if role in used)

    def reward(self, scores: Scores) -> Tensor:
        """beta times the log-probability, relative to the reference if the structure mentions it."""
        logps = scores.ratios if Need.REFERENCE in self.needs else scores.logps
        return self.beta * (logps / scores.lengths.clamp(min=1) if self.average else logps)

    def log_weights(self, batch: PreferenceBatch) -> list[Tensor]:
        """(N,) log-probability of each proposition."""
        weights = []
        for part in self._propositions:
            logps = [self._log_weight(batch, *_ATOM.fullmatch(atom).groups()) for atom in part]  # type: ignore[union-attr]
            weights.append(torch.stack(logps).sum(0))
        return weights

    def _log_weight(self, batch: PreferenceBatch, source: str, role: str) -> Tensor:
        scores = batch.role(_ROLES[role])
        assert scores is not None  # `_check` made sure of it
        logps: Tensor = getattr(scores, _SOURCES[source])
        return logps / scores.lengths.clamp(min=1) if self.average else logps

    def log_odds(self, batch: PreferenceBatch) -> Tensor:
        """(N,) log WMC(T) - log WMC(B).

        Raises:
            ValueError: if either side is empty, so that the loss would be infinite or 0 for all predictions.
        """
        if not self._true or not self._false:
            side, what = ("T", "infinite") if not self._true else ("B", "0")
            raise LossError(f"{self} has no row in {side}: the loss is {what} whatever the models predict")
        weights = self.log_weights(batch)
        odds = log_count(self._true, weights) - log_count(self._false, weights)
        # Two sides with the same rows have equal counts.
        return odds if isinstance(odds, Tensor) else weights[0] * 0 + odds

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        paired_roles(batch)
        odds = self.log_odds(batch)
        if self.link == "squared":
            return (odds - self.gamma - 1 / (2 * self.beta)) ** 2
        z = self.beta * odds - self.gamma
        return -F.logsigmoid(z) if self.link == "logistic" else torch.relu(1 - z)


def _structure(T: str, B: str, beta: float, reference: bool) -> Loss:
    return Logic(T, B, over=WITH_REFERENCE if reference else MODEL, beta=beta, average=not reference)


@preset("ccpo", paper="2412.17696")
def ccpo(beta: float = 1.0, reference: bool = False) -> Loss:
    """Constrained CPO: not the rejected completion without the chosen one, given that one of them is predicted.

    Odds P/(Q(1-P)), P and Q per token; with `reference` over policy and reference together, summed. Richardson et al.
    2024, from memory.
    """
    return _structure("11,10", "01", beta, reference)


@preset("uncpo", paper="2412.17696")
def uncpo(beta: float = 1.0, reference: bool = False) -> Loss:
    """Unconstrained CPO: not the rejected completion without the chosen one. With beta = 1, -log(1 - Q(1-P)).

    Satisfied if neither completion is predicted, so it asks little of the chosen one. Richardson et al. 2024, from
    memory.
    """
    return _structure("11,10,00", "01", beta, reference)


@preset("ceunl", paper="2412.17696")
def ceunl(beta: float = 1.0, reference: bool = False) -> Loss:
    """Likelihood and unlikelihood as one structure: the chosen completion and not the rejected one.

    With beta = 1, -log P - log(1-Q). Richardson et al. 2024, from memory.
    """
    return _structure("10", "11,01,00", beta, reference)


@preset("funl", paper="2412.17696")
def funl(beta: float = 1.0, reference: bool = False) -> Loss:
    """Not the rejected completion, for any probability of the chosen one: odds (1-Q)/Q.

    Our reading of the fUNL of Richardson et al. 2024.
    """
    return _structure("10,00", "11,01", beta, reference)


@preset("qfunl", paper="2412.17696")
def qfunl(beta: float = 1.0, reference: bool = False) -> Loss:
    """Not the rejected completion, with both together excluded: odds (1-Q)/(Q(1-P)).

    An uncertain reading of the qfUNL of Richardson et al. 2024.
    """
    return _structure("10,00", "01", beta, reference)


@preset("cfunl", paper="2412.17696")
def cfunl(beta: float = 1.0, reference: bool = False) -> Loss:
    """Not the rejected completion, given that one of them is predicted: odds P(1-Q)/Q.

    An uncertain reading of the cfUNL of Richardson et al. 2024.
    """
    return _structure("10", "11,01", beta, reference)
