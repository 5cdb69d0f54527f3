"""`prefopt losses`: the list, explanations, Markdown tables and errors; and that the pages are not stale."""

from __future__ import annotations

import errno
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import prefopt
from prefopt.catalogue.tables import FAMILIES, facts, families, losses_table, objectives_table, presets_table
from prefopt.cli import app
from prefopt.cli.losses import LISTING, listing
from prefopt.losses import Loss, available, presets, register
from prefopt.losses.registry import _LOSSES
from prefopt.safety.errors import UsageError
from prefopt.trainer.saving.checkpoints import CheckpointError

ROOT = Path(__file__).parents[2]
OBJECTIVES = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


def run(*words: str, columns: int = 80) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["losses", *words], env={"COLUMNS": str(columns)})
    return result.exit_code, result.output


def script():
    spec = importlib.util.spec_from_file_location("write_tables", ROOT / "scripts" / "write_objectives_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestList:
    def test_fits_into_80_columns_and_misses_nothing(self):
        code, shown = run()
        assert code == 0
        assert max(map(len, shown.splitlines())) <= 80
        names = re.findall(r"^  ([a-z_0-9]+)\(", shown, re.MULTILINE)
        assert sorted(names) == sorted([*available(), *presets()])

    def test_its_file_has_the_objectives_as_they_are(self):
        stale = "stale: run `python scripts/write_objectives_table.py`"
        assert json.loads(LISTING.read_text(encoding="utf-8")) == listing(), stale
        assert script().listing_text() == LISTING.read_text(encoding="utf-8")

    def test_says_what_is_free_of_a_reference_and_what_trl_calls_it(self):
        shown = run(columns=200)[1]
        assert "pairs · reference · TRL: sigmoid · arXiv 2305.18290" in shown
        assert "pairs · no reference · arXiv 2405.14734" in shown

    def test_every_family_has_its_place(self):
        assert [family.name for family in families()] == list(FAMILIES)

    def test_families_of_other_packages_come_last(self):
        try:

            @register("stranger")
            class Stranger(Loss):
                def per_example(self, batch):
                    return batch.chosen.logps

            last = families()[-1]
            assert (last.name, [cls.name for cls in last.losses]) == ("test-cli", ["stranger"])
            assert last.about.startswith("`prefopt losses`")
        finally:
            _LOSSES.pop("stranger", None)


class TestFacts:
    def test_needs_are_those_of_the_loss_as_made(self):
        """`kl_retain` declares its need only in its constructor."""
        assert facts(available()["kl_retain"]).needs == "forward_kl"
        assert facts(available()["kl_retain"]).reference == "yes"

    def test_a_column_is_a_need(self):
        assert facts(available()["margin_dpo"]).needs == "column margin"

    def test_a_wrapper_adds_to_its_loss(self):
        wpo, plain = facts(available()["wpo"]), facts(available()["length_normalized"])
        assert (wpo.data, wpo.reference, wpo.needs) == ("as its loss", "as its loss", "collision")
        assert plain.needs == ""


class TestExplain:
    def test_a_docstring_is_filled_anew(self):
        lines = run("dpo")[1].splitlines()
        assert all(len(line) <= 80 for line in lines)
        start = next(i for i, line in enumerate(lines) if line.startswith("    label_smoothing: "))
        # In the source the sentence is broken before "beta d".
        assert "instead" in lines[start + 1]
        assert lines[start + 1].startswith("    (conservative")

    def test_a_preset_shows_its_arguments_and_expansion(self):
        code, shown = run("irpo", columns=200)
        assert code == 0
        for part in (
            "irpo(beta=0.1, alpha=1.0)",
            "The reference is the iterate that drew the pairs.",
            "dpo(beta=0.1, label_smoothing=0.0) + sft(nll='mean')",
            "Paper of irpo: https://arxiv.org/abs/2404.19733",
            "Paper of dpo: https://arxiv.org/abs/2305.18290",
        ):
            assert part in shown

    def test_an_expression_shows_needs_by_role_columns_and_papers(self):
        shown = run("wpo(margin_dpo) + hypo(lam=0.1)", columns=200)[1]
        for part in (
            "wpo(loss=margin_dpo(beta=0.1), aligned=True, clamp=False)",
            "Needs of the scorer for chosen completions: reference, collision",
            "Needs of the scorer for sampled completions: reference",
            "Columns of the data: margin",
            "Reference model: yes",
            "Paper of hypo: https://arxiv.org/abs/2406.01462",
            "Paper of margin_dpo: https://arxiv.org/abs/2307.09288",
        ):
            assert part in shown

    def test_mismatched_completions_are_a_role_too(self):
        assert "for mismatched completions: reference" in run("kto + sft")[1]
        assert "Reference model: no" in run("simpo + sft")[1]

    def test_several_at_once(self):
        shown = run("hinge", "orpo_paper")[1]
        assert "relu(1 - beta*d)" in shown
        assert "0.1*orpo(beta=1.0)" in shown


class TestMarkdown:
    def test_without_names_it_is_the_overview(self):
        assert run("--markdown")[1].strip() == losses_table()

    def test_with_names_it_has_everything(self):
        shown = run("--markdown", "sft", "kto")[1]
        assert shown.strip() == objectives_table([available()["sft"], available()["kto"]])
        assert r"`-log pi(y_w\|x)," in shown
        assert "| yes | mismatched |  | [2402.01306](https://arxiv.org/abs/2402.01306) |" in shown

    def test_marks(self):
        table = losses_table()
        assert "[`dpo`](https://arxiv.org/abs/2305.18290)ᵀ," in table
        assert "[`simpo`](https://arxiv.org/abs/2405.14734)°," in table
        assert "`sft`ᵀ°" in table

    @pytest.mark.parametrize("table", [losses_table(), presets_table()])
    def test_rows_have_as_many_cells_as_the_heading(self, table):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1

    @pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
    def test_the_page_has_every_family_as_it_is(self, family):
        assert f"\n## {family.name}\n" in OBJECTIVES
        assert objectives_table(family.losses) in OBJECTIVES, "stale: run `python scripts/write_objectives_table.py`"

    def test_the_page_has_the_presets_as_they_are(self):
        assert presets_table() in OBJECTIVES, "stale: run `python scripts/write_objectives_table.py`"

    def test_the_script_replaces_what_is_stale(self):
        tables = script()
        stale = "before\n<!-- objectives: binary -->\nold\n<!-- end -->\nafter\n"
        assert tables.rewritten(stale).startswith("before\n<!-- objectives: binary -->\n| objective |")
        assert tables.rewritten(stale).endswith("\n<!-- end -->\nafter\n")
        assert tables.rewritten(OBJECTIVES) == OBJECTIVES
        with pytest.raises(SystemExit, match="no family is called 'nobody'"):
            tables.rewritten("<!-- objectives: nobody -->\n<!-- end -->")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--span", "3"], "add --plot FILE.png"),
        (["dpo", "--vary", "chosen"], "add --plot FILE.png"),
        (["dpo", "--plot", "x.png", "--markdown"], "exclude one another"),
        (["--markdown", "irpo"], "'irpo' is not one"),
        (["--plot", "x.png"], "name the losses or expressions to plot"),
        (["--plot", "x.png", "hinges"], "did you mean 'hinge'"),
        (["--plot", "x.png", "dpo", "--vary", "both"], "vary must be margin, chosen or rejected"),
        (["--plot", "x.png", "dpo", "--span", "0.0"], "span must be between 0 and 166.4 nats"),
        (["--plot", "x.nothing", "dpo"], "cannot write x.nothing"),
        (["--plot", "picture", "dpo"], "no ending that names a format"),
    ],
)
def test_errors_say_what_to_do(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, shown = run(*words, columns=200)
    assert code == 1
    assert message in shown
    assert not list(tmp_path.iterdir())


class TestCache:
    def kept(self, folder):
        import torch

        from prefopt.scoring.cache import ReferenceCache
        from prefopt.scoring.collate import PreferenceCollator
        from prefopt.scoring.rows import RowBatch

        inputs = RowBatch.of(
            PreferenceCollator(pad_token_id=0)([{"prompt_ids": [5], "chosen_ids": [6, 2], "rejected_ids": [7]}])
        )
        cache = ReferenceCache(folder / "abc", {"model": "some/model", "precision": "float32"})
        cache.scores(inputs, lambda rows: torch.zeros(int(rows.sum()), 2))
        cache.write()

    def test_references_are_listed_and_deleted_by_name(self, tmp_path):
        self.kept(tmp_path)
        listed = CliRunner().invoke(app, ["cache", "--folder", str(tmp_path)])
        assert listed.exit_code == 0
        assert "abc" in listed.output
        assert "some/model" in listed.output
        gone = CliRunner().invoke(app, ["cache", "--folder", str(tmp_path), "--prune", "abc"])
        assert "deleted abc: 2 completions" in gone.output
        assert not (tmp_path / "abc").exists()

    def test_an_unknown_name_is_an_error(self, tmp_path):
        result = CliRunner().invoke(app, ["cache", "--folder", str(tmp_path), "--prune", "nothing"])
        assert result.exit_code == 1
        assert "no reference named nothing" in result.output


class TestStart:
    """The command as people start it, in a process of its own."""

    @staticmethod
    def python(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)

    @pytest.mark.parametrize("module", ["prefopt", "prefopt.cli"])
    def test_as_a_module(self, module):
        done = self.python("-m", module, "--help")
        assert done.returncode == 0
        assert "select-kernel" in done.stdout

    def test_its_version(self):
        result = CliRunner().invoke(app, ["--version"])
        assert (result.exit_code, result.output) == (0, f"prefopt {prefopt.__version__}\n")

    def libraries(self, *words: str, **variables: str) -> tuple[str, set[str]]:
        """What the command prints, and the slow libraries that are then imported."""
        code = (
            "import atexit, os, sys\n"
            "slow = ('torch', 'transformers', 'trl', 'datasets', 'accelerate', 'peft', 'sympy', 'matplotlib')\n"
            "atexit.register(lambda: print(*[name for name in slow if name in sys.modules], file=sys.stderr))\n"
            f"os.environ.update({variables!r})\n"
            f"sys.argv = ['prefopt', *{words!r}]\n"
            "from prefopt.cli import main\n"
            "main()"
        )
        done = self.python("-c", code)
        return done.stdout, set(done.stderr.splitlines()[-1].split())

    @pytest.mark.parametrize("words", [["--help"], ["--version"], ["losses", "--help"], ["new", "config"]])
    def test_help_imports_no_slow_library(self, words):
        shown, imported = self.libraries(*words)
        assert shown
        assert imported == set()

    def test_the_list_of_losses_imports_no_slow_library(self):
        shown, imported = self.libraries("losses")
        assert "simpo" in shown
        assert imported == set()

    def test_a_loss_imports_torch_alone(self):
        shown, imported = self.libraries("losses", "simpo")
        assert "simpo" in shown
        assert imported == {"torch"}

    @pytest.mark.parametrize(
        ("line", "expected"),
        [("prefopt sel", ["select-kernel"]), ("prefopt new config papers/simpo_g", ["papers/simpo_gemma2"])],
    )
    def test_completion_imports_no_slow_library(self, line, expected):
        shown, imported = self.libraries(
            _PREFOPT_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(line.split()) - 1)
        )
        assert shown.split() == expected
        assert imported == set()


