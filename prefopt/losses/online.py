"""Terms of online and iterative methods: they use the previous policy, or completions that the policy just sampled.

Symbols as in `direct`; q = log-probability under the previous iterate.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from torch import Tensor

from prefopt.losses.base import Loss, PairLoss
from prefopt.losses.checks import non_negative, positive
from prefopt.losses.direct import paired_roles
from prefopt.losses.distributed import global_sum, present
from prefopt.losses.errors import LossError
from prefopt.losses.needs import Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores


@register("inpo")
class INPO(PairLoss):
    """Iterative Nash policy optimization: IPO against a blend of the reference and the previous iterate.

    loss = (h_w - h_l - 1 / (2 eta))^2,  h = p - (tau / eta) r - (1 - tau / eta) q,  sums

    Args:
        eta: inverse step size of mirror descent; 0.002 in yale-nlp/COMAL, 0.0075 in MNPO's code.
        tau: strength of the pull towards the reference, 0 <= tau <= eta; a third of eta in both.

    Needs: sums under the reference and under the previous iterate, from which both completions should be drawn.
    Limits: tau = eta, and the first iteration (previous = reference), are IPO(eta, average=False); tau = 0 is IPO
        against the previous iterate. With too small an eta it need not converge.
    Rewards: eta h, so that the reward margin's target is 1/2.
    Reference: Zhang et al. 2024, arXiv 2407.00617, eq. 9; as yale-nlp/COMAL, losses.py (nash_loss).
    """

    formula = "(h_w - h_l - 1/(2*eta))^2, h = p - (tau/eta)*r - (1 - tau/eta)*q"
    paper = "2407.00617"
    needs = Need.REFERENCE | Need.PREVIOUS

    def __init__(self, eta: float = 0.0075, tau: float = 0.0025):
        super().__init__()
        self.eta = positive("eta", eta)
        self.tau = non_negative("tau", tau, most=eta)

    def reward(self, scores: Scores) -> Tensor:
        assert scores.ref_logps is not None
        assert scores.prev_logps is not None
        share = self.tau / self.eta
        return self.eta * (scores.logps - share * scores.ref_logps - (1 - share) * scores.prev_logps)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        return ((self.reward(chosen) - self.reward(rejected)) / self.eta - 1 / (2 * self.eta)) ** 2


@register("xpo_bonus")
class XPOBonus(PairLoss):
    """The exploration bonus of exploratory preference optimization: what the reference writes becomes less likely.

    loss = log pi of the pair's completion that was drawn from the reference, summed over its tokens

    Args: none.

    Needs: sums; the column `chosen_from_reference`: 1 where the chosen completion was drawn from the reference and the
    rejected one from the policy, 0 the other way round. No reference: the bonus moves with the policy alone.
    Limits: unbounded below, so its weight beside DPO is small (1e-5 is TRL's default): preset `xpo`.
    Reference: Xie et al. 2024, arXiv 2405.21046, algorithm 1; as TRL's experimental XPO trainer.
    """

    formula = "log pi(y|x) of the completion drawn from the reference"
    paper = "2405.21046"
    columns = ("chosen_from_reference",)
    limits = MappingProxyType({"chosen_from_reference": (0.0, 1.0)})

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        share = chosen.columns["chosen_from_reference"].to(chosen.logps)
        return share * chosen.logps + (1 - share) * rejected.logps


@register("kl_online")
class KLOnline(Loss):
    """The reverse KL to the reference, estimated on completions drawn from the policy itself (HyPO's online term).

    gradient of stop_gradient(u - b) log pi(y|x);  the value is the estimate u itself

    Args:
        baseline: b: "leave_one_out", the mean u of the batch's other samples, or "none". A baseline
            usually lowers the variance and does not change the mean gradient.

    Needs: reference sums of the sampled role: completions drawn from the current policy at temperature 1.
    Differentiating the sample mean of u instead would have an expected gradient of 0. A single sample has no baseline.
    Reference: Song et al. 2024, arXiv 2406.01462, algorithm 1 (from memory; the paper's repository could not be
        read). Leave-one-out as in Ahmadian et al. 2024, arXiv 2402.14740, here over the samples of the batch.
    """

    formula = "E_pi[u], gradient of sg(u - b) log pi(y|x) on sampled completions"
    paper = "2406.01462"
    needs = Need.REFERENCE
    roles = ("sampled",)

    def __init__(self, baseline: Literal["leave_one_out", "none"] = "leave_one_out"):
        super().__init__()
        if baseline not in ("leave_one_out", "none"):
            raise LossError(f"baseline must be 'leave_one_out' or 'none', got {baseline!r}")
        self.baseline = baseline

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.sampled is not None
        estimate = batch.sampled.ratios.detach()
        counted = present(estimate, self._weights(batch))
        others = counted.sum() - counted
        rest = ((estimate * counted).sum() - estimate * counted) / others.clamp(min=1)
        advantage = estimate - rest * (others > 0) if self.baseline == "leave_one_out" else estimate
        surrogate = advantage * batch.sampled.logps
        return estimate + surrogate - surrogate.detach()


@register("kl_prior")
class KLPrior(Loss):
    """SuperHF's KL prior: stay close to the reference on the completions that are trained on.

    loss = K_i per example, K_i = max(0, mean over completion positions of KL(ref || pi))

    Args:
        reduction: "sum" over the examples of the batch of all processes, as the official code does (on one process)
            beside a likelihood that is a mean, or "mean".

    Needs: the full next-token distributions of policy and reference on the chosen completions.
    The official code computes the forward direction and uses positions without the usual shift by one; here
    completion positions count. Limits: policy = reference gives 0.
    Reference: Mukobi et al. 2023, arXiv 2310.16763, section 3; as openfeedback/superhf, src/superhf/training.py.
    """

    formula = "sum over examples of mean_t KL(ref || pi) on chosen completions"
    paper = "2310.16763"
    needs = Need.FORWARD_KL
    roles = ("chosen",)

    def __init__(self, reduction: Literal["sum", "mean"] = "sum"):
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise LossError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.reduction = reduction
        self.batchwise = reduction == "sum"

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.chosen is not None
        scores = batch.chosen
        assert scores.token_forward_kl is not None
        values = (scores.token_forward_kl.sum(-1) / scores.lengths.clamp(min=1)).clamp(min=0)
        if self.reduction == "mean":
            return values
        return values * global_sum(present(values, self._weights(batch)).sum())
