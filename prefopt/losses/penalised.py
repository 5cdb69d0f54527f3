"""DPO's margin with something added to it or its scores reshaped: penalties, length terms, other divergences.

Symbols as in `direct`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.checks import finite, non_negative, positive, whole
from prefopt.losses.direct import ReferencePairLoss, paired_roles
from prefopt.losses.errors import LossError
from prefopt.losses.needs import Need
from prefopt.losses.numerics import capped_exp, capped_expm1, numbered_generator
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores


@register("dpop")
class DPOP(ReferencePairLoss):
    """DPO-Positive (Smaug): a penalty where the chosen completion falls below its reference likelihood.

    loss = -log sigmoid(beta (d - lam relu(-u_w)))

    Args:
        beta: 0.1 to 0.3 in the paper.
        lam: weight of the penalty, inside the sigmoid; the paper uses 5, 50 and 500.

    Needs: reference sums.
    Limits: u_w >= 0 or lam = 0 is DPO.
    Reference: Pal et al. 2024, arXiv 2402.13228, eq. 3.
    """

    formula = "-log sigmoid(beta*(d - lam*relu(-u_w)))"
    paper = "2402.13228"

    def __init__(self, beta: float = 0.1, lam: float = 50.0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.lam = non_negative("lam", lam)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, _ = paired_roles(batch)
        return -F.logsigmoid(self.scaled_margin(batch) - self.beta * self.lam * torch.relu(-chosen.ratios))


@register("rdpo")
class RDPO(ReferencePairLoss):
    """R-DPO: DPO for a reward with a penalty of alpha per token.

    loss = -log sigmoid(beta d + alpha (n_w - n_l))

    Args:
        beta: as in DPO.
        alpha: penalty per token; 0.005 to 0.01 for dialogue, 0.2 to 0.5 for summaries.

    Needs: reference sums, lengths.
    The length term enters with plus: a longer chosen answer is partly explained by its length, so its gradient is
    smaller. Limits: alpha = 0 or equal lengths is DPO.
    Reference: Park et al. 2024, arXiv 2403.19159, eq. 9; sign as in HumainLab/Understand_MarginPO, dpo.py.
    """

    formula = "-log sigmoid(beta*d + alpha*(n_w - n_l))"
    paper = "2403.19159"

    def __init__(self, beta: float = 0.1, alpha: float = 0.01):
        super().__init__()
        self.beta = positive("beta", beta)
        self.alpha = finite("alpha", alpha)
        self.by_length = "alpha" if alpha else ""

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        z = self.scaled_margin(batch)
        return -F.logsigmoid(z + self.alpha * (chosen.lengths - rejected.lengths).to(z.dtype))


@register("ld_dpo")
class LDDPO(ReferencePairLoss):
    """LD-DPO: tokens past the length of the shorter completion have weight alpha.

    loss = -log sigmoid(beta d'), d' being d with per-token log-ratios weighted 1 up to min(n_w, n_l), alpha after

    Args:
        beta: as in DPO.
        alpha: weight of the surplus tokens, in [0, 1]; the paper suggests about 0.5.

    Needs: per-token log-probabilities of policy and reference.
    Limits: alpha = 1 or equal lengths is DPO; alpha = 0 cuts both completions to the common length.
    Reference: Liu et al. 2024, arXiv 2409.06411, eq. 9; as TRL's `ld_alpha`.
    """

    formula = "-log sigmoid(beta*d), tokens past min(n_w, n_l) weighted alpha"
    paper = "2409.06411"
    needs = Need.REFERENCE | Need.TOKENS

    def __init__(self, beta: float = 0.1, alpha: float = 0.5):
        super().__init__()
        self.beta = positive("beta", beta)
        self.alpha = non_negative("alpha", alpha, most=1)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        common = torch.minimum(chosen.lengths, rejected.lengths)
        d = self._ratios(chosen, common) - self._ratios(rejected, common)
        return -F.logsigmoid(self.beta * d)

    def _ratios(self, scores: Scores, common: Tensor) -> Tensor:
        assert scores.token_logps is not None
        assert scores.ref_token_logps is not None
        assert scores.token_mask is not None
        place = scores.token_mask.cumsum(-1)  # 1 at the first completion token
        ratios = scores.token_logps - scores.ref_token_logps
        kept = torch.where(place <= common.unsqueeze(-1), ratios, self.alpha * ratios)
        return (kept * scores.token_mask).sum(-1)


@register("sampo")
class SamPO(ReferencePairLoss):
    """SamPO: both completions of a pair are compared on equally many of their tokens, drawn anew at every step.

    loss = -log sigmoid(beta d'), d' being d with the log-ratios of min(n_w, n_l) random tokens of each completion

    Args:
        beta: as in DPO.
        seed: of the draws, which are numbered: a resumed run continues with the next one.

    Needs: per-token log-probabilities of policy and reference.
    During evaluation the sum over drawn tokens is replaced by its expectation, min(n_w, n_l) / n times the whole sum.
    Policy and reference are read at the same tokens; the official code draws for each of the two. The examples of a
    batch share one draw of noise by place; each gets a uniform choice of its tokens.
    Limits: equal lengths are DPO; the evaluation's loss is DPO's on log-ratios scaled to the shorter length.
    Reference: Lu et al. 2024, arXiv 2406.10957; as LuJunru/SamPO, dpo_trainer.py.
    """

    formula = "-log sigmoid(beta*d), d over min(n_w, n_l) random tokens of each completion"
    paper = "2406.10957"
    needs = Need.REFERENCE | Need.TOKENS

    def __init__(self, beta: float = 0.1, seed: int = 0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.seed = whole("seed", seed)
        self.draws: Tensor
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        common = torch.minimum(chosen.lengths, rejected.lengths)
        if not self.training:
            shares = [common / scores.lengths.clamp(min=1) for scores in (chosen, rejected)]
            return -F.logsigmoid(self.beta * (shares[0] * chosen.ratios - shares[1] * rejected.ratios))
        generator = numbered_generator(self.seed, int(self.draws))
        self.draws.add_(1)
        assert chosen.token_mask is not None
        assert rejected.token_mask is not None
        width = max(chosen.token_mask.shape[1], rejected.token_mask.shape[1])
        # Drawn in blocks: the numbers of the first places then do not depend on how far a batch is padded.
        noise = torch.rand(-(-width // _BLOCK) * _BLOCK, generator=generator).to(chosen.logps.device)
        d = _drawn_ratios(chosen, common, noise) - _drawn_ratios(rejected, common, noise)
        return -F.logsigmoid(self.beta * d)


_BLOCK = 4096


def _drawn_ratios(scores: Scores, count: Tensor, noise: Tensor) -> Tensor:
    """(N,) log-ratios of the `count` completion tokens with the largest noise."""
    assert scores.token_logps is not None
    assert scores.ref_token_logps is not None
    assert scores.token_mask is not None
    ordered = noise[: scores.token_mask.shape[1]].masked_fill(~scores.token_mask, -1.0)
    rank = ordered.argsort(-1, descending=True).argsort(-1)
    drawn = (rank < count.unsqueeze(-1)) & scores.token_mask
    return ((scores.token_logps - scores.ref_token_logps) * drawn).sum(-1)


@register("dpo_shift")
class DPOShift(ReferencePairLoss):
    """DPO-Shift: the rejected side counts less, so that the likelihood of chosen completions falls less.

    loss = -log sigmoid(beta u_w - shift beta u_l)

    Args:
        beta: as in DPO; 0.01 in the authors' recipes for UltraFeedback.
        shift: weight of the rejected side, in (0, 1]. The authors trained with 0.55 to 0.99, and with values that rise
            from 0.95 to 1 or fall from 1 to 0.95 over the run; here it is constant.

    Needs: reference sums.
    Limits: shift = 1 is DPO. `mappo` takes the weight of each pair from its scores.
    Reference: Yang et al. 2025, arXiv 2502.07599; as Meaquadddd/DPO-Shift, scripts/dposhift_trainer.py.
    """

    formula = "-log sigmoid(beta*u_w - shift*beta*u_l)"
    paper = "2502.07599"

    def __init__(self, beta: float = 0.1, shift: float = 0.95):
        super().__init__()
        self.beta = positive("beta", beta)
        self.shift = positive("shift", shift, most=1)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        return -F.logsigmoid(self.reward(chosen) - self.shift * self.reward(rejected))


@register("chi_po")
class ChiPO(ReferencePairLoss):
    """Chi-squared preference optimization: the link z + log z in place of DPO's log z.

    loss = -log sigmoid(clip(beta [phi(u_w) - phi(u_l)], -clip, clip)),  phi(u) = e^u + u

    Args:
        beta: as in DPO; the paper's theory allows small values.
        clip: 2 R_max, the largest reward difference considered possible; None does not clip. A clipped pair has no
            gradient.

    Needs: reference sums.
    e^u is continued along its tangent beyond u = 20, because summed log-ratios of long completions overflow it.
    Limits: for u << 0 the link is DPO's. The author of huggingface/trl pull request 3573 could not reproduce the
    paper's gains. The clip is from memory of the paper; neither that pull request nor another public copy has it.
    Reference: Huang et al. 2024, arXiv 2407.13399, eq. 5 and algorithm 1.
    """

    formula = "-log sigmoid(clip(beta*(phi(u_w) - phi(u_l)))), phi(u) = e^u + u"
    paper = "2407.13399"

    def __init__(self, beta: float = 0.1, clip: float | None = None):
        super().__init__()
        self.beta = positive("beta", beta)
        self.clip = clip if clip is None else positive("clip", clip)

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * (capped_exp(scores.ratios, cap=20.0) + scores.ratios)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        z = self.scaled_margin(batch)
        return -F.logsigmoid(z if self.clip is None else z.clamp(-self.clip, self.clip))


@register("f_dpo")
class FDPO(ReferencePairLoss):
    """f-DPO: DPO under another divergence from the reference.

    loss = -log sigmoid(beta (g(u_w) - g(u_l))),  g(u) = f'(e^u) up to a constant:
    reverse_kl u;  forward_kl 1 - e^-u;  js log 2 + log sigmoid(u);  alpha (e^{(alpha - 1) u} - 1) / (alpha - 1)

    Args:
        beta: as in DPO.
        divergence: "reverse_kl" (DPO), "forward_kl", "js" (Jensen-Shannon) or "alpha".
        alpha: coefficient of the alpha divergence; unused by the others. Towards 1 it is the reverse KL, at 0 the
            forward KL, as in TRL. In the authors' code (alecwangcq/f-divergence-dpo) alpha is 1 minus
            this one.

    Needs: reference sums.
    Exponents are continued along their tangent beyond 30. The forward KL's gradient grows as e^-u for completions far
    below their reference.
    Reference: Wang et al. 2023, arXiv 2309.16240, table 1; as TRL's `f_divergence_type`.
    """

    formula = "-log sigmoid(beta*(f'(e^u_w) - f'(e^u_l)))"
    paper = "2309.16240"

    def __init__(
        self,
        beta: float = 0.1,
        divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
        alpha: float = 0.5,
    ):
        super().__init__()
        if divergence not in ("reverse_kl", "forward_kl", "js", "alpha"):
            raise LossError(f"divergence must be 'reverse_kl', 'forward_kl', 'js' or 'alpha', got {divergence!r}")
        self.beta = positive("beta", beta)
        self.divergence = divergence
        self.alpha = finite("alpha", alpha)

    def reward(self, scores: Scores) -> Tensor:
        u = scores.ratios
        if self.divergence == "reverse_kl":
            return self.beta * u
        if self.divergence == "forward_kl":
            return self.beta * (1 - capped_exp(-u))
        if self.divergence == "js":
            return self.beta * (math.log(2) + F.logsigmoid(u))
        power = self.alpha - 1
        return self.beta * (u if power == 0 else capped_expm1(power * u) / power)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return -F.logsigmoid(self.scaled_margin(batch))


@register("rainbow_po")
class RainbowPO(ReferencePairLoss):
    """RainbowPO's margin: averages per token, a reference that counts only in part, and a home advantage for the rest.

    loss = -log sigmoid(beta [p_w / n_w - p_l / n_l - mixing (r_w / n_w - r_l / n_l) - (1 - mixing) home])

    Args:
        beta: on the scale of per-token log-probabilities; 10 in the authors' runs.
        mixing: share of the reference in [0, 1]; 0.25 in the authors' runs, alpha there.
        home: gamma there, 0.1 or 0.3: the margin, per token, that the part without a reference aims at.
        average: False sums log-probabilities, as DPO does.

    Needs: reference sums, lengths.
    Limits: mixing = 1 is dpo_norm(beta), or dpo(beta) of sums; mixing = 0 is simpo(beta, gamma=beta * home).
    The paper's other options: a likelihood term is `+ 0.1*sft(nll='token')`. Contextual scaling, which multiplies beta
    by the reference's entropy as a share of the largest possible one, is not included.
    Reference: Zhao et al. 2024, arXiv 2410.04203; as CapitalOne-Research/RainbowPO, trl/trainer/dpo_trainer.py.
    """

    formula = "-log sigmoid(beta*(a_w - a_l - mixing*(r_w/n_w - r_l/n_l) - (1-mixing)*home)); sums if average=False"
    paper = "2410.04203"

    def __init__(self, beta: float = 10.0, mixing: float = 0.25, home: float = 0.1, average: bool = True):
        super().__init__()
        self.beta = positive("beta", beta)
        self.mixing = non_negative("mixing", mixing, most=1)
        self.home = finite("home", home)
        self.average = average

    def reward(self, scores: Scores) -> Tensor:
        assert scores.ref_logps is not None
        reward = self.beta * (scores.logps - self.mixing * scores.ref_logps)
        return reward / scores.lengths.clamp(min=1) if self.average else reward

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return -F.logsigmoid(self.scaled_margin(batch) - self.beta * (1 - self.mixing) * self.home)
