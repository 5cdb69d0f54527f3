"""What a model says of questions and their answers, token by token: one pass, from which the metrics follow.

Rows are tokenized as for training (`prefopt.data.tokenize`) and scored as in training (`prefopt.scoring`): the head is
computed on answer tokens only, a chunk at a time, so no batch's logits exist as a whole. Of a batch, a few numbers per
answer token remain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prefopt.data.tokenize import tokens_of
from prefopt.evaluation.arrays import Floats
from prefopt.generation.answers import Answer, continued
from prefopt.losses import Need
from prefopt.safety.errors import UsageError
from prefopt.scoring import Extras, Layout, PreferenceCollator, RowBatch, TokenScores
from prefopt.scoring.exact import undisturbed
from prefopt.scoring.layout import LayoutName
from prefopt.scoring.measure import BARE
from prefopt.scoring.model import positions_of
from prefopt.unlearning.data import Question, answer_of, learn_rows, prompt_of

TOKENS_AT_ONCE = {"cpu": 2048, "elsewhere": 16384}
"""Tokens of a batch, padding included, by kind of device."""


@dataclass(frozen=True)
class AnswerScores:
    """One answer under a model, in its T tokens. The end token is one of them; prompt tokens are not.

    Attributes:
        text: the answer.
        token_ids: (T,) its tokens.
        token_logps: (T,) their log-probabilities, given the prompt and the true tokens before them.
        predicted_ids: (T,) the most probable token at each position.
        means: (T,) mean of log p over the vocabulary under the model's own distribution (minus its entropy).
        deviations: (T,) its standard deviation.
        start_logps: (T,) the tokens' log-probabilities under the start; None without one.
        start_kl: (T,) KL(start || model) at each position; None without a start.
    """

    text: str
    token_ids: NDArray[np.int64]
    token_logps: Floats
    predicted_ids: NDArray[np.int64]
    means: Floats
    deviations: Floats
    start_logps: Floats | None = None
    start_kl: Floats | None = None

    @property
    def average_logp(self) -> float:
        """In nats per token."""
        return float(self.token_logps.mean())


@dataclass(frozen=True)
class QuestionScores:
    """One question's answers under a model.

    Attributes:
        question: the row.
        answer: its answer; of a plain text, the text without its first token, which nothing predicts.
        paraphrase: the paraphrased answer; the answer itself where the row has none, as TOFU does for real authors.
        wrong: the wrong answers, in order.
    """

    question: Question
    answer: AnswerScores
    paraphrase: AnswerScores
    wrong: tuple[AnswerScores, ...]


@dataclass(frozen=True)
class _Part:
    """An answer after its prompt, or a part of a plain text, as ids; `place` is (question, answer)."""

    place: tuple[int, int]
    prompt: list[int]
    completion: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


def score_questions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    start: nn.Module | None = None,
    share: slice = slice(None),
    max_length: int | None = None,
    tokens_at_once: int | None = None,
    layout: Layout | LayoutName = "auto",
) -> list[QuestionScores]:
    """Score the answers, paraphrases and wrong answers of all questions, in one pass over the model.

    Questions of similar length share a batch; the prompt of a question is computed once where the model allows it.

    Args:
        model: a causal language model, wrapped or not; its mode, adapters and random state are left as they are.
        tokenizer: the model's; with a chat template, questions are user turns.
        questions: with their answers, or plain texts.
        start: another model (with the same vocabulary) to compare with at every answer token: the one before
            unlearning, or the reference of `metrics.reference_score`.
        share: which of the questions are scored; all of them are checked.
        max_length: plain texts are cut into parts of this many tokens; the first token of each part is not scored.
        tokens_at_once: maximum tokens of a batch, padding included, unless a single question has more.
        layout: a layout, used before or not, or its name.

    Returns:
        Scores of the share, in the order of the questions.

    Raises:
        UsageError: without questions, or naming the row that is too long for the model or has one token.
    """
    if not questions:
        raise UsageError("there are no questions to score")
    parts = [_parts_of(question, row, tokenizer, max_length) for row, question in enumerate(questions)]
    _check_lengths(model, parts)
    device = next(model.parameters()).device
    limit = tokens_at_once or TOKENS_AT_ONCE["cpu" if device.type == "cpu" else "elsewhere"]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = PreferenceCollator(pad, vocabulary=_vocabulary(model))
    scorer = _Scorer(model, start, layout if isinstance(layout, Layout) else Layout(layout))
    scored: dict[tuple[int, int], list[dict[str, Any]]] = {}
    with scorer.prepared():
        for batch in _batches(parts[share], limit):
            examples = [{"prompt_ids": p.prompt, "completion_ids": p.completion, "label": True} for p in batch]
            rows = RowBatch.of({name: _moved(value, device) for name, value in collate(examples).items()})
            for part, values in zip(batch, scorer.of_rows(rows), strict=True):
                scored.setdefault(part.place, []).append(values)
    return [_joined(row, questions[row], scored) for row in range(len(questions))[share]]


def answer_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int = 200,
    batch_size: int = 64,
) -> list[Answer]:
    """The model's own greedy answers, in order, after the prompts that `score_questions` uses.

    Args:
        model: whole on this process's device; its mode is left as it is.
        tokenizer: of the model.
        questions: none of them a plain text.
        max_new_tokens: maximum length of an answer.
        batch_size: questions at once; where one is answered, the next takes its place.
    """
    prompts = [tokens_of({"prompt": prompt_of(q.question, tokenizer)}, (), tokenizer).prompt for q in questions]
    return [answer.stripped() for answer in continued(model, tokenizer, prompts, max_new_tokens, batch_size)]


@dataclass(frozen=True)
class _Scorer:
    """Scores batches of rows under a model, beside its start if there is one."""

    model: nn.Module
    start: nn.Module | None
    layout: Layout

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Context in which rows are scored; the models are as before afterwards."""
        models = [self.model] if self.start is None else [self.model, self.start]
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(undisturbed(model))
                stack.callback(self.layout.release, model)
            yield

    def of_rows(self, rows: RowBatch) -> list[dict[str, Any]]:
        """The values of each row's completion tokens, by the name of the field of `AnswerScores`."""
        extras, reference = Extras(statistics=False, distribution=True), None
        if self.start is not None:
            self.layout.meet(self.model, rows)
            reference, _ = self.layout.score(self.start, rows, extras=BARE, keep_logits=True)
            extras = Extras(Need.FORWARD_KL, statistics=False, distribution=True)
        tokens, _ = self.layout.score(self.model, rows, extras=extras, reference=reference)
        return _split(tokens, rows.ids[:, 1:], None if reference is None else reference.logps)


