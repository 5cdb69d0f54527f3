"""Unlearning token by token: some tokens of a completion are forgotten more, or in another way, than others.

Symbols as in `unlearning`; p_t = pi(y_t | x, y_<t). All of these are means over the tokens of the batch.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from prefopt.losses.checks import non_negative, whole
from prefopt.losses.errors import LossError
from prefopt.losses.likelihood import reduce_tokens
from prefopt.losses.needs import Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch
from prefopt.losses.unlearning import ForgetLoss


class _TokenWeightedAscent(ForgetLoss):
    """Gradient ascent with tokens weighted by their probability; the weights have no gradient."""

    needs = Need.TOKENS
    batchwise = True

    @abstractmethod
    def token_weights(self, token_logps: Tensor) -> Tensor:
        """(N, T) weights from the log-probabilities of the tokens."""

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        scores = self.forget(batch)
        assert scores.token_logps is not None
        assert scores.token_mask is not None
        weights = self.token_weights(scores.token_logps).detach() * scores.token_mask
        return reduce_tokens((weights * scores.token_logps).sum(-1), scores.lengths, "token", self._weights(batch))


@register("wga")
class WGA(_TokenWeightedAscent):
    """Weighted gradient ascent: tokens that are already unlikely get almost no weight.

    loss = mean over the batch's tokens of stop_gradient(p_t^beta) log p_t

    Args:
        beta: 1 in open-unlearning; 0 is gradient ascent.

    Needs: per-token log-probabilities of the forget set; no reference.
    Reference: Wang et al. 2025, arXiv 2502.19301, section 4; as locuslab/open-unlearning, trainer/utils.py.
    """

    formula = "mean_t sg(p_t^beta) log p_t on rejected completions"
    paper = "2502.19301"

    def __init__(self, beta: float = 1.0):
        super().__init__()
        self.beta = non_negative("beta", beta)

    def token_weights(self, token_logps: Tensor) -> Tensor:
        return torch.exp(self.beta * token_logps)


@register("sat_imp")
class SatImp(_TokenWeightedAscent):
    """SatImp: gradient ascent weighted by saturation and importance of each token.

    loss = mean over the batch's tokens of stop_gradient(p_t^beta1 (1 - p_t)^beta2) log p_t

    Args:
        beta1: 5 in open-unlearning.
        beta2: 1 in open-unlearning, which weights the loss 0.1 beside a likelihood on the retain set.

    Needs: per-token log-probabilities of the forget set; no reference.
    Limits: beta2 = 0 is `wga`.
    Reference: Yang et al. 2025, arXiv 2505.11953; as locuslab/open-unlearning, trainer/utils.py.
    """

    formula = "mean_t sg(p_t^beta1 (1-p_t)^beta2) log p_t on rejected completions"
    paper = "2505.11953"

    def __init__(self, beta1: float = 5.0, beta2: float = 1.0):
        super().__init__()
        self.beta1 = non_negative("beta1", beta1)
        self.beta2 = non_negative("beta2", beta2)

    def token_weights(self, token_logps: Tensor) -> Tensor:
        return torch.exp(self.beta1 * token_logps) * (-torch.expm1(token_logps)).clamp(min=0) ** self.beta2


@register("undial")
class UNDIAL(ForgetLoss):
    """UNDIAL: imitate the reference with the logit of the token to be forgotten lowered by beta.

    loss = mean over the batch's tokens of CE(softmax(reference logits - beta onehot(y_t)), pi)

    Args:
        beta: strength; 10 in open-unlearning.

    Needs: per-token log-probabilities of policy and reference and their full distributions on the forget set.
    open-unlearning averages over prompt and padding positions too; here completion positions count. Limits: beta = 0
        is distillation from the reference.
    Reference: Dong et al. 2024, arXiv 2402.10052, eq. 3; as locuslab/open-unlearning, trainer/utils.py.
    """

    formula = "mean_t CE(softmax(ref logits - beta*onehot(y_t)), pi) on rejected completions"
    paper = "2402.10052"
    batchwise = True
    needs = Need.REFERENCE | Need.FORWARD_KL

    def __init__(self, beta: float = 10.0):
        super().__init__()
        self.beta = non_negative("beta", beta)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        scores = self.forget(batch)
        assert scores.token_logps is not None
        assert scores.token_forward_kl is not None
        for name in ("ref_token_entropy", "ref_token_logps"):
            if getattr(scores, name) is None:
                raise LossError(f"undial needs {name}, but the rejected scores hold none")
        assert scores.ref_token_logps is not None
        assert scores.ref_token_entropy is not None
        assert scores.token_mask is not None
        # With r the reference, softmax(logits - beta onehot(y)) is r / Z off y and r(y) e^-beta / Z at y, so its
        # cross-entropy follows from that of r: KL(r || pi) + H(r).
        there = torch.exp(scores.ref_token_logps)
        taken = there * -math.expm1(-self.beta)
        cross_entropy = scores.token_forward_kl + scores.ref_token_entropy
        values = (cross_entropy + taken * scores.token_logps) / (1 - taken).clamp(min=1e-6)
        sums = (values * scores.token_mask).sum(-1)
        return reduce_tokens(sums, scores.lengths, "token", self._weights(batch))


@register("ce_u")
class CEU(ForgetLoss):
    """CE-U: imitate the policy's own distribution without the token to be forgotten.

    loss = mean over the batch's tokens of KL(q_t || pi) = -log(1 - p_t)
    q_t = pi with p_t set to 0 and the rest scaled up, no gradient

    Args:
        skip: how many tokens at the beginning of each completion are left out; 1 in the paper.

    Needs: log(1 - p_t) of the forget set; no reference.
    Limits: 0 where every token is already impossible. The gradient is that of unlikelihood training: large for tokens
        that the policy is sure of, 0 for unlikely ones. A completion of at most `skip` tokens has value 0.
    The paper's cross-entropy is larger by the entropy of q_t, which has no gradient.
    Numerics: log(1 - p_t) comes from the other tokens' logits, so its gradient is exact where p_t rounds to 1.
    Reference: Yang 2025, arXiv 2503.01224; as locuslab/open-unlearning, trainer/unlearn/ceu.py.
    """

    formula = "mean_t -log(1 - p_t) on rejected completions"
    paper = "2503.01224"
    batchwise = True
    needs = Need.OTHERS

    def __init__(self, skip: int = 1):
        super().__init__()
        self.skip = whole("skip", skip)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        scores = self.forget(batch)
        assert scores.token_others is not None
        assert scores.token_mask is not None
        counted = scores.token_mask & (scores.token_mask.cumsum(-1) > self.skip)
        # Not a product with the mask: outside of it there may be log 0.
        sums = torch.where(counted, -scores.token_others, 0.0).sum(-1)
        return reduce_tokens(sums, counted.sum(-1), "token", self._weights(batch))


@register("flatten")
class Flatten(ForgetLoss):
    """Logit-margin flattening: make the distribution at every forget position uniform.

    loss = mean over the batch's tokens of (max_v logit_v - mean_v logit_v)^2

    Args: none.

    Needs: the largest logit less the mean logit at every position of the forget set; no reference.
    Limits: 0 at the uniform distribution, which is its minimum. Values are large (100 and more at the start), so the
        retain term needs a large weight: `pdu` starts at 100.
    open-unlearning takes the logits at the completion's own tokens, which predict the tokens after these; here the
    logits that predict the completion's tokens count.
    Reference: Entesari et al. 2025, arXiv 2506.05314; as locuslab/open-unlearning, trainer/unlearn/pdu.py.
    """

    formula = "mean_t (max_v logit_v - mean_v logit_v)^2 on rejected completions"
    paper = "2506.05314"
    batchwise = True
    needs = Need.PEAK

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        scores = self.forget(batch)
        assert scores.token_peak is not None
        assert scores.token_mask is not None
        sums = torch.where(scores.token_mask, scores.token_peak**2, 0.0).sum(-1)
        return reduce_tokens(sums, scores.lengths, "token", self._weights(batch))
