"""Scores of answers against a loop over single rows and the model's own logits."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from prefopt.safety.errors import UsageError
from prefopt.unlearning import metrics
from prefopt.unlearning.data import Question
from prefopt.unlearning.scores import answer_questions, score_questions
from tests.tiny import make_model, make_tokenizer

QUESTIONS = [
    Question("Where was she born?", "In Lima.", "Her birthplace is Lima.", ("Her birthplace is Oslo.", "It is Rome.")),
    Question("What does she write about, and for whom, and since when?", "Bridges.", "", ("Dogs and foxes.",)),
    Question("Who?", "The quick brown fox jumps over the lazy dog, as it has done before."),
    Question("Where was she born?", "In Lima.", "", ("In Lima.",)),
]
TEXTS = [Question("", "The quick brown fox jumps over the lazy dog."), Question("", "A bridge.")]


@pytest.fixture(scope="module")
def model():
    return make_model(dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def plain():
    """A tokenizer without a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def naive(model, prompt, completion, start=None):
    """All values of one row from the model's logits, without anything of ours."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        full = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0, len(prompt) - 1 : -1]
        labels = ids[0, len(prompt) :]
        probs = full.exp()
        means = (probs * full).sum(-1)
        values = {
            "token_ids": labels,
            "token_logps": full[torch.arange(len(labels)), labels],
            "predicted_ids": full.argmax(-1),
            "means": means,
            "deviations": ((probs * full**2).sum(-1) - means**2).sqrt(),
        }
        if start is not None:
            other = torch.log_softmax(start(input_ids=ids).logits.double(), -1)[0, len(prompt) - 1 : -1]
            values["start_logps"] = other[torch.arange(len(labels)), labels]
            values["start_kl"] = (other.exp() * (other - full)).sum(-1)
    return {name: value.numpy() for name, value in values.items()}


def as_chat(tokenizer, question, answer):
    """Prompt and completion ids, from the rendered conversation."""
    user = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": answer}], tokenize=False)
    assert whole.startswith(prompt)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole[len(prompt) :])]


def assert_equal(answer, expected, tolerance=1e-9):
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(answer, name), values, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("layout", ["auto", "padded", "tree"])
@pytest.mark.parametrize("tokens_at_once", [1, 150, 4096])
def test_equals_a_loop_over_rows(model, tokenizer, layout, tokens_at_once):
    scores = score_questions(model, tokenizer, QUESTIONS, layout=layout, tokens_at_once=tokens_at_once)
    assert [score.question for score in scores] == QUESTIONS
    for score, question in zip(scores, QUESTIONS, strict=True):
        texts = [question.answer, question.paraphrase or question.answer, *question.wrong]
        answers = [score.answer, score.paraphrase, *score.wrong]
        assert [answer.text for answer in answers] == texts
        for answer, text in zip(answers, texts, strict=True):
            assert_equal(answer, naive(model, *as_chat(tokenizer, question.question, text)))
            assert answer.average_logp == pytest.approx(answer.token_logps.mean())
            assert answer.start_kl is None


@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_divergence_from_the_start(model, tokenizer, layout):
    start = make_model(seed=1, dtype=torch.float64).eval()
    scores = score_questions(model, tokenizer, QUESTIONS, start=start, layout=layout)
    for score, question in zip(scores, QUESTIONS, strict=True):
        expected = naive(model, *as_chat(tokenizer, question.question, question.answer), start)
        assert_equal(score.answer, expected)
        assert (score.answer.start_kl > 0).all()


def test_without_a_chat_template(model, plain):
    scores = score_questions(model, plain, QUESTIONS)
    for score, question in zip(scores, QUESTIONS, strict=True):
        prompt = plain(f"Question: {question.question}\nAnswer:")["input_ids"]
        completion = plain(f" {question.answer}<|im_end|>")["input_ids"]
        assert_equal(score.answer, naive(model, prompt, completion))


@pytest.mark.parametrize("max_length", [None, 5])
def test_plain_texts(model, tokenizer, max_length):
    for score, text in zip(score_questions(model, tokenizer, TEXTS, max_length=max_length), TEXTS, strict=True):
        ids = tokenizer(text.answer)["input_ids"]
        size = max_length or len(ids)
        parts = [ids[at : at + size] for at in range(0, len(ids), size)]
        expected = [naive(model, part[:1], part[1:]) for part in parts if len(part) > 1]
        joined = {name: np.concatenate([part[name] for part in expected]) for name in expected[0]}
        assert_equal(score.answer, joined)
        assert score.wrong == ()


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "mamba", "moe"])
def test_other_architectures(architecture, tokenizer, caplog):
    """A capped head, learned positions, no attention, experts."""
    caplog.set_level(logging.ERROR)
    model = make_model(architecture).eval()
    for score, question in zip(score_questions(model, tokenizer, QUESTIONS), QUESTIONS, strict=True):
        expected = naive(model, *as_chat(tokenizer, question.question, question.answer))
        expected.pop("predicted_ids")  # float32 may change which of two equally probable tokens comes first
        assert_equal(score.answer, expected, tolerance=2e-4)


def test_in_bfloat16(tokenizer):
    half = make_model(dtype=torch.bfloat16).eval()
    answer = score_questions(half, tokenizer, QUESTIONS[:1])[0].answer
    assert_equal(answer, naive(half, *as_chat(tokenizer, QUESTIONS[0].question, QUESTIONS[0].answer)), tolerance=0.05)


def test_the_model_is_left_as_it_was(tokenizer):
    model, start = make_model(), make_model(seed=1)
    model.train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    attention, random = model.config._attn_implementation, torch.get_rng_state()
    score_questions(model, tokenizer, QUESTIONS, start=start)
    assert model.training
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_metrics_follow(model, tokenizer):
    """One pass is enough for every metric that takes log-probabilities or ids."""
    scores = score_questions(model, tokenizer, QUESTIONS[:1] * 2, start=make_model(seed=1, dtype=torch.float64))
    ratios = metrics.truth_ratio(
        [score.paraphrase.average_logp for score in scores],
        [[wrong.average_logp for wrong in score.wrong] for score in scores],
    )
    assert ratios.shape == (2,)
    answer = scores[0].answer
    assert 0 <= metrics.extraction_strength(answer.predicted_ids, answer.token_ids) <= 1
    assert metrics.min_k(answer.token_logps) >= metrics.loss_score(answer.token_logps)
    assert np.isfinite(metrics.min_k_plus_plus(answer.token_logps, answer.means, answer.deviations))
    assert metrics.zlib_score(answer.token_logps, answer.text) > 0
    assert np.isfinite(metrics.reference_score(answer.token_logps, answer.start_logps))


def test_greedy_answers_continue_the_scored_prompt(model, plain, tokenizer):
    for ours in (plain, tokenizer):
        answers = answer_questions(model, ours, QUESTIONS, max_new_tokens=3, batch_size=3)
        scores = score_questions(model, ours, [Question(q.question, "x") for q in QUESTIONS])
        for answer, score in zip(answers, scores, strict=True):
            first = ours.decode(score.answer.predicted_ids[:1], skip_special_tokens=True).strip()
            assert answer.text.startswith(first)


def test_greedy_answers_need_text_without_a_template(model, plain):
    from prefopt.generation.answers import greedy_answers

    with pytest.raises(UsageError, match="no chat template, so prompts must be texts"):
        greedy_answers(model, plain, [[{"role": "user", "content": "Who?"}]])


def test_refuses(model, tokenizer):
    with pytest.raises(UsageError, match="there are no questions"):
        score_questions(model, tokenizer, [])
    with pytest.raises(UsageError, match=r"row 1 \(from 0\) has 5\d\d tokens, but the model has 512 positions"):
        score_questions(model, tokenizer, [QUESTIONS[0], Question("Who?", "x y" * 180)])
    with pytest.raises(UsageError, match=r"row 0 \(from 0\): a plain text needs two tokens"):
        score_questions(model, tokenizer, [Question("", "a")])
