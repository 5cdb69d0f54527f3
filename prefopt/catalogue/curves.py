"""Objectives as curves: loss and gradient against the margin, for one pair.

Nothing here loads a model or draws; `prefopt.catalogue.plots` does the drawing.

Both completions have `TOKENS` tokens. At every position the vocabulary has `VOCABULARY` tokens, which the
reference finds equally likely; the policy moves probability between the completion's token and all the others equally.
One log-ratio per completion then determines everything that a loss may need (per-token values, largest
log-probabilities, divergences) without contradiction. Columns such as `margin` are 0, the previous iterate is the
reference, the reference point of `kto` is 0, and prompts and completions share one embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from prefopt.losses import Loss, LossOutput, PreferenceBatch, Scores, WeightedSum, parse
from prefopt.losses.divergences import divergence, named
from prefopt.safety.errors import PrefoptError

TOKENS = 40
VOCABULARY = 8
POINTS = 161
SPAN = 40.0
"""Default of half the width of the x-axis, in nats."""

START = -math.log(VOCABULARY)
"""Log-probability of every token where the policy is the reference."""

MOVES = {
    "margin": {"chosen": 0.5, "rejected": -0.5},
    "chosen": {"chosen": 1.0},
    "rejected": {"rejected": 1.0},
    "sampled": {"sampled": 1.0},
}
"""How far each role's log-ratio moves when x moves by one nat; roles that are not named stay at 0."""


NOISE = 1e-12
"""Gradients below this are rounding errors of terms that cancel; panels are not scaled to them."""


class PlotError(PrefoptError, ValueError):
    """An objective or option that cannot be drawn; the message gives the reason."""


@dataclass(frozen=True)
class Curve:
    """Loss and gradient of one objective over one axis, (POINTS,) each."""

    x: Tensor
    loss: Tensor
    gradient: Tensor

    def same(self, other: Curve) -> bool:
        """Whether the two look the same in a picture."""
        pairs = ((self.loss, other.loss), (self.gradient, other.gradient))
        return all(bool(((a - b).abs() <= 1e-6 * (a.abs().max() + 1e-9)).all()) for a, b in pairs)


@dataclass(frozen=True)
class Line:
    """One line style of the picture.

    Attributes:
        names: the expressions whose curves these are; several where they coincide.
        curves: by axis, a key of `MOVES`.
        reference: whether each of the names compares with a reference.
        batch: whether an example's value or gradient depends on the rest of its batch.
        held: whether the gradient is not the slope of the loss, because the objective stops gradients.
    """

    names: tuple[str, ...]
    curves: dict[str, Curve]
    reference: tuple[bool, ...]
    batch: bool
    held: bool

    @property
    def label(self) -> str:
        return " = ".join(self.names) + "*" * self.batch + "†" * self.held


def trace(expressions: Sequence[str], vary: Sequence[str] = ("margin",), span: float = SPAN) -> list[Line]:
    """The curves of some objectives.

    Args:
        expressions: loss expressions, as `parse` reads them.
        vary: what to move for losses that look at both completions: "margin" moves the chosen one up by x/2 and the
            rejected one down by x/2, "chosen" and "rejected" move one and hold the other at the reference. A loss
            on one role is always drawn against that role.
        span: half the width of the x-axis in nats.

    Raises:
        LossSyntaxError: for an expression that cannot be read.
        PlotError: for one that has no curve here, or an axis that is too long for it.
    """
    if not expressions:
        raise PlotError("name the losses or expressions to plot")
    for axis in vary:
        if axis not in ("margin", "chosen", "rejected"):
            raise PlotError(f"vary must be margin, chosen or rejected, got {axis!r}")
    lines: list[Line] = []
    for text in dict.fromkeys(expressions):
        line = _line(text, tuple(dict.fromkeys(vary)), span)
        known = next((other for other in lines if _coincide(other.curves, line.curves)), None)
        if known is None:
            lines.append(line)
        else:
            lines[lines.index(known)] = Line(
                (*known.names, text),
                known.curves,
                known.reference + line.reference,
                known.batch or line.batch,
                known.held or line.held,
            )
    if tuple(vary) != ("margin",) and not any(axis in line.curves for line in lines for axis in vary):
        raise PlotError("vary has no effect here: each of these losses looks at one side only")
    return lines


