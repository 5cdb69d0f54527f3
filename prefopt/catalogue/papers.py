"""Title and first author of the papers that the objectives come from, so that a model card can cite them.

Titles are those of `configs/papers/` where there is a file for the paper. The other authors are left to arXiv ("and
others"): a list from memory would contain mistakes. Imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv.

    Attributes:
        arxiv: its id; the first two digits are the year.
        author: the first author, family name first.
        title: of the paper, without the braces that keep capitals in BibTeX.
    """

    arxiv: str
    author: str
    title: str

    @property
    def year(self) -> int:
        return 2000 + int(self.arxiv[:2])

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def key(self) -> str:
        """The BibTeX key; the id distinguishes two papers of one author and year."""
        family = "".join(letter for letter in self.author.partition(",")[0].lower() if letter.isalpha())
        return f"{family}{self.year}_{self.arxiv.replace('.', '_')}"

    @property
    def bibtex(self) -> str:
        """An entry for a bibliography."""
        return (
            f"@misc{{{self.key},\n"
            f"  title         = {{{{{self.title}}}}},\n"
            f"  author        = {{{self.author} and others}},\n"
            f"  year          = {{{self.year}}},\n"
            f"  eprint        = {{{self.arxiv}}},\n"
            "  archivePrefix = {arXiv},\n"
            f"  url           = {{{self.url}}}\n"
            "}"
        )


def find(arxiv: str) -> Paper | None:
    """The paper with this arXiv id; None if the table does not have it, as for losses of other packages."""
    return PAPERS.get(arxiv)


