"""What a loss is: a small module that maps scored completions to a scalar, declares its needs, and adds to others.

`LossOutput`, `Loss`, `PairLoss` and the weighted sum. Imports torch and its neighbours (`needs`, `scores`, `values`,
`distributed`); it never sees a model, a trainer or a data set.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from prefopt.losses.distributed import global_sum, world_size
from prefopt.losses.errors import LossError
from prefopt.losses.needs import PER_TOKEN, QUANTITIES, Need
from prefopt.losses.scores import PreferenceBatch, Scores
from prefopt.losses.values import values_of

ROLES = ("chosen", "rejected", "sampled", "candidate")
"""Roles that a loss can return values for, in the order in which it does."""


@dataclass(frozen=True)
class LossOutput:
    """What calling a loss returns.

    Attributes:
        loss: scalar to minimise, with gradient.
        per_example: (N,) values before weighting by `weight` columns; for a pair loss one per pair, for a binary loss
            chosen then rejected, for a loss over groups one per group. None for a sum whose terms score different
            numbers of examples.
        metrics: detached per-example values by name, (M,) each, M may differ between names and may be 0. Average them
            over any number of batches and processes; `mean_metrics` averages over one batch.
        terms: of a sum, the weighted value of each term, with gradient; they add up to `loss`.
    """

    loss: Tensor
    per_example: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    terms: tuple[Tensor, ...] = ()

    def mean_metrics(self) -> dict[str, float]:
        """Averages over this batch of every metric that has at least one value."""
        return {name: float(values.mean()) for name, values in self.metrics.items() if values.numel()}


def arguments_of(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a class or a function is called with, in order; of a loss class these are its hyperparameters."""
    # A loss without a constructor of its own inherits torch's (*args, **kwargs), which takes nothing here.
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(make).parameters
    return {name: p for name, p in signature.items() if p.kind not in variable}


