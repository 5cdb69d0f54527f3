"""Rounds under DeepSpeed and FSDP2: two of them, with the pairs and weights of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefopt.online.run import main
from tests.online.rounds import files, weights, words
from tests.processes import ROOT, launch
from tests.trainer.runs import require, save_model

pytestmark = pytest.mark.distributed

ON_CPU = str(ROOT / "scripts" / "bench" / "_on_cpu.py")


def launcher_of(engine: str, folder: Path) -> list[str]:
    launcher = ["accelerate.commands.launch", "--num_processes=2"]
    if engine == "fsdp2":
        return [*launcher, "--use_fsdp", "--fsdp_version=2"]
    stage = int(engine[-1])
    settings: dict[str, object] = {"zero_stage": stage}
    if stage == 3:
        settings |= {"zero3_init_flag": True, "zero3_save_16bit_model": True}
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "deepspeed_config": settings}
    (folder / "engine.json").write_text(json.dumps({**config, "num_machines": 1, "num_processes": 2}))
    return [*launcher, f"--config_file={folder / 'engine.json'}"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of two rounds on one process."""
    folder = tmp_path_factory.mktemp("alone")
    model = save_model(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(folder / "cache"))
        main(argv=words(folder, prompts=14, model_name_or_path=model, per_device_train_batch_size=4))
    return folder


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_two_rounds_under_an_engine_end_as_on_one_process(alone, engine, tmp_path, monkeypatch):
    require(engine)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    argv = words(tmp_path, prompts=14, model_name_or_path=str(alone / "llama-0"), per_device_train_batch_size=2)
    ended = launch([ON_CPU, str(ROOT / "recipes" / "irpo.py"), *argv], launcher_of(engine, tmp_path))
    assert ended.status == 0, ended.stderr[-3000:]
    one, two = files(alone / "out"), files(tmp_path / "out")
    assert one.keys() == two.keys()
    # The first round's samples are of the same model; later ones are of trained ones, that differ in rounding.
    for name in ("samples", "judgements", "pairs"):
        assert two[f"round-1/{name}.jsonl"] == one[f"round-1/{name}.jsonl"], name
    summaries = [json.loads(stored["round-2/summary.json"]) for stored in (one, two)]
    assert summaries[0]["kl"]["mean"] == pytest.approx(summaries[1]["kl"]["mean"], rel=0.05, abs=0.05)
    for number in (1, 2):
        single, both = (weights(folder / "out", number) for folder in (alone, tmp_path))
        assert single.keys() == both.keys() - {"lm_head.weight"}  # ZeRO-2 saves the tied weights twice
        for name, value in single.items():
            assert (value - both[name]).abs().max() < 1e-4, name