def _split(tokens: TokenScores, ids: Tensor, start_logps: Tensor | None) -> list[dict[str, Any]]:
    of = tokens.quantities
    values = {
        "token_ids": ids,
        "token_logps": tokens.logps,
        "predicted_ids": of["predicted_ids"],
        "means": of["mean_logps"],
        "deviations": of["logp_deviations"],
    }
    if start_logps is not None:
        values |= {"start_logps": start_logps, "start_kl": of["token_forward_kl"]}
    mask = tokens.mask.cpu().numpy()
    arrays = {name: (v.double() if v.is_floating_point() else v).cpu().numpy() for name, v in values.items()}
    return [{name: array[row][mask[row]] for name, array in arrays.items()} for row in range(len(mask))]


def _joined(row: int, question: Question, scored: dict[tuple[int, int], list[dict[str, Any]]]) -> QuestionScores:
    answers = []
    for number, text in enumerate(_texts(question)):
        parts = scored[row, number]
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        answers.append(AnswerScores(text, **values))
    first = 2 if question.paraphrase else 1
    return QuestionScores(question, answers[0], answers[first - 1], tuple(answers[first:]))


def _texts(question: Question) -> list[str]:
    return [question.answer, *([question.paraphrase] if question.paraphrase else []), *question.wrong]


def _parts_of(question: Question, row: int, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[_Part]:
    if not question.question:
        if len(tokenizer(question.answer)["input_ids"]) < 2:
            raise UsageError(f"row {row} (from 0): a plain text needs two tokens, the first of which is not scored")
        rows = learn_rows([question], tokenizer, max_length)
        return [_Part((row, 0), part["prompt_ids"], part["completion_ids"]) for part in rows]
    example: dict[str, Any] = {"prompt": prompt_of(question.question, tokenizer)}
    names = [f"answer {number}" for number in range(len(_texts(question)))]
    example |= {name: answer_of(text, tokenizer) for name, text in zip(names, _texts(question), strict=True)}
    tokens = tokens_of(example, names, tokenizer)
    return [_Part((row, number), tokens.prompt, ids) for number, ids in enumerate(tokens.completions)]


def _batches(parts: Sequence[Sequence[_Part]], limit: int) -> Iterator[list[_Part]]:
    """Whole questions, those of similar length together, until the padded batch would exceed the limit."""
    batch: list[_Part] = []
    # The longest first: a layout that was tried for them need not be tried for the others.
    for question in sorted(parts, key=lambda own: -max(part.length for part in own)):
        longest = max(part.length for part in (batch or question))
        if batch and (len(batch) + len(question)) * longest > limit:
            yield batch
            batch = []
        batch += question
    if batch:
        yield batch


def _check_lengths(model: nn.Module, parts: Sequence[Sequence[_Part]]) -> None:
    positions = positions_of(model)
    for part in (part for own in parts for part in own):
        if positions is not None and part.length > positions:
            raise UsageError(
                f"row {part.place[0]} (from 0) has {part.length} tokens, but the model has {positions} positions: "
                "shorten the question or its answer; plain texts are cut by max_length"
            )


def _vocabulary(model: nn.Module) -> int | None:
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
