"""Options that would have no effect or fail late are refused by name, before a model is loaded; others work."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from prefopt import PreferenceConfig
from prefopt.trainer.options import REFUSED
from prefopt.trainer.tokens import example_lengths
from tests.tiny import TEXT_SIZES, make_model, make_tokenizer
from tests.trainer.runs import make_labelled, make_pairs, make_trainer, save_model, train

DOCS = Path(__file__).parents[2] / "docs" / "options.md"


def no_model(tmp_path):
    """A name under which there is no model: whoever tries to load it fails otherwise."""
    return str(tmp_path / "missing")


@pytest.mark.parametrize(
    "options",
    [
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.1},
        {"bf16_full_eval": True},
        {"activation_offloading": True},
        {"train_sampling_strategy": "group_by_length", "train_dataset": make_pairs(8).to_iterable_dataset()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_without_use_is_refused_before_the_model_is_loaded(tmp_path, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"^{name}="):
        make_trainer(tmp_path, model=no_model(tmp_path), **options)


def test_defaults_and_zeros_are_refused_nowhere(tmp_path):
    make_trainer(tmp_path, neftune_noise_alpha=0.0, label_smoothing_factor=0.0, bf16_full_eval=False)


def test_every_option_is_in_the_table():
    """docs/options.md says of each argument what becomes of it; what is refused there is refused here."""
    rows = {
        name: row
        for row in DOCS.read_text(encoding="utf-8").splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([a-z0-9_]+)`", row.split("|")[1])
    }
    fields = {field.name for field in dataclasses.fields(PreferenceConfig)}
    assert fields - rows.keys() == set()
    assert {name for name in rows if "refused" in rows[name].split("|")[2]} >= REFUSED.keys()


@pytest.mark.parametrize("make", [make_pairs, make_labelled])
def test_examples_are_grouped_by_length(tmp_path, make):
    options = {"train_dataset": make(64), "loss": "dpo" if make is make_pairs else "kto"}
    spreads = {}
    for strategy in ("random", "group_by_length"):
        trainer = make_trainer(tmp_path, train_sampling_strategy=strategy, seed=3, **options)
        lengths = example_lengths(trainer.train_dataset)
        order = list(trainer._get_train_sampler())
        assert sorted(order) == list(range(64))
        spreads[strategy] = np.ptp(lengths[order].reshape(-1, 4), axis=1).sum()
    assert spreads["group_by_length"] < spreads["random"] / 2


def test_lengths_count_the_prompt_and_every_completion():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]},
        {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": []},
    ]
    assert example_lengths(Dataset.from_list(rows)).tolist() == [6, 3]
    assert example_lengths(Dataset.from_list(rows).select([1, 0])).tolist() == [3, 6]


def test_runs_grouped_by_length_train_and_evaluate_in_order(tmp_path):
    valid = make_pairs(10, seed=1)
    options = {"trainer_options": {"eval_dataset": valid}, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, train_sampling_strategy="group_by_length", **options)
    trainer.train()
    assert trainer.state.log_history[-2]["eval_loss"] > 0
    assert list(trainer._get_eval_sampler(valid)) == list(range(10))


# ---- models ------------------------------------------------------------------------------------------------------


def save(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )


def bert():
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=400, **size))


def reward():
    return LlamaForSequenceClassification(LlamaConfig(**TEXT_SIZES))


@pytest.mark.parametrize(("make", "what"), [(t5, "encoder-decoder"), (bert, "MaskedLM"), (reward, "Classification")])
@pytest.mark.parametrize("by", ["name", "object"])
def test_models_that_do_not_predict_the_next_token_are_refused_before_the_data(tmp_path, make, what, by):
    model = make() if by == "object" else save(make(), tmp_path / "other")
    data = Dataset.from_list([{"prompt": 1, "chosen": 2, "rejected": 3}])  # whoever prepares it fails otherwise
    with pytest.raises(ValueError, match=rf"^model=.*{what}"):
        make_trainer(tmp_path, model=model, train_dataset=data)
    if by == "object":
        with pytest.raises(ValueError, match=rf"^ref_model=.*{what}"):
            make_trainer(tmp_path, train_dataset=data, trainer_options={"ref_model": model})


@pytest.mark.parametrize("role", ["ref_model", "previous_model"])
def test_a_name_in_the_place_of_another_model_is_refused(tmp_path, role):
    with pytest.raises(ValueError, match=rf"^{role}='other/model' is a name.*{role}=AutoModelForCausalLM"):
        make_trainer(tmp_path, loss="inpo", trainer_options={role: "other/model"})


@pytest.mark.parametrize("role", ["model", "ref_model"])
def test_a_wrapped_model_is_refused(tmp_path, role):
    wrapped = {role: torch.nn.DataParallel(make_model())}
    options = {"model": wrapped.pop("model")} if role == "model" else {}
    with pytest.raises(ValueError, match=rf"^{role} is wrapped in DataParallel.*pass {role}\.module"):
        make_trainer(tmp_path, **options, trainer_options=wrapped)


SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=512, word_embed_proj_dim=32, layerdrop=0.3),
        GPTBigCodeConfig(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=512),
        FalconConfig(
            **SMALL, hidden_dropout=0.2, attention_dropout=0.2, new_decoder_architecture=True, num_kv_heads=2
        ),
    ],
    ids=["opt", "bigcode", "falcon"],
)
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_dropout_that_is_no_module_is_off(tmp_path, config, layout):
    """The policy equals its reference at step 0 and again with a rate of 0; the saved settings stay the model's."""
    torch.manual_seed(0)
    path = save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    trainer = make_trainer(tmp_path, model=path, max_steps=2, layout=layout, learning_rate=0.0)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx([0.693147, 0.693147], abs=1e-5)
    assert {name: value for name, value in vars(trainer.model.config).items() if "drop" in name} == {
        name: value for name, value in vars(config).items() if "drop" in name
    }


