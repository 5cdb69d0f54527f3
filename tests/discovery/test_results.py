"""What comes out of a search: the exported loss and its test, the page, the levels above the toy, the command."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.discovery import held_out, page, read, trained
from prefopt.discovery import search as module
from prefopt.discovery.archive import Archive, Candidate, Result
from prefopt.discovery.evolve import Proposal
from prefopt.discovery.export import export
from prefopt.discovery.held_out import MEASURES, compare
from prefopt.discovery.levels import ToyLevel
from prefopt.discovery.search import LRML, SEEDS, Search, SearchOptions
from prefopt.losses import parse
from prefopt.losses.from_file import register_file
from prefopt.safety.errors import UsageError
from tests.discovery.test_grammar import value_and_slope

LONG = " + ".join(f"0.{n}1 * softplus(-(1.{n}3 * x))" for n in range(1, 7))


class Fixed:
    """Proposes one good loss and then nonsense."""

    share = 1.0

    def ask(self, archive, members, numbers):
        texts = {3: LONG, 4: "softplus(x)", 5: "no loss | at all"}
        return {number: Proposal(texts.get(number, ""), "fixed") for number in numbers}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "SCREEN", ToyLevel("screen", (0.1,), (0,), 4))
    monkeypatch.setattr(module, "TOY", ToyLevel("toy", (0.1, 0.5), (0,), 6))
    linear = ToyLevel("held-out, linear", (0.01, 1.0), (7, 8), 40)
    bent = ToyLevel("held-out, bent", (0.5,), (7, 8), 4, "bent")
    monkeypatch.setattr(held_out, "HELD_OUT", (linear, bent))
    monkeypatch.setattr(held_out, "_RESAMPLES", 20)


@pytest.fixture
def searched(tmp_path):
    archive = Archive(tmp_path / "search")
    options = SearchOptions(tmp_path / "search", candidates=7, generation=4)
    members = Search(options, archive, Fixed(), say=lambda line: None).run()
    yield archive, members
    archive.close()


class TestExport:
    @pytest.mark.usefixtures("no_loss_stays")
    def test_the_file_registers_the_loss_and_its_test_passes(self, searched, tmp_path):
        loss, test = export(searched[0], 3, tmp_path / "steep.py")
        assert max(map(len, loss.read_text(encoding="utf-8").splitlines())) <= 119
        assert register_file(loss).names == ("steep",)
        values, _ = value_and_slope(parse("steep(beta=0.3)"))
        d = torch.linspace(-30, 30, 121, dtype=torch.float64)
        expected = sum(
            float(f"0.{n}1") * torch.nn.functional.softplus(-float(f"1.{n}3") * 0.3 * d) for n in range(1, 7)
        )
        torch.testing.assert_close(values, expected)
        assert parse("steep").separable
        assert str(parse("steep(beta=0.3)")) == "steep(beta=0.3)"
        tests = runpy.run_path(str(test))
        for beta in (0.01, 0.1, 1.0):
            tests["test_is_finite_to_1000_and_pushes_the_chosen_answer_up"](beta)

    def test_a_file_of_the_users_is_not_overwritten(self, searched, tmp_path):
        own = tmp_path / "new" / "steep.py"
        export(searched[0], 3, own)
        export(searched[0], 3, own)  # the same again
        own.with_name("test_steep.py").write_text("# mine")
        with pytest.raises(UsageError, match="exists and is another file"):
            export(searched[0], 3, own)
        assert own.with_name("test_steep.py").read_text() == "# mine"

    @pytest.mark.usefixtures("no_loss_stays")
    def test_the_exported_test_can_fail(self, searched, tmp_path):
        loss, test = export(searched[0], 3, tmp_path / "steep.py")
        text = loss.read_text(encoding="utf-8")
        loss.write_text(text.replace("expression = (", 'expression = "softplus(x)" or (', 1), encoding="utf-8")
        with pytest.raises(AssertionError):
            runpy.run_path(str(test))["test_is_finite_to_1000_and_pushes_the_chosen_answer_up"](0.1)

    @pytest.mark.parametrize(
        ("number", "out", "message"),
        [
            (99, "mine.py", "no candidate 99"),
            (4, "mine.py", "candidate 4 was refused: its slope"),
            (5, "mine.py", "candidate 5 was refused: column"),
            (3, "mine.txt", "a loss file is a Python module"),
            (3, "dpo.py", "a loss is named dpo already"),
            (3, "Mine.py", "cannot name a loss"),
        ],
    )
    def test_what_cannot_be_exported_is_said(self, searched, tmp_path, number, out, message):
        with pytest.raises(UsageError, match=message):
            export(searched[0], number, tmp_path / out)


class TestHeldOut:
    def test_lrml_collapses_and_dpo_does_not(self):
        rows = {
            row.name: row
            for row in compare({"dpo": read(SEEDS["dpo"]), "lrml": read(LRML), "same": read("3 * softplus(-x)")})
            if row.level.name == "held-out, linear"
        }
        assert rows["lrml"].measures["reward"].high < 0 < rows["dpo"].measures["reward"].low
        assert rows["lrml"].against_dpo["value"].high < 0
        assert not rows["lrml"].beats_dpo
        assert not rows["same"].beats_dpo
        assert rows["same"].against_dpo["reward"].value == pytest.approx(0, abs=1e-3)
        assert rows["dpo"].rows.shape == (2, 2, 4)

    def test_measures_of_rows_worked_by_hand(self):
        # Two seeds, two betas: reward, KL, length, value.
        rows = np.array([[[1.0, 1.0, 2.0, 0.5], [0.4, 0.2, -4.0, 0.7]], [[2.0, 3.0, 4.0, 0.7], [0.6, 0.2, -2.0, 0.9]]])
        assert MEASURES["value"](rows) == pytest.approx(0.6)
        assert MEASURES["reward"](rows) == pytest.approx(0.5)
        assert MEASURES["kl"](rows) == pytest.approx(1.1)
        assert MEASURES["length"](rows) == pytest.approx(3.0)
        # Over the root of KL, through (0, 0), (0.2, 0.5) and (2, 1.5).
        low, high = 0.2**0.5, 2.0**0.5
        line = [0.5 + (kl**0.5 - low) / (high - low) for kl in (0.25, 0.5, 1.0, 1.5)]
        assert MEASURES["reward_at_kl"](rows) == pytest.approx(sum(line) / 4)

    def test_a_training_that_breaks_has_no_measures(self, monkeypatch):
        def broken(level, node, candidate):
            return [
                Result(0, level.name, beta, seed, None, None, None) for beta in level.betas for seed in level.seeds
            ]

        real = held_out.run_level
        monkeypatch.setattr(held_out, "run_level", lambda *words: (broken if str(words[1]) == "x" else real)(*words))
        rows = compare({"dpo": read(SEEDS["dpo"]), "bad": read("x")})
        assert all(row.measures == {} and not row.beats_dpo for row in rows if row.name == "bad")
        told = page.Frontier([], {}, {}, [], rows, [])
        assert "broke" in page.markdown(told)


class TestPage:
    def test_page_json_and_picture(self, searched, tmp_path):
        archive, members = searched
        told = page.measure_frontier(archive, members)
        files = page.write_page(told, tmp_path)
        assert [file.name for file in files] == ["frontier.md", "frontier.json", "frontier.png"]
        text, stored = files[0].read_text(encoding="utf-8"), json.loads(files[1].read_text(encoding="utf-8"))
        assert "7 candidates" in text
        assert "| could not be read | 2 |" in text
        assert "| static checks | 1 |" in text
        assert f"`{LONG}`" in text
        assert "candidate 0" not in text  # DPO has its name
        assert stored["candidates"] == 7
        assert stored["verdict"] in text
        assert {point["candidate"] for point in stored["frontier"]} <= {0, 1, 2, 3}
        assert np.array(stored["held_out"][0]["rows"]).shape == (2, 2, 4)
        assert files[2].read_bytes()[:4] == b"\x89PNG"

    @pytest.mark.parametrize(
        ("wins", "sentence"),
        [
            ((True, True), "beats DPO on"),
            ((True, False), "it is not said to"),
            ((False, False), "no candidate is"),
        ],
    )
    def test_the_verdict_needs_both_kinds_of_problems(self, wins, sentence):
        class Row:
            def __init__(self, name, kind, beats):
                self.name, self.beats_dpo = name, beats
                self.level = ToyLevel(kind, (1.0,), (0,), 1)

        rows = [Row("dpo", "a", False), Row("candidate 5", "a", wins[0]), Row("candidate 9", "a", True)]
        rows += [Row("dpo", "b", False), Row("candidate 5", "b", wins[1]), Row("candidate 9", "b", True)]
        assert sentence in page.verdict(rows)


class TestAboveTheToy:
    def run(self, monkeypatch, archive, folder, answers):
        """Train with a stand-in for `prefopt train`; `answers` gives a run's rate of the rule, or None to fail."""
        calls = []

        def process(words, **_):
            calls.append(words)
            options = dict(
                zip(words[words.index("train") + 1 :: 2], words[words.index("train") + 2 :: 2], strict=True)
            )
            rate = answers(options["--loss"], int(options["--seed"]))
            if rate is None:
                return subprocess.CompletedProcess(words, 1, "", "Traceback\nerror: out of memory\n")
            output = Path(options["--output_dir"])
            output.mkdir(parents=True)
            after = {"eval_rewards/accuracies": 0.75, "eval_ratios/chosen": -1.5}
            stored = {"after": after, "answers_before": {"rule_rate": 0.1, "mean_words": 20.0},
                      "answers_after": {"rule_rate": rate, "mean_words": 9.0, "empty": 0.0}}  # fmt: skip
            (output / "results.json").write_text(json.dumps(stored))
            return subprocess.CompletedProcess(words, 0, "", "")

        monkeypatch.setattr(trained.subprocess, "run", process)
        order = trained.train_best(archive, trained.bundled_level(3), [3, 1, 2], folder, say=lambda line: None)
        return order, calls

    def test_the_best_and_dpo_are_trained_at_every_beta_and_seed_once(self, searched, tmp_path, monkeypatch):
        archive, members = searched
        rates = lambda loss, seed: 0.9 if loss.startswith("candidate_3") else 0.5 if "0.05" in loss else 0.2  # noqa: E731
        order, calls = self.run(monkeypatch, archive, tmp_path / "runs", rates)
        assert len(calls) == 3 * 2 * 2
        assert order[0] == 3
        assert set(order) == {0, 1, 3}
        results = archive.results("model", [3])
        assert (results[0].beta, results[0].seed) == (0.05, 0)
        assert (results[0].reward, results[0].length) == (0.9, -11.0)
        assert results[0].details["log-ratio of chosen"] == -1.5
        assert self.run(monkeypatch, archive, tmp_path / "runs", rates)[1] == []
        assert "## Above the toy" in page.markdown(page.measure_frontier(archive, members, ["model"]))

    def test_a_training_that_fails_is_a_line_and_is_tried_again(self, searched, tmp_path, monkeypatch):
        archive = searched[0]
        order, _ = self.run(monkeypatch, archive, tmp_path / "a", lambda loss, seed: None if "_3" in loss else 0.5)
        assert order[-1] == 3
        (row,) = archive.candidates("id = 3")
        assert row.reason == "model: error: out of memory"
        assert len(self.run(monkeypatch, archive, tmp_path / "b", lambda loss, seed: 0.5)[1]) == 4
        assert archive.candidates("id = 3")[0].reason == ""

    def test_a_config_that_does_not_exist_is_named(self, tmp_path):
        with pytest.raises(UsageError, match="--config: there is no file"):
            trained.configured_level(tmp_path / "none.yaml")


