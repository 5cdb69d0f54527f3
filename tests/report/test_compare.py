"""`prefopt compare`: what is compared, paired intervals, and when there is no best run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from prefopt.report import compare_page, compare_runs, write_run_page
from prefopt.report.intervals import over_rows, over_seeds, sign_test, student_quantile
from prefopt.safety.errors import UsageError
from tests.report.folders import write, write_run
from tests.report.test_run_page import read


@pytest.fixture(autouse=True)
def _no_picture(request, monkeypatch):
    if "picture" not in request.node.name:
        monkeypatch.setattr(compare_page, "draw", lambda *_: None)


def compared(folder, *runs):
    compare_runs(list(runs), folder / "compared")
    return json.loads((folder / "compared" / "compare.json").read_text())


def three_seeds(folder, loss, rate):
    return [write_run(folder / f"{loss}-{seed}", loss=loss, seed=seed, rate=rate) for seed in range(3)]


def test_a_clear_difference_over_seeds_has_a_best(tmp_path):
    result = compared(tmp_path, *three_seeds(tmp_path, "dpo", 1.0), *three_seeds(tmp_path, "simpo", 0.2))
    assert [group["label"] for group in result["groups"]] == ["dpo", "simpo"]
    assert result["best"] == "dpo"
    assert "It is better than simpo" in result["verdict"]
    accuracy = result["groups"][1]["measures"]["accuracy"]["best_minus_this"]
    assert accuracy["over"] == "seeds"
    assert accuracy["count"] == 3
    assert accuracy["low"] < 0.008 * 40 * 0.8 < accuracy["high"]
    assert result["cautions"] == []


def test_runs_that_differ_by_chance_cannot_be_told_apart(tmp_path):
    result = compared(tmp_path, *three_seeds(tmp_path, "dpo", 1.0), *three_seeds(tmp_path, "ipo", 1.0))
    assert "cannot be told apart" in result["verdict"]
    assert "better than" not in result["verdict"]


def test_pairing_by_seed_removes_what_the_seed_does(tmp_path):
    """One loss is better by 0.01 at every seed; between seeds accuracy varies by a tenth."""
    runs = []
    for loss, more in (("dpo", 0.0), ("ipo", 0.01)):
        for seed, base in enumerate((0.5, 0.6, 0.7)):
            folder = write_run(tmp_path / f"{loss}{seed}", loss=loss, seed=seed)
            noise = 0.001 * seed if loss == "ipo" else 0.0
            line = {"step": 1, "eval_rewards/accuracies": base + more + noise, "eval_rewards/margins": 1.0}
            write(folder, "log_history.json", {"log_history": [line]})
            (folder / "heldout.json").unlink()
            runs.append(folder)
    result = compared(tmp_path, *runs)
    assert result["best"] == "ipo"
    assert "It is better than dpo" in result["verdict"]


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (lambda line: {**line, "eval_rewards/accuracies": math.nan}, "later evaluations are NaN or infinite"),
        (lambda line: {"step": line["step"]}, "was last evaluated at step 10, and logged until step 40"),
    ],
)
def test_a_run_whose_last_evaluations_are_missing_is_named(tmp_path, ends, said):
    whole, other = write_run(tmp_path / "whole"), write_run(tmp_path / "other", loss="ipo")
    log = json.loads((other / "log_history.json").read_text())
    late = [ends(line) if "eval_runtime" in line and line["step"] > 10 else line for line in log["log_history"]]
    write(other, "log_history.json", {**log, "log_history": late})
    cautions = compared(tmp_path, whole, other)["cautions"]
    assert [line for line in cautions if said in line and line.startswith("other")]
    assert not [line for line in cautions if line.startswith("whole")]
    page = write_run_page(other).read_text(encoding="utf-8")
    assert ("of an earlier one" in page) is ("NaN" in said)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("gained", "apart"), [(4, False), (7, True)])
def test_a_few_rows_are_not_more_certain_than_their_sign_test(tmp_path, seeds, gained, apart):
    """One run alone ranks some of 60 rows right, and every seed says the same."""
    runs = []
    for loss, right in (("dpo", 40), ("ipo", 40 + gained)):
        for seed in range(seeds):
            folder = write_run(tmp_path / f"{loss}{seed}", loss=loss, seed=seed)
            line = {"step": 40, "eval_rewards/accuracies": right / 60, "eval_rewards/margins": 1.0 + seed}
            write(folder, "log_history.json", {"log_history": [line]})
            margins = [1.0] * right + [-1.0] * (60 - right)
            values = dict.fromkeys(("rewards/margins", "ratios/chosen", "ratios/rejected"), margins)
            write(folder, "heldout.json", {"fingerprint": "h", "values": values})
            runs.append(folder)
    result = compared(tmp_path, *runs)
    assert result["best"] == "ipo"
    assert ("It is better than dpo" in result["verdict"]) is apart
    assert (result["flips"][0]["probability"] < 0.05) is apart


def test_one_run_each_is_compared_over_the_held_out_rows(tmp_path):
    good = write_run(tmp_path / "good", loss="dpo", rate=3.0)
    bad = write_run(tmp_path / "bad", loss="ipo", rate=0.0)
    result = compared(tmp_path, good, bad)
    difference = result["groups"][1]["measures"]["accuracy"]["best_minus_this"]
    assert difference["over"] == "rows"
    assert difference["low"] > 0
    assert "intervals over rows do not say how much a seed changes" in " ".join(result["cautions"])
    [flips] = result["flips"]
    stored = [json.loads((run / "heldout.json").read_text())["values"]["rewards/margins"] for run in (good, bad)]
    one, two = (np.array(margins) > 0 for margins in stored)
    assert (flips["gained"], flips["lost"]) == (int((one & ~two).sum()), int((two & ~one).sum()))
    assert flips["shown"][0]["prompt"].startswith("question ")
    page = read(tmp_path / "compared" / "compare.html").text
    assert "question " in page
    assert "It carries the load." in page  # answers side by side


def test_without_rows_or_seeds_nothing_is_claimed(tmp_path):
    runs = [write_run(tmp_path / loss, loss=loss, rate=rate) for loss, rate in (("dpo", 2.0), ("ipo", 0.1))]
    for run in runs:
        (run / "heldout.json").unlink()
    result = compared(tmp_path, *runs)
    assert "is more than chance is unknown" in result["verdict"]
    assert "better than" not in result["verdict"]
    assert "no heldout.json in dpo, ipo" in read(tmp_path / "compared" / "compare.html").text


@pytest.mark.parametrize(
    ("facts", "caution"),
    [
        ({"base_digest": "other"}, "started from different models"),
        ({"data": [{"role": "held-out", "fingerprint": "other"}]}, "different held-out rows"),
    ],
)
def test_runs_on_other_models_or_rows_are_not_ranked(tmp_path, facts, caution):
    result = compared(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", loss="ipo", **facts))
    assert result["best"] is None
    assert result["verdict"].startswith("These runs cannot be compared")
    assert caution in " ".join(result["cautions"])


def test_plain_runs_of_trl_are_compared_as_far_as_their_logs_go(tmp_path):
    for name, accuracy in (("a", 0.7), ("b", 0.8)):
        line = {"step": 5, "eval_loss": 0.6, "eval_rewards/accuracies": accuracy, "eval_rewards/margins": 1.0}
        write(tmp_path / name / "checkpoint-5", "trainer_state.json", {"log_history": [line]})
    result = compared(tmp_path, tmp_path / "a", tmp_path / "b")
    assert [group["label"] for group in result["groups"]] == ["a", "b"]
    assert result["best"] == "b"
    assert "No run.json in a, b" in " ".join(result["cautions"])
    assert (tmp_path / "compared" / "compare.md").read_text().count("| `a` |") == 1


def test_a_run_without_facts_is_called_by_its_folder(tmp_path):
    write(tmp_path / "plain", "log_history.json", {"log_history": [{"step": 5, "eval_rewards/accuracies": 0.5}]})
    result = compared(tmp_path, write_run(tmp_path / "a", loss="ipo"), tmp_path / "plain")
    assert [group["label"].partition(",")[0] for group in result["groups"]] == ["ipo", "plain"]


def test_a_picture_for_cards(tmp_path):
    runs = [write_run(tmp_path / name, loss=name) for name in ("$a$", "_b")]
    compare_runs(runs, tmp_path / "compared")
    assert (tmp_path / "compared" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_is_no_comparison(tmp_path):
    run = write_run(tmp_path / "a")
    with pytest.raises(UsageError, match="at least two runs"):
        compare_runs([run], tmp_path / "compared")
    with pytest.raises(UsageError, match=r"these are one: .*a, .*a"):
        compare_runs([run, write_run(tmp_path / "b"), tmp_path / "." / "a"], tmp_path / "compared")


def evaluated(folder, accuracy, **facts):
    write_run(folder, **facts)
    line = {"step": 40, "eval_rewards/accuracies": accuracy, "eval_rewards/margins": 1.0}
    write(folder, "log_history.json", {"max_steps": 40, "global_step": 40, "log_history": [line]})
    return folder


def test_equal_runs_have_no_best_one(tmp_path):
    runs = [evaluated(tmp_path / loss, 1.0, loss=loss) for loss in ("dpo", "ipo")]
    result = compared(tmp_path, *runs)
    assert result["verdict"] == "dpo and ipo have the same held-out accuracy, 100.0%, so it does not tell them apart."
    assert result["tied"] == ["ipo"]
    worse = evaluated(tmp_path / "sft", 0.1, loss="sft", seed=9)
    write(worse, "heldout.json", {})
    assert compared(tmp_path, *runs, worse)["verdict"].startswith("dpo and ipo have the highest held-out accuracy")


def test_other_held_out_rows_are_seen_where_no_seed_is_common(tmp_path):
    """Rows are drawn by the seed: runs of two seeds have other rows, unless the seed of the data is one."""
    rows = {seed: [{"role": "held-out", "fingerprint": f"of seed {seed}"}] for seed in range(4)}
    runs = [
        write_run(tmp_path / f"{loss}{seed}", loss=loss, seed=seed, data=rows[seed])
        for loss, seeds in (("dpo", (0, 1)), ("ipo", (2, 3)))
        for seed in seeds
    ]
    assert compared(tmp_path, *runs)["best"] is None
    assert compared(tmp_path, *runs[:2], write_run(tmp_path / "ipo0", loss="ipo", data=rows[0]))["best"] is not None
    assert compared(tmp_path, write_run(tmp_path / "a", seed=5), write_run(tmp_path / "b", loss="ipo", seed=6))["best"]


def test_what_is_wrong_with_a_run_is_a_caution(tmp_path):
    whole = write_run(tmp_path / "whole")
    log = json.loads((whole / "log_history.json").read_text())
    stopped = write_run(tmp_path / "stopped", loss="ipo")
    write(stopped, "log_history.json", {**log, "log_history": log["log_history"][:-9], "global_step": 30})
    broken = write_run(tmp_path / "broken", loss="simpo")
    write(broken, "log_history.json", {**log, "not_finite": "the loss is nan"})
    (broken / "run.json").write_text('{"version": 1, "loss"', encoding="utf-8")
    cautions = " ".join(compared(tmp_path, whole, stopped, broken)["cautions"])
    assert "stopped ended after step 30 of 40." in cautions
    assert "broken ended with a number that is NaN or infinite" in cautions
    assert "broken: run.json: Expecting" in cautions
    assert "No run.json" not in cautions
    assert "whole and broken logged the same numbers: they may be one run" in cautions


def test_runs_that_lack_the_deciding_measure_are_named(tmp_path):
    silent = write_run(tmp_path / "silent", loss="sft")
    write(silent, "log_history.json", {"log_history": [{"step": 1, "loss": 1.0}]})
    assert "Without held-out accuracy: sft." in compared(tmp_path, write_run(tmp_path / "a"), silent)["verdict"]


def test_quantiles_of_student():
    for share, freedom, value in ((0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 10, 2.2281), (0.9975, 5, 4.7733)):
        assert student_quantile(share, freedom) == pytest.approx(value, abs=1e-4)


def test_intervals_by_hand():
    interval = over_seeds([1.0, 2.0, 3.0])
    assert (interval.low, interval.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert over_seeds([1.0]) is None
    assert over_rows([0.5]) is None
    rows = over_rows([1.0, -1.0] * 200)
    assert rows.has_zero
    assert rows.high == pytest.approx(1.96 / 20, abs=0.02)
    assert sign_test(2, 8) == pytest.approx(0.109375)
    assert sign_test(0, 0) == 1.0
    assert sign_test(1500, 1500) == 1.0


def test_folders_of_one_name_are_told_apart_by_the_folder_above(tmp_path):
    runs = [write_run(tmp_path / trial / "seed-0", loss=trial) for trial in ("trial-1", "trial-2")]
    for run in runs:
        (run / "run.json").unlink()
    result = compared(tmp_path, *runs)
    assert [group["label"] for group in result["groups"]] == ["trial-1/seed-0", "trial-2/seed-0"]
