"""Two processes share the questions of a measurement, and end with one process's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefopt.recipe.unlearning import main
from prefopt.unlearning.data import Question
from prefopt.unlearning.scores import score_questions
from tests.processes import ROOT, launch, torchrun
from tests.recipe.test_engines import ON_CPU, ZERO3
from tests.recipe.test_unlearning import words
from tests.reliability.faults import forked
from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import require
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


@pytest.mark.distributed
def test_zero3_learns_measures_and_forgets_as_one_process_does(tmp_path):
    """Three trainers in one command, and models that are measured whole though new ones load sharded."""
    require("zero3")
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO3))
    more = ("--learn", "true", "--per_device_train_batch_size", "2", "--loss", "npo_rt(beta=0.1)")
    command = [ON_CPU, str(ROOT / "recipes" / "unlearn.py"), *words(tmp_path, *more, output="zero3", epochs="2")]
    launcher = ["accelerate.commands.launch", "--num_processes=2", f"--config_file={tmp_path / 'zero3.json'}"]
    ended = launch(command, launcher)
    assert ended.status == 0, ended.stderr[-3000:]
    sharded = read(tmp_path / "zero3" / "results.json")
    assert sharded["before"]["forget_probability"] > 2 * sharded["gold"]["forget_probability"]
    assert sharded["after"]["forget_probability"] < sharded["before"]["forget_probability"]

    learned, gold = (str(next((tmp_path / "models").glob(f"{name}-*"))) for name in ("learned", "gold"))
    named = ("--model_name_or_path", learned, "--gold_model_name_or_path", gold, "--loss", "npo_rt(beta=0.1)")
    alone = main(argv=words(tmp_path, *named, "--models_dir", str(tmp_path / "other"), output="alone", epochs="2"))
    for name in ("before", "gold", "after"):
        for what, value in sharded[name].items():  # ZeRO-3 has no whole start, so no KL
            assert value == pytest.approx(alone[name][what], rel=1e-3, abs=1e-4), (name, what)


def read(path: Path) -> dict:
    return json.loads(path.read_text())
