"""scripts/bench/speed.py: which jobs it runs, what it counts, how it goes on after an interruption, what it prints."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts" / "bench"
sys.path.insert(0, str(FOLDER))  # the script imports its neighbours by bare name, as scripts do

import _count  # noqa: E402
import _job  # noqa: E402
import _report  # noqa: E402
import _results  # noqa: E402
import speed  # noqa: E402

from tests.tiny import make_model, make_tokenizer  # noqa: E402

COMMON = {"model": "a/model", "dtype": "float32", "threads": 1}


def job(**options) -> _job.Job:
    return _job.Job(**{**COMMON, **options})


def turn(seconds, **more):
    fixed = {"loss": [0.7], "tokens": 10.0, "digest": "d", "limit": 1.0, "peak_bytes": 2**30, "machine": {}}
    return {"seconds": seconds, "cpu_seconds": seconds, **fixed, **more}


def result(of: _job.Job, repeats: int = 1, failed: dict[str, str] | None = None, **more):
    runs = {
        "trl": _results.summarise("trl", [turn([9.0, 4.0], peak_bytes=4 * 2**30)]),
        "prefopt": _results.summarise("prefopt", [turn([9.0, 2.0])]),
    }
    runs = {role: run for role, run in runs.items() if role not in (failed or {})}
    return _results.assemble(of, repeats, runs, failed or {}, None if failed else 2e-5) | more


# ---- jobs -----------------------------------------------------------------------------------------------------------


def test_quick_is_the_beginning_of_full():
    quick, full = (speed.sweep_jobs(kind, "hh.jsonl", **COMMON) for kind in ("quick", "full"))
    assert full[: len(quick)] == quick
    assert len(quick) == 8
    assert len(set(full)) == len(full)
    sizes = {(j.prompt, j.completion) for j in full if j.data is None and j.completions == 2}
    assert sizes >= {(prompt, completion) for prompt in (64, 256, 1024) for completion in (64, 256)}
    assert {(j.full, j.cached_reference) for j in full} == {(a, b) for a in (False, True) for b in (False, True)}


def test_without_data_the_sweep_has_made_up_pairs_only():
    assert all(j.data is None for j in speed.sweep_jobs("full", None, **COMMON))


@pytest.mark.parametrize("row", speed.ROWS)
def test_rows_of_lengths_have_the_tokens_they_name(row):
    of = speed.length_jobs(**COMMON)[row]
    assert of.prompt + 2 * of.completion == row
    assert of.pairs * row == 2048


def test_made_up_pairs_are_never_cut():
    assert job(prompt=1024, completion=64).max_length == 1088
    assert job(data="pairs.jsonl").max_length == 512


def test_pairs_that_do_not_fill_prompts_are_refused():
    with pytest.raises(ValueError, match="3 pairs, so pairs must be a multiple"):
        job(completions=4, pairs=4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--sweep", "needs --json"),
        ("--sweep --json a.json --prompt 8", "--prompt has no effect"),
        ("--data a.jsonl --completions 3", "--completions describes made-up pairs"),
        ("--max_length 64", "made-up pairs are never cut"),
        ("--steps 1", "the first step is not timed"),
        ("--again", "a single job is always measured"),
        ("--table a.json --full", "--full has no effect"),
    ],
)
def test_an_option_without_effect_is_an_error(line, message, capsys):
    with pytest.raises(SystemExit):
        speed.parse(line.split())
    assert message in " ".join(capsys.readouterr().err.split())


# ---- counting -------------------------------------------------------------------------------------------------------


def batch(rows):
    """Rows of (prompt, completion) ids, padded on the right, all chosen ones before all rejected ones."""
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)

    def padded(of):
        return torch.tensor([[*of(p, c), *[0] * (longest - len(p) - len(c))] for p, c in rows])

    return {
        "input_ids": padded(lambda p, c: p + c),
        "attention_mask": padded(lambda p, c: [1] * len(p + c)),
        "completion_mask": padded(lambda p, c: [0] * len(p) + [1] * len(c)),
    }


def test_each_prompt_and_each_distinct_completion_is_counted_once():
    best = [7, 7, 2]
    pairs = [([5, 6], best), ([5, 6], best), ([9], [3, 2]), ([5, 6], [8, 2]), ([5, 6], [7, 2]), ([9], [4, 4, 4, 2])]
    trees = _count.sizes(batch(pairs))
    assert trees == [(2, [2, 2, 3]), (1, [2, 4])]
    assert _count.real_tokens(trees) == 16


def test_operations_of_a_tree_worked_by_hand():
    # One prompt of 10 tokens, completions of 4 and 2; products of 100 body, 50 head and 7 adapter weights.
    weights = _count.Weights(body=100, head=50, adapters=7, attention=3)
    trees = [(10, [2, 4])]
    # Forward, backward to the inputs, the reference: body on 16 tokens, head on 6.
    products = 3 * 2 * (100 * 16 + 50 * 6)
    adapters = 3 * 2 * 7 * 16
    # Query-key pairs: 50 in the prompt, 2*10 + 2 and 4*10 + 8 from the completions.
    attention = 4 * 4 * 3 * (50 + 22 + 48)
    assert (
        _count.matmul_operations(weights, trees, full=False, cached_reference=False) == products + adapters + attention
    )
    # The weights' gradients take the place of the reference's forward.
    cached = {"full": True, "cached_reference": True}
    assert _count.matmul_operations(weights, trees, **cached) == products + adapters + attention * 3 // 4


def test_weights_of_a_model_with_adapters():
    from peft import LoraConfig, get_peft_model

    model = make_model()
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert _count.Weights.of(model) == _count.Weights(layers, 400 * 32, 0, 2 * 32)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert _count.Weights.of(wrapped) == _count.Weights(layers, 400 * 32, 2 * 4 * (32 + 32), 2 * 32)


def test_made_up_pairs_have_their_lengths_and_lie_side_by_side():
    tokenizer = make_tokenizer()
    rows = _job.made_up_pairs(job(prompt=12, completion=6, completions=4, pairs=6, steps=2), tokenizer)
    assert len(rows) == 12
    assert {len(tokenizer(row["prompt"])["input_ids"]) for row in rows} == {12}
    # The end token is the sixth.
    assert {len(tokenizer(row[name])["input_ids"]) for row in rows for name in ("chosen", "rejected")} == {5}
    for start in range(0, 12, 3):
        group = rows[start : start + 3]
        assert len({row["prompt"] for row in group}) == len({row["chosen"] for row in group}) == 1
        assert len({row["rejected"] for row in group}) == 3


def test_a_cut_row_is_an_error():
    with pytest.raises(ValueError, match="should hold"):
        _job.check_lengths(job(prompt=8, completion=4, pairs=1), [(8, [3, 4])])


# ---- results --------------------------------------------------------------------------------------------------------


def test_the_first_step_of_every_turn_is_left_out():
    run = _results.summarise("trl", [turn([50.0, 3.0, 5.0]), turn([70.0, 4.0, 9.0])])
    assert (run["step"], run["fastest"]) == (4.5, 3.0)


def sweep(tmp_path, monkeypatch, jobs, compare, *more):
    monkeypatch.setattr(speed, "compare", compare)
    args = speed.parse(["--sweep", "--json", str(tmp_path / "speed.json"), *more])
    return speed.measure_jobs(jobs, args)


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    jobs = [job(prompt=prompt) for prompt in (1, 2, 3)]
    seen = []

    def stopped(of, repeats, verbose):
        if of.prompt == 3 and len(seen) < 3:
            seen.append("stopped")
            raise KeyboardInterrupt
        seen.append(of.prompt)
        return result(of, repeats)

    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, monkeypatch, jobs, stopped)
    assert len(json.loads((tmp_path / "speed.json").read_text())["jobs"]) == 2
    assert len(sweep(tmp_path, monkeypatch, jobs, stopped)) == 3
    assert seen == [1, 2, "stopped", 3]
    sweep(tmp_path, monkeypatch, jobs[:1], stopped, "--again")
    sweep(tmp_path, monkeypatch, jobs[:1], stopped, "--repeats", "2")
    assert seen[4:] == [1, 1]
    assert [r["job"]["prompt"] for r in json.loads((tmp_path / "speed.json").read_text())["jobs"]] == [1, 2, 3]


def test_a_trainer_that_fails_is_recorded_and_the_other_is_measured(monkeypatch):
    started = []

    def start(role, of, folder, verbose):
        started.append(role)
        if role == "trl":
            raise speed.MeasurementError("out of memory")
        return turn([9.0, 2.0])

    monkeypatch.setattr(speed, "start", start)
    made = speed.compare(job(), 2, False)
    assert started == ["trl", "prefopt", "prefopt"]
    assert made["failed"] == {"trl": "out of memory"}
    assert made["prefopt"]["step"] == 2.0
    assert made["speedup"] is None


@pytest.mark.parametrize(
    ("code", "log", "reason"),
    [
        (-9, "", "killed, most likely out of memory"),
        (1, "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n", "out of memory"),
        (1, "Traceback\nValueError: no words\n\n", "ValueError: no words"),
        (3, "", "exit status 3"),
    ],
)
def test_the_reason_of_a_failure(code, log, reason):
    assert speed.reason(code, log) == reason


def test_another_file_is_not_taken_for_results(tmp_path):
    (tmp_path / "other.json").write_text('{"speedup": 4}')
    with pytest.raises(_results.ReportError, match="not a file of this script's results"):
        _results.read_results(tmp_path / "other.json")


def test_results_are_found_by_names_and_not_by_folders(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "model").mkdir(parents=True)
    here, there = (job(model=str(tmp_path / f / "model"), data=str(tmp_path / f / "a.jsonl")) for f in ("one", "two"))
    assert _results.find([result(here)], there, 1) is not None
    assert _results.find([result(here)], dataclasses.replace(there, full=True), 1) is None


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_markdown_rows():
    rows = [
        result(job(data="/some/where/hh.jsonl.gz", model="HuggingFaceTB/SmolLM2-135M-Instruct", full=True)),
        result(job(completions=4, pairs=6), failed={"trl": "out of memory"}),
    ]
    lines = _report.markdown(rows).splitlines()
    assert lines[2] == (
        "| hh, up to 512 tokens, full fine-tuning; 4 pairs "
        "| `python scripts/bench/speed.py --data hh.jsonl.gz --max_length 512 --pairs 4 --steps 4 --full` "
        "| 4 s, 1 pairs/s, 4.0 GiB | 2 s, 2 pairs/s, 1.0 GiB | **2.00x** | **0.25x** | 50% | 2.0e-05 |"
    )
    assert lines[3] == (
        "| prompt 256, completions 4×64; 6 pairs "
        "| `python scripts/bench/speed.py --prompt 256 --completion 64 --completions 4 --pairs 6 --steps 4 "
        "--model a/model` | out of memory | 2 s, 3 pairs/s, 1.0 GiB |  |  | 50% |  |"
    )


def test_the_printed_command_measures_the_same_job():
    for of in speed.sweep_jobs("full", None, **COMMON):
        words = _report.command(of.settings).split()
        args = speed.parse(words[2:])
        own = {name: getattr(args, name) for name in speed.JOB_OPTIONS if getattr(args, name) is not None}
        assert dataclasses.replace(job(**own), steps=args.steps) == of


def test_a_picture_of_measured_and_failed_jobs(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [result(job()), result(job(prompt=64), failed={"trl": "out of memory"})]
    _report.draw(rows, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(_results.ReportError, match="nothing to draw"):
        _report.draw([], tmp_path / "speed.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(_report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(_results.ReportError, match=r"prefopt-trainer\[plot\]"):
        _report.draw([result(job())], tmp_path / "speed.png")


# ---- all of it ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_trainers_get_the_same_tokens_and_the_same_gradient(tmp_path):
    """K = 4 in float64, whose difference is rounding; the parent and both measuring processes."""
    model, file = tmp_path / "model", tmp_path / "speed.json"
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    line = f"--model {model} --prompt 16 --completion 8 --completions 4 --pairs 6 --steps 2 --threads 1 --json {file}"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "speed.py"), *line.split(), "--dtype", "float64"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = json.loads(file.read_text(encoding="utf-8"))["jobs"]
    assert made["same_tokens"]
    assert made["gradient"] < 1e-12
    assert made["trl"]["tokens"] == made["prefopt"]["tokens"] == 2 * (16 + 4 * 8)
    assert {"torch", "transformers", "trl", "device", "dtype"} <= made["machine"].keys()
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    assert done.stdout.count("turn 1 of 1") == 2
