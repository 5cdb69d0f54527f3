"""Unlearning: rejected completions are the forget set, chosen ones the retain set.

A forget objective plus a retain term is an expression: `npo(beta=0.1) + sft` is NPO+RT, `ga + kl_retain` is GA+KL.
Symbols as in `direct`; a = log pi(y|x) / n per token. The reference is the model before unlearning. Forget objectives
return values for the rejected role, retain terms for the chosen one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.base import Loss
from prefopt.losses.checks import finite, positive
from prefopt.losses.direct import ReferencePairLoss, paired_roles
from prefopt.losses.distributed import global_mean
from prefopt.losses.errors import LossError
from prefopt.losses.likelihood import Reduction, check_reduction, reduce_tokens
from prefopt.losses.needs import Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores


class ForgetLoss(Loss):
    """A loss on the completions to be forgotten."""

    roles = ("rejected",)

    @staticmethod
    def forget(batch: PreferenceBatch) -> Scores:
        assert batch.rejected is not None
        return batch.rejected


@register("npo")
class NPO(ForgetLoss):
    """Negative preference optimization: DPO without the chosen completion.

    loss = (2 / beta) log(1 + e^(beta u))

    Args:
        beta: 0.1 in the paper.

    Needs: reference sums of the forget set.
    Limits: bounded below by 0; its gradient is 2 sigmoid(beta u) times gradient ascent's on summed log-probabilities,
        1 where policy = reference, and fades as the completion is forgotten. beta to 0 is gradient ascent, up to the
        constant (2 / beta) log 2.
    Reference: Zhang et al. 2024, arXiv 2404.05868, eq. 3; as licong-lin/negative-preference-optimization.
    """

    formula = "(2/beta) log(1 + e^(beta*u_l))"
    paper = "2404.05868"
    needs = Need.REFERENCE

    def __init__(self, beta: float = 0.1):
        super().__init__()
        self.beta = positive("beta", beta)

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * scores.ratios

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return 2 / self.beta * F.softplus(self.beta * self.forget(batch).ratios)


@register("simnpo")
class SimNPO(ForgetLoss):
    """SimNPO: NPO without a reference, on per-token log-probabilities.

    loss = (2 / beta) log(1 + e^(beta (a + delta)))

    Args:
        beta: 4.5 in open-unlearning.
        delta: offset of the per-token log-probability; 0 in open-unlearning, which weights the loss 0.125.

    Needs: sums and lengths of the forget set; no reference.
    Reference: Fan et al. 2024, arXiv 2410.07163, eq. 4; as locuslab/open-unlearning, trainer/unlearn/simnpo.py.
    """

    formula = "(2/beta) log(1 + e^(beta*(a_l + delta)))"
    paper = "2410.07163"

    def __init__(self, beta: float = 4.5, delta: float = 0.0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.delta = finite("delta", delta)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return 2 / self.beta * F.softplus(self.beta * (self.forget(batch).mean_logps + self.delta))


@register("ga")
class GradientAscent(ForgetLoss):
    """Gradient ascent: minus the likelihood loss of the forget set.

    loss = log pi(y_l|x), normalised by `nll`

    Args:
        nll: "token", a mean over all tokens of the batch (the official code), "mean" per token of each example, or
            "sum".

    Needs: sums and lengths of the forget set; no reference.
    Limits: unbounded below: long runs destroy the model.
    Reference: Maini et al. 2024, arXiv 2401.06121 (TOFU), section 3; as locuslab/open-unlearning.
    """

    formula = "log pi(y_l|x), over the batch's tokens (nll=token), per token (mean) or summed (sum)"
    paper = "2401.06121"

    def __init__(self, nll: Reduction = "token"):
        super().__init__()
        check_reduction("nll", nll)
        self.nll = nll
        self.batchwise = nll == "token"
        self.by_length = "nll" if nll == "token" else ""

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        scores = self.forget(batch)
        return reduce_tokens(scores.logps, scores.lengths, self.nll, self._weights(batch))


@register("kl_retain")
class KLRetain(Loss):
    """Stay close to the reference on the retain set: the full KL of next-token distributions.

    loss = mean over positions of KL(ref || pi) (direction="forward") or KL(pi || ref) ("reverse")

    Args:
        direction: "forward" in TOFU's and NPO's code; the NPO paper (2404.05868) writes "reverse".
        reduction: "token", a mean over all completion positions of the batch, "mean" per completion, or "sum".

    Needs: the full next-token distributions of policy and reference on the retain set.
    TOFU's code also counts prompt and padding positions and does not shift them; here completion positions count.
    Limits: policy = reference gives 0.
    Reference: Maini et al. 2024, arXiv 2401.06121 (TOFU), section 3; as locuslab/open-unlearning, trainer/utils.py.
    """

    formula = "mean_t KL(ref || pi) on chosen completions; KL(pi || ref) if direction='reverse'"
    paper = "2401.06121"
    needs = Need.FORWARD_KL
    roles = ("chosen",)

    def __init__(
        self,
        direction: Literal["forward", "reverse"] = "forward",
        reduction: Reduction = "token",
    ):
        super().__init__()
        if direction not in ("forward", "reverse"):
            raise LossError(f"direction must be 'forward' or 'reverse', got {direction!r}")
        check_reduction("reduction", reduction)
        self.direction = direction
        self.reduction = reduction
        self.batchwise = reduction == "token"
        self.needs = Need.FORWARD_KL if direction == "forward" else Need.REVERSE_KL

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.chosen is not None
        scores = batch.chosen
        divergence = scores.token_forward_kl if self.direction == "forward" else scores.token_reverse_kl
        assert divergence is not None
        return reduce_tokens(divergence.sum(-1), scores.lengths, self.reduction, self._weights(batch))


@register("kto_forget")
class KTOForget(ReferencePairLoss):
    """KTO for unlearning: the completion to be forgotten falls below an "I don't know" answer to the same prompt.

    loss = 1 - (2 / beta) log sigmoid(z - beta u_l),  z = mean of u_w over the batch of all processes, no gradient

    Args:
        beta: 0.1 in the paper's code.
        link: "logsigmoid" as above, or "sigmoid", which drops the logarithm.
        baseline: "code" as above; "paper" multiplies z by beta, as the paper writes it. At beta 0.1 they differ by 10.

    Needs: reference sums; chosen completions are the "I don't know" answers. As in the official code, z may fall below
    0.
    Reference: Zhang et al. 2024, arXiv 2404.05868, appendix; as licong-lin/negative-preference-optimization,
        TOFU/dataloader.py (`kto_sigmoid`, `kto_logsigmoid`).
    """

    formula = "1 - (2/beta) log sigmoid(z - beta*u_l), z = mean(u_w); beta*mean(u_w) if baseline='paper'"
    paper = "2404.05868"
    batchwise = True

    def __init__(
        self,
        beta: float = 0.1,
        link: Literal["logsigmoid", "sigmoid"] = "logsigmoid",
        baseline: Literal["code", "paper"] = "code",
    ):
        super().__init__()
        if link not in ("logsigmoid", "sigmoid"):
            raise LossError(f"link must be 'logsigmoid' or 'sigmoid', got {link!r}")
        if baseline not in ("code", "paper"):
            raise LossError(f"baseline must be 'code' or 'paper', got {baseline!r}")
        self.beta = positive("beta", beta)
        self.link = link
        self.baseline = baseline

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        idk, forget = paired_roles(batch)
        z = global_mean(idk.ratios, self._weights(batch)) * (self.beta if self.baseline == "paper" else 1)
        x = z - self.beta * forget.ratios
        return 1 - 2 / self.beta * (F.logsigmoid(x) if self.link == "logsigmoid" else torch.sigmoid(x))
