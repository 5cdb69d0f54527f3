"""The field's measures of unlearning, as functions of numbers: log-probabilities, token ids, texts.

Arguments are lists, NumPy arrays or tensors of any precision; everything is computed in float64 on the CPU. Results
are Python floats, or arrays with one value per row. Every function refuses empty input, NaN and wrong shapes.

Average log-probabilities are per token, over the answer's tokens: its log-probability divided by its length. scipy,
scikit-learn and rouge-score (`pip install 'prefopt-trainer[unlearning]'`) are imported by functions that need them.
"""

from prefopt.evaluation.intervals import Interval, bootstrap
from prefopt.evaluation.texts import repetition
from prefopt.unlearning.metrics.answers import (
    forget_truth_ratio,
    model_utility,
    normalized_probability,
    probability,
    rel_diff,
    truth_ratio,
    utility_truth_ratio,
)
from prefopt.unlearning.metrics.degeneration import Degeneration, degeneration
from prefopt.unlearning.metrics.divergence import kl_to_start
from prefopt.unlearning.metrics.membership import (
    loss_score,
    membership_auc,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_score,
    zlib_score,
)
from prefopt.unlearning.metrics.memorization import exact_memorization, extraction_strength
from prefopt.unlearning.metrics.muse import (
    few_shot_prompt,
    first_answer,
    knowledge_memorization,
    verbatim_memorization,
)
from prefopt.unlearning.metrics.quality import ForgetQuality, forget_quality
from prefopt.unlearning.metrics.rouge import RougeL, rouge_l
from prefopt.unlearning.metrics.sampling import leak_at_k

__all__ = [
    "Degeneration",
    "ForgetQuality",
    "Interval",
    "RougeL",
    "bootstrap",
    "degeneration",
    "exact_memorization",
    "extraction_strength",
    "few_shot_prompt",
    "first_answer",
    "forget_quality",
    "forget_truth_ratio",
    "kl_to_start",
    "knowledge_memorization",
    "leak_at_k",
    "loss_score",
    "membership_auc",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "normalized_probability",
    "privleak",
    "probability",
    "reference_score",
    "rel_diff",
    "repetition",
    "rouge_l",
    "truth_ratio",
    "utility_truth_ratio",
    "verbatim_memorization",
    "zlib_score",
]