def reach(values: Tensor, origin: float | None = None) -> float:
    """Largest distance of a curve from its value at 0, without the farthest tenth of the points."""
    start = float(values[len(values) // 2]) if origin is None else origin
    return float(torch.quantile((values - start).abs(), 0.9))


# ---- the pair ----------------------------------------------------------------------------------------------------


def _scores(loss: Loss, ratio: Tensor, start: Tensor) -> Scores:
    """(N,) completions with log-ratio `ratio` to the reference, where each token's log-probability is `start`."""

    def spread(each: Tensor) -> Tensor:
        return each.unsqueeze(-1).expand(-1, TOKENS)

    def others(each: Tensor) -> Tensor:
        return torch.log(-torch.expm1(each)) - math.log(VOCABULARY - 1)

    token = start + ratio / TOKENS
    rest, ref_rest = others(token), others(start)
    p, r = torch.exp(token), torch.exp(start)
    vocabulary = torch.cat([token.unsqueeze(-1), rest.unsqueeze(-1).expand(-1, VOCABULARY - 1)], -1)
    ref_vocabulary = torch.cat([start.unsqueeze(-1), ref_rest.unsqueeze(-1).expand(-1, VOCABULARY - 1)], -1)
    divergences = [divergence(named(name), vocabulary, ref_vocabulary) for name in loss.divergences]
    top_ids = torch.argsort(vocabulary.detach(), dim=-1, descending=True, stable=True)[:, : loss.top_k]
    ones = torch.ones(len(ratio), TOKENS, dtype=torch.bool)
    # Log-ratios say nothing about hidden states: a loss on them is refused, since it does not depend on the axis.
    vectors = torch.ones(len(ratio), 2)
    states = torch.ones(len(ratio), TOKENS, len(loss.layers), 2, dtype=ratio.dtype)
    return Scores(
        logps=TOKENS * token,
        lengths=ones.sum(-1),
        ref_logps=TOKENS * start,
        prev_logps=TOKENS * start,
        token_logps=spread(token),
        token_mask=ones,
        ref_token_logps=spread(start),
        token_ids=torch.zeros_like(ones, dtype=torch.long),
        top_logps=vocabulary.gather(-1, top_ids).unsqueeze(1).expand(-1, TOKENS, -1),
        top_ids=top_ids.unsqueeze(1).expand(-1, TOKENS, -1),
        token_collision=spread(torch.logsumexp(2 * vocabulary, -1).detach()),
        token_others=spread(torch.log(-torch.expm1(token))),
        token_peak=spread(vocabulary.amax(-1) - vocabulary.mean(-1)),
        token_forward_kl=spread(r * (start - token) + (1 - r) * (ref_rest - rest)),
        ref_token_entropy=spread(-r * start - (1 - r) * ref_rest),
        token_reverse_kl=spread(p * (token - start) + (1 - p) * (rest - ref_rest)),
        token_divergences=torch.stack([spread(each) for each in divergences], -1) if divergences else None,
        divergences=loss.divergences,
        states=states,
        ref_states=states,
        layers=loss.layers,
        # One vector for all, so that kernels do not distinguish the completions of a pair.
        hidden=vectors,
        prompt_hidden=vectors,
        embedding=vectors,
        prompt_embedding=vectors,
        columns={name: torch.zeros_like(ratio) for name in loss.columns},
    )


def _groups_of_two(chosen: Scores, rejected: Scores) -> Scores:
    """Each pair as a group, with the scores 1 and 0."""
    one = torch.ones_like(chosen.logps)
    values: dict[str, Any] = {
        field.name: torch.stack([value, getattr(rejected, field.name)], 1).flatten(0, 1)
        for field in fields(Scores)
        if isinstance(value := getattr(chosen, field.name), Tensor)
    }
    scores = torch.stack([one, 0 * one], 1).flatten()
    return replace(chosen, **values, score=scores, group_sizes=(2,) * len(one), columns={})


def _evaluate(loss: Loss, axis: str, x: Tensor, starts: Tensor | None = None) -> tuple[LossOutput, Tensor]:
    """A batch of pairs at (N,) `x`, and its loss's gradient there; `starts` (N,) moves the rejected start."""
    x = x.detach().clone().requires_grad_()
    usual = torch.full_like(x, START).detach()
    chosen, rejected, sampled, mismatched = (
        _scores(loss, MOVES[axis].get(role, 0.0) * x, usual if starts is None or role != "rejected" else starts)
        for role in ("chosen", "rejected", "sampled", "mismatched")
    )
    # State (running means, numbered draws) is reset at every point: the picture shows the first step.
    fresh = copy.deepcopy(loss).double()
    groups = _groups_of_two(chosen, rejected) if loss.grouped else None
    output = fresh(PreferenceBatch(chosen, rejected, sampled=sampled, mismatched=mismatched, candidate=groups))
    if not output.loss.requires_grad:
        return output, torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(output.loss, x)
    return output, gradient


def _pairs(loss: Loss, axis: str, x: Tensor, alone: bool) -> tuple[Tensor, Tensor]:
    """(N,) losses and gradients of the pairs at (N,) `x`, each in its own batch if `alone`."""
    if not alone:
        output, gradient = _evaluate(loss, axis, x)
        if isinstance(loss, WeightedSum):
            terms = [(weight, output.metrics.get(f"{label}/loss")) for weight, label, _ in loss.terms()]
        else:
            terms = [(1.0, output.per_example)]
        parts = [weight * part.detach().reshape(-1, len(x)).mean(0) for weight, part in terms if part is not None]
        values = torch.stack(parts).sum(0)
        # A loss may override how its scalar is computed.
        if torch.isclose(values.mean(), output.loss.detach(), rtol=1e-9):
            return values, gradient * len(x)
    points = [_evaluate(loss, axis, place.reshape(1)) for place in x]
    return torch.stack([output.loss.detach() for output, _ in points]), torch.cat([slope for _, slope in points])


def _mixes(loss: Loss, axis: str) -> bool:
    """Whether two pairs in one batch get other values or gradients than each has alone."""
    x = torch.tensor([-7.0, 4.0], dtype=torch.float64)
    # The references rank the two pairs in the opposite order of x, so that a sort has an effect.
    starts = torch.tensor([START - 0.05, START], dtype=torch.float64)
    together, slopes = _evaluate(loss, axis, x, starts)
    alone = [_evaluate(loss, axis, x[i : i + 1], starts[i : i + 1]) for i in range(2)]
    mean = sum(float(output.loss.detach()) for output, _ in alone) / 2
    apart = torch.cat([slope for _, slope in alone]) / 2
    same = math.isclose(float(together.loss.detach()), mean, rel_tol=1e-9, abs_tol=1e-12)
    return not (same and torch.allclose(slopes, apart, rtol=1e-9))


def _held(loss: Loss, axis: str, span: float, mixes: bool) -> bool:
    """Whether the gradient is not the slope of the loss."""
    step = 1e-5 * span
    # Uneven shares of the span, so that they rarely hit a kink or a jump.
    x = span * torch.tensor([-0.83, -0.47, -0.29, -0.11, 0.07, 0.23, 0.53, 0.79], dtype=torch.float64)
    _, gradient = _pairs(loss, axis, x, mixes)
    slope = (_pairs(loss, axis, x + step, mixes)[0] - _pairs(loss, axis, x - step, mixes)[0]) / (2 * step)
    return int((~torch.isclose(slope, gradient, rtol=1e-4, atol=1e-8)).sum()) > 1


def _line(text: str, axes: Sequence[str], span: float) -> Line:
    """The curves of one expression, over its own role if it has only one, else over `axes`."""
    loss = parse(text)
    # A group is shown as a pair, so it has the axes of pairs.
    axes = (loss.roles[0],) if len(loss.roles) == 1 and not loss.grouped else axes
    limit = min(-START * TOKENS / max(MOVES[axis].values()) for axis in axes)
    if not 0 < span < limit:
        raise PlotError(
            f"span must be between 0 and {limit:.1f} nats for {text}, where a completion of {TOKENS} tokens becomes "
            f"certain; got {span!r}"
        )
    if loss.top_k > VOCABULARY:
        raise PlotError(
            f"{text} cannot be plotted: it asks for the {loss.top_k} likeliest tokens of a position, and these "
            f"pictures have a vocabulary of {VOCABULARY}"
        )
    curves = {}
    try:
        mixes = _mixes(loss, axes[0])
        held = _held(loss, axes[0], span, mixes)
        x = torch.linspace(-span, span, POINTS, dtype=torch.float64)
        for axis in axes:
            values, gradients = _pairs(loss, axis, x, mixes)
            curves[axis] = Curve(x, values, torch.where(gradients.abs() < NOISE, 0.0, gradients))
    except (ValueError, AssertionError) as error:
        raise PlotError(f"{text} cannot be plotted: {error or 'it needs what the pictures cannot supply'}") from None
    if not all(bool((torch.isfinite(c.loss) & torch.isfinite(c.gradient)).all()) for c in curves.values()):
        raise PlotError(f"{text} cannot be plotted: it is not finite everywhere between -{span:g} and {span:g} nats")
    if not any(bool(curve.gradient.any()) or reach(curve.loss) > NOISE for curve in curves.values()):
        what = "margin" if "margin" in axes else f"log-probability of the {' or '.join(axes)} completion"
        raise PlotError(f"{text} cannot be plotted: it does not depend on the {what}")
    return Line((text,), curves, (loss.needs.compares,), mixes, held)


def _coincide(one: dict[str, Curve], other: dict[str, Curve]) -> bool:
    return one.keys() == other.keys() and all(one[axis].same(other[axis]) for axis in one)
