"""The measures by which DPO-Kernels chooses a kernel and a divergence, on embeddings of a preference set.

Their names are the paper's (Das et al. 2025, arXiv 2501.03271); its text was not available, so the formulas, the
projection and the estimators are our reading. Imports torch alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from prefopt.safety.errors import UsageError

SLACK = 0.1
"""TAT's margin: how much closer the chosen completion should be than the rejected one, as a cosine distance."""
FEWEST = 20
"""Minimum number of pairs."""

_BINS = 20
_RANGE = 3.0
_NORMAL_DRAWS = 200
_SEED = 0


@dataclass(frozen=True)
class Triplets:
    """Embeddings of N pairs: (N, H) of the prompts, the chosen and the rejected completions, scaled to unit length."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor

    def __post_init__(self) -> None:
        if not self.prompt.shape == self.chosen.shape == self.rejected.shape or self.prompt.dim() != 2:
            shapes = ", ".join(str(tuple(part.shape)) for part in (self.prompt, self.chosen, self.rejected))
            raise UsageError(f"prompt, chosen and rejected must be of one shape (N, H), got {shapes}")
        for name in ("prompt", "chosen", "rejected"):
            vectors = getattr(self, name).double()
            if not bool(vectors.isfinite().all()):
                row = int((~vectors.isfinite().all(1)).nonzero()[0])
                raise UsageError(f"the embedding of the {name} text in row {row} is not finite")
            object.__setattr__(self, name, torch.nn.functional.normalize(vectors, dim=-1))

    def __len__(self) -> int:
        return self.prompt.shape[0]


@dataclass(frozen=True)
class Geometry:
    """Distances between completions and their prompts. D is the cosine distance 1 - cos, in [0, 2].

    Attributes:
        pnd: positive-negative divergence, mean D(chosen, rejected).
        pnav: positive-negative alignment variance, variance of D(prompt, chosen) - D(prompt, rejected).
        pad: positive alignment distance, mean D(prompt, chosen).
        nad: the same of the rejected.
        tat: triplet alignment tightness, mean max(0, D(prompt, chosen) - D(prompt, rejected) + `SLACK`).
        nag: normalised alignment gap, mean (D(prompt, rejected) - D(prompt, chosen)) / their sum, in [-1, 1].
        nag_error: standard error of `nag`.
    """

    pnd: float
    pnav: float
    pad: float
    nad: float
    tat: float
    nag: float
    nag_error: float

    @property
    def spread(self) -> float:
        """sqrt(pnav) over the mean distance to the prompt: how different the rows are, without a scale."""
        mean = (self.pad + self.nad) / 2
        return 0.0 if mean == 0 else self.pnav**0.5 / mean


@dataclass(frozen=True)
class Distribution:
    """How the chosen and the rejected completions are distributed along the direction in which they differ.

    The direction is the mean of chosen - rejected over one half of the pairs; the other half is projected on it, and
    the reverse. A direction fitted to all of a few hundred texts in 384 dimensions would separate anything.

    Attributes:
        overlap: support overlap, the mass that the two histograms share, in [0, 1]. Histograms of one distribution
            never share all of it, so the amount that as many normal draws at the same distance lack is added.
        drift: drift magnitude, the distance of the two means in pooled standard deviations.
        kurtosis: excess kurtosis, the mean of the two distributions'; 0 of a normal one.
        roughness: squared second differences of the histograms, relative to those of as many normal draws; 1 is as
            smooth as a normal sample.
    """

    overlap: float
    drift: float
    kurtosis: float
    roughness: float


@dataclass(frozen=True)
class Measures:
    """Everything that was measured over `rows` pairs."""

    rows: int
    geometry: Geometry
    distribution: Distribution

    def as_dict(self) -> dict[str, float]:
        return {"rows": self.rows, **asdict(self.geometry), **asdict(self.distribution)}


def measure(triplets: Triplets) -> Measures:
    """All measures.

    Raises:
        ValueError: for fewer than `FEWEST` pairs.
    """
    if len(triplets) < FEWEST:
        raise UsageError(f"at least {FEWEST} pairs are needed to measure a preference set, got {len(triplets)}")
    return Measures(len(triplets), geometry(triplets), distribution(triplets))


def geometry(triplets: Triplets) -> Geometry:
    def distance(u: Tensor, v: Tensor) -> Tensor:
        return 1 - (u * v).sum(-1)

    positive, negative = distance(triplets.prompt, triplets.chosen), distance(triplets.prompt, triplets.rejected)
    difference, total = positive - negative, positive + negative
    gaps = torch.where(total > 0, -difference / total.clamp(min=1e-12), 0.0)
    return Geometry(
        pnd=float(distance(triplets.chosen, triplets.rejected).mean()),
        pnav=float(difference.var()),
        pad=float(positive.mean()),
        nad=float(negative.mean()),
        tat=float((difference + SLACK).clamp(min=0).mean()),
        nag=float(gaps.mean()),
        nag_error=float(gaps.std() / len(triplets) ** 0.5),
    )


def distribution(triplets: Triplets) -> Distribution:
    halves = [_projected(triplets, torch.arange(len(triplets)) % 2 == half) for half in range(2)]
    drift = abs(sum(float(chosen.mean() - rejected.mean()) for chosen, rejected in halves) / 2)
    chosen, rejected = (torch.cat(parts) for parts in zip(*halves, strict=True))
    centred = [torch.cat([half[side] - half[side].mean() for half in halves]) for side in range(2)]
    roughness = sum(_roughness(part) for part in centred) / 2
    return Distribution(
        overlap=min(max(_overlap(chosen, rejected) + _shortfall(len(chosen), drift), 0.0), 1.0),
        drift=drift,
        # Each scaled by its own deviation: two normal distributions of unequal width look heavy-tailed together.
        kurtosis=sum(_excess_kurtosis(part) for part in centred) / 2,
        roughness=roughness / _normal_roughness(len(chosen)),
    )


def _projected(triplets: Triplets, held: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) positions of the chosen and the rejected of the `held` rows, in pooled standard deviations."""
    direction = (triplets.chosen - triplets.rejected)[~held].mean(0)
    chosen, rejected = triplets.chosen[held] @ direction, triplets.rejected[held] @ direction
    deviation = ((chosen.var() + rejected.var()) / 2).sqrt()
    # Equal texts all have the same position.
    scale = 1 / deviation if float(deviation) > 1e-12 else torch.zeros_like(deviation)
    middle = (chosen.mean() + rejected.mean()) / 2
    return (chosen - middle) * scale, (rejected - middle) * scale


