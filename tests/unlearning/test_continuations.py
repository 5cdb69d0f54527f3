"""MUSE's measures: of hand-made texts, and of a tiny model that continues what it reads."""

from __future__ import annotations

import pytest
import torch

from prefopt.safety.errors import UsageError
from prefopt.unlearning.continuations import Beginning, beginnings, continuations, scored
from prefopt.unlearning.data import Question
from prefopt.unlearning.metrics import few_shot_prompt, first_answer, knowledge_memorization, verbatim_memorization
from tests.tiny import make_model, make_tokenizer

pytest.importorskip("rouge_score")

TEXT = Question("", "The quick brown fox jumps over the lazy dog. A bridge carries loads across a gap.")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_verbatim_memorization_is_f1_of_the_longest_common_subsequence():
    """Words in common and in order: 4 of 4, 2 of 4 against 2 of 3, none; `runs` is not `run` without a stemmer."""
    texts = ["the fox runs away"] * 4
    said = ["The fox runs away!", "the dog away", "nothing", "a fox run"]
    precision_recall = [(1, 1), (2 / 3, 2 / 4), (0, 0), (1 / 3, 1 / 4)]
    expected = [2 * p * r / (p + r) if p else 0 for p, r in precision_recall]
    assert verbatim_memorization(said, texts).tolist() == pytest.approx(expected)


def test_an_answer_after_examples_ends_where_the_model_asks_itself():
    assert (
        few_shot_prompt("Who?", [("Where?", "Here.")]) == "Question: Where?\nAnswer: Here.\n\nQuestion: Who?\nAnswer: "
    )
    assert few_shot_prompt("Who?") == "Question: Who?\nAnswer: "
    for completion in ("A fox\n\nmore", "A fox\nQuestion: Why?", "A foxQuestion: Why?", "A fox"):
        assert first_answer(completion) == "A fox"
    assert first_answer("\n\nA fox") == ""  # as MUSE's code has it
    assert knowledge_memorization(["A fox\n\nQuestion: a dog?", "dog"], ["a fox", "a fox"]).tolist() == [1, 0]


def test_a_text_is_continued_after_its_first_tokens_or_its_half(tokenizer):
    ids = tokenizer(TEXT.answer)["input_ids"]
    (part,) = beginnings("forget", [TEXT], tokenizer, 5)
    assert part == Beginning(ids[:5], tokenizer.decode(ids[5 : 5 + 128]))
    (half,) = beginnings("forget", [TEXT], tokenizer, 1000)
    assert half.prompt == ids[: len(ids) // 2]
    (given,) = beginnings("verbatim", [Question("The quick", " brown fox")], tokenizer, 5)
    assert given == Beginning(tokenizer("The quick")["input_ids"], " brown fox")
    long = Question("The quick", " brown fox" * 200)
    (cut,) = beginnings("verbatim", [long], tokenizer, 5)
    assert len(tokenizer(cut.reference)["input_ids"]) == 128


def test_the_model_continues_prompts_as_they_are(tokenizer):
    model = make_model()
    parts = beginnings("forget", [TEXT, Question("", "How does a bridge work?")], tokenizer, 5)
    texts = continuations(model, tokenizer, "forget", parts)
    for part, text in zip(parts, texts, strict=True):
        ids = torch.tensor([part.prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False)
        assert text == tokenizer.decode(out[0, len(part.prompt) :], skip_special_tokens=True)
    with pytest.raises(UsageError, match=r"verbatim set, row 1 \(from 0\): its prompt has 500 tokens, and 128 more"):
        continuations(model, tokenizer, "verbatim", [Beginning([5], "a"), Beginning([5] * 500, "a")])


def test_references_without_a_word_are_left_out():
    parts = [Beginning([1], "a fox"), Beginning([1], "...")]
    assert scored("forget", ["a fox", "a fox"], parts) == [1.0]
    assert scored("forget", ["a fox"], parts[1:]) == []
    assert scored("verbatim", ["\u043b\u0438\u0441\u0430"], [Beginning([1], "\u043b\u0438\u0441\u0430")]) == [1.0]
