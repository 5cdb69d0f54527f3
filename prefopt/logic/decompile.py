"""From a loss to its structure: the formula behind a loss, computed from its values alone.

A loss is probed at a few dozen random pairs of completions. It has a structure if its values there are a link of
beta * log(WMC(T) / WMC(B)) - gamma for some rows T and B; all of them are tried, over the policy's predictions, policy
and reference together, and either completion against its reference. Imports torch, `prefopt.losses` and `structure`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.logic.structure import Structure
from prefopt.losses import Loss, Need, PreferenceBatch, Scores
from prefopt.losses.logic import MODEL, WITH_REFERENCE, Logic
from prefopt.safety.errors import PrefoptError

PROBES = 48
EXACT = 1e-7
"""Largest relative misfit that counts as equal; the losses clamp probabilities at 1 - 1e-6."""

OVER = (MODEL, WITH_REFERENCE, "Ref(l), M(l)", "M(w), Ref(w)")
"""The propositions to try structures over."""


@dataclass(frozen=True)
class Decompiled:
    """A loss as scale * link(beta * log-odds - gamma) of a structure.

    Attributes:
        structure: the one with the most rows among those that fit: odds do not change when both sides gain rows in
            proportion.
        link: "logistic", "hinge" or "squared", as in `Logic`.
        beta, gamma: as in `Logic`.
        average: whether log-probabilities are per token.
        scale: factor of the link's value, as in NPO.
    """

    structure: Structure
    link: str
    beta: float
    gamma: float
    average: bool
    scale: float = 1.0

    def loss(self) -> Loss:
        """The loss compiled again; equal to the one it came from."""
        made = self.structure.loss(beta=self.beta, gamma=self.gamma, link=self.link, average=self.average)
        return made if self.scale == 1 else self.scale * made


class NoStructure(PrefoptError, ValueError):
    """A loss without a structure over two propositions; the message gives the reason."""


def decompile(loss: Loss) -> Decompiled:
    """The structure of a loss.

    Raises:
        NoStructure: if it has no structure over the propositions in `OVER`.
    """
    if isinstance(loss, Logic):
        return Decompiled(Structure(loss.T, loss.B, loss.over), loss.link, loss.beta, loss.gamma, loss.average)
    _refuse(loss)
    batch = _probes(loss)
    with torch.no_grad():
        values = loss.per_example(batch)
    if values.shape != (PROBES,):
        raise NoStructure(f"{loss} gives each completion a value of its own, so its odds are not of a pair")
    for scale in _scales(loss):
        if (found := _fit(values / scale, loss.needs, scale)) is not None:
            return found
    raise NoStructure(
        f"{loss} is not a logistic, hinge or squared link of the log-odds of any structure over two of the "
        "predictions M(w), M(l), Ref(w), Ref(l)"
    )


def _refuse(loss: Loss) -> None:
    if len(list(loss.terms())) > 1 or any(weight != 1 for weight, _, _ in loss.terms()):
        raise NoStructure(f"{loss} is a weighted sum; decompile its terms one by one")
    if not loss.separable or "sampled" in loss.roles:
        raise NoStructure(f"the examples of {loss} act on one another, so that no pair's odds settle its loss")
    if more := loss.needs & ~(Need.REFERENCE | Need.PREVIOUS):
        raise NoStructure(f"{loss} looks at {more.words} and not at whole completions' probabilities alone")


def _probes(loss: Loss) -> PreferenceBatch:
    """Pairs of completions of a few tokens, likely enough that complements matter."""
    draw = torch.Generator().manual_seed(0)

    def scores() -> Scores:
        lengths = torch.randint(1, 5, (PROBES,), generator=draw)
        logps, ref_logps = (
            -lengths * (0.05 + 0.75 * torch.rand(PROBES, generator=draw, dtype=torch.float64)) for _ in range(2)
        )
        columns = {name: torch.zeros(PROBES, dtype=torch.float64) for name in loss.columns}
        return Scores(logps, lengths, ref_logps, prev_logps=ref_logps, columns=columns)

    return PreferenceBatch(chosen=scores(), rejected=scores())


def _scales(loss: Loss) -> list[float]:
    """1, and other likely factors of a loss with such hyperparameters."""
    numbers = [v for v in loss.hyperparameters().values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return list(dict.fromkeys([1.0, *(scale for n in numbers if n > 0 for scale in (n, 1 / n, 2 / n))]))


@functools.cache
def _candidates() -> list[Structure]:
    """Every structure that is not trivial, most rows first."""
    rows = [",".join(f"{row:02b}" for row in range(4) if bits >> row & 1) for bits in range(1, 16)]
    found = [Structure(T, B) for T in rows for B in rows if T != B]
    return sorted(found, key=lambda s: -len(s.T) - len(s.B))


@functools.cache
def _odds(over: str, average: bool) -> Tensor:
    """(candidates, PROBES) log-odds of every candidate at the probes."""
    batch = _probes(Logic())
    return torch.stack([Logic(c.T, c.B, over, average=average).log_odds(batch) for c in _candidates()])


def _fit(values: Tensor, needs: Need, scale: float) -> Decompiled | None:
    for link, fit in (("logistic", _logistic), ("hinge", _hinge), ("squared", _squared)):
        for over in OVER if Need.REFERENCE in needs else OVER[:1]:
            for average in (True, False):
                if (found := fit(values, _odds(over, average))) is not None:
                    number, beta, gamma = found
                    candidate = _candidates()[number]
                    structure = Structure(candidate.T, candidate.B, over)
                    return Decompiled(structure, link, _tidy(beta), _tidy(gamma), average, scale)
    return None


Found = tuple[int, float, float] | None
"""The first candidate that fits, with its beta and gamma."""


def _logistic(values: Tensor, odds: Tensor) -> Found:
    if not bool((values > 1e-9).all()):
        return None
    slope, constant, misfit = _lines(odds, -torch.log(torch.expm1(values)))
    return _first((misfit <= EXACT) & (slope > EXACT), slope, -constant)


def _hinge(values: Tensor, odds: Tensor) -> Found:
    active = values > 0
    if int(active.sum()) < PROBES // 4:
        return None
    slope, constant, misfit = _lines(odds[:, active], 1 - values[active])
    # Where the loss is 0 the hinge must be so as well.
    zero = (slope[:, None] * odds[:, ~active] + constant[:, None] >= 1 - EXACT).all(1)
    return _first((misfit <= EXACT) & (slope > EXACT) & zero, slope, -constant)


def _squared(values: Tensor, odds: Tensor) -> Found:
    """(rho - c)^2 less rho^2 is a line of slope -2c through c^2; c is 1 / (2 beta) where gamma is 0."""
    slope, constant, misfit = _lines(odds, values - odds**2)
    target = -slope / 2
    good = (misfit <= EXACT) & (target > EXACT) & ((constant - target**2).abs() <= EXACT * target.clamp(min=1) ** 2)
    return _first(good, 1 / (2 * target), torch.zeros_like(target))


def _lines(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, constant and relative misfit of the line that is nearest to y over each row of x, (candidates,) each."""
    centred = x - x.mean(1, keepdim=True)
    y = y.expand_as(x)
    middle = y.mean(1, keepdim=True)
    slope = (centred * (y - middle)).sum(1) / centred.square().sum(1).clamp(min=1e-300)
    constant = middle[:, 0] - slope * x.mean(1)
    misfit = (slope[:, None] * x + constant[:, None] - y).abs().amax(1) / y.abs().amax(1).clamp(min=1)
    return slope, constant, misfit


def _first(good: Tensor, beta: Tensor, gamma: Tensor) -> Found:
    if not bool(good.any()):
        return None
    number = int(good.int().argmax())
    return number, float(beta[number]), float(gamma[number])


def _tidy(number: float) -> float:
    """The short decimal closest to a fitted number."""
    short = round(number, 6)
    return short + 0.0 if abs(short - number) < 1e-6 * max(1.0, abs(number)) else number
