"""Names for the sums of losses that papers train with. A preset takes arguments and expands to an expression.

`prefopt losses irpo` shows the expansion, `parse("irpo(alpha=0.5)")` gives it. A project adds its own with `@preset`.
"""

from __future__ import annotations

from typing import Literal

from prefopt.losses.base import Loss
from prefopt.losses.direct import DPO
from prefopt.losses.kernel import Embeddings, KernelDPO
from prefopt.losses.likelihood import SFT
from prefopt.losses.online import KLOnline, KLPrior, XPOBonus
from prefopt.losses.pointwise import BCOPair
from prefopt.losses.reference_free import ASFT, CPO, ORPO, RRHF, SLiC
from prefopt.losses.registry import preset
from prefopt.losses.unlearning import NPO, GradientAscent, KLRetain, KTOForget, SimNPO
from prefopt.losses.unlearning_parts import OnForget, OnRetain
from prefopt.losses.unlearning_states import RMU, RMURetain
from prefopt.losses.unlearning_tokens import Flatten, SatImp
from prefopt.losses.wrappers import Dual


@preset("irpo", paper="2404.19733")
def irpo(beta: float = 0.1, alpha: float = 1.0) -> Loss:
    """Iterative reasoning preference optimization's loss: DPO and the chosen completion's likelihood per token.

    The reference is the iterate that drew the pairs. Pang et al. 2024, eq. 1 and 2 (third version: the likelihood is
    divided by each completion's own length; TRL's is one mean over the batch's tokens).
    """
    return DPO(beta) + alpha * SFT("mean")


@preset("rpo", paper="2405.16436")
def rpo(beta: float = 0.01, eta: float = 0.005) -> Loss:
    """Regularized preference optimization: DPO and eta * beta times the chosen completion's summed likelihood.

    Liu et al. 2024, eq. 4.7; weights as in YSLIU627/Regularized-Preference-Optimization, rpo_trainer.py. The average
    form of the appendix is dpo(beta=0.5) + 0.2*sft(nll='token').
    """
    return DPO(beta) + eta * beta * SFT("sum")


@preset("hypo", paper="2406.01462")
def hypo(beta: float = 0.05, lam: float = 1e-4) -> Loss:
    """Hybrid preference optimization: offline DPO, online reverse KL on fresh samples.

    Song et al. 2024, algorithm 1; beta and lam from memory. lam must be compared with beta: far below it the KL cannot
    undo what DPO does outside the data. Not Hybrid-DPO (2602.11902), which shares the abbreviation.
    """
    return DPO(beta) + lam * KLOnline()


@preset("xpo", paper="2405.21046")
def xpo(beta: float = 0.1, alpha: float = 1e-5) -> Loss:
    """Exploratory preference optimization: DPO on pairs of a policy's and a reference's sample, and the bonus.

    Xie et al. 2024, algorithm 1; alpha as in TRL, which like this takes sums over tokens.
    """
    return DPO(beta) + alpha * XPOBonus()


@preset("superhf", paper="2310.16763")
def superhf(kl: float = 0.35) -> Loss:
    """SuperHF: likelihood of the best of B samples, and a KL prior.

    The chosen completions of the data are the samples that a reward model selected. Mukobi et al. 2023; kl as in
    openfeedback/superhf.
    """
    return SFT("token") + kl * KLPrior()


@preset("mpo", paper="2411.10442")
def mpo(beta: float = 0.1) -> Loss:
    """Mixed preference optimization: 0.8 DPO + 0.2 BCO + 1.0 likelihood.

    Wang et al. 2024, section 3.2; weights as in TRL's paper index.
    """
    return 0.8 * DPO(beta) + 0.2 * BCOPair(beta) + 1.0 * SFT("token")


@preset("cpo_paper", paper="2401.08417")
def cpo_paper(beta: float = 0.1, alpha: float = 1.0) -> Loss:
    """CPO as trained in its paper: the preference term and the chosen completions' likelihood per token of the batch.

    Xu et al. 2024, eq. 5; as TRL's experimental CPO trainer (cpo_alpha). The authors' repository now holds ARPO.
    """
    return CPO(beta) + alpha * SFT("token")


@preset("orpo_paper", paper="2403.07691")
def orpo_paper(lam: float = 0.1) -> Loss:
    """One-stage ORPO: likelihood and 0.1 times the odds-ratio term.

    Hong et al. 2024, eq. 6. The official code counts prompt tokens in the likelihood unless told otherwise; here
    completion tokens count.
    """
    return SFT("token") + lam * ORPO(1.0)


@preset("asft_paper", paper="2409.10571")
def asft_paper(lam: float = 0.1) -> Loss:
    """One-stage ASFT: likelihood per token and lam times the alignment term. The paper's lam is unknown to us."""
    return SFT("mean") + lam * ASFT(1.0)


@preset("slic_hf", paper="2305.10425")
def slic_hf(delta: float = 1.0, lam: float = 0.1) -> Loss:
    """SLiC-HF: the hinge and 0.1 times the chosen completion's summed likelihood, as in ContextualAI/HALOs."""
    return SLiC(delta) + lam * SFT("sum")


@preset("rrhf_paper", paper="2304.05302")
def rrhf_paper() -> Loss:
    """RRHF: the ranking term and the likelihood of the best completion, equally weighted.

    Yuan et al. 2023, eq. 4. The official code divides the likelihood by the padded length.
    """
    return RRHF() + SFT("sum")