def test_dropout_that_is_asked_for_stays(tmp_path):
    config = OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=512, word_embed_proj_dim=32)
    path = save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    entries = train(tmp_path, model=path, max_steps=2, disable_dropout=False, learning_rate=0.0)
    assert entries[0]["loss"] != pytest.approx(0.693147, abs=1e-5)


# ---- positions ---------------------------------------------------------------------------------------------------


def of_length(*rejected: int) -> Dataset:
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [9] * n + [2]} for n in rejected]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=16, word_embed_proj_dim=32),
        GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=16),
    ],
    ids=["opt", "gpt2"],
)
def test_rows_longer_than_the_learned_positions_are_refused(tmp_path, config):
    path = save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    with pytest.raises(
        ValueError, match="train row 2 has 17 tokens, but the model has learned 16 positions: set max_"
    ):
        make_trainer(tmp_path, model=path, train_dataset=of_length(4, 13, 14, 30), max_length=None)
    make_trainer(tmp_path, model=path, train_dataset=of_length(4, 13, 14, 30), max_length=16).train()
    make_trainer(tmp_path, model=path, train_dataset=of_length(13, 13, 13, 13), max_length=None).train()


def test_computed_positions_have_no_limit(tmp_path):
    config = LlamaConfig(**{**TEXT_SIZES, "max_position_embeddings": 16})
    path = save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    make_trainer(tmp_path, model=path, train_dataset=of_length(4, 13, 14, 30), max_length=None).train()


# ---- vocabularies ------------------------------------------------------------------------------------------------


def small_model(vocabulary):
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**TEXT_SIZES, "vocab_size": vocabulary}))


def prepared(*rows, highest):
    pairs = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9, 2]} for _ in range(8)]
    for row in rows:
        pairs[row]["rejected_ids"][0] = highest
    return Dataset.from_list(pairs)


def test_ids_beyond_the_vocabulary_are_refused_with_their_row(tmp_path):
    path = save(small_model(300), tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"train row 6: rejected holds token 300 .* beyond the policy's vocabulary of 300"
    ):
        make_trainer(tmp_path, model=path, train_dataset=prepared(6, 7, highest=300))
    make_trainer(tmp_path, model=path, train_dataset=prepared(6, highest=299))


