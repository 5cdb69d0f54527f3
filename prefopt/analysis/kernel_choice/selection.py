"""From the measures to a kernel and a divergence, with the reasons.

Which measure decides what follows summaries of DPO-Kernels (Das et al. 2025, arXiv 2501.03271). Its thresholds are not
known, so those here, and the order of the rules, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.analysis.kernel_choice.measures import SLACK, Distribution, Geometry, Measures


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the rules; the first match wins, in this order.

    Those on overlap and drift are Cohen's: normal distributions whose means are 0.5 and 0.8 standard deviations apart
    (a medium and a large effect) share 0.80 and 0.69 of their mass; those of 1.35 share half.

    Attributes:
        spread: standard deviation of the alignment difference over the mean distance, above which rows differ.
        near: distance of chosen and rejected, below which they are variants of one answer.
        disjoint: overlap below which the two supports hardly meet.
        drift: pooled standard deviations above which the means are far apart.
        heavy: excess kurtosis above which tails are heavy.
        rough: roughness, in that of normal samples, above which a histogram is not smooth.
        same: overlap above which the two distributions are nearly one.
        mostly: overlap above which they are one for the most part.
    """

    spread: float = 0.25
    near: float = 0.2
    disjoint: float = 0.5
    drift: float = 0.8
    heavy: float = 1.0
    rough: float = 2.0
    same: float = 0.9
    mostly: float = 0.8


@dataclass(frozen=True)
class Selection:
    """A kernel and a divergence with the reasons; `doubt` is the reason against any kernel, or empty."""

    kernel: str
    kernel_reason: str
    divergence: str
    divergence_reason: str
    doubt: str


def select(measures: Measures, thresholds: Thresholds | None = None) -> Selection:
    """The pair that the rules give."""
    thresholds = thresholds or Thresholds()
    kernel, kernel_reason = _kernel(measures.geometry, thresholds)
    divergence, divergence_reason = _divergence(measures.distribution, thresholds)
    return Selection(kernel, kernel_reason, divergence, divergence_reason, _doubt(measures.geometry))


def _kernel(geometry: Geometry, at: Thresholds) -> tuple[str, str]:
    if geometry.spread > at.spread:
        return "mahalanobis", (
            f"which completion is closer to its prompt varies much from row to row (spread {geometry.spread:.2f} > "
            f"{at.spread:g}): directions in which all vary count for less"
        )
    if geometry.pnd < at.near:
        return "rbf", (
            f"chosen and rejected are variants of one answer (PND {geometry.pnd:.2f} < {at.near:g}): a local kernel "
            "tells small distances apart"
        )
    if geometry.tat > SLACK:
        return "spectral", (
            f"triplets are loose (TAT {geometry.tat:.3f} > {SLACK:g}): two ranges keep far completions in play"
        )
    return "polynomial", (
        f"triplets are tight (TAT {geometry.tat:.3f} <= {SLACK:g}) and the completions apart "
        f"(PND {geometry.pnd:.2f}): the angle to the prompt orders them"
    )


def _divergence(found: Distribution, at: Thresholds) -> tuple[str, str]:
    if found.overlap < at.disjoint:
        return "wasserstein", (
            f"chosen and rejected hardly overlap ({found.overlap:.2f} < {at.disjoint:g}): a distance stays finite"
        )
    if found.drift > at.drift:
        return "renyi", f"their means are far apart (drift {found.drift:.2f} > {at.drift:g}): its order weighs the gap"
    if found.kurtosis > at.heavy:
        return "f", f"tails are heavy (excess kurtosis {found.kurtosis:.2f} > {at.heavy:g})"
    if found.roughness > at.rough:
        return "hellinger", (
            f"they overlap, but not smoothly (roughness {found.roughness:.2f} > {at.rough:g}): square roots damp peaks"
        )
    smooth = f"smooth (roughness {found.roughness:.2f}), light-tailed (excess kurtosis {found.kurtosis:.2f})"
    if found.overlap > at.same:
        return "kl", f"{smooth} and nearly the same (overlap {found.overlap:.2f} > {at.same:g})"
    if found.overlap > at.mostly:
        return "js", f"{smooth} and overlapping (overlap {found.overlap:.2f} > {at.mostly:g})"
    return "bhattacharyya", f"{smooth}, partly overlapping (overlap {found.overlap:.2f}), which it measures"


def _doubt(geometry: Geometry) -> str:
    if geometry.nag > 2 * geometry.nag_error:
        return ""
    found = f"NAG {geometry.nag:+.3f} ± {geometry.nag_error:.3f}"
    if geometry.nag > -2 * geometry.nag_error:
        return (
            f"by these embeddings the chosen completion is no closer to its prompt than the rejected one ({found}): "
            "no kernel's margin has much to say; a small gamma, or plain dpo, is the safer choice"
        )
    return (
        f"by these embeddings the chosen completion is the one farther from its prompt ({found}): every kernel's "
        "margin speaks against the preference on average; a small gamma, or plain dpo, is the safer choice"
    )
