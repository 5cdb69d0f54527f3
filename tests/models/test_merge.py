"""`prefopt merge`: the merged model says what base and adapter say; what cannot be merged is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.models import merge as merging
from prefopt.models.merge import MergeError, merge
from prefopt.trainer.facts import RunNotes
from tests.publishing.folders import load, log_probabilities, lora
from tests.tiny import CHATML, THINKING, make_tokenizer
from tests.trainer.runs import make_trainer, save_model


def adapter_folder(folder: Path, config: Any = None, tokenizer: bool = True, architecture: str = "llama") -> Path:
    """An adapter with random weights, saved as peft does, on the tiny model in the same folder."""
    base = save_model(folder, architecture)
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config or lora(r=4, lora_alpha=16))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1 if "lora" in name else 0.3)
    model.save_pretrained(folder / "adapter")
    if tokenizer:
        make_tokenizer().save_pretrained(folder / "adapter")
    return folder / "adapter"


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


KINDS = {
    "lora": lora(r=4, lora_alpha=16),
    "rslora": lora(r=4, use_rslora=True),
    "dora": lora(r=4, use_dora=True),
    "on tied embeddings": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"),
    "on a tied head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "tokens of tied embeddings": TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=list(range(40, 120)), task_type="CAUSAL_LM"
    ),
    "with a head of its own": lora(r=4, modules_to_save=["lm_head"]),
    "loha": LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_says_what_the_adapter_says(tmp_path: Path, kind: str) -> None:
    adapter = adapter_folder(tmp_path, KINDS[kind])
    found = merge(str(adapter), str(tmp_path / "merged"))
    with_adapter, tokenizer = load(adapter, found.base)
    merged, its_tokenizer = load(tmp_path / "merged")
    wanted = log_probabilities(with_adapter, tokenizer)
    assert log_probabilities(merged, its_tokenizer) == pytest.approx(wanted, abs=1e-4)
    before = log_probabilities(AutoModelForCausalLM.from_pretrained(found.base), tokenizer)
    assert max(abs(a - b) for a, b in zip(wanted, before, strict=True)) > 0.05
    assert found.mean <= found.largest < 1e-4
    assert found.moved > 0.05
    assert found.tokens > 50
    assert its_tokenizer.chat_template == CHATML


def test_a_runs_adapter_becomes_a_whole_folder(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, loss="dpo(beta=0.1)", max_steps=3, learning_rate=1e-2, trainer_options={"peft_config": lora()}
    )
    trainer.train()
    trainer.notes = RunNotes(base_model="org/base")  # the Hub's name of a base that is loaded from a folder
    trainer.save_model(str(tmp_path / "adapter"))
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "adapter")], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert "differs from the adapter by" in result.output
    target = tmp_path / "adapter-merged"
    assert f"Saved to {target}" in result.output
    names = {file.name for file in target.iterdir()}
    assert {
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".pt")) or name.startswith("adapter_")]
    model, tokenizer = load(target)
    learnt = log_probabilities(trainer.model, make_tokenizer())
    assert log_probabilities(model, tokenizer) == pytest.approx(learnt, abs=1e-4)
    assert (
        GenerationConfig.from_pretrained(target).to_dict()
        == GenerationConfig.from_pretrained(tmp_path / "llama-0").to_dict()
    )
    card = ModelCard((target / "README.md").read_text(encoding="utf-8"))
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "finetune")
    assert card.data.library_name == "transformers"
    assert "PeftModel" not in card.text
    assert "AutoModelForCausalLM.from_pretrained('adapter-merged')" in card.text
    assert "The adapter `adapter` folded into `llama-0`" in card.text
    assert "`dpo(beta=0.1, label_smoothing=0.0)`" in card.text  # where it came from is still there
    assert "@misc{rafailov2023" in card.text


def test_an_adapter_of_others_gets_a_card_too(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    assert "More Information Needed" in (adapter / "README.md").read_text(encoding="utf-8")
    named = adapter.rename(tmp_path / "{{ 7 * 7 }}`")
    merge(str(named), str(tmp_path / "merged"))
    card = ModelCard((tmp_path / "merged" / "README.md").read_text(encoding="utf-8"))
    assert "More Information Needed" not in card.text
    assert "`` {{ 7 * 7 }}` ``" in card.text


@pytest.mark.parametrize(
    ("asked", "kept"), [("bfloat16", torch.bfloat16), ("float32", torch.float32), (None, torch.float16)]
)
def test_the_dtype_is_the_one_asked_for_or_the_bases(tmp_path: Path, asked: str | None, kept: torch.dtype) -> None:
    adapter = adapter_folder(tmp_path)
    base = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tmp_path / "llama-0", dtype=torch.float16).save_pretrained(base)
    found = merge(str(adapter), str(tmp_path / "merged"), base=str(base), dtype=asked)
    assert found.dtype == kept
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {kept}
    assert 0 <= found.mean < 0.05


def test_without_a_tokenizer_of_its_own_the_bases_is_saved(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path, tokenizer=False)
    merge(str(adapter), str(tmp_path / "merged"))
    assert load(tmp_path / "merged")[1].chat_template == CHATML


def test_a_tokenizer_that_cannot_be_read_is_not_put_aside_for_the_bases(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(MergeError, match=r"tokenizer in .*adapter cannot be read: .*Save it again"):
        merge(str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_without_any_tokenizer_ids_are_compared(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path, tokenizer=False)
    for file in (*(tmp_path / "llama-0").glob("tokenizer*"), tmp_path / "llama-0" / "chat_template.jinja"):
        file.unlink()
    assert merge(str(adapter), str(tmp_path / "merged")).tokens == 47
    assert not (tmp_path / "merged" / "tokenizer.json").exists()


def test_an_adapter_that_does_nothing_is_noticed(tmp_path: Path) -> None:
    base = save_model(tmp_path)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora()).save_pretrained(tmp_path / "fresh")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "fresh")])
    assert result.exit_code == 0
    assert "The adapter changes nothing" in result.output


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, ["merge", *words], env={"COLUMNS": "400"})
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_prompt_learning(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    assert "PROMPT_TUNING adapter: it adds learned tokens before every prompt" in refused(str(adapter))


def test_activated_lora(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    change(adapter, alora_invocation_tokens=[5, 6])
    assert "activated LoRA" in refused(str(adapter))


@pytest.mark.parametrize("where", ["output", "default"])
def test_a_used_output_folder(tmp_path: Path, where: str) -> None:
    adapter = adapter_folder(tmp_path)
    target = tmp_path / ("mine" if where == "output" else "adapter-merged")
    target.mkdir()
    (target / "notes.txt").write_text("keep me")
    more = ["--output", str(target)] if where == "output" else []
    assert f"{target} is not empty" in refused(str(adapter), *more)
    assert [file.name for file in target.iterdir()] == ["notes.txt"]


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    merge(str(adapter), str(tmp_path / "empty"))
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_pickled_adapters(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert "holds pickled weights (adapter_model.bin)" in refused(str(adapter))


def test_pickled_bases(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    base = tmp_path / "llama-0"
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert "has no safetensors weights" in refused(str(adapter))


def test_bases_that_bring_code(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    path = tmp_path / "llama-0" / "config.json"
    settings = json.loads(path.read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}}
    path.write_text(json.dumps(settings))
    (tmp_path / "llama-0" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\n")
    assert "does not run code from a model's repository" in refused(str(adapter))
    assert not (tmp_path / "ran").exists()


def test_quantised_bases(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    path = tmp_path / "llama-0" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    said = refused(str(adapter))
    assert "is quantised (gptq)" in said
    assert "--base" in said


def test_a_base_that_is_an_adapter(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    shutil.copytree(adapter, tmp_path / "second")
    change(tmp_path / "second", base_model_name_or_path=str(adapter))
    assert "is an adapter itself: merge that into its own base first" in refused(str(tmp_path / "second"))


def test_a_base_that_is_gone_is_given_by_hand(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    change(adapter, base_model_name_or_path="/gone/llama")
    assert "'/gone/llama', which is not on this machine" in refused(str(adapter))
    change(adapter, base_model_name_or_path=None)
    assert "does not name the adapter's base model: give it with --base" in refused(str(adapter))
    (adapter / "chat_template.jinja").write_text(THINKING)
    found = merge(str(adapter), str(tmp_path / "merged"), base=str(tmp_path / "llama-0"))
    assert found.largest < 1e-4
    assert load(tmp_path / "merged")[1].chat_template == THINKING


def test_a_base_of_another_shape(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    other = save_model(tmp_path, "gpt2")
    assert "does not fit" in refused(str(adapter), "--base", other)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    weights[name] = torch.zeros(7, weights[name].shape[1])
    save_file(weights, adapter / "adapter_model.safetensors")
    assert "does not fit" in refused(str(adapter))


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: folder / "nowhere", "is not a folder"),
        (lambda folder: Path(save_model(folder)), "It holds whole weights, which need no merging"),
        (lambda folder: adapter_folder(folder).parent, "There are adapters in adapter."),
    ],
)
def test_what_is_no_adapter(tmp_path: Path, prepare: Any, said: str) -> None:
    assert said in refused(str(prepare(tmp_path)))


def test_a_configuration_without_weights_or_sense(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    (adapter / "adapter_config.json").write_text("{not json")
    assert "adapter_config.json cannot be read" in refused(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refused(str(adapter))


def test_an_unknown_dtype(tmp_path: Path) -> None:
    assert "dtype must be one of float32, bfloat16, float16, got 'int8'" in refused(
        str(adapter_folder(tmp_path)), "--dtype", "int8"
    )


def test_a_merge_that_went_wrong_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_folder(tmp_path)
    fold = merging._fold

    def broken(*arguments: Any) -> Any:
        whole: Any = fold(*arguments)
        whole.get_input_embeddings().weight.data.mul_(1.5)
        return whole

    monkeypatch.setattr(merging, "_fold", broken)
    with pytest.raises(MergeError, match=r"differs from base and adapter by .* nothing was saved"):
        merge(str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_leaves_no_half_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_folder(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "merged_card", full)
    with pytest.raises(OSError, match="No space"):
        merge(str(adapter), str(tmp_path / "merged"))
    assert not list(tmp_path.glob("merged*"))


def test_an_adapter_that_was_trained_on_another_model_of_that_name_is_refused(tmp_path: Path) -> None:
    """An earlier adapter merged in memory: the configuration names the model before that."""
    earlier = adapter_folder(tmp_path)
    base = save_model(tmp_path)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(earlier)).merge_and_unload()
    options = {"peft_config": lora(r=4)}
    trainer = make_trainer(tmp_path, model=merged, max_steps=1, learning_rate=1e-2, trainer_options=options)
    trainer.train()
    trainer.save_model(str(tmp_path / "second"))
    with pytest.raises(MergeError, match=r"is not the model that the adapter was trained on: \d+ of its weights"):
        merge(str(tmp_path / "second"))
    trainer = make_trainer(tmp_path, max_steps=1, learning_rate=1e-2, trainer_options={"peft_config": lora(r=4)})
    trainer.train()
    trainer.save_model(str(tmp_path / "plain"))
    for dtype in ("float32", "bfloat16"):
        merge(str(tmp_path / "plain"), str(tmp_path / dtype), dtype=dtype)
