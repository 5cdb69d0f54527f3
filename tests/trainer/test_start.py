"""Runs that train nothing stop as they start, and healthy ones pass without a word."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, MixtralConfig, RwkvConfig, XLNetConfig

from prefopt.losses import PairLoss
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_pairs, make_trainer, save_model

LOGGER = "prefopt.trainer.start"


def lora(**options):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def saved_adapter(tmp_path):
    base = save_model(tmp_path)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora()).save_pretrained(tmp_path / "sft")
    return base, str(tmp_path / "sft")


def grad_norms(trainer):
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def test_an_adapter_that_was_loaded_frozen_is_refused_by_name(tmp_path):
    base, adapter = saved_adapter(tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    trainer = make_trainer(tmp_path, model=model, max_steps=2)
    with pytest.raises(ValueError, match=r"adapter 'default'.*is_trainable=True"):
        trainer.train()


def test_a_frozen_model_can_be_evaluated_but_not_trained(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path)).requires_grad_(False)
    trainer = make_trainer(tmp_path, model=model, max_steps=2)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    with pytest.raises(ValueError, match="requires_grad_"):
        trainer.train()


@pytest.mark.parametrize("continued", [True, False], ids=["continued", "new"])
def test_scoring_the_reference_unfreezes_nothing(tmp_path, continued):
    """LoRA-FA freezes A: its gradients are neither taken nor counted, however often adapters are switched."""
    base, adapter = saved_adapter(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    if continued:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trainer = make_trainer(
        tmp_path, model=model, max_steps=3, trainer_options={} if continued else {"peft_config": lora()}
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    norms = []

    def count(*_, **__):
        norms.append(sum(p.grad is not None for n, p in trainer.model.named_parameters() if "lora_A" in n))

    trainer.callback_handler.callbacks[-1].on_pre_optimizer_step = count
    trainer.train()
    assert norms == [0, 0, 0]
    wanted = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert wanted
    assert all("lora_B.default" in name for name in wanted)


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    other = AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    trainer = make_trainer(tmp_path, max_steps=2, trainer_options={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="holds no trainable parameter"):
        trainer.train()


def test_an_optimizer_made_before_the_adapter_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    options = {"optimizers": (torch.optim.AdamW(model.parameters(), lr=1e-3), None), "peft_config": lora()}
    trainer = make_trainer(tmp_path, model=model, max_steps=2, trainer_options=options)
    with pytest.raises(ValueError, match="before the adapter was added"):
        trainer.train()


def test_parameters_beside_the_optimizer_are_named(tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    optimizer = torch.optim.AdamW(model.model.layers[0].parameters(), lr=1e-3)
    trainer = make_trainer(tmp_path, model=model, max_steps=1, trainer_options={"optimizers": (optimizer, None)})
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer.train()
    assert "are not in the optimizer (model.embed_tokens.weight" in caplog.text


def test_updates_that_bf16_weights_cannot_hold_stop_the_run(tmp_path):
    options = {"model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 5e-8, "max_steps": 2}
    with pytest.raises(ValueError, match=r"--dtype float32 --bf16 true"):
        make_trainer(tmp_path, **options).train()
    make_trainer(tmp_path, step0_check="off", **options).train()


def test_bf16_weights_of_which_few_move_get_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        make_trainer(tmp_path, model_init_kwargs={"dtype": "bfloat16"}, learning_rate=1e-5, max_steps=1).train()
    assert "rounded back" in caplog.text


def idle_trainer(tmp_path):
    """Its optimizer holds the weights, and moves none of them."""

    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            return None

    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    optimizers = (Idle(model.parameters(), lr=0.1), None)
    return make_trainer(tmp_path, model=model, max_steps=2, trainer_options={"optimizers": optimizers})


def test_an_optimizer_that_holds_the_weights_but_moves_none_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="changed none of"):
        idle_trainer(tmp_path).train()


def test_where_too_few_weights_have_a_gradient_nothing_is_judged(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.trainer.start.JUDGED", 10**9)
    assert idle_trainer(tmp_path).train().global_step == 2


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 5e-7},
        {"learning_rate": 1e-6, "warmup_steps": 100},
        {"learning_rate": 1e-3, "warmup_steps": 3, "model_init_kwargs": {"dtype": "bfloat16"}},
        {
            "learning_rate": 5e-7,
            "model_init_kwargs": {"dtype": "bfloat16"},
            "trainer_options": {"peft_config": lora()},
        },
        {"loss": "hinge(beta=0.1)", "learning_rate": 1e-3, "optim": "sgd"},
        {"optim": "adafactor", "learning_rate": 1e-4},
    ],
    ids=["float32", "warm-up", "bf16 warm-up", "bf16 with LoRA", "sgd", "adafactor"],
)
def test_healthy_runs_pass_without_a_word(tmp_path, caplog, options):
    with caplog.at_level(logging.WARNING, LOGGER):
        make_trainer(tmp_path, **{"max_steps": 4, **options}).train()
    assert not [record for record in caplog.records if record.name == LOGGER]


@pytest.mark.parametrize(
    "options",
    [{"loss": "0.0*dpo(beta=0.1)"}, {"train_dataset": make_pairs(12, weight=[0.0] * 12)}],
    ids=["loss", "weights"],
)
def test_a_short_run_without_any_gradient_says_so_at_its_end(tmp_path, caplog, options):
    """It is not refused: an objective that is satisfied has no gradient either."""
    with caplog.at_level(logging.WARNING, LOGGER):
        make_trainer(tmp_path, **{"loss": "dpo", "max_steps": 2, **options}).train()
    assert [r.getMessage()[:30] for r in caplog.records if r.name == LOGGER] == ["no weight had a gradient in th"]


def test_one_update_with_a_gradient_is_enough(tmp_path, caplog):
    rows = make_pairs(8, weight=[0.0] * 7 + [1.0])
    with caplog.at_level(logging.WARNING, LOGGER):
        make_trainer(tmp_path, loss="dpo", max_steps=2, train_dataset=rows).train()
    assert not [record for record in caplog.records if record.name == LOGGER]


def test_updates_without_any_gradient_get_one_warning(tmp_path, caplog):
    """Forgetting, on rows that are all to be retained."""
    rows = Dataset.from_list([{"prompt": "Say", "completion": f" {n}", "label": True} for n in range(12)])
    with caplog.at_level(logging.WARNING, LOGGER):
        make_trainer(tmp_path, loss="npo(beta=0.1)", max_steps=12, train_dataset=rows, learning_rate=1e-3).train()
    assert [r.getMessage()[:30] for r in caplog.records if r.name == LOGGER] == ["no weight had a gradient in th"]


# ---- models to compare with, models that are not causal, losses ------------------------------------------


def sharing(model):
    """Another model around the same layers."""
    other = AutoModelForCausalLM.from_config(model.config)
    other.model = model.model
    return other


@pytest.mark.parametrize("role", ["ref_model", "previous_model"])
def test_a_model_to_compare_with_that_would_be_trained_is_refused(tmp_path, role):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    loss = {"ref_model": "dpo(beta=0.1)", "previous_model": "inpo"}[role]
    with pytest.raises(ValueError, match=rf"{role} shares 20 trained parameters .*model\.embed_tokens\.weight"):
        make_trainer(tmp_path, model=model, loss=loss, trainer_options={role: sharing(model)})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_base_that_an_adapter_was_put_into_is_no_reference(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    model = get_peft_model(base, lora())
    with pytest.raises(ValueError, match=r"ref_model shares 8 trained parameters .*lora_A"):
        make_trainer(tmp_path, model=model, trainer_options={"ref_model": base})


def test_what_is_frozen_may_be_shared(tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    reference = AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    model.model.embed_tokens.requires_grad_(False)
    reference.model.embed_tokens = model.model.embed_tokens
    make_trainer(tmp_path, model=model, max_steps=2, trainer_options={"ref_model": reference}).train()
    assert not [record for record in caplog.records if record.name == LOGGER]


def test_a_learning_rate_of_zero_gets_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        make_trainer(tmp_path, max_steps=3, learning_rate=0.0).train()
    assert [r.getMessage()[:22] for r in caplog.records if r.name == LOGGER] == ["the learning rate is 0"]


def test_a_run_that_ends_within_its_warm_up_says_what_was_rounded_away(tmp_path, caplog):
    options = {"model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 1e-5, "warmup_steps": 100}
    with caplog.at_level(logging.WARNING, LOGGER):
        make_trainer(tmp_path, max_steps=5, **options).train()
    assert [r.getMessage()[:55] for r in caplog.records if r.name == LOGGER] == [
        "the run ended before its full learning rate; update 4 ("
    ]


SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize(
    ("config", "decoder"),
    [
        (BertConfig(**SIZES, intermediate_size=64), True),
        (XLNetConfig(vocab_size=400, d_model=32, n_layer=2, n_head=4), False),
    ],
    ids=["bert", "xlnet"],
)
def test_a_model_that_sees_later_tokens_is_refused(tmp_path, config, decoder, layout):
    path = saved(config, tmp_path)
    with pytest.raises(ValueError, match=r"sees tokens that come later .*step0_check") as caught:
        make_trainer(tmp_path, model=path, max_steps=1, layout=layout).train()
    assert ("is_decoder=True" in str(caught.value)) == decoder
    make_trainer(tmp_path, model=path, max_steps=1, layout=layout, step0_check="off").train()


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SIZES, intermediate_size=64, is_decoder=True),
        RwkvConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2),
        MixtralConfig(**SIZES, num_key_value_heads=2, intermediate_size=64, router_jitter_noise=0.1),
    ],
    ids=["decoder", "recurrent", "experts"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_causal_models_are_taken(tmp_path, config, dtype):
    path = saved(config, tmp_path)
    options = {"model_init_kwargs": {"dtype": dtype}, "disable_dropout": False, "step0_tolerance": 10.0}
    assert make_trainer(tmp_path, model=path, max_steps=2, **options).train().global_step == 2


def saved(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


def test_a_loss_without_a_gradient_is_refused(tmp_path):
    class Detached(PairLoss):
        def per_example(self, batch):
            return (batch.rejected.logps - batch.chosen.logps).detach()

    with pytest.raises(ValueError, match=r"Detached\.per_example returns values without a gradient"):
        make_trainer(tmp_path, max_steps=1, trainer_options={"loss": Detached()}).train()