_TABLE = """
2006.13554 | Ma, Xingjun | Normalized Loss Functions for Deep Learning with Noisy Labels
2007.01162 | Li, Tian | Tilted Empirical Risk Minimization
2211.05826 | Adolphs, Leonard | The CRINGE Loss: Learning what language not to model
2304.05302 | Yuan, Zheng | RRHF: Rank Responses to Align Language Models with Human Feedback without tears
2305.10425 | Zhao, Yao | SLiC-HF: Sequence Likelihood Calibration with Human Feedback
2305.18290 | Rafailov, Rafael | Direct Preference Optimization: Your Language Model is Secretly a Reward Model
2307.09288 | Touvron, Hugo | Llama 2: Open Foundation and Fine-Tuned Chat Models
2309.06657 | Liu, Tianqi | Statistical Rejection Sampling Improves Preference Optimization
2309.16240 | Wang, Chaoqi | \
Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints
2310.12036 | Azar, Mohammad Gheshlaghi | A General Theoretical Paradigm to Understand Learning from Human Preferences
2310.16763 | Mukobi, Gabriel | SuperHF: Supervised Iterative Learning from Human Feedback
2312.16682 | Xu, Jing | \
Some things are more CRINGE than others: Iterative Preference Optimization with the Pairwise Cringe Loss
2401.06121 | Maini, Pratyush | TOFU: A Task of Fictitious Unlearning for LLMs
2401.08417 | Xu, Haoran | \
Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation
2402.00856 | Ji, Haozhe | Towards Efficient Exact Optimization of Language Model Alignment
2402.01306 | Ethayarajh, Kawin | KTO: Model Alignment as Prospect Theoretic Optimization
2402.01878 | Liu, Tianqi | LiPO: Listwise Preference Optimization through Learning-to-Rank
2402.05369 | Chen, Huayu | Noise Contrastive Alignment of Language Models with Explicit Rewards
2402.05749 | Tang, Yunhao | Generalized Preference Optimization: A Unified Approach to Offline Alignment
2402.10052 | Dong, Yijiang River | \
UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models
2402.13228 | Pal, Arka | Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive
2403.00409 | Ray Chowdhury, Sayak | Provably Robust DPO: Aligning Language Models with Noisy Feedback
2403.03218 | Li, Nathaniel | The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning
2403.07691 | Hong, Jiwoo | ORPO: Monolithic Preference Optimization without Reference Model
2403.19159 | Park, Ryan | Disentangling Length from Quality in Direct Preference Optimization
2404.04656 | Jung, Seungjae | Binary Classifier Optimization for Large Language Model Alignment
2404.05868 | Zhang, Ruiqi | Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning
2404.11999 | Zeng, Yongcheng | Token-level Direct Preference Optimization
2404.16767 | Gao, Zhaolin | REBEL: Reinforcement Learning via Regressing Relative Rewards
2404.19733 | Pang, Richard Yuanzhe | Iterative Reasoning Preference Optimization
2405.00675 | Wu, Yue | Self-Play Preference Optimization for Language Model Alignment
2405.14734 | Meng, Yu | SimPO: Simple Preference Optimization with a Reference-Free Reward
2405.16436 | Liu, Zhihan | \
Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer
2405.16681 | Saeidi, Amir | \
Triple Preference Optimization: Achieving Better Alignment using a Single Step Optimization
2405.21046 | Xie, Tengyang | \
Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF
2406.01462 | Song, Yuda | The Importance of Online Data: Understanding Preference Fine-tuning via Coverage
2406.05882 | Melnyk, Igor | Distributional Preference Alignment of LLMs via Optimal Transport
2406.08414 | Lu, Chris | Discovering Preference Optimization Algorithms with and for Large Language Models
2406.10957 | Lu, Junru | \
Eliminating Biased Length Reliance of Direct Preference Optimization via Down-Sampled KL Divergence
2406.11827 | Zhou, Wenxuan | WPO: Enhancing RLHF with Weighted Preference Optimization
2407.00617 | Zhang, Yuheng | \
Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning
2407.08639 | Wu, Junkang | beta-DPO: Direct Preference Optimization with Dynamic beta
2407.13399 | Huang, Audrey | \
Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via Chi-Squared Preference \
Optimization
2408.06266 | D'Oosterlinck, Karel | \
Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment
2408.11104 | Liu, Qiang | ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
2409.06411 | Liu, Wei | Length Desensitization in Direct Preference Optimization
2409.10571 | Wang, Ruoyu | ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood
2409.13474 | Mekala, Anmol | \
Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models
2410.04203 | Zhao, Hanyang | \
RainbowPO: A Unified Framework for Combining Improvements in Preference Optimization
2410.07163 | Fan, Chongyu | Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning
2410.10148 | Wu, Junkang | alpha-DPO: Adaptive Reward Margin is What Direct Preference Optimization Needs
2410.13828 | Yuan, Hui | A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement
2411.07595 | Omura, Motoki | Entropy Controllable Direct Preference Optimization
2411.10442 | Wang, Weiyun | \
Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization
2411.15124 | Lambert, Nathan | TULU 3: Pushing Frontiers in Open Language Model Post-Training
2412.14516 | Xiao, Teng | Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment
2412.17696 | Richardson, Kyle | Understanding the Logic of Direct Preference Alignment through Logic
2501.03271 | Das, Amitava | \
DPO Kernels: A Semantically-Aware, Kernel-Enhanced, and Divergence-Rich Paradigm for Direct Preference Optimization
2501.03884 | Gupta, Aman | AlphaPO: Reward Shape Matters for LLM Alignment
2502.00203 | Sun, Shengyang | \
Reward-aware Preference Optimization: A Unified Mathematical Framework for Model Alignment
2502.00883 | Xiao, Teng | SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters
2502.01237 | Gorbatovski, Alexey | The Differences Between Direct Alignment Algorithms are a Blur
2502.07599 | Yang, Xiliang | DPO-Shift: Shifting the Distribution of Direct Preference Optimization
2502.19301 | Wang, Qizhou | Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond
2503.01224 | Yang, Bo | CE-U: Cross Entropy Unlearning
2504.19599 | Zhang, Kaichen | GVPO: Group Variance Policy Optimization for Large Language Model Post-Training
2505.11953 | Yang, Puning | Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning
2505.20686 | Brantley, Kianté | Accelerating RL for LLM Reasoning with Optimal Advantage Regression
2506.05314 | Entesari, Taha | Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models
2507.21183 | Lan, Guangchen | MaPPO: Maximum a Posteriori Preference Optimization with Prior Knowledge
2509.24207 | Liu, Sijia | Humanline: Online Alignment as Perceptual Loss
"""

PAPERS = {
    fields[0]: Paper(*fields)
    for fields in (tuple(map(str.strip, line.split(" | "))) for line in _TABLE.strip().splitlines())
}
"""By arXiv id."""
