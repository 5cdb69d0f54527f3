"""A folder holds one model: saving replaces the one before as a whole, and loading refuses two."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prefopt import PreferenceTrainer
from prefopt.models.load import adapter_base, check_weights, load_model
from prefopt.models.merge import MergeError, merge
from prefopt.safety.folders import ASIDE, move_into, recover, what_is_there
from tests.publishing.folders import load, log_probabilities, lora
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_pairs, make_trainer, save_model

FULL = {"config.json": '{"model_type": "llama"}', "generation_config.json": "{}", "model.safetensors": "f"}
SHARDS = {
    "config.json": '{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": "s1",
    "model-00002-of-00002.safetensors": "s2",
    "model.safetensors.index.json": "{}",
}
FEWER = {
    "config.json": '{"model_type": "llama"}',
    "model-00001-of-00001.safetensors": "t1",
    "model.safetensors.index.json": '{"new": 1}',
}
ADAPTER = {"adapter_config.json": "{}", "adapter_model.safetensors": "a"}
CONTINUED = {**ADAPTER, "ref/adapter_config.json": "{}", "ref/adapter_model.safetensors": "r"}
PICKLED = {"adapter_config.json": "{}", "adapter_model.bin": "p"}
OLD_PICKLED = {"config.json": '{"model_type": "gpt2"}', "pytorch_model.bin": "p"}
TOKENS = {"tokenizer_config.json": "{}", "tokenizer.json": "{}"}
MORE_TOKENS = {**TOKENS, "chat_template.jinja": "x", "tokenizer.model": "m", "preprocessor_config.json": "{}"}
KINDS = {"full": FULL, "shards": SHARDS, "fewer": FEWER, "adapter": ADAPTER, "continued": CONTINUED}
EARLIER = {**KINDS, "pickled adapter": PICKLED, "pickled": OLD_PICKLED}
MINE = {"notes.txt": "mine", "data.json": "[]", "ref/mine.txt": "mine", "logs/events": "mine", "config.yaml": "a: 1"}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("before", EARLIER)
@pytest.mark.parametrize("after", ["full", "shards", "fewer", "adapter"])
def test_nothing_of_the_model_before_is_left_and_all_else_is(tmp_path, before, after):
    folder = write(tmp_path / "out", {**EARLIER[before], **MORE_TOKENS, **MINE})
    new = {**KINDS[after], **TOKENS, "training_args.bin": "new"}
    move_into(write(folder / ASIDE, new), folder)
    assert read(folder) == {**new, **MINE}


def test_a_config_that_is_no_models_is_left(tmp_path):
    folder = write(tmp_path / "out", {**FULL, "config.json": '{"my": "settings"}'})
    move_into(write(folder / ASIDE, ADAPTER), folder)
    assert read(folder) == {**ADAPTER, "config.json": '{"my": "settings"}'}


class Killed(BaseException):
    """What ends a process, which nothing catches."""


def weights_that_load(files: dict[str, str]) -> set[str]:
    """What transformers would read of a folder: everything in it that is not missing a part."""
    found = {name: text for name, text in files.items() if "/" not in name and name.endswith((".safetensors", ".bin"))}
    adapter = {name for name in found if name.startswith("adapter_") and "adapter_config.json" in files}
    whole = {name for name in found if name.startswith(("model", "pytorch_model"))}
    if any("-of-" in name for name in whole) and "model.safetensors.index.json" not in files:
        whole = set()
    return {found[name] for name in adapter | whole}


@pytest.mark.parametrize("before", EARLIER)
@pytest.mark.parametrize("after", ["full", "shards", "fewer", "adapter"])
def test_killed_at_any_moment_one_model_loads_or_none_and_the_new_one_is_found_again(
    tmp_path, monkeypatch, before, after
):
    old, new = {**EARLIER[before], **MORE_TOKENS}, {**KINDS[after], **TOKENS}
    for moment in range(40):
        folder = write(tmp_path / f"{moment}", {**old, **MINE})
        aside, left = write(folder / ASIDE, new), moment

        def dying(call: Any) -> Any:
            def made(*arguments: Any, **keywords: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return call(*arguments, **keywords)

            return made

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                move_into(aside, folder)
            except Killed:
                pass
            else:
                assert moment > 3
                return
        there = {name: text for name, text in read(folder).items() if not name.startswith(ASIDE)}
        assert weights_that_load(there) in (set(), weights_that_load(old), weights_that_load(new))
        if (aside / "whole.json").exists():
            with pytest.raises(ValueError, match=r"it is complete in .*\.unfinished-model\. Load that folder"):
                adapter_base(str(folder))
            assert recover(folder)
            assert read(folder) == {**new, **MINE}
        else:
            assert there == {**old, **MINE}
    raise AssertionError("it never ended")


# ---- real models -------------------------------------------------------------------------------------------------


def trained(folder: Path, out: str, adapter: bool, **options: Any) -> Any:
    trainer = make_trainer(
        folder, loss="dpo", max_steps=1, learning_rate=1e-2, output_dir=str(folder / out),
        trainer_options={"peft_config": lora()} if adapter else {}, **options,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("first", [True, False], ids=["adapter, then full", "full, then adapter"])
def test_what_was_trained_last_is_what_loads(tmp_path, first):
    trained(tmp_path, "out", first)
    trainer = trained(tmp_path, "out", not first, seed=1)
    held = what_is_there(tmp_path / "out")
    assert bool(held.adapter) is not first
    assert bool(held.weights) is first
    model, tokenizer = load(tmp_path / "out", None if first else str(tmp_path / "llama-0"))
    own = log_probabilities(trainer.accelerator.unwrap_model(trainer.model), make_tokenizer())
    assert log_probabilities(model, tokenizer) == pytest.approx(own, abs=1e-4)


def test_results_of_the_model_before_go_and_those_of_this_run_stay(tmp_path):
    out = tmp_path / "out"
    trained(tmp_path, "out", True)
    results = json.dumps({"loss": "ipo", "before": None, "after": None})
    write(out, {"results.json": results})
    weights = (out / "adapter_model.safetensors").stat().st_mtime_ns
    for name, age in (("before.json", -5), ("dropped_training_rows.jsonl", -5), ("dropped_evaluation_rows.jsonl", 5)):
        write(out, {name: results})
        os.utime(out / name, ns=(weights + age * 10**9,) * 2)
    trainer = trained(tmp_path, "out", False)
    assert not (out / "results.json").exists()
    assert not (out / "before.json").exists()
    assert not (out / "dropped_training_rows.jsonl").exists()
    assert (out / "dropped_evaluation_rows.jsonl").exists()
    write(out, {"results.json": results, "before.json": results})
    os.utime(out / "before.json", ns=(weights - 10**10,) * 2)
    trainer.save_model()  # as a push does once more
    assert (out / "results.json").exists()
    assert (out / "before.json").exists()


def test_results_of_somebody_else_are_left(tmp_path):
    out = tmp_path / "out"
    trained(tmp_path, "out", True)
    write(out, {"results.json": '{"score": 1}'})
    trained(tmp_path, "out", False)
    assert (out / "results.json").read_text() == '{"score": 1}'


def test_a_folder_with_two_models_is_refused_on_every_road(tmp_path):
    trained(tmp_path, "out", True)
    out = tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(str(tmp_path / "llama-0")).save_pretrained(out)
    said = r"holds two models: whole weights \(model.safetensors\) and an adapter \(.*Move .* out of the folder"
    for look in (adapter_base, check_weights, lambda name: load_model(name, {})):
        with pytest.raises(ValueError, match=said):
            look(str(out))
    with pytest.raises(MergeError, match=said):
        merge(str(out))
    args = make_trainer(tmp_path, loss="dpo").args
    for models in ({"model": str(out)}, {"model": save_model(tmp_path), "ref_model": str(out)}):
        with pytest.raises(ValueError, match=said):
            PreferenceTrainer(args=args, train_dataset=make_pairs(4), processing_class=make_tokenizer(), **models)
    (out / "adapter_config.json").unlink()
    (out / "adapter_model.safetensors").unlink()
    assert adapter_base(str(out)) is None
    load_model(str(out), {})


def test_an_adapter_trained_on_saves_itself_alone_and_its_checkpoints_resume(tmp_path):
    trained(tmp_path, "first", True)
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "llama-0"))
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-2}

    def again() -> Any:
        model = PeftModel.from_pretrained(base, str(tmp_path / "first"), is_trainable=True)
        return make_trainer(tmp_path, loss="dpo", model=model, output_dir=str(tmp_path / "second"), **options)

    trainer = again()
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "second" / "ref").exists()
    assert (tmp_path / "second" / "checkpoint-1" / "ref" / "adapter_config.json").exists()
    saved = log_probabilities(*load(tmp_path / "second", str(tmp_path / "llama-0")))
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "llama-0"))
    resumed = again()
    resumed.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-1"))
    resumed.save_model()
    assert log_probabilities(*load(tmp_path / "second", str(tmp_path / "llama-0"))) == pytest.approx(saved, abs=1e-6)


def test_what_is_there_in_words(tmp_path):
    assert not what_is_there(tmp_path / "nowhere")
    folder = write(tmp_path / "out", {**ADAPTER, "results.json": '{"before": 1}', "checkpoint-4/x": "", **MINE})
    held = what_is_there(folder)
    assert str(held) == (
        "an adapter (adapter_config.json, adapter_model.safetensors), results (results.json) and checkpoints "
        "(checkpoint-4)"
    )
