"""Tasks of lm-eval: against a stand-in for the module, and with lm-eval itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest

from prefopt.evaluation.benchmarks import TaskResult, find_tasks, run_tasks
from prefopt.safety.errors import UsageError
from tests.tiny import make_model, make_tokenizer

RESULTS = {
    "results": {
        "sums": {
            "alias": "sums", "sample_len": 4, "acc,none": 0.75, "acc_stderr,none": 0.25,
            "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A",
        }
    },
    "n-samples": {"sums": {"original": 9, "effective": 4}},
}  # fmt: skip


class Manager:
    def __init__(self, include_path, include_defaults):
        self.all_tasks = ["sums", "arc_easy"] if include_defaults else ["sums"]


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for lm-eval, and the arguments it was called with."""
    calls: dict = {}
    top, tasks, models, networks = (
        ModuleType(f"lm_eval{name}") for name in ("", ".tasks", ".models", ".models.huggingface")
    )
    top.simple_evaluate = lambda **arguments: calls.update(arguments) or RESULTS
    tasks.TaskManager = Manager
    networks.HFLM = lambda **arguments: arguments
    for module in (top, tasks, models, networks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_each_metric_becomes_one_number(harness):
    numbers = run_tasks("model", "tokenizer", find_tasks(["sums"]), limit=4, batch_size=2, seed=3)
    assert numbers == [
        TaskResult("sums", "acc", 0.75, 0.25, 4), TaskResult("sums", "exact_match,strict-match", 0.5, None, 4),
    ]  # fmt: skip
    assert harness["model"] == {"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 2}
    assert (harness["tasks"], harness["limit"], harness["fewshot_random_seed"]) == (["sums"], 4, 3)


def test_a_task_that_does_not_exist_is_refused_before_a_model_is_loaded(harness, tmp_path):
    with pytest.raises(UsageError, match=r"lm-eval has no task 'arc_eazy'. Did you mean 'arc_easy'"):
        find_tasks(["arc_eazy"])
    with pytest.raises(UsageError, match=r"the YAML files of .* have no task 'arc_easy'"):
        find_tasks(["arc_easy"], tmp_path)


def test_a_missing_lm_eval_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'prefopt-trainer\[lm-eval\]'"):
        find_tasks(["sums"])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
def test_lm_eval_itself_runs_a_task_of_ones_own(tmp_path):
    rows = [{"question": f"{n} + 1 =", "choices": [str(n + 1), "0"], "answer": 0} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (number,) = run_tasks(make_model(), make_tokenizer(), find_tasks(["sums"], tmp_path), limit=2)
    assert (number.task, number.metric, number.examples) == ("sums", "acc", 2)
    assert number.value in (0.0, 0.5, 1.0)
