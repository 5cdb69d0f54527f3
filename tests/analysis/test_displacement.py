"""CHES scores against hidden states read with transformers alone, their filter, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from prefopt.analysis import ches
from prefopt.cli import app
from tests.tiny import make_model
from tests.trainer.runs import save_model

ROWS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [8, 9, 10, 2]},
    {"prompt_ids": [5], "chosen_ids": [11, 2], "rejected_ids": [12, 2]},
    {"prompt_ids": [9, 4, 3, 5, 6], "chosen_ids": [13, 14, 15, 16, 2], "rejected_ids": [7, 2]},
]


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
def by_hand(model, row, average):
    """The states at the last prompt token and at every completion token but the last."""
    sums = []
    for side in ("chosen", "rejected"):
        ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        states = states[len(row["prompt_ids"]) - 1 : -1]
        sums.append(states.mean(0) if average else states.sum(0))
    return float(sums[0] @ sums[1] - sums[0] @ sums[0])


def test_scores_are_those_of_the_paper(model):
    scores = ches(model, ROWS)
    for values, average in ((scores.summed, False), (scores.averaged, True)):
        expected = [by_hand(model, row, average) for row in ROWS]
        assert values.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert scores.worst(2) == sorted(range(3), key=lambda n: -float(scores.averaged[n]))[:2]
    assert scores.lowest(0.4) == [int(scores.averaged.argmin())]
    assert scores.lowest(1) == [0, 1, 2]


def test_a_pair_of_equal_completions_has_score_0(model):
    row = {**ROWS[0], "rejected_ids": ROWS[0]["chosen_ids"]}
    assert float(ches(model, [row]).averaged) == pytest.approx(0, abs=1e-5)


def test_what_cannot_be_scored_is_named(model):
    with pytest.raises(ValueError, match="no pairs"):
        ches(model, [])
    with pytest.raises(ValueError, match="row 1 has no rejected tokens"):
        ches(model, [ROWS[0], {**ROWS[1], "rejected_ids": []}])
    with pytest.raises(ValueError, match="at most 1"):
        ches(model, ROWS).lowest(2)


def run(*words):
    return CliRunner().invoke(app, ["check", *map(str, words)])


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": "What is 2 + 2?", "chosen": f" {n}", "rejected": f" {n + 1} or {n}"} for n in range(6)]
    rows.insert(2, {"prompt": "Why?", "chosen": "", "rejected": " so"})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_the_command_lists_the_worst_pairs_and_writes_the_others(data, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, out = save_model(tmp_path / "model"), tmp_path / "kept.jsonl"
    result = run(data, "--model", folder, "--displacement", "--keep", "0.5", "--out", out)
    assert result.exit_code == 1, result.output  # one row cannot be trained on
    assert "CHES of 6 pairs" in result.output
    assert f"{out}: the 3 pairs with the lowest scores" in " ".join(result.output.split())
    kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(kept) == 3
    assert set(kept[0]) == {"prompt", "chosen", "rejected"}
    assert all(row["chosen"] for row in kept)


def test_the_data_is_not_overwritten(data):
    before = data.read_bytes()
    for source in (data, f"{data}:1,other.jsonl:2"):
        result = run(source, "--model", "m", "--displacement", "--keep", "0.5", "--out", data)
        assert result.exit_code == 1
        assert "is the file that is read, and would be lost" in " ".join(result.output.split())
    assert data.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--displacement",), "--model"),
        (("--keep", "0.5", "--out", "x.jsonl"), "add it"),
        (("--displacement", "--model", "m", "--keep", "0.5"), "belong together"),
        (("--displacement", "--model", "m", "--keep", "2", "--out", "x.jsonl"), "above 0 and at most 1"),
    ],
)
def test_options_without_effect_are_refused(data, words, said):
    result = run(data, *words)
    assert result.exit_code
    assert said in " ".join(result.output.split())
