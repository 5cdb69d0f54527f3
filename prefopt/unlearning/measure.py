"""What a model still knows of the forget set, and what it kept: every metric from one pass over the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase

from prefopt import __version__
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_text
from prefopt.scoring import Layout
from prefopt.scoring.fingerprint import is_sharded
from prefopt.scoring.layout import LayoutName
from prefopt.unlearning import metrics
from prefopt.unlearning.continuations import CONTINUED_SETS, beginnings, continuations, scored
from prefopt.unlearning.data import Question
from prefopt.unlearning.learn import digest, model_key
from prefopt.unlearning.scores import QuestionScores, answer_questions, score_questions

UTILITY_SETS = ("retain", "real_authors", "world_facts")
"""The sets whose nine numbers make the model utility (TOFU)."""

VERBATIM_PROMPT = 200
"""Tokens of a plain text that its continuation follows; MUSE's data has its prompts ready, so this is our choice."""

_CHOICES = ("real_authors", "world_facts")
"""Sets whose probability is that of the true answer among the wrong ones."""


@dataclass(frozen=True)
class SetScores:
    """The numbers of one set, one per question, in order.

    Attributes:
        probability: of the answer, per token; among the wrong answers for real authors and world facts.
        rouge: ROUGE-L recall of the greedy answer; empty for plain texts.
        truth_ratio: of `metrics.truth_ratio`; empty where questions have no wrong answers.
        extraction_strength, exact_memorization: of the answer.
        loss, zlib, min_k, min_k_plus_plus: scores of membership.
        answers: the greedy answers.
        kl: KL(start || model) of each answer, mean over its tokens in nats; empty where the start is not at hand.
        f1: ROUGE-L F1 as in MUSE, of the continuation of a plain text to forget and of `CONTINUED_SETS`; texts whose
            continuation has no word are left out. All else but `answers` is empty for these sets.
    """

    probability: list[float] = field(default_factory=list)
    rouge: list[float] = field(default_factory=list)
    truth_ratio: list[float] = field(default_factory=list)
    extraction_strength: list[float] = field(default_factory=list)
    exact_memorization: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    zlib: list[float] = field(default_factory=list)
    min_k: list[float] = field(default_factory=list)
    min_k_plus_plus: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)


_Value = TypeVar("_Value")

Measured = dict[str, SetScores]
"""The numbers of a model, by the name of the set."""


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Question]],
    *,
    start: Any = None,
    max_length: int | None = None,
    max_new_tokens: int = 64,
    verbatim_tokens: int = VERBATIM_PROMPT,
    layout: Layout | LayoutName = "auto",
) -> Measured:
    """The numbers of a model on every set. Several processes share the questions; each returns all numbers.

    Args:
        model: a causal language model, the same in all processes; its mode is left as it is.
        tokenizer: of the model.
        sets: questions by the name of the set.
        start: the model before forgetting, to see how far the forget set's and the retain set's answers have moved
            from it; costs its forward passes over both sets.
        max_length: plain texts are cut into parts of this many tokens.
        max_new_tokens: of the greedy answers.
        verbatim_tokens: plain texts to forget are continued after this many tokens, or after their first half if that
            is less; 0 leaves it out.
        layout: to score in. Trying a layout takes as long as scoring a set, so models of one kind should share one.
    """
    layout = layout if isinstance(layout, Layout) else Layout(layout)
    state = PartialState()
    # The weights of a sharded model are gathered by all processes at once: each takes every question.
    processes = 1 if is_sharded(model) else state.num_processes
    share = slice(state.process_index if processes > 1 else 0, None, processes)

    def of_all(mine: list[_Value]) -> list[_Value]:
        return mine if processes == 1 else _interleaved(gather_object([mine]))

    def answers(name: str, questions: Sequence[Question]) -> list[str]:
        # Nothing is asked about plain texts, and the holdout set only serves membership inference.
        if name == "holdout" or not all(question.question for question in questions):
            return []
        mine = answer_questions(model, tokenizer, questions[share], max_new_tokens=max_new_tokens)
        return of_all([answer.text for answer in mine])

    def scores(name: str, questions: Sequence[Question]) -> list[QuestionScores]:
        mine = score_questions(
            model, tokenizer, questions, share=share, max_length=max_length, layout=layout,
            start=start if name in ("forget", "retain") else None,
        )  # fmt: skip
        return of_all(mine)

    def goes_on(name: str, questions: Sequence[Question]) -> SetScores:
        parts = beginnings(name, questions, tokenizer, verbatim_tokens)
        texts = of_all(continuations(model, tokenizer, name, parts[share]))
        return SetScores(answers=texts, f1=scored(name, texts, parts))

    measured: Measured = {}
    for name, questions in sets.items():
        if name in CONTINUED_SETS:
            measured[name] = goes_on(name, questions)
            continue
        of = _scores(scores(name, questions), answers(name, questions), among_wrong=name in _CHOICES)
        if name == "forget" and verbatim_tokens and not any(question.question for question in questions):
            of = replace(of, f1=goes_on(name, questions).f1)
        measured[name] = of
    return measured