def _overlap(a: Tensor, b: Tensor) -> float:
    both = torch.cat([a, b])
    low, high = float(both.min()), float(both.max())
    if high == low:
        return 1.0
    bins = min(max(round(2 * len(a) ** (1 / 3)), 5), 64)  # Rice's rule
    shares = [torch.histc(part, bins, low, high) / len(part) for part in (a, b)]
    return float(torch.minimum(*shares).sum())


def _shortfall(count: int, drift: float) -> float:
    """How much less mass the histograms of two normal samples share than their distributions do.

    Args:
        count: draws in each.
        drift: between their means as measured, in standard deviations; chance alone makes it 2 / count in square.
    """
    apart = math.sqrt(max(drift**2 - 2 / count, 0.0))
    generator = torch.Generator().manual_seed(_SEED)
    found = 0.0
    for _ in range(_NORMAL_DRAWS):  # one at a time: all together would need much memory for many rows
        a, b = torch.randn(2, count, generator=generator, dtype=torch.float64)
        found += _overlap(a + apart, b) / _NORMAL_DRAWS
    return math.erfc(apart / 8**0.5) - found


def _excess_kurtosis(values: Tensor) -> float:
    variance = values.var(correction=0)
    return 0.0 if float(variance) == 0 else float((values**4).mean() / variance**2 - 3)


def _roughness(values: Tensor) -> float:
    """Sum of squared second differences over sum of squares, of a histogram on +-3 standard deviations."""
    deviation = values.std()
    if float(deviation) == 0:
        return 0.0
    counts = torch.histc((values / deviation).clamp(-2 * _RANGE, 2 * _RANGE), 2 * _BINS, -2 * _RANGE, 2 * _RANGE)
    counts = counts[_BINS // 2 : -(_BINS // 2)]
    return float((counts.diff(n=2) ** 2).sum() / (counts**2).sum())


def _normal_roughness(count: int) -> float:
    """The median of as many normal draws: few draws make any histogram rough."""
    generator = torch.Generator().manual_seed(_SEED)
    draws = torch.randn(_NORMAL_DRAWS, count, generator=generator, dtype=torch.float64)
    return float(torch.tensor([_roughness(draw) for draw in draws]).median())
