"""What a run saves loads in plain transformers and peft, and says what the trained model said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback, pipeline

from tests.processes import torchrun
from tests.publishing.folders import load, log_probabilities, lora
from tests.tiny import CHATML, make_tokenizer
from tests.trainer.runs import make_trainer, save_model

COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Fused(TrainerCallback):
    """Notes, at every save, how many LoRA layers compute in their own fused way."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_save(self, *_: Any, model: Any = None, **__: Any) -> None:
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        self.counts.append(sum("forward" in vars(layer) for layer in layers))


def trained(folder: Path, adapter: bool, **options: Any) -> tuple[Any, Fused]:
    fused = Fused()
    extra = {"peft_config": lora(), "callbacks": [fused]} if adapter else {"callbacks": [fused]}
    trainer = make_trainer(
        folder, loss="dpo(beta=0.1)", max_steps=3, learning_rate=1e-2, save_strategy="steps", save_steps=2,
        trainer_options=extra, **options,
    )  # fmt: skip
    trainer.train()
    return trainer, fused


@pytest.mark.parametrize(
    "options", [pytest.param({}, id="plain"), pytest.param(COMPILED, id="compiled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_folder_says_what_the_trained_model_said(tmp_path: Path, adapter: bool, options: dict[str, Any]) -> None:
    trainer, fused = trained(tmp_path, adapter, **options)
    out, base = tmp_path / "out", str(tmp_path / "llama-0")
    trainer.save_model(str(out))
    model, tokenizer = load(out, base if adapter else None)
    learnt = log_probabilities(model, tokenizer)
    inner = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    assert learnt == pytest.approx(log_probabilities(inner, make_tokenizer()), abs=1e-5)
    before = log_probabilities(AutoModelForCausalLM.from_pretrained(base), tokenizer)
    assert max(abs(a - b) for a, b in zip(learnt, before, strict=True)) > 0.05
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    with safe_open(out / weights, "pt") as file:
        assert not [name for name in file.keys() if "_orig_mod" in name or name.startswith("module.")]  # noqa: SIM118
    if adapter and not options:
        assert set(fused.counts) == {6}  # saved while the layers were patched
    # The checkpoint of step 2 is another model, and as whole.
    earlier = log_probabilities(*load(tmp_path / "run" / "checkpoint-2", base if adapter else None))
    assert earlier != pytest.approx(learnt, abs=1e-5)
    assert earlier != pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_folder_chats(tmp_path: Path, adapter: bool) -> None:
    trainer, _ = trained(tmp_path, adapter)
    out = tmp_path / "out"
    trainer.save_model(str(out))
    answer = pipeline("text-generation", model=str(out))(
        QUESTION, max_new_tokens=5, do_sample=False, return_full_text=False
    )[0]["generated_text"]
    model, tokenizer = load(out, str(tmp_path / "llama-0") if adapter else None)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == expected
    if not adapter:
        assert GenerationConfig.from_pretrained(out).pad_token_id == tokenizer.pad_token_id


def test_an_adapter_loads_by_its_folder_alone(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, True)
    trainer.save_model(str(tmp_path / "out"))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "llama-0")
    assert settings["inference_mode"] is True
    learnt = log_probabilities(trainer.model, make_tokenizer())
    assert log_probabilities(model, make_tokenizer()) == pytest.approx(learnt, abs=1e-5)


def test_pickled_arguments_hold_no_token(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, loss="dpo", max_steps=1, hub_token="hf_secretSecretSecret00", run_name="https://u:pa55word@host/run"
    )
    trainer.save_model(str(tmp_path / "out"))
    raw = (tmp_path / "out" / "training_args.bin").read_bytes()
    assert b"hf_secretSecret" not in raw
    assert b"pa55word" not in raw
    kept = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert kept.hub_token is None
    assert kept.loss == "dpo"
    # The trainer itself still has it.
    assert trainer.args.hub_token == "hf_secretSecretSecret00"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_folder_of_two_processes(tmp_path: Path, kind: str) -> None:
    base = save_model(tmp_path)
    torchrun("tests.publishing.two_processes", str(tmp_path), kind)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["world"], found["wrapped"]) == (2, "DistributedDataParallel")
    model, tokenizer = load(tmp_path / "out", base if kind == "lora" else None)
    learnt = log_probabilities(model, tokenizer)
    assert learnt == pytest.approx(found["learnt"], abs=1e-5)
    before = log_probabilities(AutoModelForCausalLM.from_pretrained(base), tokenizer)
    assert learnt != pytest.approx(before, abs=1e-2)
    assert "x 2 processes)" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
