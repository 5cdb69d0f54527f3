"""The gradients of chosen and rejected log-probabilities on probe pairs, and what the next step does to both.

A step on a margin loss moves the two answers of a pair together where their gradients point the same way. Imports
losses and scoring, never a trainer.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.analysis.gradients.push import pushes, refuse_unpushable
from prefopt.losses import Loss, PairNormalized, parse
from prefopt.losses.scores import Role
from prefopt.safety.errors import UsageError
from prefopt.scoring import Layout, RowBatch, Scorer
from prefopt.scoring.fingerprint import is_sharded
from prefopt.scoring.measure import BARE
from prefopt.scoring.scorer import rows_on_device

VERDICTS = {
    (True, True): "as wanted",
    (True, False): "both rise",
    (False, True): "both fall",
    (False, False): "swapped",
}
"""By whether the chosen answer rises and whether the rejected one falls."""
STILL = "no gradient"


@dataclass(frozen=True)
class Entanglement:
    """What a step on a loss does to each of N probe pairs, to first order; (N,) float64 tensors on the CPU.

    With g_w and g_l the gradients of the two log-probabilities, and d_w and d_l the loss's pushes, a gradient step of
    size s on the pair changes them by s * `chosen_change` and s * `rejected_change`. The paper's two conditions: the
    chosen answer rises where d_w |g_w|^2 > d_l <g_w, g_l>, the rejected one falls where d_l |g_l|^2 > d_w <g_w, g_l>.

    Attributes:
        loss: the expression.
        d_w: the loss's push on the chosen log-probability, above 0 for up; divided by |g_w| for `pair_normalized`.
        d_l: its push on the rejected one, above 0 for down; divided by |g_l| for `pair_normalized`.
        chosen_norm: |g_w|.
        rejected_norm: |g_l|.
        inner: <g_w, g_l>.
        chosen_logps: log pi(chosen), nats.
        rejected_logps: log pi(rejected).
    """

    loss: str
    d_w: Tensor
    d_l: Tensor
    chosen_norm: Tensor
    rejected_norm: Tensor
    inner: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def cosine(self) -> Tensor:
        """(N,) of the angle between the two gradients; 1 where a step cannot tell the answers apart."""
        return self.inner / (self.chosen_norm * self.rejected_norm).clamp(min=1e-300)

    @property
    def chosen_change(self) -> Tensor:
        """(N,) change of log pi(chosen) a unit of step size: d_w |g_w|^2 - d_l <g_w, g_l>."""
        return self.d_w * self.chosen_norm**2 - self.d_l * self.inner

    @property
    def rejected_change(self) -> Tensor:
        """(N,) change of log pi(rejected) a unit of step size: d_w <g_w, g_l> - d_l |g_l|^2."""
        return self.d_w * self.inner - self.d_l * self.rejected_norm**2

    @property
    def verdicts(self) -> list[str]:
        """Of each pair one of `VERDICTS`, or `STILL` where the loss has no gradient left."""
        both = zip(self.chosen_change.tolist(), self.rejected_change.tolist(), strict=True)
        return [STILL if up == down == 0 else VERDICTS[up > 0, down < 0] for up, down in both]

    def share(self, verdict: str) -> float:
        """The share of the pairs with a verdict."""
        return self.verdicts.count(verdict) / len(self)

    def metrics(self) -> dict[str, float]:
        """Means over the probes as they are logged, under `entanglement/...`."""
        means = {
            "cosine": self.cosine,
            "inner_positive": self.inner > 0,
            "inner_below_chosen": self.inner < self.chosen_norm**2,
            "inner_below_rejected": self.inner < self.rejected_norm**2,
            "chosen_rises": self.chosen_change > 0,
            "rejected_falls": self.rejected_change < 0,
            "chosen_norm": self.chosen_norm,
            "rejected_norm": self.rejected_norm,
            "push_chosen": self.d_w,
            "push_rejected": self.d_l,
        }
        return {f"entanglement/{name}": float(values.double().mean()) for name, values in means.items()}

    def __str__(self) -> str:
        """The verdict in plain words."""
        counts = {verdict: self.verdicts.count(verdict) for verdict in (*VERDICTS.values(), STILL)}
        what = {
            "as wanted": "raises the chosen and lowers the rejected answer",
            "both rise": "raises both answers",
            "both fall": "lowers both answers",
            "swapped": "lowers the chosen and raises the rejected answer",
            STILL: "changes nothing, as the loss has no gradient",
        }
        parts = [f"{what[verdict]} in {count}" for verdict, count in counts.items() if count]
        longer = int((self.rejected_norm > self.chosen_norm).sum())
        return (
            f"a step of {self.loss} on one of {len(self)} probe pairs {', '.join(parts)}. The gradients of the two "
            f"answers have a median cosine of {statistics.median(self.cosine.tolist()):.2f}; the rejected answer's is "
            f"the longer one in {longer}"
        )


def entanglement(
    model: nn.Module,
    batch: RowBatch | Mapping[str, Any],
    loss: Loss | str,
    *,
    reference: nn.Module | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> Entanglement:
    """Measure the gradient entanglement of a model on probe pairs.

    Costs a forward pass over all rows under policy and reference, and a forward and a backward pass over each row: 2.5
    times as much as training on the pairs (scripts/bench/analysis.py). Holds two gradients of the trainable
    parameters. The model, its mode and its `.grad` are as before afterwards.

    Args:
        model: a causal language model. Gradients are those of its trainable parameters, so of an adapter alone where
            it has one.
        batch: pairs from `PreferenceCollator.for_loss(loss, pad_token_id)`.
        loss: a loss or an expression, on log-probabilities of pairs.
        reference: the frozen model of a loss with a reference; None for a model with an adapter, whose reference is
            itself with the adapter off, or where the log-probabilities come with the batch.
        autocast: the context that the model runs in; default: none.

    Raises:
        UsageError: for a loss or rows that this is not about, a model without trainable parameters, or one whose
            parameters are sharded.

    Reference: Yuan et al. 2024, arXiv 2410.13828.
    """
    objective = parse(loss) if isinstance(loss, str) else loss
    refuse_unpushable(objective)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UsageError("gradient entanglement needs trainable parameters; this model has none (requires_grad)")
    if is_sharded(model):
        raise UsageError("gradient entanglement needs whole parameters; this model's are sharded (FSDP, ZeRO-3)")
    scorer = Scorer(objective, model, reference, layout=Layout("padded"))
    rows = batch if isinstance(batch, RowBatch) else rows_on_device(batch, model)
    if not rows.paired or not len(rows.rows_of(Role.CHOSEN)):
        raise UsageError("gradient entanglement is about pairs; this batch has none")
    with _evaluating(model), autocast or contextlib.nullcontext():
        with torch.no_grad():
            scored = scorer(rows, every_role=True)
        d_w, d_l = pushes(objective, scored)
        products = [_products(scorer, rows, example, trained) for example in range(rows.example_count)]
    w_norm, l_norm, inner, w_logps, l_logps = (
        torch.tensor(values, dtype=torch.float64) for values in zip(*products, strict=True)
    )
    if isinstance(objective, PairNormalized):
        d_w, d_l = (torch.where(norm > 0, d / norm, 0.0) for d, norm in ((d_w, w_norm), (d_l, l_norm)))
    return Entanglement(str(objective), d_w, d_l, w_norm, l_norm, inner, w_logps, l_logps)


def _products(scorer: Scorer, rows: RowBatch, example: int, trained: list[nn.Parameter]) -> tuple[float, ...]:
    """|g_w|, |g_l|, <g_w, g_l>, log pi(w) and log pi(l) of a pair."""
    (g_w, w_logp), (g_l, l_logp) = (
        _gradient(scorer, rows, example, role, trained) for role in (Role.CHOSEN, Role.REJECTED)
    )
    return _dot(g_w, g_w) ** 0.5, _dot(g_l, g_l) ** 0.5, _dot(g_w, g_l), w_logp, l_logp


def _gradient(
    scorer: Scorer, rows: RowBatch, example: int, role: Role, trained: list[nn.Parameter]
) -> tuple[list[Tensor | None], float]:
    """The gradient of one answer's log-probability, and that."""
    one = rows.select_rows((rows.examples == example) & (rows.roles == role))
    with torch.enable_grad():
        tokens, _ = scorer.layout.score(scorer.policy, one, extras=BARE, model_options=scorer.policy_options)
        logp = tokens.logps.sum()
        gradient = torch.autograd.grad(logp, trained, allow_unused=True)
    return list(gradient), float(logp.detach())


def _dot(one: list[Tensor | None], other: list[Tensor | None]) -> float:
    parts = [
        (a.float() * b.float()).sum().double()
        for a, b in zip(one, other, strict=True)
        if a is not None and b is not None
    ]
    return float(torch.stack(parts).sum()) if parts else 0.0


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and each module in its own mode again afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
