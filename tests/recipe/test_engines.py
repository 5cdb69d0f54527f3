"""A recipe file, unchanged, through `accelerate launch`: every engine ends at one process's held-out numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.recipe import main
from tests.processes import IN_WORDS, ROOT, Ended, launch
from tests.trainer.runs import require, save_model

pytestmark = pytest.mark.distributed

ON_CPU = str(ROOT / "scripts" / "bench" / "_on_cpu.py")
ZERO3 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True},
    "num_machines": 1,
    "num_processes": 2,
}


def arguments(folder: Path, output: str, per_device: int) -> list[str]:
    """Rows that divide neither by the processes nor by the batch."""
    options = {
        "model_name_or_path": folder / "llama-0",
        "dataset_name": ROOT / "prefopt" / "demo" / "data" / "heldout.jsonl",
        "eval_rows": 7,
        "max_steps": 3,
        "per_device_train_batch_size": per_device,
        "per_device_eval_batch_size": per_device,
        "learning_rate": 1e-3,
        "max_length": 384,
        "save_strategy": "no",
        "evaluate_first": False,
        "seed": 1,
        "output_dir": folder / output,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def launched(folder: Path, engine: str, words: list[str]) -> Ended:
    """The recipe on two processes under an engine, once it has ended."""
    launcher = ["accelerate.commands.launch", "--num_processes=2"]
    command = [str(ROOT / "recipes" / "dpo.py"), *words]
    if engine == "ddp":
        launcher.append("--multi_gpu")  # which is what accelerate calls it on CPUs as well
    elif engine == "fsdp2":
        launcher += ["--use_fsdp", "--fsdp_version=2"]
        command = [ON_CPU, *command]
    else:
        (folder / "zero3.json").write_text(json.dumps(ZERO3))
        launcher.append(f"--config_file={folder / 'zero3.json'}")
        command = [ON_CPU, *command]
    return launch(command, launcher)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict]:
    """A folder with the model, and what one process finds."""
    folder = tmp_path_factory.mktemp("recipe")
    save_model(folder)
    results = main("dpo(beta=0.1)", arguments(folder, "plain", 4))
    assert results is not None
    assert results["engine"] == "1 process"
    return folder, results["after"]


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_the_same_recipe_ends_at_the_same_numbers(alone, engine):
    require(engine)
    folder, expected = alone
    ended = launched(folder, engine, arguments(folder, engine, 2))
    assert ended.status == 0, ended.stderr[-3000:]
    results = json.loads((folder / engine / "results.json").read_text())
    assert results["engine"] == IN_WORDS[engine]
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen", "eval_entropy"):
        assert results["after"][name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    saved, whole = (AutoModelForCausalLM.from_pretrained(folder / name) for name in (engine, "plain"))
    for mine, reference in zip(saved.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)


def test_kl_on_answers_is_known_to_both_processes_and_can_choose_the_best_model(alone):
    folder, _ = alone
    more = "--eval_answers 3 --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1"
    more += " --load_best_model_at_end true --metric_for_best_model kl --greater_is_better false"
    words = {
        name: [*arguments(folder, f"kl-{name}", 4 if name == "one" else 2), *more.split()] for name in ("one", "two")
    }
    main("dpo(beta=0.1)", words["one"])
    ended = launched(folder, "ddp", words["two"])
    assert ended.status == 0, ended.stderr[-3000:]
    states = [
        json.loads((folder / f"kl-{name}" / "checkpoint-3" / "trainer_state.json").read_text()) for name in words
    ]
    found = [[line["eval_kl"] for line in state["log_history"] if "eval_kl" in line] for state in states]
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    for state, kl in zip(states, found, strict=True):
        assert (len(kl), state["best_metric"]) == (3, min(kl))
        assert state["best_global_step"] == kl.index(min(kl)) + 1


def test_a_cpu_run_says_that_accelerate_started_one_process_of_two(alone):
    folder, expected = alone
    command = [str(ROOT / "recipes" / "dpo.py"), *arguments(folder, "one-of-two", 4)]
    ended = launch(command, ["accelerate.commands.launch", "--num_processes=2", "--cpu"])
    assert ended.status == 0, ended.stderr[-3000:]
    said = " ".join(ended.stdout.split())
    assert "Running on 1 process" in said
    assert "accelerate launch was asked for several processes and started one" in said
    assert "give it --multi_gpu and not --cpu" in said
    results = json.loads((folder / "one-of-two" / "results.json").read_text())
    assert results["after"]["eval_loss"] == expected["eval_loss"]


def test_a_cpu_run_says_that_fsdp_is_left_out(alone, capsys, monkeypatch):
    folder, _ = alone
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    main("dpo(beta=0.1)", arguments(folder, "left-out", 4))
    said = " ".join(capsys.readouterr().out.split())
    assert "Running on 1 process" in said
    assert "FSDP was requested, but accelerate uses it only on GPUs and the like: this run has 1 process" in said
