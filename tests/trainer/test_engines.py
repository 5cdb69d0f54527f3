"""Two real processes under each engine learn, log, evaluate, save and resume what one process does.

The processes of an engine are started once and go through all jobs. One process of its own, without an engine, does
the same jobs with the same global batches, and is what everything is compared with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.processes import ENGINES, IN_WORDS, WRAPPERS, torchrun
from tests.tiny import make_tokenizer
from tests.trainer.engine_processes import run, weighted
from tests.trainer.runs import require, save_model

pytestmark = pytest.mark.distributed

SUM = "dpo + 0.1*sft(nll='token')"
IN_PARTS = "dpo + 0.1*sft + 0.1*tdpo"
# Given embeddings and hidden states beside one another, both with variances that span the processes.
KERNELS = "kernel_dpo('mahalanobis', 'js', embeddings='given') + kernel_dpo('mahalanobis', 'wasserstein', gamma=3.0)"
LEARNED = {"loss_learning_rate": 0.05}
# Completions that are moved to other prompts are the same on any number of processes only in the order of the data.
IN_ORDER = {"train_sampling_strategy": "sequential"}
GROUPS = "gvpo(beta=0.5) + 0.1*infonca(beta=0.5) + 0.1*plackett_luce(beta=0.5)"
CHECKPOINTS = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
}

# One candidate is the likeliest other token; of more, each process draws its own.
FULL: list[dict[str, Any]] = [
    {"name": "weighted", "loss": SUM, "data": "weighted", "save": True},
    {"name": "kto", "loss": "kto(beta=0.5)", "data": "labelled", "options": IN_ORDER},
    {"name": "spanning", "loss": "aot + 0.5*bco", "data": "weighted"},
    {"name": "groups", "loss": GROUPS, "data": "groups"},
    {"name": "candidates", "loss": "cringe", "data": "labelled"},
    {"name": "distributions", "loss": "tdpo + 0.1*pairwise_cringe(k=1)", "data": "weighted"},
    {"name": "mixture", "loss": "hmk", "data": "weighted", "options": LEARNED},
    {"name": "kernels", "loss": KERNELS, "data": "embedded"},
    {"name": "cached", "loss": "ipo + dpo", "data": "weighted", "cached": True},
    {"name": "budget", "loss": IN_PARTS, "data": "weighted", "options": {"token_budget": 50}},
    {"name": "accumulated", "loss": "dpo", "data": "weighted", "options": {"gradient_accumulation_steps": 2}},
    {"name": "checkpointed", "loss": "dpo", "options": {"gradient_checkpointing": True}},
    {"name": "whole", "loss": "bco + 0.1*sft", "options": CHECKPOINTS},
    {"name": "resumed", "loss": "bco + 0.1*sft", "options": CHECKPOINTS, "resumes": "whole"},
]
# What groups have in common with pairs is tried under DDP; a budget and a cache also where each call is waited for.
OF_GROUPS: list[dict[str, Any]] = [
    {"name": "groups-in-order", "loss": "plackett_luce(beta=0.5) + 0.1*tpo", "data": "lists", "engines": ("ddp",)},
    {
        "name": "groups-cached",
        "loss": GROUPS,
        "data": "groups",
        "cached": True,
        "options": {"token_budget": 50, "gradient_accumulation_steps": 2},
        "engines": ("ddp", "zero3"),
    },
    {
        "name": "groups-uneven",
        "loss": GROUPS,
        "data": "groups",
        "rows": 29,
        "options": {"max_steps": 4, **IN_ORDER},
        "engines": ("ddp",),
    },
    {"name": "whole-groups", "loss": GROUPS, "data": "groups", "options": CHECKPOINTS, "engines": ("ddp",)},
    {
        "name": "resumed-groups",
        "loss": GROUPS,
        "data": "groups",
        "options": CHECKPOINTS,
        "resumes": "whole-groups",
        "engines": ("ddp",),
    },
]
# ZeRO-1 differs from ZeRO-2 in how gradients lie only.
OF_ZERO1 = ("weighted", "accumulated", "whole", "resumed")
JOBS = [{**job, "kind": "full"} for job in FULL + OF_GROUPS] + [
    {**job, "kind": "lora", "name": f"{job['name']}-lora", **({"resumes": "whole-lora"} if "resumes" in job else {})}
    for job in FULL
    if job["name"] not in ("spanning", "candidates", "groups")
]
NAMES = [job["name"] for job in JOBS]


def jobs_of(engine: str) -> list[dict[str, Any]]:
    jobs = JOBS if engine != "zero1" else [job for job in JOBS if job["name"].removesuffix("-lora") in OF_ZERO1]
    return [job for job in jobs if engine in ("plain", *job.get("engines", ENGINES))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where everything lies; one process has done all jobs."""
    place = tmp_path_factory.mktemp("engines")
    save_model(place)
    for job in JOBS:
        run(place, "plain", job)
    return place


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, folder) -> str:
    """The name of an engine under which two processes have done its jobs."""
    require(request.param)
    (folder / "jobs.json").write_text(json.dumps(jobs_of(request.param)))
    torchrun("tests.trainer.engine_processes", str(folder), request.param)
    return request.param


