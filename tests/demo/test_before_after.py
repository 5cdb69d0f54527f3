"""What the report says of answers and metrics; greedy answers on a tiny model."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from prefopt.demo.before_after import (
    PairMetrics,
    broken_answers,
    rule_rate,
    side_by_side,
    summarize,
)
from prefopt.generation.answers import Answer, greedy_answers
from tests.tiny import make_model, make_tokenizer

GOOD = Answer("Wool traps air, which keeps heat in.", True)
LONG = Answer("Wool is warm. It comes from sheep.", True)
CUT = Answer("Wool traps air.", False)
EMPTY = Answer("", True)
WORD = Answer("Wool.", True)


def text_of(renderable: object) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_an_unfinished_answer_does_not_follow() -> None:
    assert rule_rate([GOOD, LONG, CUT, EMPTY]) == 0.25
    assert rule_rate([]) == 0.0


def test_summary_counts_what_a_collapse_looks_like() -> None:
    summary = summarize([GOOD, CUT, EMPTY, WORD])
    assert (summary.unfinished, summary.empty, summary.one_word) == (0.25, 0.25, 0.25)
    assert summary.mean_words == (7 + 3 + 0 + 1) / 4


def test_metrics_are_read_from_a_trainers_logs() -> None:
    logs = {
        "eval_loss": 0.3,
        "eval_rewards/accuracies": 0.9,
        "eval_rewards/margins": 1.5,
        "eval_rewards/chosen": 0.5,
        "eval_rewards/rejected": -1.0,
    }
    assert PairMetrics.from_logs(logs) == PairMetrics(0.3, 0.9, 1.5)
    ratios = {"eval_ratios/chosen": 3.0, "eval_ratios/rejected": -12.0}
    assert PairMetrics.from_logs(logs | ratios) == PairMetrics(0.3, 0.9, 1.5, 3.0, -12.0)
    assert PairMetrics.from_logs({"eval_loss": 0.3}) is None  # plain sft defines no rewards


def test_healthy_run_shows_its_numbers_and_no_warning() -> None:
    prompts = ["Why does wool keep us warm?", [{"role": "user", "content": "Why is the sea salty?"}]]
    metrics = PairMetrics(0.69, 0.5, 0.0, 0.0, 0.0), PairMetrics(0.2, 0.95, 2.1, 3.2, -15.0)
    shown = text_of(side_by_side(prompts, [LONG, CUT], [GOOD, GOOD], *metrics))
    for part in ("Why is the sea salty?", "It comes from sheep.", "95%", "2.10", "+3.2", "-15.0", "100%", "7.0"):
        assert part in shown
    assert "!" not in shown


def test_collapse_is_called_by_its_name() -> None:
    (sign,) = broken_answers(summarize([GOOD, EMPTY, WORD]))
    assert "67% of the answers are empty or one word" in sign
    assert "(empty)" in text_of(side_by_side(["Why?"], [LONG], [EMPTY]))


def test_different_counts_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 prompts, 2 answers before and 1 after"):
        side_by_side(["Why?"], [GOOD, GOOD], [GOOD])


def test_greedy_answers_keep_order_and_leave_settings_alone() -> None:
    model, tokenizer = make_model().train(), make_tokenizer()
    prompts = ["How does a bridge work?", "Hello", [{"role": "user", "content": "The quick brown fox"}], "dog"]
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=5, batch_size=2)
    assert model.training
    model.eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        new = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer.ended == (tokenizer.eos_token_id in new)