class TestErrors:
    def plan(self, error: BaseException, monkeypatch) -> Result:
        """What a command ends with whose work raises an error."""

        def work(words):
            raise error

        monkeypatch.delenv("PREFOPT_VERBOSE", raising=False)
        monkeypatch.setattr("prefopt.planning.plan.main", work)
        return CliRunner().invoke(app, ["plan"])

    @pytest.mark.parametrize("error", [UsageError("no such row"), CheckpointError("no such row")])
    def test_our_own_are_a_line(self, error, monkeypatch):
        ended = self.plan(error, monkeypatch)
        assert (ended.exit_code, ended.stderr, ended.stdout) == (1, "error: no such row\n", "")

    @pytest.mark.parametrize("error", [RuntimeError("tensors on two devices"), ValueError("tensors on two devices")])
    def test_a_defect_keeps_its_traceback(self, error, monkeypatch):
        assert self.plan(error, monkeypatch).exception is error

    def test_a_closed_pipe_ends_without_a_word(self, monkeypatch):
        result = self.plan(BrokenPipeError(errno.EPIPE, "Broken pipe"), monkeypatch)
        assert result.exit_code == 1
        assert "error" not in result.output

    def test_of_a_process_of_its_own(self, tmp_path):
        words = ["-m", "prefopt", "demo", "--loss", "dpo", "--dataset_name", str(tmp_path / "no.jsonl")]
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr
