"""Embeddings by an encoder: the mean of its last states over real tokens, computed once, kept on disk."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, BertConfig, BertModel

from prefopt.data import DataError
from prefopt.data.embed import COLUMNS, Encoder, embed, find_encoder, plain_text
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_labelled, make_pairs

TEXTS = ["the quick brown fox", "fox", "over the lazy dog the bridge carries load", "Paris"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random encoder of the sentence-transformers layout, its pooling a mean."""
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    pooling(path, mean=True)
    return path


def pooling(path, **modes: bool) -> None:
    (path / "1_Pooling").mkdir(exist_ok=True)
    names = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token", "most": "pooling_mode_max_tokens"}
    (path / "1_Pooling" / "config.json").write_text(json.dumps({names[mode]: on for mode, on in modes.items()}))


def test_equals_the_mean_over_each_text_alone(folder, tmp_path):
    vectors = Encoder(str(folder), tmp_path)(TEXTS)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), make_tokenizer()
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(vector, torch.nn.functional.normalize(states.mean(0), dim=-1), rtol=1e-4, atol=1e-5)


def test_texts_are_computed_once_and_a_damaged_file_costs_no_more_than_what_it_held(folder, tmp_path):
    first = Encoder(str(folder), tmp_path)
    vectors = first([*TEXTS, TEXTS[0]])
    assert first.computed == 4
    again = Encoder(str(folder), tmp_path)
    assert torch.equal(again([*TEXTS, TEXTS[0]]), vectors)
    assert again.computed == 0
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    damaged = Encoder(str(folder), tmp_path)
    assert torch.equal(damaged(TEXTS), vectors[:4])
    assert damaged.computed == 4


def test_another_encoder_does_not_find_the_vectors_of_the_first(folder, tmp_path):
    Encoder(str(folder), tmp_path / "cache")(TEXTS)
    other = tmp_path / "other"
    torch.manual_seed(1)
    model = AutoModel.from_pretrained(folder)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    encoder = Encoder(str(other), tmp_path / "cache")
    encoder(TEXTS)
    assert encoder.computed == 4


def test_pairs_get_three_columns_and_other_rows_are_refused(folder, tmp_path):
    encoder = Encoder(str(folder), tmp_path)
    pairs = make_pairs(5)
    made = embed(pairs, encoder)
    assert set(COLUMNS.values()) <= set(made.column_names)
    expected = encoder([pairs[2]["rejected"][0]["content"]])[0]
    torch.testing.assert_close(torch.tensor(made[2]["rejected_embedding"]), expected)
    with pytest.raises(DataError, match="the data has a column 'chosen_embedding' already"):
        embed(made, encoder)
    with pytest.raises(DataError, match="these rows are single ones"):
        embed(make_labelled(5), encoder)


def test_messages_are_read_as_their_contents():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"content": "b"}]
    assert plain_text(messages) == "a\n\nb"
    assert plain_text("as it is") == "as it is"


def test_what_is_no_encoder_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"has no config\.json or no safetensors weights"):
        find_encoder(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="is no folder here and cannot be had from the Hub"):
        find_encoder("nobody/nothing")
    copy = tmp_path / "copy"
    AutoModel.from_pretrained(folder).save_pretrained(copy)
    pooling(copy, most=True)
    with pytest.raises(DataError, match="pools by pooling_mode_max_tokens"):
        Encoder(str(copy), tmp_path)


def test_vectors_reach_training(folder, tmp_path):
    from tests.trainer.runs import make_trainer

    data = embed(make_pairs(8), Encoder(str(folder), tmp_path / "cache"))
    assert isinstance(data, Dataset)
    loss = "kernel_dpo(divergence='js', embeddings='given')"
    trainer = make_trainer(tmp_path, loss=loss, train_dataset=data, max_steps=2)
    trainer.train()
    margins = [entry["kernel/margins"] for entry in trainer.state.log_history if "kernel/margins" in entry]
    assert len(margins) == 2
    assert all(margin != 0 for margin in margins)
    with pytest.raises(ValueError, match=r"the data lacks chosen_embedding, prompt_embedding, rejected_embedding"):
        make_trainer(tmp_path, loss=loss, train_dataset=make_pairs(8))
