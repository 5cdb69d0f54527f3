"""`report.html`: loads nothing, runs nothing that came from a run, stays small, and shows what the folder holds."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from prefopt.report import compare_runs, write_run_page
from prefopt.report.changes import changed_words
from prefopt.report.curves import decimated
from prefopt.report.folder import read_run
from prefopt.safety.errors import UsageError
from tests.report.folders import write, write_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}<!--"


class Page(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data

    @property
    def charts(self):
        return json.loads(self.scripts[0])


def read(file):
    return Page(file.read_text(encoding="utf-8"))


def assert_loads_nothing(file):
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    loading = {"src", "srcset", "href", "data", "action", "poster", "background", "formaction"}
    assert not [(tag, name) for tag, attributes in page.tags for name in attributes if name in loading]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "img", "object", "embed", "base", "form"}
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    for script in page.scripts[1:]:
        assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|\bimport\(|eval\(", script)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "content-security" in str(a).lower())
    assert policy.startswith("default-src 'none'; ")
    # The browser runs our two scripts and no other.
    assert len(page.scripts) == 3
    hashes = re.search(r"script-src (.*)$", policy)[1].split()
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert hashes == [f"'sha256-{digest}'" for digest in digests]


def test_no_page_makes_a_request(tmp_path):
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    assert_loads_nothing(write_run_page(runs[0]))
    assert_loads_nothing(compare_runs(runs, tmp_path / "compared"))


def test_hostile_text_stays_text(tmp_path):
    folders = [tmp_path / f"<img src=x onerror=alert(3)>{name}" for name in "ab"]
    runs = [write_run(folder, loss=f"{HOSTILE}{folder.name}", command=HOSTILE) for folder in folders]
    for run in runs:
        hostile = dict.fromkeys(("rule", "level", "text", "remedy", "step"), HOSTILE)
        write(run, "findings.json", [hostile])
        prompts, texts = [HOSTILE], [[HOSTILE], [HOSTILE * 2]]
        answers = [{"step": step, "texts": one, "ended": [True]} for step, one in enumerate(texts)]
        write(run, "answers.json", {"prompts": prompts, "answers": answers})
        log = json.loads((run / "log_history.json").read_text())
        log["log_history"].append({"step": 41, HOSTILE: 1.0, "eval_" + HOSTILE: 2.0})
        write(run, "log_history.json", {**log, "not_finite": HOSTILE, "settings": {HOSTILE: HOSTILE}})
        facts = json.loads((run / "run.json").read_text())
        term = {"name": HOSTILE, "formula": HOSTILE, "paper": HOSTILE, "hyperparameters": {HOSTILE: HOSTILE}}
        problem = {"kind": HOSTILE, "severity": HOSTILE, "rows": HOSTILE, "first": HOSTILE, "text": HOSTILE}
        split = {"role": HOSTILE, "sources": [HOSTILE], "rows": HOSTILE, "fingerprint": HOSTILE}
        more = {"terms": [term], "problems": [problem], "data": [split], "versions": {HOSTILE: HOSTILE}}
        write(run, "run.json", {**facts, **more})
        pairs = json.loads((run / "heldout.json").read_text())
        pairs["texts"] = [{"prompt": HOSTILE, "chosen": HOSTILE, "rejected": HOSTILE}] * len(pairs["texts"])
        write(run, "heldout.json", pairs)
    for page in (write_run_page(runs[0]), compare_runs(runs, tmp_path / "compared")):
        assert_loads_nothing(page)
        assert HOSTILE in read(page).text


def test_a_secret_in_the_command_is_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    run = write_run(tmp_path / "a", command="prefopt train --hub_token hunter2hunter2")
    page = write_run_page(run).read_text()
    assert "hunter2" not in page
    assert "prefopt train --hub_token ***" in page


def test_the_page_shows_what_the_folder_holds(tmp_path):
    run = write_run(tmp_path / "mine", loss="dpo(beta=0.1) + 0.2*sft", command="prefopt train --loss dpo")
    finding = {"rule": "flat", "level": "warning", "step": 7, "text": "It learns nothing", "remedy": "learning_rate"}
    write(run, "findings.json", {"version": 1, "findings": [finding]})
    page = read(write_run_page(run))
    for shown in (
        "mine", "40 of 40 steps logged", "-(1-e) log sigmoid(beta*d)", "Direct Preference Optimization", "2305.18290",
        "It learns nothing.", "learning_rate", "prefopt train --loss dpo", "pairs.jsonl", "How does a bridge work?",
        "unchanged", "run.json", hashlib.sha256((run / "run.json").read_bytes()).hexdigest(),
    ):  # fmt: skip
        assert shown in page.text
    removed = [tag for tag, _ in page.tags].count("del")
    assert removed >= 2  # in the legend, and in the answer that lost words
    titles = [chart["title"] for chart in page.charts]
    assert titles[:6] == ["Loss", "Log-ratios", "Margin", "Accuracy", "Reward margin", "KL to the reference"]
    ratios = page.charts[1]["series"]
    assert [one["label"] for one in ratios] == ["chosen", "chosen held out", "rejected", "rejected held out"]
    assert page.charts[2]["series"][1]["values"] == pytest.approx([2, 4, 6, 8])  # nats: -0.1 - -0.3 for each step


def test_a_long_run_stays_small_and_loses_no_peak(tmp_path):
    steps = 100_000
    lines = [{"step": s, "loss": 1 / s, "rewards/margins": s * 1e-5, "grad_norm": 1.0} for s in range(1, steps + 1)]
    lines[54_321]["grad_norm"] = 777.0
    write(tmp_path / "long", "log_history.json", {"log_history": lines})
    file = write_run_page(tmp_path / "long")
    assert file.stat().st_size < 400_000
    page = read(file)
    assert "The longest curve has 100,000 points; 1,000 are shown" in page.text
    norm = next(chart for chart in page.charts if chart["title"] == "Gradient norm")["series"][0]
    assert norm["values"][norm["steps"].index(54_322)] == 777.0
    assert norm["steps"][0] == 1
    assert norm["steps"][-1] == steps


def test_a_run_that_logs_hundreds_of_numbers_stays_under_two_megabytes(tmp_path):
    lines = [{"step": s, **{f"number {n}": s * math.pi for n in range(300)}} for s in range(1, 1201)]
    write(tmp_path / "wide", "log_history.json", {"log_history": lines})
    assert write_run_page(tmp_path / "wide").stat().st_size < 2_000_000


def test_answers_of_many_evaluations_stay_small(tmp_path):
    run = write_run(tmp_path / "run")
    rounds = [{"step": n, "texts": [f"{n} " + "word " * 1000] * 60, "ended": [True] * 60} for n in range(200)]
    write(run, "answers.json", {"prompts": ["Why? " * 1000] * 60, "answers": rounds})
    page = write_run_page(run)
    assert page.stat().st_size < 2_000_000
    assert "The first 24 of 60 held-out prompts, answered greedily, at 12 of 200 evaluations." in read(page).text
    assert "step 199" in read(page).text


def test_a_plain_checkpoint_of_trl_has_a_page(tmp_path):
    line = {"loss": 0.6, "rewards/chosen": -0.5, "rewards/rejected": -2.0, "rewards/accuracies": 0.75}
    log = [{"step": step, **line, "rewards/margins": 1.5} for step in (10, 20)]
    for step in (10, 20):
        write(tmp_path / f"checkpoint-{step}", "trainer_state.json", {"log_history": log, "max_steps": 20})
    page = read(write_run_page(tmp_path))
    assert "This folder does not say which loss was trained." in page.text
    assert "Log-ratios" not in [chart["title"] for chart in page.charts]
    page = read(write_run_page(tmp_path, beta=0.1))
    margin = next(chart for chart in page.charts if chart["title"] == "Margin")
    assert margin["series"][0]["values"] == [15.0, 15.0]


def test_numbers_that_are_not_finite_are_left_out_and_named(tmp_path):
    lines = [{"step": step, "loss": loss} for step, loss in enumerate((1.0, math.nan, 1e400, 2), 1)]
    write(tmp_path / "run", "log_history.json", {"log_history": lines, "not_finite": "the loss is nan at step 5"})
    page = read(write_run_page(tmp_path / "run"))
    assert "at 2 steps: 2, 3" in page.text
    assert "the loss is nan at step 5" in page.text
    assert page.charts[0]["series"][0]["values"] == [1.0, 2.0]


@pytest.mark.parametrize("content", ["[1, 2]", "{", '{"answers": 3, "prompts": "x"}', '"a"', "null"])
def test_a_file_that_cannot_be_read_does_not_end_the_page(tmp_path, content):
    run = write_run(tmp_path / "run")
    for name in ("run.json", "answers.json", "heldout.json", "findings.json", "results.json", "before.json"):
        (run / name).write_text(content)
    text = read(write_run_page(run)).text
    assert "40 of 40 steps" in text
    assert ("Could not be read: run.json" in text) == (content == "{")


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"it has no log_history\.json, and no checkpoint"):
        write_run_page(tmp_path)
    with pytest.raises(UsageError, match="there is no such folder"):
        write_run_page(tmp_path / "missing")
    write(tmp_path, "log_history.json", {"steps": 3})
    with pytest.raises(UsageError, match="it is not the log of a run"):
        write_run_page(tmp_path)


def test_a_folder_of_runs_names_them(tmp_path):
    write_run(tmp_path / "sweep" / "trial-000" / "seed-0")
    with pytest.raises(UsageError, match=r"It has runs in .*seed-0: name these"):
        write_run_page(tmp_path / "sweep")


def test_accuracy_of_a_policy_that_is_its_reference_is_left_out(tmp_path):
    lines = [{"step": s, "rewards/margins": float(s), "rewards/accuracies": s / 4} for s in (0, 1, 2)]
    write(tmp_path, "log_history.json", {"log_history": lines})
    assert read_run(tmp_path).curves["rewards/accuracies"].steps == [1, 2]


def test_decimation_keeps_both_ends_and_the_extremes_of_each_stretch():
    values = [math.sin(place / 50) for place in range(5000)]
    values[1234], values[4321] = 9.0, -9.0
    steps, rest = decimated(range(5000), values, 100)
    assert len(steps) <= 100
    assert steps[0] == 0
    assert steps[-1] == 4999
    assert steps == sorted(set(steps))
    assert dict(zip(steps, rest, strict=True))[1234] == 9.0
    assert dict(zip(steps, rest, strict=True))[4321] == -9.0
    assert decimated([1, 2], [0.5, 0.25], 100) == ([1, 2], [0.5, 0.25])


def test_changed_words():
    parts = changed_words("It is long and strong.", "It is strong.")
    assert "".join(text for kind, text in parts if kind != "removed") == "It is strong."
    assert "".join(text for kind, text in parts if kind != "added") == "It is long and strong."
    assert changed_words("a b", "a b") == [("same", "a b")]
    assert changed_words("", "new") == [("added", "new")]
