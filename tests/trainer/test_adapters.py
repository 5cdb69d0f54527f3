"""Adapters in unusual places: continued or new with PiSSA and its like, on the head, under other names."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefopt.scoring.rows import RowBatch
from tests.trainer.runs import make_trainer, save_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


def logps(model):
    model.eval()
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=IDS).logits.float(), -1)


def trained_adapter(tmp_path, **options):
    """A saved adapter that does something, and its model's folder."""
    base = save_model(tmp_path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    model.save_pretrained(tmp_path / "sft")
    return base, str(tmp_path / "sft")


def load(base, adapter, name="default"):
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, adapter, adapter_name=name, is_trainable=True)


@pytest.mark.parametrize("init", ["pissa", "olora", True, "gaussian"])
def test_a_continued_adapter_starts_as_it_was_saved(tmp_path, init):
    base, adapter = trained_adapter(tmp_path, init_lora_weights=init)
    model = load(base, adapter)
    before = logps(model)
    trainer = make_trainer(tmp_path, model=model, max_steps=2, learning_rate=1e-2)
    assert torch.equal(logps(trainer.model), before)
    trainer.train()
    with trainer._scorer.as_reference():
        assert torch.allclose(logps(trainer.model), before, atol=1e-5)
    assert not torch.allclose(logps(trainer.model), before, atol=1e-2)
    # Whoever loads the result must take the same part out of the base again.
    assert trainer.model.peft_config["default"].init_lora_weights == init
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.allclose(logps(load(base, str(tmp_path / "saved"))), logps(trainer.model), atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_new_adapter_that_changes_the_base_is_compared_with_the_model_it_was_put_on(tmp_path, init):
    base = save_model(tmp_path)
    before = logps(AutoModelForCausalLM.from_pretrained(base))
    options = {"peft_config": lora(init_lora_weights=init)}
    trainer = make_trainer(tmp_path, max_steps=2, learning_rate=1e-2, trainer_options=options)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    with trainer._scorer.as_reference():
        assert torch.allclose(logps(trainer.model), before, atol=1e-4)
    assert not torch.allclose(logps(trainer.model), before, atol=1e-2)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True"):
        make_trainer(tmp_path, precompute_ref_log_probs=True, trainer_options=options)


def test_an_initialisation_that_cannot_be_loaded_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use 'pissa'"):
        make_trainer(tmp_path, trainer_options={"peft_config": lora(init_lora_weights="pissa_niter_4")})


def test_a_base_that_changes_while_the_trainer_is_set_up_is_refused(tmp_path, monkeypatch):
    base, adapter = trained_adapter(tmp_path)
    model = load(base, adapter)
    add = PeftModel.add_adapter

    def changing(self, *arguments, **keywords):
        add(self, *arguments, **keywords)
        self.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data += 0.1

    monkeypatch.setattr(PeftModel, "add_adapter", changing)
    with pytest.raises(ValueError, match=r"base's weights changed .*q_proj.*pass a separate model as ref_model"):
        make_trainer(tmp_path, model=model)


@pytest.mark.parametrize(
    "adapter",
    [
        lora(target_modules=["q_proj", "lm_head"]),
        lora(target_modules=["q_proj", "embed_tokens"]),
        TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[40, 41, 50], task_type="CAUSAL_LM"),
        lora(modules_to_save=["lm_head"]),
    ],
    ids=["head", "embeddings", "tokens of tied embeddings", "head in full"],
)
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_an_adapter_on_the_head_is_trained_and_scored(tmp_path, adapter, layout):
    """Log-probabilities are those of PEFT's own forward pass, also after updates, and the head's weights move."""
    trainer = make_trainer(
        tmp_path, max_steps=2, learning_rate=1e-2, layout=layout, trainer_options={"peft_config": adapter}
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(before[name], p)
    }
    assert any("lm_head" in name or "embed_tokens" in name for name in moved)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        scores = trainer._score(trainer.model, RowBatch.of(batch), all_logits=False).batch
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    own = torch.log_softmax(logits, -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    own = (own * batch["completion_mask"][:, 1:]).sum(-1)
    assert torch.allclose(torch.cat([scores.chosen.logps, scores.rejected.logps]), own, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["policy"], "must be called 'default'"),
        (["policy", "reference"], "must be called 'default'"),
        (["default", "ref"], r"delete_adapter\('ref'\)"),
        (["default", "other"], r"set_adapter\('default'\)"),
    ],
    ids=str,
)
def test_adapters_by_other_names_are_refused_with_how_it_is_done(tmp_path, names, said):
    base, adapter = trained_adapter(tmp_path)
    model = load(base, adapter, names[0])
    for name in names[1:]:
        model.load_adapter(adapter, adapter_name=name)
    if "other" in names:
        model.set_adapter("other")
    with pytest.raises(ValueError, match=said) as caught:
        make_trainer(tmp_path, model=model)
    assert "merge_and_unload" in str(caught.value)


def test_two_active_adapters_are_refused(tmp_path):
    """Only one of them would be trained, compared with, and scored."""
    base, adapter = trained_adapter(tmp_path)
    model = load(base, adapter)
    model.load_adapter(adapter, adapter_name="other")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        ValueError, match=r"the active adapters are 'default', 'other', but .*set_adapter\('default'\)"
    ):
        make_trainer(tmp_path, model=model)


def test_a_merged_adapter_is_refused_with_advice_that_works(tmp_path):
    model = load(*trained_adapter(tmp_path))
    before = logps(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"call model\.unmerge_adapter\(\)"):
        make_trainer(tmp_path, model=model)
    model.unmerge_adapter()
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    assert torch.allclose(logps(trainer.model), before, atol=1e-5)


def test_a_folder_of_an_adapter_is_refused_with_advice_that_works(tmp_path):
    _, adapter = trained_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"holds an adapter on .*AutoPeftModelForCausalLM\.from_pretrained\('.*sft'"):
        make_trainer(tmp_path, model=adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_the_advice_for_another_reference_works(tmp_path):
    base, adapter = trained_adapter(tmp_path)
    other = load(base, adapter).merge_and_unload()
    expected = logps(other)
    trainer = make_trainer(tmp_path, model=load(base, adapter), max_steps=1, trainer_options={"ref_model": other})
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert torch.allclose(logps(trainer.ref_model), expected, atol=1e-6)
