"""How much of an answer a model reproduces when it is given the tokens before (teacher forcing)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefopt.evaluation.arrays import Array, token_ids
from prefopt.safety.errors import UsageError


def extraction_strength(predicted_ids: Array, label_ids: Array) -> float:
    """Share of the answer, from its end, that the model predicts without an error: 1 - k / T.

    k is the smallest number of leading tokens after which every prediction is right. 1 where all are right, 0 where
    not even the last token is.

    Args:
        predicted_ids: (T,) the most probable token at each position of the answer, given the true tokens before it.
        label_ids: (T,) the answer's tokens.

    Reference: Carlini et al. 2021, arXiv 2012.07805; for unlearning Wang et al. 2025, arXiv 2406.09179.
    """
    wrong = ~_matches(predicted_ids, label_ids)
    return float(np.argmax(wrong[::-1]) / len(wrong)) if wrong.any() else 1.0


def exact_memorization(predicted_ids: Array, label_ids: Array) -> float:
    """Share of the answer's tokens that are predicted right; arguments as in `extraction_strength`.

    Reference: Tirumala et al. 2022, arXiv 2205.10770.
    """
    return float(_matches(predicted_ids, label_ids).mean())


def _matches(predicted_ids: Array, label_ids: Array) -> NDArray[np.bool_]:
    predicted, labels = token_ids("predicted_ids", predicted_ids), token_ids("label_ids", label_ids)
    if len(predicted) != len(labels):
        raise UsageError(f"different lengths: predicted_ids {len(predicted)}, label_ids {len(labels)}")
    if (labels < 0).any():
        raise UsageError(
            f"label_ids holds {int(labels.min())}, which is no token; pass the answer's tokens alone, without the "
            "positions that labels mask"
        )
    return np.asarray(predicted == labels)
