"""Training on labelled rows where a micro-batch holds rows to forget alone, or rows to retain alone."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig

from prefopt.losses import Need, parse
from tests.losses.test_empty_roles import OFFLINE
from tests.processes import torchrun
from tests.trainer.empty_roles_processes import labelled, numbers
from tests.trainer.runs import make_trainer, save_model

TWO_PROCESSES = [loss for loss in OFFLINE if Need.MISMATCHED not in parse(loss).needs]
"""Completions are moved to prompts of the same process, so mismatched ones differ with the number of processes."""
LORA = LoraConfig(target_modules="all-linear", r=2)


def step(folder: Any, loss: str, labels: str, batch: int, **options: Any) -> dict[str, Any]:
    """One step of plain descent on rows in their order: what was logged, and the weights after it."""
    trainer = make_trainer(
        folder, loss=loss, train_dataset=labelled(labels), max_steps=1, per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(labels) // batch, optim="sgd", learning_rate=0.05, max_grad_norm=0.0,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert all(math.isfinite(value) for value in logged.values())
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return {**logged, "weights": weights}


@pytest.mark.parametrize(
    "loss", ["npo", "npo + 0.5*sft", "0.3*simnpo(beta=0.1) + sft", "ga(nll='sum') + kl_retain(reduction='mean')"]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_accumulated_micro_batches_are_one_large_batch(tmp_path, loss, batch):
    labels = "ffrfrr"  # in twos: only to forget, one of each, only to retain
    whole, parts = (step(tmp_path, loss, labels, size) for size in (6, batch))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    torch.testing.assert_close(parts["weights"], whole["weights"], rtol=1e-5, atol=1e-6)


ROADS = {
    "auto": {},
    "padded": {"layout": "padded"},
    "tree": {"layout": "tree"},
    "token_budget": {"layout": "tree", "token_budget": 64},
    "cache": {"reference_cache": "cache"},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora": {"trainer_options": {"peft_config": LORA}},
    "lora on the last layer": {
        "trainer_options": {"peft_config": LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], r=2)}
    },
    "checkpointing": {"gradient_checkpointing": True},
}


WHOLE_DISTRIBUTIONS = "undial + kl_retain"
"""These are not kept in a cache, nor computed ahead."""


@pytest.mark.parametrize(
    ("loss", "road"),
    [
        (loss, road)
        for loss in ("npo", "npo + sft", WHOLE_DISTRIBUTIONS)
        for road in ROADS
        if loss != WHOLE_DISTRIBUTIONS or road not in ("cache", "precomputed")
    ],
)
def test_every_road_gives_the_plain_ones_numbers(tmp_path, loss, road):
    options = dict(ROADS[road])
    if road == "cache":
        options["reference_cache"] = str(tmp_path / "cache")
    adapter = {"trainer_options": options["trainer_options"]} if "trainer_options" in options else {}
    plain = step(tmp_path, loss, "rrff", 2, **{"layout": "padded", **adapter})
    there = step(tmp_path, loss, "rrff", 2, **options)
    assert there["loss"] == pytest.approx(plain["loss"], rel=1e-4, abs=1e-5)
    assert there["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("first", ["r", "f"])
def test_a_micro_batch_without_the_role_of_the_loss_leaves_the_weights_alone(tmp_path, first):
    logged = step(tmp_path, "npo" if first == "r" else "sft", first * 2, 2)
    assert logged["loss"] == 0
    assert logged["grad_norm"] == 0


def test_evaluations_are_means_over_the_completions_that_a_term_is_about(tmp_path):
    """Two batches of which the second lacks a role, one batch of everything, and one role alone."""
    trainer = make_trainer(tmp_path, loss="ga(nll='sum') + 0.5*sft(nll='sum')", train_dataset=labelled("rf"))
    several = trainer.evaluate(labelled("rrfrrr"))
    trainer.args.per_device_eval_batch_size = 6
    assert trainer.evaluate(labelled("rrfrrr"))["eval_loss"] == pytest.approx(several["eval_loss"], rel=1e-6)
    expected = several["eval_logps/rejected"] - 0.5 * several["eval_logps/chosen"]
    assert several["eval_loss"] == pytest.approx(expected, rel=1e-6)
    alone = trainer.evaluate(labelled("ff"))
    assert alone["eval_loss"] == pytest.approx(alone["eval_logps/rejected"], rel=1e-6)
    assert all(math.isfinite(value) for value in alone.values())


def test_a_run_resumed_before_a_batch_of_one_role_goes_on_as_if_nothing_had_happened(tmp_path):
    options = {"per_device_train_batch_size": 1, "max_steps": 4, "train_sampling_strategy": "sequential"}
    job = {
        "loss": "npo + sft",
        "train_dataset": labelled("rfrf"),
        "save_strategy": "steps",
        "save_steps": 1,
        **options,
    }
    trainer = make_trainer(tmp_path, **job)
    trainer.train()
    resumed = make_trainer(tmp_path, **job)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for before, after in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


# ---- two processes -------------------------------------------------------------------------------------------------

# Each process has its own half of a batch: with "rrff" one has rows to retain alone and the other rows to forget.
JOBS: dict[str, dict[str, Any]] = {
    **{loss: {"loss": loss, "labels": "rrrfff"} for loss in TWO_PROCESSES},
    "no row on any process": {"loss": "npo", "labels": "rrrr"},
    "no row on one": {"loss": "npo + sft", "labels": "rrrf"},
    "accumulated": {"loss": "npo + sft", "labels": "rrfrrffr", "accumulate": 2},
    "cached": {"loss": "npo + sft", "labels": "rrff", "options": {"cached": True}},
    "cached, no row on one": {"loss": "npo", "labels": "rrff", "options": {"cached": True}},
    "precomputed": {"loss": "npo", "labels": "rrff", "options": {"precompute_ref_log_probs": True}},
    "padded": {"loss": "npo + kl_retain", "labels": "rrff", "options": {"layout": "padded"}},
    "lora": {"loss": "npo", "labels": "rrff", "lora": True},
    "lora, tree": {"loss": "undial + kl_retain", "labels": "rrff", "lora": True, "options": {"layout": "tree"}},
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Any, dict[str, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("two")
    save_model(folder)
    for name, job in JOBS.items():
        labelled(job["labels"]).save_to_disk(folder / f"data-{name}")
    (folder / "jobs.json").write_text(json.dumps(JOBS))
    torchrun("tests.trainer.empty_roles_processes", str(folder), timeout=900)
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_of_one_role_each_are_one_with_all_rows(two_processes, name):
    folder, found = two_processes
    alone = numbers(folder, JOBS[name], name, 1)
    assert found[name] == pytest.approx(alone, rel=2e-3, abs=1e-5)
    if name == "no row on any process":
        assert alone["loss"] == 0
        assert alone["grad_norm"] == 0
