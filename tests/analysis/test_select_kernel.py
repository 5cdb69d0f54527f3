"""`prefopt select-kernel` from start to end, with a random encoder and a random model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

from prefopt.analysis.kernel_choice import choose as kernels
from prefopt.analysis.kernel_choice.choose import choose
from prefopt.analysis.kernel_choice.show import _verdict
from prefopt.analysis.kernel_choice.trial import Outcome, Trial
from prefopt.cli import app
from prefopt.data import normalise
from prefopt.losses import parse
from prefopt.losses.scores import EMBEDDINGS
from tests.tiny import save_encoder
from tests.trainer.runs import make_labelled, make_pairs, save_model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    make_pairs(40).to_json(path)
    return str(path)


@pytest.fixture(autouse=True)
def _short(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "run_trial", lambda *given: _RUN(*given, seeds=2, steps=1))


_RUN = kernels.run_trial


def run(*words, columns=100):
    result = CliRunner().invoke(app, ["select-kernel", *words], env={"COLUMNS": str(columns)})
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def with_vectors(path, n=30, width=4):
    generator = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(n, width, generator=generator).tolist() for name in EMBEDDINGS}
    make_pairs(n, **vectors).to_json(path)
    return str(path)


class TestOutput:
    def test_measures_choice_and_how_to_train_with_it(self, data, encoder):
        code, shown = run(data, "--embeddings", encoder, columns=200)
        assert code == 0
        for word in ("40 pairs", "PND", "PNAV", "TAT", "NAG", "support overlap", "drift", "kurtosis", "roughness"):
            assert word in shown
        assert f"embeddings='given')\" --embeddings {encoder}" in shown
        assert "our reading" in shown

    def test_verify_ranks_all_pairs_and_says_where_the_selected_one_stands(self, data, encoder, model, tmp_path):
        file = tmp_path / "found.json"
        words = ("--embeddings", encoder, "--verify", "--model", model, "--json", str(file))
        code, shown = run(data, *words, columns=200)
        assert code == 0
        found = json.loads(file.read_text())
        assert len(found["trial"]["outcomes"]) == 28
        selected = (found["selection"]["kernel"], found["selection"]["divergence"])
        order = [(one["kernel"], one["divergence"]) for one in found["trial"]["outcomes"]]
        assert found["trial"]["rank"] == order.index(selected) + 1
        assert f"ranks {found['trial']['rank']} of 28" in shown
        assert "Loss against plain dpo" in shown
        assert "not the model" in shown
        assert f"hold {1 - found['trial']['left_out']:.1%} of the model's probability" in shown

    def test_hidden_states_of_the_model(self, data, model):
        code, shown = run(data, "--embeddings", "hidden", "--model", model, columns=200)
        assert code == 0
        assert "the model's mean hidden states" in shown
        assert "--embeddings" not in shown

    def test_columns_of_the_data(self, tmp_path):
        code, shown = run(with_vectors(tmp_path / "rows.jsonl"), "--embeddings", "columns")
        assert code == 0
        assert "30 pairs, the data's columns" in shown

    def test_fewer_rows_are_drawn_where_asked(self, data, encoder):
        code, shown = run(data, "--embeddings", encoder, "--rows", "25")
        assert code == 0
        assert "25 of 40 pairs" in shown

    def test_of_a_mixture_as_many_rows_as_its_weights_say(self, data, encoder, tmp_path):
        make_pairs(40, seed=1).to_json(tmp_path / "other.jsonl")
        code, shown = run(f"{data}:3,{tmp_path / 'other.jsonl'}:1", "--embeddings", encoder)
        assert code == 0
        assert "53 pairs" in shown

    def test_what_is_to_be_copied_stays_in_one_line(self, data, encoder):
        result = CliRunner().invoke(app, ["select-kernel", data, "--embeddings", encoder], env={"COLUMNS": "80"})
        (line,) = (line for line in result.output.splitlines() if line.startswith("train with"))
        words = shlex.split(line)
        assert words[2] == "--loss"
        assert str(parse(words[3])).startswith("kernel_dpo(")
        assert words[4:] == ["--embeddings", encoder]

    def test_fits_into_80_columns(self, data, encoder, model):
        words = ["select-kernel", data, "--embeddings", encoder, "--verify", "--model", model]
        result = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
        lines = [line for line in result.output.splitlines() if encoder not in line and data not in line]
        assert max(map(len, lines)) <= 80


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--embeddings", "columns"], "has no column 'prompt_embedding': name an encoder with --embeddings"),
            (["--embeddings", "nowhere/at-all"], "encoder 'nowhere/at-all' is not a folder here"),
            (["--model", "anything"], "--model is not used"),
            (
                ["--rows", "5", "--embeddings", "ENCODER"],
                "at least 20 pairs are needed to measure a preference set, got 5",
            ),
            (
                ["--rows", "500", "--embeddings", "hidden"],
                "rows is 500, but of hidden states at most 240 pairs are kept",
            ),
            (["--json", "tests"], "--json: tests is a folder: name a file in it"),
            (["--embeddings", "hidden", "--model", "/no/where"], "no tokenizer can be loaded from '/no/where'"),
            (["--json", "no/such/folder.json"], "there is no folder no/such"),
        ],
    )
    def test_are_told_in_a_line(self, words, message, data, encoder):
        code, shown = run(data, *(encoder if word == "ENCODER" else word for word in words))
        assert code == 1
        assert message in shown
        assert "Traceback" not in shown

    def test_single_completions(self, tmp_path):
        make_labelled(30).to_json(tmp_path / "rows.jsonl")
        code, shown = run(str(tmp_path / "rows.jsonl"))
        assert code == 1
        assert "these rows are single completions" in shown

    def test_a_vector_that_is_not_there_is_named(self, tmp_path):
        vectors = {name: [[1.0, 2.0]] * 30 for name in EMBEDDINGS}
        vectors["chosen_embedding"][4] = None
        make_pairs(30, **vectors).to_json(tmp_path / "rows.jsonl")
        code, shown = run(str(tmp_path / "rows.jsonl"), "--embeddings", "columns")
        assert code == 1
        assert "row 4, column 'chosen_embedding': the vector has no numbers" in shown

    def test_an_encoder_where_the_data_has_vectors(self, tmp_path, encoder):
        code, shown = run(with_vectors(tmp_path / "rows.jsonl"), "--embeddings", encoder)
        assert code == 1
        assert "'chosen_embedding': measure such vectors with --embeddings columns, or drop" in shown

    def test_rows_that_the_model_cannot_read_are_left_out_while_there_are_enough(self, data, tmp_path):
        model = save_model(tmp_path)
        template = Path(model) / "chat_template.jinja"
        refusal = "{% if messages[0]['content'] == 'refused' %}{{ raise_exception('no') }}{% endif %}"
        template.write_text(refusal + template.read_text())
        rows = make_pairs(40).to_list()
        rows[5]["prompt"][0]["content"] = "refused"
        Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
        code, shown = run(str(tmp_path / "rows.jsonl"), "--embeddings", "hidden", "--model", model)
        assert code == 0
        assert "39 of 40 pairs" in shown
        template.write_text("{{ messages[0]['content'] }}")  # a completion leaves no token
        code, shown = run(data, "--embeddings", "hidden", "--model", model)
        assert code == 1
        assert "40 of 40 pairs cannot be read by the model's tokenizer, and it takes 20: `prefopt check`" in shown
        template.unlink()
        code, shown = run(data, "--embeddings", "hidden", "--model", model)
        assert code == 1
        assert "has no chat template: name a chat model (--model)" in shown

    def test_too_few_pairs(self, tmp_path):
        make_pairs(5).to_json(tmp_path / "rows.jsonl")
        code, shown = run(str(tmp_path / "rows.jsonl"))
        assert code == 1
        assert "5 pairs are too few to measure; it takes 20" in shown

    def test_bundled_pairs_have_no_split_to_choose(self):
        assert "--columns and --split are about DATA" in run("--split", "test")[1]


def test_rows_that_cannot_be_trained_on_are_left_out(encoder):
    rows = make_pairs(30).to_list()
    for row in (3, 7):
        rows[row]["chosen"] = rows[row]["rejected"]
    assert choose(normalise(Dataset.from_list(rows)), encoder).usable == 28


def test_the_verdict_says_when_draws_cannot_tell():
    near, best = (
        Outcome("rbf", "kl", (0.61, 0.59), (0.5, 0.5), (0.0, 0.0)),
        Outcome("rbf", "js", (0.6, 0.598), (0.5, 0.5), (0.0, 0.0)),
    )
    trial = Trial((best, near), Outcome("dpo", "", (0.7, 0.69), (0.5, 0.5), (0.0, 0.0)), 30, 10)
    shown = _verdict(trial, near).plain
    assert "ranks 2 of 2 by held-out loss" in shown
    assert "Loss against the best pair: +0.0010 ± 0.0116, not significant with these draws." in shown
    assert "Loss against plain dpo: -0.0950 ± 0.0065." in shown


@pytest.mark.parametrize(("loss", "told"), [(0.6, False), (0.7, True)])
def test_the_verdict_says_when_nothing_was_learned(loss, told):
    found = Outcome("rbf", "kl", (loss, loss), (0.5, 0.5), (0.0, 0.0))
    trial = Trial((found,), Outcome("dpo", "", (0.71, 0.7), (0.5, 0.5), (0.0, 0.0)), 30, 10)
    assert (
        "None did better than no training at all (log 2 = 0.6931): 30 pairs" in _verdict(trial, found).plain
    ) == told
