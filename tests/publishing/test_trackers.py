"""Trackers in their local modes, read back with their own readers: names, steps, values, and the run's settings."""

from __future__ import annotations

import json
import sqlite3
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from prefopt.losses import DPO, SFT
from prefopt.trainer.trackers import objective_settings
from tests.publishing.conftest import TrackedRun
from tests.publishing.wandb_file import read
from tests.trainer.runs import make_trainer

TRAINED = ("loss", "rewards/chosen", "rewards/margins", "ratios/chosen", "dpo/loss", "sft/loss", "learning_rate")
HELD_OUT = ("loss", "rewards/accuracies", "rewards/margins", "ratios/rejected", "dpo/loss", "sft/loss")
SETTINGS = {
    "objective": "dpo(beta=0.1, label_smoothing=0.0) + 0.2*sft(nll='mean')",
    "objective/dpo/beta": 0.1,
    "objective/dpo/weight": 1.0,
    "objective/sft/weight": 0.2,
    "objective/sft/nll": "mean",
}


def test_a_checkout_on_the_path_has_no_version_of_its_own(monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert objective_settings(DPO())["prefopt_version"] == "unknown"


def check_history(rows: list[dict[str, Any]], run: TrackedRun) -> None:
    """Every logged row, with the step that it belongs to, against what the run itself wrote down."""
    results = json.loads((run.out / "results.json").read_text())
    trained = {row["train/global_step"]: row for row in rows if "train/loss" in row}
    assert set(trained) == {1, 2}
    for row in trained.values():
        assert not [name for name in TRAINED if f"train/{name}" not in row]
    heldout = [(row["train/global_step"], row) for row in rows if "eval/loss" in row]
    assert [step for step, _ in heldout] == [0, 1, 2, 2]
    for name in HELD_OUT:
        assert heldout[0][1][f"eval/{name}"] == pytest.approx(results["before"][f"eval_{name}"], rel=1e-6)
        assert heldout[-1][1][f"eval/{name}"] == pytest.approx(results["after"][f"eval_{name}"], rel=1e-6)
    assert heldout[-1][1]["eval/loss"] != pytest.approx(heldout[0][1]["eval/loss"], rel=1e-6)


def check_settings(settings: dict[str, Any]) -> None:
    assert {name: settings.get(name) for name in SETTINGS} == SETTINGS
    assert settings["learning_rate"] == 1e-2
    assert settings["max_steps"] == 2
    assert settings["model_init_kwargs"]["token"] == "***"
    assert settings["hub_token"] == "***"


def test_tensorboard(tracked_run: TrackedRun) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    assert not (tracked_run.folder / "runs").exists()  # nothing beside the output folder
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tracked_run.out / "runs"))
    multiplexer.Reload()
    (name,) = multiplexer.Runs()
    tags = multiplexer.Runs()[name]["scalars"]
    rows: dict[tuple[int, str, int], dict[str, Any]] = {}
    for tag in tags:
        seen: dict[int, int] = {}
        for event in multiplexer.Scalars(name, tag):
            seen[event.step] = seen.get(event.step, -1) + 1
            row = rows.setdefault((event.step, tag.partition("/")[0], seen[event.step]), {})
            row |= {tag: event.value, "train/global_step": event.step}
    check_history([rows[key] for key in sorted(rows)], tracked_run)
    texts = {}
    for tag in multiplexer.Runs()[name]["tensors"]:
        texts[tag] = multiplexer.Tensors(name, tag)[0].tensor_proto.string_val[0].decode()
    assert all(f"{name}: {value}" in texts["objective/text_summary"] for name, value in SETTINGS.items())
    assert json.loads(texts["args/text_summary"])["loss"] == "dpo(beta=0.1) + 0.2*sft"


def test_wandb(tracked_run: TrackedRun) -> None:
    pytest.importorskip("wandb")
    (file,) = (tracked_run.folder / "wandb").glob("offline-run-*/*.wandb")
    settings, rows, _ = read(file)
    check_history(rows, tracked_run)
    check_settings(settings)


def test_trackio(tracked_run: TrackedRun) -> None:
    pytest.importorskip("trackio")
    (database,) = (tracked_run.folder / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, metrics from metrics order by step").fetchall()
        configs = connection.execute("select config from configs").fetchall()
    # The evaluation after training belongs to the same run.
    assert len({name for name, _ in found}) == 1
    assert found[0][0].startswith("out-")
    check_history([json.loads(metrics) for _, metrics in found], tracked_run)
    check_settings(json.loads(configs[-1][0]))


def test_a_loss_that_is_an_object_reaches_the_tracker_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        tmp_path, trainer_options={"loss": DPO(beta=0.3) + 0.5 * SFT()}, report_to="tensorboard", max_steps=1
    )
    trainer.train()
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    text = events.Tensors("objective/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "objective/dpo/beta: 0.3" in text
    assert "objective/sft/weight: 0.5" in text


def test_settings_of_two_equal_terms_stay_apart() -> None:
    settings = objective_settings(DPO(beta=0.1) + DPO(beta=0.5))
    assert (settings["objective/dpo/beta"], settings["objective/dpo_2/beta"]) == (0.1, 0.5)
