"""Two processes share the questions of a measurement, and end with one process's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefopt.unlearning.data import Question
from prefopt.unlearning.scores import score_questions
from tests.processes import torchrun
from tests.recipe.test_unlearning import words
from tests.reliability.faults import forked
from tests.tiny import make_model, make_tokenizer
from tests.unlearning import shared_questions

pytest.importorskip("rouge_score")

QUESTIONS = [Question(f"{name}?", f"a {thing}") for name, thing in (("Ada", "fox"), ("Bo", "dog"), ("Cy", "sun"))]


def test_shares_are_parts_of_the_whole():
    model, tokenizer = make_model("llama"), make_tokenizer()
    whole = score_questions(model, tokenizer, QUESTIONS)
    first, second = (score_questions(model, tokenizer, QUESTIONS, share=slice(n, None, 2)) for n in range(2))
    assert [row.question for row in whole] == QUESTIONS
    assert [row.question.question for row in first] == ["Ada?", "Cy?"]
    for row, other in zip([whole[0], whole[2], whole[1]], [*first, *second], strict=True):
        assert other.answer.average_logp == pytest.approx(row.answer.average_logp, rel=1e-5)
    assert score_questions(model, tokenizer, QUESTIONS, share=slice(3, None, 4)) == []


@pytest.mark.distributed
def test_two_processes_share_the_questions_and_have_the_numbers_of_one(tmp_path):
    def arguments(output: str, batch: int, *more: str) -> list[str]:
        batches = ("--per_device_train_batch_size", str(batch), "--models_dir", str(tmp_path / f"models-{output}"))
        return words(tmp_path, *batches, *more, output=output)

    alone_words = arguments("alone", 4)

    def alone_run() -> None:
        alone = shared_questions.unlearn(tmp_path, alone_words)
        (tmp_path / "process-alone.json").write_text(json.dumps(alone))

    assert forked(alone_run, output=tmp_path / "output.txt") == 0, (tmp_path / "output.txt").read_text()[-3000:]
    torchrun("tests.unlearning.shared_questions", str(tmp_path), *arguments("both", 2, "--ddp_backend", "gloo"))
    alone, *both = (read(tmp_path / f"process-{name}.json") for name in ("alone", 0, 1))
    for name in ("scored", "asked"):
        shares = [process[name] for process in both]
        assert sum(shares) == alone[name]
        assert max(shares) < 0.7 * alone[name]
    assert both[0]["results"] == both[1]["results"]
    for name in ("before", "after"):
        assert both[0]["results"][name] == pytest.approx(alone["results"][name], rel=1e-4, abs=1e-6)


def read(path: Path) -> dict:
    return json.loads(path.read_text())
