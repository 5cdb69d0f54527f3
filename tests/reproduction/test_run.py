"""The runner: verdicts, failures, what is kept, and runs that are stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from prefopt.reproduction import code
from prefopt.reproduction.paper import Claim, PaperError
from prefopt.reproduction.run import kept_results, reproduce
from prefopt.safety.errors import UsageError
from tests.reproduction.conftest import PACKAGE, claim
from tests.reproduction.stand_in import quick


def run(paper, out, **options):
    return reproduce([paper], out, package=PACKAGE, **options)


def test_every_claim_gets_a_verdict_and_a_failure_is_one_too(paper, tmp_path):
    results = run(paper, tmp_path, quick=True)
    assert [result.verdict for result in results] == [
        *("holds", "does not hold", "partly", "error", "error", "cannot be run here"),
    ]
    by_id = {result.claim.id: result for result in results}
    assert "no luck" in by_id["broken"].measured
    assert "did not measure it" in by_id["long"].measured
    assert "(2 seeds)" in by_id["drawn"].interval
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))) == len(results)


def test_quick_leaves_out_what_is_marked_full(paper, tmp_path):
    rest = [claim for claim in paper.claims if claim.experiment != "quick.second" or claim.run == "full"]
    results = run(dataclasses.replace(paper, claims=tuple(rest)), tmp_path, quick=True)
    assert {result.claim.id: result.verdict for result in results}["long"] == "not run"
    assert "second" not in quick.CALLS


def test_what_is_kept_is_not_run_again_but_a_failure_is(paper, tmp_path):
    before = run(paper, tmp_path)
    quick.CALLS.clear()
    after = run(paper, tmp_path)
    assert quick.CALLS == ["failing"]
    assert [dataclasses.replace(result, seconds=0) for result in after] == [
        dataclasses.replace(result, seconds=0) for result in before
    ]


def test_a_run_that_is_stopped_twice_ends_with_the_same_table(paper, tmp_path):
    whole = run(paper, tmp_path / "whole")
    quick.STOPS += ["first", "second"]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(paper, tmp_path / "stopped")
    stopped = run(paper, tmp_path / "stopped")
    assert [result.measured for result in stopped] == [result.measured for result in whole]
    assert [result.verdict for result in stopped] == [result.verdict for result in whole]


def test_an_experiment_is_run_again_when_its_code_has_changed(paper, tmp_path, monkeypatch):
    run(paper, tmp_path)
    quick.CALLS.clear()
    monkeypatch.setattr(code, "code_hash", lambda module: "other")
    run(paper, tmp_path)
    assert quick.CALLS == ["first", "second", "failing"]


def test_a_file_that_is_cut_short_is_run_again(paper, tmp_path):
    run(paper, tmp_path)
    file = tmp_path / "experiments" / "quick.second.json"
    file.write_text(file.read_text(encoding="utf-8")[:100], encoding="utf-8")
    quick.CALLS.clear()
    run(paper, tmp_path)
    assert quick.CALLS == ["second", "failing"]


def test_an_outcome_that_no_claim_asks_for_is_an_error(paper, tmp_path):
    stray = dataclasses.replace(paper, claims=(claim("stray", "quick.stray"),))
    with pytest.raises(PaperError, match="nobody asked"):
        run(stray, tmp_path)


def test_the_state_of_a_folder_is_read_without_running(paper, tmp_path):
    assert {result.verdict for result in kept_results(paper, tmp_path)} == {"not run", "cannot be run here"}
    run(paper, tmp_path)
    quick.CALLS.clear()
    assert kept_results(paper, tmp_path)[0].verdict == "holds"
    assert quick.CALLS == []


def test_threads_are_set_for_the_run_alone(paper, tmp_path):
    import torch

    before = torch.get_num_threads()
    run(paper, tmp_path, threads=1)
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_table(tmp_path):
    """SIGKILL inside the second and the third of three experiments of a process of its own."""
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys, types
        from pathlib import Path
        from prefopt.reproduction.experiments.outcome import Outcome
        from prefopt.reproduction.paper import Claim, Paper
        from prefopt.reproduction.run import reproduce
        import torch

        out, kill = Path(sys.argv[1]), sys.argv[2]
        module = types.ModuleType("killed.tables")
        sys.modules["killed"], sys.modules["killed.tables"] = types.ModuleType("killed"), module
        def experiment(name):
            def run():
                if name == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                return Outcome(name, f"{float(torch.rand(())):.6f}", True)
            return run
        for name in "abc":
            setattr(module, name, experiment(name))
        claims = tuple(Claim(n, n, "", "", tolerance="-", experiment=f"tables.{n}") for n in "abc")
        reproduce([Paper("p", "P", "0", False, claims)], out, package="killed")
        """),
        encoding="utf-8",
    )

    def start(folder: str, kill: str) -> int:
        command = [sys.executable, str(script), str(tmp_path / folder), kill]
        return subprocess.run(command, env=os.environ, check=False, timeout=300).returncode

    assert start("whole", "") == 0
    assert [start("killed", "b"), start("killed", "c"), start("killed", "")] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    tables = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("whole", "killed")]
    for row in (*tables[0], *tables[1]):
        row.pop("seconds")
    assert tables[0] == tables[1]


