"""Membership inference: can the forget set still be told from text that the model never saw?

Every score is higher for text that the model does not know (a non-member), so that `membership_auc` is 1 where the
forget set is fully remembered, and near 0.5 where it is like unseen text.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

from prefopt.evaluation.arrays import Array, Floats, floats, logps, same_length
from prefopt.safety.errors import UsageError
from prefopt.unlearning.metrics.extra import required

SMALLEST_DEVIATION = 1e-3
"""Of `min_k_plus_plus`: where a model is certain of a token, a deviation of 0 would divide."""


def loss_score(token_logps: Array) -> float:
    """Average loss per token: minus the mean of (T,) log-probabilities.

    Reference: Yeom et al. 2018, arXiv 1709.01604.
    """
    return -float(logps("token_logps", token_logps, "T").mean())


def reference_score(token_logps: Array, ref_token_logps: Array) -> float:
    """How much larger the average loss is than under a reference model.

    Args:
        token_logps: (T,) log-probabilities of a text's tokens.
        ref_token_logps: (T,) those under a model that never saw the text.

    Reference: Carlini et al. 2021, arXiv 2012.07805.
    """
    ours, theirs = logps("token_logps", token_logps, "T"), logps("ref_token_logps", ref_token_logps, "T")
    same_length(token_logps=ours, ref_token_logps=theirs)
    return float(theirs.mean() - ours.mean())


def zlib_score(token_logps: Array, text: str) -> float:
    """Average loss per token over the number of bytes to which zlib compresses the text.

    Args:
        token_logps: (T,) log-probabilities of the text's tokens, or their average as one number.
        text: what the tokens say.

    Reference: Carlini et al. 2021, arXiv 2012.07805.
    """
    if not isinstance(text, str) or not text:
        raise UsageError(f"zlib_score needs the text as a non-empty string, got {text!r}")
    shape = () if np.ndim(token_logps) == 0 else ("T",)
    return -float(logps("token_logps", token_logps, *shape).mean()) / len(zlib.compress(text.encode()))


def min_k(token_logps: Array, share: float = 0.4) -> float:
    """Minus the mean of the lowest log-probabilities of a text: of max(1, floor(share T)) of its T tokens.

    Args:
        token_logps: (T,) log-probabilities.
        share: in (0, 1]. 0.4 is MUSE's and open-unlearning's; the authors use 0.2.

    Reference: Shi et al. 2024 (Min-K% Prob), arXiv 2310.16789.
    """
    return _lowest(logps("token_logps", token_logps, "T"), share)


def min_k_plus_plus(token_logps: Array, means: Array, deviations: Array, share: float = 0.4) -> float:
    """`min_k` of standardized log-probabilities: (log p - mean) / deviation at each position.

    Args:
        token_logps: (T,) log-probabilities.
        means: (T,) mean of log p over the vocabulary under the model's own distribution (minus its entropy).
        deviations: (T,) its standard deviation; those below 0.001 count as 0.001.
        share: as in `min_k`.

    Reference: Zhang et al. 2024 (Min-K%++), arXiv 2404.02936.
    """
    values, means = logps("token_logps", token_logps, "T"), logps("means", means, "T")
    spreads = floats("deviations", deviations, "T")
    same_length(token_logps=values, means=means, deviations=spreads)
    if (spreads < 0).any():
        raise UsageError(f"deviations are at least 0, got {spreads.min():.4g}")
    return _lowest((values - means) / np.maximum(spreads, SMALLEST_DEVIATION), share)


def membership_auc(forget_scores: Array, holdout_scores: Array) -> float:
    """Chance that a forget text has a lower score than an unseen one, ties counted half (area under the ROC curve).

    Args:
        forget_scores: (N,) of one of the scores above, on the forget set.
        holdout_scores: (M,) of the same score on similar text that the model never saw.
    """
    forget, holdout = floats("forget_scores", forget_scores, "N"), floats("holdout_scores", holdout_scores, "M")
    metrics = required("sklearn.metrics", "scikit-learn", "membership inference")
    labels = np.concatenate([np.zeros(len(forget)), np.ones(len(holdout))])
    return float(metrics.roc_auc_score(labels, np.concatenate([forget, holdout])))


def privleak(auc: float, gold_auc: float) -> float:
    """MUSE's privacy leakage in percent: 100 (gold_auc - auc) / (1 - gold_auc), 0 at best.

    MUSE takes the relative difference of the AUC that counts the other way round, 1 - auc. Far below 0 the forget set
    is still remembered; far above 0 it is less likely than unseen text, which gives it away too.

    Args:
        auc: of `membership_auc`, unlearned model.
        gold_auc: the same for the model that was trained without the forget set.

    Raises:
        UsageError: if `gold_auc` is 1: that model knows the forget set.

    Reference: Shi et al. 2024 (MUSE), arXiv 2407.06460.
    """
    for name, value in (("auc", auc), ("gold_auc", gold_auc)):
        if not 0 <= value <= 1:
            raise UsageError(f"{name} must be in [0, 1], got {value}")
    if gold_auc == 1:
        raise UsageError("gold_auc is 1: this model knows the forget set, so it was not trained without it")
    return float(100 * (gold_auc - auc) / (1 - gold_auc))


def _lowest(values: Floats, share: float) -> float:
    if not 0 < share <= 1:
        raise UsageError(f"share must be in (0, 1], got {share}")
    count = max(1, math.floor(share * len(values)))
    return -float(np.sort(values)[:count].mean())