def found(folder: Path, name: str, engine: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a job left: its record and its trained parameters."""
    if name not in {job["name"] for job in jobs_of(engine)}:
        pytest.skip(f"{engine} is not asked to do the job {name}")
    path = folder / f"{name}-{engine}.json"
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def assert_same_numbers(mine: dict[str, float], reference: dict[str, float], but: tuple[str, ...] = ()) -> None:
    timed = ("runtime", "per_second", "preparation_time", "epoch")
    for name, value in reference.items():
        if not name.endswith((*timed, *but)):
            # Log-ratios near zero are differences of sums of 50 nats, which single precision knows to 4e-6.
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def start(folder: Path, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """What parameters were before training; adapters start where their product is zero."""
    model = load_file(folder / "llama-0" / "model.safetensors")
    return {name: model.get(name, torch.zeros_like(value)) for name, value in parameters.items()}


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_learn_what_one_does(folder, engine, name):
    mine, weights = found(folder, name, engine)
    alone, expected = found(folder, name, "plain")
    assert (mine["world"], mine["wrapper"]) == (2, WRAPPERS[engine])
    assert mine["in words"] == [IN_WORDS[engine]] * 2
    assert alone["in words"] == ["1 process"] * 2
    # What the numbers are equal in: packed trees, and a head that never holds whole logits.
    assert mine["layout"] == alone["layout"] == ["packed", True]
    # No completion is scored by the reference on both processes.
    assert sum(mine["misses"]) == sum(alone["misses"])
    assert ("cached" in name) == (alone["misses"] > [0])
    assert len(mine["log"]) == len(alone["log"])
    for entry, reference in zip(mine["log"], alone["log"], strict=True):
        assert_same_numbers(entry, reference)
    if name.startswith(("whole", "resumed")):
        return  # these train with Adam: its losses, not its weights
    assert weights.keys() == expected.keys()
    before = start(folder, expected)
    moved = torch.cat([(expected[n] - before[n]).flatten() for n in expected if "lora_A" not in n])
    apart = torch.cat([(expected[n] - weights[n]).flatten() for n in expected])
    assert moved.norm() > 0.1
    assert apart.norm() < 1e-4 * moved.norm()
    for parameter, value in weights.items():
        torch.testing.assert_close(value, expected[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("whole", "resumed"))])
def test_rows_that_fill_up_the_last_batch_do_not_count(folder, engine, name):
    """Seven rows, two at a time on each of two processes."""
    mine, _ = found(folder, name, engine)
    alone, _ = found(folder, name, "plain")
    # The first row's completion is moved to the prompt of the last row of its batch, which may be one that fills up.
    but = ("eval_loss", "kto/loss", "mismatched_ratios") if name.startswith("kto") else ()
    assert_same_numbers(mine["evaluation"], alone["evaluation"], but)


@pytest.mark.parametrize("name", ["weighted", "weighted-lora"])
def test_what_is_saved_loads_without_us_and_scores_the_same(folder, engine, name):
    mine, _ = found(folder, name, engine)
    saved = folder / f"{name}-{engine}-saved"
    reference = AutoModelForCausalLM.from_pretrained(folder / "llama-0")
    if name.endswith("lora"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "llama-0"), saved)
    else:
        model = AutoModelForCausalLM.from_pretrained(saved)
    assert own_logps(model) == pytest.approx(mine["logps"], abs=1e-4)
    assert own_logps(reference) == pytest.approx(mine["ref_logps"], abs=1e-4)
    gaps = [abs(a - b) for a, b in zip(mine["logps"], mine["ref_logps"], strict=True)]
    assert max(gaps) > 0.01


def own_logps(model: Any) -> list[float]:
    """Log-probabilities of the chosen completions of the first four evaluation rows, a plain forward pass each."""
    tokenizer = make_tokenizer()
    found = []
    for row in weighted(4, seed=1):
        options = {"tokenize": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], **options)
        ids = torch.tensor([whole])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        taken = logps.gather(-1, ids[0, 1:, None]).squeeze(-1)
        found.append(float(taken[len(prompt) - 1 :].sum()))
    return found


@pytest.mark.parametrize("kind", ["", "-lora", "-groups"])
def test_a_resumed_run_ends_where_the_whole_one_did(folder, engine, kind):
    mine, weights = found(folder, f"resumed{kind}", engine)
    whole, expected = found(folder, f"whole{kind}", engine)
    assert [entry["step"] for entry in mine["log"]] == [1, 2, 3, 4]
    for entry, reference in zip(mine["log"][2:], whole["log"][2:], strict=True):
        assert_same_numbers(entry, reference, ("num_tokens",))  # which counts anew
    for parameter, value in weights.items():
        torch.testing.assert_close(value, expected[parameter], rtol=1e-6, atol=1e-7, msg=parameter)