# ---- what an experiment depends on ----------------------------------------------------------------------------------


def test_sources_follow_imports_and_leave_the_runner_out():
    names = {file.name for file in code.sources("prefopt.reproduction.experiments.rounds")}
    assert {"rounds.py", "inpo.py", "tables.py", "pairing.py"} <= names
    assert not {"run.py", "pages.py"} & names
    assert "rounds.py" not in {file.name for file in code.sources("prefopt.reproduction.experiments.dpo")}


def test_the_model_counts_where_it_is_trained_and_nowhere_else():
    assert code.uses_bundled_model("prefopt.reproduction.experiments.lm")
    assert not code.uses_bundled_model("prefopt.reproduction.experiments.npo")
    assert any("mixin.py" in str(file) for file in code.sources("prefopt.reproduction.experiments.lm"))


def test_rows_are_those_that_ship_with_the_rooms_it_imports():
    rows = code.row_hashes("prefopt.reproduction.experiments.cringe")
    assert {"demo/data/train.jsonl", "demo/data/heldout.jsonl"} <= set(rows)
    assert code.row_hashes("prefopt.reproduction.experiments.dpo") == {}


def test_code_hash_changes_with_what_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "shop"
    package.mkdir()
    for name, text in {"__init__": "", "a": "from shop import b\n", "b": "X = 1\n", "c": "X = 1\n"}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(code, "PACKAGE", package)

    def fresh() -> str:
        code.sources.cache_clear()
        code._file.cache_clear()
        return code.code_hash("shop.a")

    try:
        before = fresh()
        (package / "c.py").write_text("X = 2\n")
        assert fresh() == before
        (package / "b.py").write_text("X = 2\n")
        assert fresh() != before
    finally:
        code.sources.cache_clear()
        code._file.cache_clear()


def test_tokenizer_and_template_have_a_hash_of_their_own(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "one"}')
    before = code.model_hashes(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "two"}')
    after = code.model_hashes(tmp_path)
    assert before["tokenizer"] == after["tokenizer"]
    assert before["template"] != after["template"]


def test_a_file_in_place_of_the_folder_is_named_before_anything_runs(paper, tmp_path):
    (tmp_path / "file").write_text("x")
    said: list[str] = []
    with pytest.raises(UsageError, match="cannot be the folder of results"):
        run(paper, tmp_path / "file", say=said.append)
    assert said == []


def test_a_claim_that_cannot_be_run_says_why(paper, tmp_path):
    only = dataclasses.replace(paper, claims=(Claim("headline", "a", "b", "88.7", cannot="needs GPUs"),))
    (result,) = run(only, tmp_path)
    assert (result.verdict, result.measured) == ("cannot be run here", "needs GPUs")