def test_the_reference_and_held_out_rows_are_looked_at_too(tmp_path):
    path = save(small_model(400), tmp_path / "model")
    data = prepared(highest=0)
    with pytest.raises(ValueError, match=r"valid row 2: .* beyond the reference's vocabulary of 350"):
        make_trainer(
            tmp_path, model=path, train_dataset=data,
            trainer_options={"ref_model": small_model(350), "eval_dataset": {"valid": prepared(2, highest=360)}},
        )  # fmt: skip


def test_a_padding_token_that_was_added_to_the_tokenizer_alone_is_refused(tmp_path):
    path = save(small_model(384), tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(20)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"the padding token '\[PAD\]'"):
        make_trainer(tmp_path, model=path).__class__(
            path, args=PreferenceConfig(str(tmp_path / "o"), use_cpu=True), train_dataset=make_pairs(8),
            processing_class=tokenizer,
        )  # fmt: skip


def test_a_streamed_batch_with_an_unknown_id_is_refused_before_the_model_sees_it(tmp_path):
    path = save(small_model(300), tmp_path / "model")
    stream = prepared(3, highest=350).to_iterable_dataset()
    with pytest.raises(ValueError, match="token id 350 is beyond the vocabulary of 300"):
        make_trainer(tmp_path, model=path, train_dataset=stream, max_steps=3).train()


def test_models_with_more_embeddings_than_the_tokenizer_has_tokens_are_fine(tmp_path):
    train(tmp_path, model=save_model(tmp_path), max_steps=1)


# ---- models that are passed as objects -----------------------------------------------------------------------------


def test_a_model_made_in_memory_says_how_it_gets_a_reference(tmp_path):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM made in memory.*ref_model=copy\.deepcopy\(model\)"):
        make_trainer(tmp_path, model=make_model())
    with pytest.raises(ValueError, match=r"pass its folder, or train an adapter"):
        make_trainer(tmp_path, model=make_model(), loss="simpo(beta=2.0, gamma=1.0)")
    model = make_model()
    for options in ({"ref_model": copy.deepcopy(model)}, {"peft_config": LoraConfig(task_type="CAUSAL_LM")}):
        make_trainer(tmp_path, model=model, trainer_options=options)


def test_what_predicts_no_tokens_is_refused_by_name(tmp_path):
    for model, name in ((make_model().model, "LlamaModel"), (torch.nn.Linear(2, 2), "Linear")):
        with pytest.raises(
            ValueError, match=rf"model.* is a {name}, (which has no language-model head|not a transformers)"
        ):
            make_trainer(tmp_path, model=model)


def test_distributions_over_other_vocabularies_are_refused(tmp_path):
    options = {"trainer_options": {"ref_model": make_model()}}
    options["trainer_options"]["ref_model"].resize_token_embeddings(420)
    with pytest.raises(ValueError, match="the policy has 400 tokens and the reference 420"):
        make_trainer(tmp_path, loss="tdpo", **options)
    make_trainer(tmp_path, loss="dpo(beta=0.1)", **options)


def test_columns_that_would_be_computed_again_are_named(tmp_path):
    rows = make_pairs(8, ref_chosen_logps=[-1.0] * 8, ref_rejected_logps=[-1.0] * 8)
    with pytest.raises(ValueError, match=r"remove_columns\(\['ref_chosen_logps', 'ref_rejected_logps'\]\)"):
        make_trainer(tmp_path, precompute_ref_log_probs=True, train_dataset=rows)


def test_a_column_that_only_the_held_out_rows_lack_is_named_before_training(tmp_path):
    train, heldout = make_pairs(8, margin=[1.0] * 8), make_pairs(4)
    with pytest.raises(ValueError, match="needs a numeric column 'margin', which the eval set lacks"):
        make_trainer(tmp_path, loss="margin_dpo", train_dataset=train, trainer_options={"eval_dataset": heldout})