class TestCommand:
    def run(self, *words):
        result = CliRunner().invoke(app, ["discover", *map(str, words)])
        return result.exit_code, result.output

    def test_searches_continues_and_exports(self, tmp_path):
        code, said = self.run("--out", tmp_path / "s", "--candidates", 9, "--generation", 6, "--seeds", "dpo, hinge")
        assert code == 0, said
        assert "generation 1: 8 candidates" in said
        assert (tmp_path / "s" / "frontier.md").exists()
        code, said = self.run("--out", tmp_path / "s", "--candidates", 9, "--generation", 6, "--seeds", "dpo, hinge")
        assert code == 0
        assert "generation" not in said.replace("--generation", "")
        code, said = self.run("export", 1, "--archive", tmp_path / "s", "--out", tmp_path / "own_hinge.py")
        assert code == 0, said
        assert (tmp_path / "test_own_hinge.py").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--candidates", 3), "--out FOLDER"),
            (("--out", "x"), "a search needs an end"),
            (("--out", "x", "--candidates", 3, "--levels", "model"), "--levels is toy or toy,model"),
            (("--out", "x", "--candidates", 3, "--model", "m"), "--endpoint and --model go together"),
            (("--out", "x", "--candidates", 3, "--share", 0.2), "--share and --prompt"),
            (("--out", "x", "--candidates", 3, "--seeds", "lrml"), "no 'lrml'"),
        ],
    )
    def test_options_that_make_no_sense_are_named(self, words, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code, said = self.run(*words)
        assert code == 1
        assert message in " ".join(said.split())
        assert list(tmp_path.iterdir()) == []


def test_a_candidate_is_stored_and_read_back(tmp_path):
    row = Candidate(0, 0, "seed: dpo", (3, 4), "t", "softplus(-x)", "s", "toy", "", "0:0", 0.5)
    archive = Archive(tmp_path)
    archive.add(row)
    assert archive.candidates() == [row]