class Loss(nn.Module):
    """Base of every objective. Subclasses set the class attributes and write `per_example`.

    Constructor arguments are hyperparameters and are stored as attributes of the same name, so that a loss prints as
    the expression that parses back to it. State (running means, learned weights) belongs in buffers or parameters.

    Class attributes:
        name: the registry name, set by `register`.
        formula: the objective in one line of plain symbols.
        paper: arXiv id of the source, or "".
        trl_name: the `loss_type` of `trl.DPOConfig` with the same objective, or "".
        needs: what the scorer must supply.
        roles: the roles that `per_example` returns values for, in that order.
        paired: whether chosen and rejected must answer the same prompts row by row.
        grouped: whether `per_example` returns one value for each group of candidates.
        reads_scores: of a loss over groups, whether it needs their scores, and not only their order.
        columns: numeric data set columns that must be present in every scored role.
        limits: smallest and largest value of those columns that have limits, by name.
        top_k: how many of the largest log-probabilities `Need.TOP_K` supplies.
        divergences: which ones `Need.DIVERGENCE` supplies, as `prefopt.losses.divergences` names them.
        layers: after which ones `Need.STATES` supplies hidden states.
        batchwise: whether examples act on one another, through a statistic or a mean over the batch's tokens; None
            counts as True for losses from outside this package.
        by_length: the argument through which completion lengths count beyond averages over tokens, or "".
        outermost: whether it cannot be a term of a sum or inside another loss.
    """

    name: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    trl_name: ClassVar[str] = ""
    needs: Need = Need.NONE
    roles: tuple[str, ...] = ("chosen", "rejected")
    paired: bool = False
    grouped: bool = False
    reads_scores: bool = False
    columns: tuple[str, ...] = ()
    limits: Mapping[str, tuple[float, float]] = MappingProxyType({})
    top_k: int = 0
    divergences: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    batchwise: bool | None = None
    by_length: str = ""
    outermost: bool = False

    if TYPE_CHECKING:
        # torch types a call of any module as Any.
        def __call__(self, batch: PreferenceBatch) -> LossOutput: ...

    @property
    def _label(self) -> str:
        """The name in messages and metrics: the registered name, else the class's."""
        return self.name or type(self).__name__

    @property
    def separable(self) -> bool:
        """Whether the loss of a batch of pairs is the mean of the losses of its single examples.

        False where examples act on one another, where state changes with every batch, or where completions are
        sampled or moved to other prompts. A separable loss may be computed in parts.
        """
        parts = [part for part in self.modules() if isinstance(part, Loss)]
        foreign = [part for part in parts if not type(part).__module__.startswith("prefopt.losses.")]
        return not (
            any(part.batchwise is None for part in foreign)
            or any(part.batchwise or Need.MISMATCHED in part.needs or "sampled" in part.roles for part in parts)
            or next(self.buffers(), None) is not None
        )

    @abstractmethod
    def per_example(self, batch: PreferenceBatch) -> Tensor:
        """(N,) loss values: one per pair or per group for losses on these, else those of each role in `roles`."""

    def reward(self, scores: Scores) -> Tensor | None:
        """(N,) implicit reward that this objective gives a completion, or None if it defines none."""
        return None

    @property
    def has_reward(self) -> bool:
        """Whether this loss, or a loss inside it, defines `reward`, so that `rewards/...` are logged."""
        return any(
            type(part).reward is not Loss.reward
            for part in self.modules()
            if isinstance(part, Loss)
            and not any(isinstance(child, (Loss, nn.ModuleList)) for child in part.children())
        )

    def needs_of(self, role: str) -> Need:
        """What the scorer must supply for the completions of one role."""
        if role == "mismatched":
            return self.needs & Need.REFERENCE if Need.MISMATCHED in self.needs else Need.NONE
        return self.needs if role in self.roles else Need.NONE

    def forward(self, batch: PreferenceBatch) -> LossOutput:
        """Score a batch.

        Raises:
            LossError: if a role, a reference or a column that this loss needs is missing from the batch, or if
                `per_example` does not return one number per example, with a gradient where the scores have one.
        """
        self._check(batch)
        batch = batch.at_least_float32()
        values = values_of(self, batch, self.absent())
        weighted = values if (weight := self._weights(batch)) is None else values * weight.to(values.dtype)
        return LossOutput(weighted.sum() / self._count(values, batch), values, self._metrics(batch))

    def absent(self) -> dict[str, str]:
        """Fields of the scores that this loss does not need, and the need that each belongs to."""
        needs = self.needs | (Need.TOKENS if self.needs & PER_TOKEN else Need.NONE)
        absent = {name: need for need, q in QUANTITIES.items() if need not in needs for name in q.fields}
        return {name: f"Need.{need.name}" for name, need in absent.items()}

    def hyperparameters(self) -> dict[str, Any]:
        """Constructor arguments and their values, in order."""
        return {name: getattr(self, name) for name in arguments_of(type(self))}

    def terms(self) -> Iterator[tuple[float, str, Loss]]:
        """(weight, unique label, loss) of every term; a plain loss is its own single term."""
        yield 1.0, self._label, self

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={_written(value)}" for name, value in self.hyperparameters().items())
        return f"{self._label}({arguments})"

    def extra_repr(self) -> str:
        return str(self)

    def __add__(self, other: Loss) -> WeightedSum:
        if not isinstance(other, Loss):
            return NotImplemented
        return WeightedSum([*_flat(1.0, self), *_flat(1.0, other)])

    def __sub__(self, other: Loss) -> WeightedSum:
        if not isinstance(other, Loss):
            return NotImplemented
        return WeightedSum([*_flat(1.0, self), *_flat(-1.0, other)])

    def __mul__(self, weight: float) -> WeightedSum:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            return NotImplemented
        return WeightedSum(_flat(float(weight), self))

    __rmul__ = __mul__

    def _check(self, batch: PreferenceBatch) -> None:
        for role in self.roles:
            scores = batch.role(role)
            if scores is None:
                raise LossError(
                    f"{self._label} needs {' and '.join(self.roles)} completions; this batch has no {role} ones"
                )
            if role == "candidate" and (scores.group_sizes is None or scores.score is None):
                raise LossError(
                    f"{self._label} compares the completions of a group: give the candidate scores group_sizes, the "
                    "number of completions of each prompt, and score, one a completion"
                )
            needs = self.needs | (Need.TOKENS if self.needs & PER_TOKEN else Need.NONE)
            for need, quantity in QUANTITIES.items():
                missing = [name for name in quantity.fields if getattr(scores, name) is None]
                if need in needs and missing:
                    raise LossError(
                        f"{self._label} needs {missing[0]}, but the {role} scores hold none: {quantity.remedy}"
                    )
            if Need.TOKENS in self.needs and Need.REFERENCE in self.needs and scores.ref_token_logps is None:
                raise LossError(
                    f"{self._label} needs ref_token_logps, but the {role} scores hold none: keep the reference's "
                    "per-token log-probabilities too"
                )
            if Need.STATES in self.needs and Need.REFERENCE in self.needs and scores.ref_states is None:
                raise LossError(
                    f"{self._label} needs ref_states, but the {role} scores hold none: keep the reference's hidden "
                    "states too"
                )
            for column in self.columns:
                if column not in scores.columns:
                    raise LossError(f"{self._label} needs a numeric data set column {column!r}; the batch has none")
        if self.paired and not batch.paired:
            raise LossError(
                f"{self._label} compares the chosen and the rejected completion of one prompt, but this batch holds "
                "unpaired feedback; use a loss for unpaired data, such as kto"
            )
        if Need.MISMATCHED in self.needs and batch.mismatched is None:
            raise LossError(
                f"{self._label} needs completions scored under other examples' prompts, but batch.mismatched is None"
            )

    def _weights(self, batch: PreferenceBatch) -> Tensor | None:
        roles = self.roles[:1] if self.paired else self.roles
        scores = [s for role in roles if (s := batch.role(role)) is not None]
        if all(s.weight is None for s in scores):
            return None
        if self.grouped:
            (candidates,) = scores
            assert candidates.weight is not None
            sizes = torch.tensor(candidates.group_sizes, dtype=torch.long, device=candidates.logps.device)
            return candidates.weight[sizes.cumsum(0) - sizes]
        return torch.cat([s.logps.new_ones(len(s)) if s.weight is None else s.weight.to(s.logps) for s in scores])

    def _count(self, values: Tensor, batch: PreferenceBatch) -> Tensor | float:
        # Unpaired roles have different sizes on different processes and in accumulated micro-batches, whose gradients
        # are averaged with equal weight: dividing by the mean count makes that average the mean over the global batch.
        sizes = {} if batch.sizes is None or batch.paired else batch.sizes
        if known := set(self.roles) <= set(sizes):
            count = torch.stack([sizes[role].to(values) for role in self.roles]).sum()
        else:
            count = values.new_tensor(float(values.numel()))
        if self.grouped or batch.paired or (world_size() == 1 and not known):
            return max(values.numel(), 1)
        return (global_sum(count) / world_size()).clamp(min=1e-12)

    def _metrics(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        rewards: dict[str, Tensor] = {}
        with torch.no_grad():
            for role in ("chosen", "rejected"):
                scores = batch.role(role)
                if scores is not None and role in self.roles and (reward := self.reward(scores)) is not None:
                    rewards[role] = metrics[f"rewards/{role}"] = reward.detach()
            if len(rewards) == 2 and batch.paired:
                metrics["rewards/margins"] = rewards["chosen"] - rewards["rejected"]
                metrics["rewards/accuracies"] = (rewards["chosen"] > rewards["rejected"]).to(rewards["chosen"].dtype)
        return metrics


class PairLoss(Loss):
    """A loss over pairs: chosen and rejected completions of the same prompts, equal N."""

    paired = True


class WeightedSum(Loss):
    """sum_i weight_i * loss_i, each term with its own hyperparameters and its own metrics.

    `needs`, `roles` and `columns` are the unions of the terms'. The first term that defines rewards supplies the
    `rewards/...` metrics; every term adds its own values under `<term>/`.
    """

    def __init__(self, terms: list[tuple[float, Loss]]):
        super().__init__()
        if not terms:
            raise LossError("a sum of losses needs at least one term")
        self.weights = [weight for weight, _ in terms]
        if not all(math.isfinite(weight) for weight in self.weights):
            raise LossError(f"the weights of a sum of losses must be finite, got {self.weights}")
        self.losses = nn.ModuleList(loss for _, loss in terms)
        members = [loss for _, loss in terms]
        for loss in members:
            if loss.outermost:
                raise LossError(f"{loss._label} must be the outermost loss: move what is added to it inside")
            self.needs = self.needs | loss.needs
        self.roles = tuple(role for role in ROLES if any(role in loss.roles for loss in members))
        self.paired = any(loss.paired for loss in members)
        self.grouped = any(loss.grouped for loss in members)
        self.reads_scores = any(loss.reads_scores for loss in members)
        self.columns = tuple(dict.fromkeys(column for loss in members for column in loss.columns))
        self.limits = {column: limits for loss in members for column, limits in loss.limits.items()}
        self.top_k = max(loss.top_k for loss in members)
        self.divergences = tuple(dict.fromkeys(name for loss in members for name in loss.divergences))
        self.layers = tuple(dict.fromkeys(layer for loss in members for layer in loss.layers))

    def needs_of(self, role: str) -> Need:
        needs = Need.NONE
        for _, _, loss in self.terms():
            needs |= loss.needs_of(role)
        return needs

    def terms(self) -> Iterator[tuple[float, str, Loss]]:
        seen: dict[str, int] = {}
        for weight, loss in zip(self.weights, self.losses, strict=True):
            assert isinstance(loss, Loss)
            seen[loss._label] = seen.get(loss._label, 0) + 1
            again = "" if seen[loss._label] == 1 else f"_{seen[loss._label]}"
            yield weight, f"{loss._label}{again}", loss

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        values = self.forward(batch).per_example
        if values is None:
            raise LossError(f"the terms of {self} score different numbers of examples, so they have no common values")
        return values

    def forward(self, batch: PreferenceBatch) -> LossOutput:
        total: Tensor | float = 0.0
        per_example: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        same_size = True
        parts = []
        for weight, label, loss in self.terms():
            output = loss(batch)
            parts.append(weight * output.loss)
            total = total + parts[-1]
            values = output.per_example
            same_size = same_size and values is not None and (per_example is None or values.shape == per_example.shape)
            if same_size and values is not None:
                per_example = weight * values if per_example is None else per_example + weight * values
            if values is not None:
                metrics[f"{label}/loss"] = values.detach()
            for name, value in output.metrics.items():
                metrics.setdefault(name, value)
                metrics[f"{label}/{name}"] = value
        assert isinstance(total, Tensor)
        return LossOutput(total, per_example if same_size else None, metrics, tuple(parts))

    def hyperparameters(self) -> dict[str, Any]:
        return {label: loss.hyperparameters() for _, label, loss in self.terms()}

    def __str__(self) -> str:
        text = ""
        for weight, _, loss in self.terms():
            sign = "-" if weight < 0 else "+"
            scale = "" if abs(weight) == 1 else f"{abs(weight)!r}*"
            text += f" {sign} {scale}{loss}"
        return text[3:] if text.startswith(" + ") else "-" + text[3:]


def _written(value: Any) -> str:
    """A hyperparameter as an expression writes it."""
    return str(value) if isinstance(value, Loss) else repr(value)


def _flat(weight: float, loss: Loss) -> list[tuple[float, Loss]]:
    if isinstance(loss, WeightedSum):
        return [(weight * inner, term) for inner, _, term in loss.terms()]
    return [(weight, loss)]
