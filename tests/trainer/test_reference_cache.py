"""Runs with a reference cache in one process: interrupted ones, continued adapters, batches that are partly known."""

from __future__ import annotations

import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt.scoring import cache
from prefopt.scoring.rows import RowBatch
from prefopt.trainer.scoring import make_layout
from tests.reliability.faults import Fault, forked
from tests.tiny import make_model
from tests.trainer.cache_processes import run
from tests.trainer.runs import make_pairs, make_trainer, save_model


def test_a_killed_run_leaves_what_the_next_one_goes_on_with(tmp_path):
    save_model(tmp_path)

    def work() -> None:
        cache.WRITE_AFTER = 8
        run(tmp_path, "plain", "full", "kept", per_device_train_batch_size=4)

    output = tmp_path / "output.txt"
    assert forked(work, Fault("writing the reference cache", 2), output) == -signal.SIGKILL, output.read_text()[-3000:]
    assert len(list(tmp_path.glob("kept/*/*.safetensors"))) == 1
    assert len(list(tmp_path.glob("kept/*/*.unfinished"))) == 1
    without, resumed = (run(tmp_path, "plain", "full", c, per_device_train_batch_size=4) for c in ("off", "kept"))
    # Two completions of 16 examples, those of the first four being there.
    assert resumed["misses"] == [24]
    assert resumed["losses"] == pytest.approx(without["losses"], rel=1e-5)
    assert run(tmp_path, "plain", "full", "kept", per_device_train_batch_size=4)["misses"] == [0]


def test_the_reference_of_a_continued_adapter_is_its_copy(tmp_path):
    options = {"train_dataset": make_pairs(8), "max_steps": 4, "loss": "dpo"}
    save_model(tmp_path)

    def trained(seed: int):
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = make_model()
        torch.manual_seed(seed)
        model = get_peft_model(model, config)
        trainer = make_trainer(tmp_path, model=model, reference_cache=str(tmp_path / "kept"), **options)
        assert "ref" in trainer.model.peft_config
        trainer.train()
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = make_trainer(tmp_path, model=str(tmp_path / "llama-0"), reference_cache=str(tmp_path / "kept"), **options)
    first, losses = trained(0)
    again, same = trained(0)
    other, _ = trained(1)
    assert [t._scorer.cache.misses for t in (first, again, other)] == [16, 0, 16]
    assert same == pytest.approx(losses, rel=1e-5)
    names = [t._scorer.cache.folder.name for t in (plain, first, again, other)]
    assert names[1] == names[2]
    assert len(set(names)) == 3


def test_a_batch_that_is_partly_known_does_not_settle_the_layout(tmp_path):
    trainer = make_trainer(tmp_path, loss="dpo", reference_cache=str(tmp_path / "kept"), train_dataset=make_pairs(8))
    rows = RowBatch.of(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    cache = trainer._scorer.cache
    trainer._scorer.reference_scores(rows.select_rows(rows.examples <= 1))
    trainer._scorer.layout = make_layout(trainer)
    scores = trainer._scorer.reference_scores(rows)
    assert trainer._scorer.layout.masks == "packed"
    assert (cache.hits, cache.misses) == (4, 8)
    direct = trainer._scorer.run_reference(rows)
    torch.testing.assert_close(scores.logps, direct.logps, rtol=1e-5, atol=1e-5)
