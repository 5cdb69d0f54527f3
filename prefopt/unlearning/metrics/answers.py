"""How likely a model finds right, paraphrased and wrong answers, and what is left of its utility."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from prefopt.evaluation.arrays import Array, Floats, floats, logps, same_length
from prefopt.safety.errors import UsageError


def probability(average_logps: Array) -> Floats:
    """(N,) probability of each answer per token: exp of its average log-probability.

    Args:
        average_logps: (N,) average log-probabilities of the answers, in nats per token.

    Reference: Maini et al. 2024 (TOFU), arXiv 2401.06121, P(a | q)^(1 / length).
    """
    chances: Floats = np.exp(logps("average_logps", average_logps, "N"))
    return chances


def normalized_probability(average_logps: Array, perturbed: Array) -> Floats:
    """(N,) probability of the right answer among itself and the wrong ones: P / (P + sum_k P_k).

    TOFU uses it for real authors and world facts.

    Args:
        average_logps: (N,) average log-probabilities of the right answers.
        perturbed: (N, K) those of K wrong answers to each question.
    """
    right, wrong = logps("average_logps", average_logps, "N"), logps("perturbed", perturbed, "N", "K")
    same_length(average_logps=right, perturbed=wrong)
    together = np.logaddexp.reduce(np.concatenate([right[:, None], wrong], axis=1), axis=1)
    shares: Floats = np.exp(right - together)
    return shares


def truth_ratio(
    paraphrased: Array, perturbed: Array, mean: Literal["geometric", "arithmetic"] = "geometric"
) -> Floats:
    """(N,) how many times likelier the paraphrased answer is than the wrong ones: R = P(paraphrased) / mean_k P_k.

    Above 1, the model prefers the truth. This is the direction of TOFU's released code. Its paper and open-unlearning
    write 1 / R; forget quality is the same for both.

    Args:
        paraphrased: (N,) average log-probabilities of a paraphrase of each right answer.
        perturbed: (N, K) average log-probabilities of K wrong answers to each question.
        mean: over the wrong answers' probabilities: "geometric", as the code of TOFU, NPO and open-unlearning computes
            forget quality, or "arithmetic", as both papers write it.

    Returns:
        Ratios; infinite or 0 where they exceed float64.

    Reference: Maini et al. 2024, arXiv 2401.06121; Zhang et al. 2024 (NPO), arXiv 2404.05868.
    """
    right, wrong = logps("paraphrased", paraphrased, "N"), logps("perturbed", perturbed, "N", "K")
    same_length(paraphrased=right, perturbed=wrong)
    if mean == "geometric":
        reference = wrong.mean(axis=1)
    elif mean == "arithmetic":
        reference = np.logaddexp.reduce(wrong, axis=1) - np.log(wrong.shape[1])
    else:
        raise UsageError(f"mean must be 'geometric' or 'arithmetic', got {mean!r}")
    with np.errstate(over="ignore"):
        ratios: Floats = np.exp(right - reference)
    return ratios


def forget_truth_ratio(ratios: Array) -> float:
    """How close truth ratios are to 1: mean of min(R, 1 / R), in [0, 1]. TOFU reports it on the forget set.

    Args:
        ratios: (N,) of `truth_ratio`.
    """
    values = _ratios(ratios)
    with np.errstate(divide="ignore"):
        return float(np.minimum(values, 1 / values).mean())


def utility_truth_ratio(ratios: Array) -> float:
    """How much a model prefers the truth: mean of max(0, 1 - 1 / R), in [0, 1]. It enters model utility.

    Args:
        ratios: (N,) of `truth_ratio` on retain set, real authors or world facts.
    """
    with np.errstate(divide="ignore"):
        return float(np.maximum(0, 1 - 1 / _ratios(ratios)).mean())


def model_utility(values: Mapping[str, float]) -> float:
    """Harmonic mean; a single 0 makes it 0.

    TOFU's has nine values: probability, ROUGE-L recall and truth ratio (`utility_truth_ratio`), each on retain set,
    real authors and world facts.

    Args:
        values: by name, at least 0 each. Names appear only in errors.

    Reference: Maini et al. 2024, arXiv 2401.06121.
    """
    if not isinstance(values, Mapping) or not values:
        raise UsageError("model utility needs at least one value, as a mapping of names to numbers")
    numbers = np.array([_at_least_0(name, value) for name, value in values.items()])
    with np.errstate(divide="ignore", over="ignore"):  # of a value of 0, or nearly
        return float(len(numbers) / (1 / numbers).sum())


def _at_least_0(name: str, value: float) -> float:
    try:
        number = float(floats(name, value))
    except UsageError:
        number = -1.0
    if number < 0:
        raise UsageError(f"model utility: {name} must be a number of at least 0, got {value!r}")
    return number


def rel_diff(value: float, gold: float) -> float:
    """Relative difference from the gold model in percent: 100 (value - gold) / gold.

    Args:
        value: a measure of the unlearned model.
        gold: the same measure of the model that was trained without the forget set.

    Raises:
        UsageError: if `gold` is 0, where no relative difference exists.
    """
    ours, theirs = floats("value", value), floats("gold", gold)
    if theirs == 0:
        raise UsageError("the gold model's value is 0, so no relative difference exists; compare values themselves")
    return float(100 * (ours - theirs) / theirs)


def _ratios(ratios: Array) -> Floats:
    values = floats("ratios", ratios, "N", finite=False)
    if (values < 0).any():
        raise UsageError(f"truth ratios are at least 0, got {values.min():.4g}; pass ratios, not their logarithms")
    return values
