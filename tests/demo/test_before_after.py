"""What the report says of answers and metrics; greedy answers on a tiny model."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from prefopt.demo.before_after import (
    PairMetrics,
    over_optimisation,
    rule_rate,
    side_by_side,
    summarize,
)
from prefopt.generation.answers import Answer, greedy_answers

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
    signs = over_optimisation(summarize([GOOD, EMPTY, WORD]), PairMetrics(0.0, 1.0, 9.0, -60.0, -150.0))
    assert "67% of the answers are empty or one word" in signs[0]
    assert "lost 60 nats" in signs[1]
    assert "(empty)" in text_of(side_by_side(["Why?"], [LONG], [EMPTY]))


def test_different_counts_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 prompts, 2 answers before and 1 after"):
        side_by_side(["Why?"], [GOOD, GOOD], [GOOD])


class Parrot(torch.nn.Module):
    """Answers each prompt with its own first letters, then ends; long prompts never end."""

    device = torch.device("cpu")

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
        assert not self.training
        assert settings["do_sample"] is False
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            real = ids[mask.bool()]
            assert bool(mask[-1]), "prompts must be padded on the left"
            body = torch.full((settings["max_new_tokens"],), 9)
            if len(real) < 6:
                body[:2], body[2:] = real[:2], 2
            rows.append(torch.cat([ids, body]))
        return torch.stack(rows)


class Letters:
    """One token per letter: a is 10, b is 11 ...; 2 ends an answer and pads."""

    eos_token_id = pad_token_id = 2
    padding_side = "right"

    def apply_chat_template(self, chat: list[dict[str, str]], **_: object) -> str:
        return chat[-1]["content"]

    def __call__(self, batch: list[str], **_: object) -> Any:
        width = max(map(len, batch))
        rows = [[ord(letter) - 87 for letter in text] for text in batch]
        pads = [[2] * (width - len(row)) for row in rows]
        left = self.padding_side == "left"
        ids = torch.tensor([p + r if left else r + p for p, r in zip(pads, rows, strict=True)])
        kept = [
            [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p)
            for p, r in zip(pads, rows, strict=True)
        ]
        return Inputs(input_ids=ids, attention_mask=torch.tensor(kept))

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(token + 87) for token in tokens)


class Inputs(dict):  # type: ignore[type-arg]
    def to(self, _: object) -> Inputs:
        return self


def test_greedy_answers_keep_order_and_leave_settings_alone() -> None:
    model, tokenizer = Parrot().train(), Letters()
    prompts = ["abcd", "zzzzzzzz", [{"role": "user", "content": "pqr"}]]
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=4, batch_size=2)
    assert answers[0] == Answer("ab", True)
    assert not answers[1].ended
    assert answers[2] == Answer("pq", True)
    assert model.training
    assert tokenizer.padding_side == "right"