def _interleaved(shares: Sequence[list[_Value]]) -> list[_Value]:
    """The values of all rows in order, from the shares of processes that each took every so many-th row."""
    return [shares[row % len(shares)][row // len(shares)] for row in range(sum(map(len, shares)))]


def _scores(rows: Sequence[QuestionScores], answers: list[str], among_wrong: bool) -> SetScores:
    own = np.array([row.answer.average_logp for row in rows])
    tokens = [row.answer for row in rows]
    probability, ratios = metrics.probability(own), []
    if len({len(row.wrong) for row in rows}) == 1 and rows[0].wrong:
        wrong = np.array([[answer.average_logp for answer in row.wrong] for row in rows])
        ratios = metrics.truth_ratio([row.paraphrase.average_logp for row in rows], wrong).tolist()
        if among_wrong:
            probability = metrics.normalized_probability(own, wrong)
    return SetScores(
        probability=probability.tolist(),
        rouge=rouge_recall(answers, [row.question.answer for row in rows]) if answers else [],
        truth_ratio=ratios,
        extraction_strength=[metrics.extraction_strength(a.predicted_ids, a.token_ids) for a in tokens],
        exact_memorization=[metrics.exact_memorization(a.predicted_ids, a.token_ids) for a in tokens],
        loss=[metrics.loss_score(answer.token_logps) for answer in tokens],
        zlib=[metrics.zlib_score(answer.token_logps, answer.text) for answer in tokens],
        min_k=[metrics.min_k(answer.token_logps) for answer in tokens],
        min_k_plus_plus=[
            metrics.min_k_plus_plus(answer.token_logps, answer.means, answer.deviations) for answer in tokens
        ],
        answers=answers,
        kl=[float(answer.start_kl.mean()) for answer in tokens if answer.start_kl is not None],
    )


def rouge_recall(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L recall of each answer; all scripts are read if a reference has no word that rouge-score reads."""
    # Published numbers are of English, which needs no more than ASCII.
    other_script = not all(any(map(str.isascii, filter(str.isalnum, text))) for text in references)
    recall: list[float] = metrics.rouge_l(answers, references, other_script).recall.tolist()
    return recall


def numbers(measured: Measured, gold: Measured | None = None) -> dict[str, float]:
    """The metrics of a model, by name, from the numbers of its answers.

    Args:
        measured: of the model.
        gold: of the gold model on the same questions; without it there is no forget quality.

    Returns:
        For each set `NAME_probability`, `NAME_rouge` and, with wrong answers, `NAME_truth_ratio`; `NAME_kl` where the
        start was at hand; `NAME_f1` of continuations; of the forget set also `extraction_strength` and
        `exact_memorization`. `model_utility` with all three sets of `UTILITY_SETS`. With a gold model `forget_quality`
        (a p-value), `log10_forget_quality` and `gold_forget_rouge` (`gold_forget_f1` of plain texts); with both,
        `quality_and_utility`, their harmonic mean. With a holdout set, `auc_NAME` and, with a gold model,
        `privleak_NAME` for each score of membership.
    """
    values: dict[str, float] = {}
    for name, scores in measured.items():
        if name != "holdout":
            values |= {f"{name}_{what}": value for what, value in _means(name, scores).items()}
        values |= {f"{name}_{what}": float(np.mean(of)) for what, of in apart(scores).items()}
    forget = measured["forget"]
    values["extraction_strength"] = float(np.mean(forget.extraction_strength))
    values["exact_memorization"] = float(np.mean(forget.exact_memorization))
    if (utility := utility_of(measured)) is not None:
        values["model_utility"] = utility
    if gold is not None:
        for what, of_gold in (("rouge", gold["forget"].rouge), ("f1", gold["forget"].f1)):
            if of_gold:
                values[f"gold_forget_{what}"] = float(np.mean(of_gold))
        if forget.truth_ratio:
            quality = metrics.forget_quality(forget.truth_ratio, gold["forget"].truth_ratio)
            values |= {"forget_quality": quality.p, "log10_forget_quality": quality.log10_p}
            if utility is not None:
                values["quality_and_utility"] = _harmonic(quality.p, utility)
    return values | _membership(measured, gold)


def utility_of(measured: Measured) -> float | None:
    """TOFU's model utility; None without wrong answers or without one of the three sets."""
    if any(name not in measured or not (measured[name].truth_ratio and measured[name].rouge) for name in UTILITY_SETS):
        return None
    return metrics.model_utility(
        {f"{name}_{what}": value for name in UTILITY_SETS for what, value in _means(name, measured[name]).items()}
    )


def summaries(name: str, scores: SetScores) -> dict[str, tuple[list[float], Callable[[Any], Any]]]:
    """What is summed up of a set, by name: the values of its questions, and their summary as a function of them."""
    ratio = metrics.forget_truth_ratio if name == "forget" else metrics.utility_truth_ratio
    parts: dict[str, tuple[list[float], Callable[[Any], Any]]] = {
        "probability": (scores.probability, np.mean),
        "rouge": (scores.rouge, np.mean),
        "truth_ratio": (scores.truth_ratio, ratio),
    }
    return {what: (values, total) for what, (values, total) in parts.items() if values}


def apart(scores: SetScores) -> dict[str, list[float]]:
    """What is summed up of a set by its mean, and need not have a value for every question."""
    parts = {"kl": scores.kl, "f1": scores.f1}
    return {what: values for what, values in parts.items() if values}


def _means(name: str, scores: SetScores) -> dict[str, float]:
    return {what: float(total(values)) for what, (values, total) in summaries(name, scores).items()}


def _harmonic(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one + other > 0 else 0.0


def _membership(measured: Measured, gold: Measured | None) -> dict[str, float]:
    if "holdout" not in measured:
        return {}
    values = {}
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus"):
        auc = metrics.membership_auc(getattr(measured["forget"], name), getattr(measured["holdout"], name))
        values[f"auc_{name}"] = auc
        if gold is not None:
            of_gold = metrics.membership_auc(getattr(gold["forget"], name), getattr(gold["holdout"], name))
            values[f"privleak_{name}"] = metrics.privleak(auc, of_gold)
    return values


def check_gold(start: Measured, gold: Measured) -> None:
    """Refuse a gold model that knows the forget set as well as the model that is to forget it.

    Raises:
        UsageError: if the gold model's answers are not less probable, by a paired bootstrap over questions at 95%.
    """
    pairs = np.log([start["forget"].probability, gold["forget"].probability]).T
    interval = metrics.bootstrap(lambda rows: np.mean(rows[:, 0] - rows[:, 1]), pairs)
    if interval.low > 0:
        return
    before, after = (float(np.mean(scores["forget"].probability)) for scores in (start, gold))
    raise UsageError(
        f"the gold model gives the answers of the forget set a probability of {after:.2f} per token, the model that "
        f"is to forget them {before:.2f}: either the gold model was trained on the forget set, or the model never "
        "learned it. Name another gold model, or learn the sets first (--learn true)"
    )


def stored(
    folder: Path,
    name: str,
    sets: Mapping[str, Sequence[Question]],
    measure_now: Callable[[], Measured],
    max_length: int | None = None,
    verbatim_tokens: int = VERBATIM_PROMPT,
) -> Measured:
    """The numbers of a model from an earlier run, or measured now, by all processes, and stored.

    Args:
        folder: of the stored numbers.
        name: the model's folder or Hub name.
        sets: what is measured.
        measure_now: measures the model.
        max_length: of plain texts, where it was measured with one.
        verbatim_tokens: as for `measure`.
    """
    facts = [
        model_key(name),
        {key: [asdict(question) for question in rows] for key, rows in sets.items()},
        __version__,
        *(
            [max_length, verbatim_tokens]
            if any(not question.question for rows in sets.values() for question in rows)
            else []
        ),
    ]
    path = folder / f"measured-{digest(facts)}.json"
    # The first process looks, so that no other one sees a file that was written in between.
    stored_text = [path.read_text(encoding="utf-8") if PartialState().is_main_process and path.is_file() else None]
    if (text := broadcast_object_list(stored_text)[0]) is not None:
        return {key: SetScores(**scores) for key, scores in json.loads(text).items()}
    measured = measure_now()
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({key: asdict(scores) for key, scores in measured.items()}))
    return measured