@preset("kernel_dpo_detonate", paper="2501.03271")
def kernel_dpo_detonate(
    kernel: Literal["polynomial", "rbf", "mahalanobis"] = "rbf",
    divergence: Literal["kl", "js", "renyi", "wasserstein"] = "kl",
    beta: float = 0.1,
    embeddings: Embeddings = "hidden",
) -> Loss:
    """DPO-Kernels as in the same group's later code for images: logistic link, weights 1/2, divergences in the margin.

    DETONATE, arXiv 2506.14903; abhilekhborah/Detonate, sd15_kernel_trainer.py: the log sigmoid of the log-ratio, plus
    0.5 times the kernel's margin, less 0.5 (D_w - D_l).
    Its embeddings are a frozen encoder's (embeddings="given"); beta and the reference in the log-ratio are DPO's, that
    code has neither.
    """
    return KernelDPO(
        kernel, divergence, beta, gamma=0.5, alpha=0.5, embeddings=embeddings, gradient=False, inside=True
    )


@preset("npo_rt", paper="2404.05868")
def npo_rt(beta: float = 0.1, retain: float = 1.0) -> Loss:
    """NPO+RT: NPO on the forget set, likelihood on the retain set."""
    return NPO(beta) + retain * SFT("token")


@preset("npo_kl", paper="2404.05868")
def npo_kl(beta: float = 0.1, retain: float = 1.0, direction: Literal["forward", "reverse"] = "forward") -> Loss:
    """NPO+KL: NPO on the forget set, KL to the reference on the retain set.

    Zhang et al. 2024 write KL(pi || ref), "reverse"; their code computes KL(ref || pi), "forward".
    """
    return NPO(beta) + retain * KLRetain(direction)


@preset("gradient_difference", paper="2401.06121")
def gradient_difference(retain: float = 1.0) -> Loss:
    """GA+RT: gradient ascent on the forget set, likelihood on the retain set."""
    return GradientAscent() + retain * SFT("token")


@preset("ga_kl", paper="2401.06121")
def ga_kl(retain: float = 1.0) -> Loss:
    """GA+KL: gradient ascent on the forget set, KL to the reference on the retain set."""
    return GradientAscent() + retain * KLRetain()


@preset("simnpo_rt", paper="2410.07163")
def simnpo_rt(beta: float = 4.5, delta: float = 0.0, forget: float = 0.125) -> Loss:
    """SimNPO with a retain likelihood, weighted as in open-unlearning."""
    return forget * SimNPO(beta, delta) + SFT("token")


@preset("sat_imp_rt", paper="2505.11953")
def sat_imp_rt(beta1: float = 5.0, beta2: float = 1.0, forget: float = 0.1) -> Loss:
    """SatImp with a retain likelihood, weighted as in open-unlearning."""
    return forget * SatImp(beta1, beta2) + SFT("token")


@preset("pdu", paper="2506.05314")
def pdu(limit: float = 0.3, weight: float = 100.0, step: float = 5.0, warmup: int = 0) -> Loss:
    """Primal-dual unlearning: flatten the forget set under the constraint that the retain loss stays below `limit`.

    Entesari et al. 2025; defaults as in open-unlearning's script for TOFU, which also holds the weight still for the
    first five epochs (`warmup`, in batches). `limit` belongs to a model and data: somewhat above the retain loss at
    the start.
    """
    return Flatten() + Dual(SFT("token"), limit, weight, step, warmup)


@preset("rmu_paper", paper="2403.03218")
def rmu_paper(layer: int = 7, scale: float = 6.5, retain: float = 1200.0) -> Loss:
    """RMU with its retain term: the paper's values for Zephyr-7B on WMDP."""
    return RMU(layer, scale) + retain * RMURetain(layer)


@preset("idk", paper="2401.06121")
def idk() -> Loss:
    """IDK: likelihood of "I don't know" answers to forget prompts and of retain answers, one mean over all tokens.

    Both are chosen completions, in one data set.
    """
    return SFT("token")


@preset("dpo_idk", paper="2404.05868")
def dpo_idk(beta: float = 0.1) -> Loss:
    """DPO-IDK: "I don't know" preferred to the answer to be forgotten; DPO scaled by 2 / beta, like NPO."""
    return (2 / beta) * DPO(beta)


@preset("dpo_idk_rt", paper="2404.05868")
def dpo_idk_rt(beta: float = 0.1, retain: float = 1.0) -> Loss:
    """DPO+RT: `dpo_idk` on the forget set, likelihood on the retain set, as in the NPO paper and open-unlearning."""
    return (2 / beta) * OnForget(DPO(beta)) + retain * OnRetain(SFT("token"))


@preset("dpo_idk_kl", paper="2404.05868")
def dpo_idk_kl(beta: float = 0.1, retain: float = 1.0) -> Loss:
    """DPO+KL: `dpo_idk` on the forget set, KL to the reference on the retain set."""
    return (2 / beta) * OnForget(DPO(beta)) + retain * OnRetain(KLRetain())


@preset("kto_forget_rt", paper="2404.05868")
def kto_forget_rt(beta: float = 0.1, retain: float = 1.0) -> Loss:
    """KTO+RT: `kto_forget` on the forget set, likelihood on the retain set."""
    return OnForget(KTOForget(beta)) + retain * OnRetain(SFT("token"))


@preset("altpo", paper="2409.13474")
def altpo(beta: float = 0.1, retain: float = 1.0) -> Loss:
    """AltPO: `dpo_idk_rt` with a plausible other answer, not "I don't know", as the chosen completion.

    Mekala et al. 2024; scaled by 2 / beta as in open-unlearning, whose grid is beta 0.05, 0.1, 0.5 and retain 1, 2, 5.
    """
    return dpo_idk_rt(beta, retain)
