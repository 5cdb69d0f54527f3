"""Attacks on tiny models: what they do to a model, what they ask, and what their numbers are taken to show."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from prefopt.models.load import load_model
from prefopt.safety.errors import UsageError
from prefopt.unlearning.audit import Quantization, Relearning, Wording, nf4_values, rounded_to_nf4
from prefopt.unlearning.audit.quantization import bitsandbytes_runs, round_weights
from prefopt.unlearning.audit.relearning import split_rows
from prefopt.unlearning.audit.report import attack_summary, summary, table_of
from prefopt.unlearning.audit.wording import ANY, FORMS, NO_TEMPLATE, PARAPHRASED
from prefopt.unlearning.data import Question
from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import save_model

pytest.importorskip("rouge_score")

QUESTIONS = tuple(
    Question(f"Who likes the {thing}?", f"The {who} likes the {thing}.", rephrased=f"The {thing}: who likes it?")
    for who, thing in (("fox", "dog"), ("dog", "fox"), ("quick fox", "bridge"), ("lazy dog", "load"))
)
TEXTS = (Question("", "The quick brown fox jumps."), Question("", "A bridge carries the load."))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny model: the trainer takes no model that was never saved."""
    return save_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(folder):
    return load_model(folder, {"dtype": "float32"}).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# ---- 4-bit weights -----------------------------------------------------------------------------------------------

# QLoRA (arXiv 2305.14314) lists these.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_values_are_those_of_the_paper():
    assert nf4_values().tolist() == pytest.approx(NF4, abs=2e-7)


def test_weights_get_the_nearest_value_of_their_block():
    weight = torch.randn(10, 13, generator=torch.Generator().manual_seed(0))
    rounded = rounded_to_nf4(weight)
    values = np.array(NF4)
    flat = weight.flatten().numpy()
    for at in range(0, len(flat), 64):
        block = flat[at : at + 64]
        scale = np.abs(block).max()
        nearest = values[np.abs(block[:, None] / scale - values).argmin(1)] * scale
        assert rounded.flatten()[at : at + 64].numpy() == pytest.approx(nearest, abs=1e-6)
    assert rounded_to_nf4(rounded).numpy() == pytest.approx(rounded.numpy(), abs=1e-6)
    assert not rounded_to_nf4(torch.zeros(3, 5)).any()


@pytest.mark.skipif(not bitsandbytes_runs(torch.device("cpu")), reason="bitsandbytes does not run here")
def test_the_simulation_rounds_as_bitsandbytes_does(model):
    simulated = copy.deepcopy(model)
    round_weights(simulated, rounded_to_nf4)
    Quantization(QUESTIONS, bitsandbytes=True)(model, make_tokenizer())
    for one, other in zip(model.parameters(), simulated.parameters(), strict=True):
        assert one.detach().numpy() == pytest.approx(other.detach().numpy(), abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_linear_layers_are_rounded_and_the_others_are_not(architecture):
    model = make_model(architecture)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    round_weights(model, rounded_to_nf4)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    parts = ("_proj", "c_attn", "c_fc")
    assert changed == {name for name in before if any(part in name for part in parts) and name.endswith("weight")}
    if architecture == "gpt2":  # its matrices are transposed: blocks run along the inputs
        name = next(name for name in before if name.endswith("c_attn.weight"))
        assert torch.equal(dict(model.named_parameters())[name], rounded_to_nf4(before[name].T.contiguous()).T)


# ---- relearning --------------------------------------------------------------------------------------------------


def test_rows_are_learned_or_asked_never_both():
    learned, asked = split_rows(QUESTIONS, 0.25, seed=3)
    assert len(learned) == 1
    assert set(learned).isdisjoint(asked)
    assert set(learned) | set(asked) == set(QUESTIONS)
    assert split_rows(QUESTIONS, 0.25, seed=3) == (learned, asked)
    assert len({split_rows(QUESTIONS, 0.25, seed)[0] for seed in range(20)}) == 4


@pytest.mark.parametrize(
    ("rows", "share", "words"),
    [(2, 0.5, "2 forgotten rows are too few to relearn 1"), (4, 1.0, r"must be in \(0, 1\), got 1.0")],
)
def test_too_few_rows_to_relearn(rows, share, words):
    with pytest.raises(UsageError, match=words):
        split_rows(QUESTIONS[:rows], share, 0)


def test_relearning_brings_back_what_the_rows_share(folder, model, tokenizer):
    attack = Relearning(QUESTIONS[:2], QUESTIONS[2:], steps=6, learning_rate=1e-2)
    values = attack(model, tokenizer)
    assert list(values) == ["after 0 steps", "after 1 step", "after 2 steps", "after 4 steps", "after 6 steps"]
    assert attack.headline in values
    means = [np.mean(of["probability"]) for of in values.values()]
    assert means[0] == pytest.approx(1 / len(tokenizer), rel=0.5)  # nothing is known at first
    assert means[-1] > 3 * means[0]
    assert attack(load_model(folder, {"dtype": "float32"}), tokenizer) == values  # the same seed


def test_plain_texts_are_relearned_by_their_probability(model, tokenizer):
    values = Relearning(TEXTS[:1], TEXTS, steps=1, learning_rate=1e-2, max_length=4)(model, tokenizer)
    assert [list(of) for of in values.values()] == [["probability"], ["probability"]]


# ---- other words and forms ---------------------------------------------------------------------------------------


def test_every_form_is_asked_and_the_best_counts(model, tokenizer):
    template = tokenizer.chat_template
    values = Wording(QUESTIONS)(model, tokenizer)
    assert list(values) == [PARAPHRASED, NO_TEMPLATE, *FORMS, ANY]
    assert tokenizer.chat_template == template
    forms = [of["probability"] for name, of in values.items() if name != ANY]
    assert len({tuple(of) for of in forms}) == len(forms)  # the forms differ
    assert values[ANY]["probability"] == np.max(forms, axis=0).tolist()


def test_what_cannot_be_asked_is_left_out(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    attack = Wording((*QUESTIONS, Question("Who?", "The fox.")))
    assert attack.lacking == "row 4 (from 0) of the forget set has no paraphrased_question: only other forms are asked"
    assert list(attack(model, bare)) == [*FORMS, ANY]
    with pytest.raises(UsageError, match="the forget set holds plain texts"):
        Wording(TEXTS)


# ---- numbers and findings ----------------------------------------------------------------------------------------


def test_the_difference_is_paired_by_question():
    base = np.array([0.1, 0.5, 0.9, 0.3, 0.2, 0.8])
    found = summary({"unlearned": base + 0.05, "gold": base})
    assert found["unlearned"]["low"] < found["gold"]["value"]  # far apart questions, wide intervals
    assert found["difference"] == pytest.approx({"value": 0.05, "low": 0.05, "high": 0.05})
    assert found["verdict"] == "more"
    assert summary({"unlearned": base, "gold": base + 0.05})["verdict"] == "less"
    assert summary({"unlearned": base, "gold": base[::-1]})["verdict"] == "same"
    assert "verdict" not in summary({"unlearned": base})
    # Of four questions, all differ the same way by chance once in eight times.
    assert summary({"unlearned": base[:4] + 0.05, "gold": base[:4]})["verdict"] == "same"


def test_one_measure_that_leaks_is_enough():
    attack = Quantization(QUESTIONS, bitsandbytes=False)
    gold, more, less = [0.2, 0.3, 0.4] * 2, [0.3, 0.4, 0.5] * 2, [0.0, 0.1, 0.2] * 2
    values = {
        "unlearned": {attack.headline: {"probability": more, "rouge": less}},
        "gold": {attack.headline: {"probability": gold, "rouge": gold}},
    }
    finding = attack_summary(attack, values)["finding"]
    assert finding["verdict"] == "more"
    assert finding["words"].startswith(
        "leaks more than the gold model. With 4-bit weights: probability 0.40, gold 0.30"
    )
    values["unlearned"][attack.headline]["probability"] = gold
    assert attack_summary(attack, values)["finding"]["verdict"] == "less"
    alone = attack_summary(attack, {"unlearned": values["unlearned"]})["finding"]
    assert alone["verdict"] is None
    assert "without a gold model" in alone["words"]


def test_the_table_says_that_4_bit_weights_are_simulated():
    attack = Quantization(QUESTIONS, bitsandbytes=False)
    values = {"unlearned": {attack.headline: {"probability": [0.1, 0.2]}}}
    section = attack_summary(attack, values)
    audit = {"questions": 2, "numbers": {}, "plain": section, "attacks": {"quantization": section}}
    shown = table_of({**audit, "settings": {"quantization": {"bitsandbytes": False}}})
    assert "without bitsandbytes" in str(shown.caption)
    assert "4-bit weights (simulated)" in [str(cell) for cell in shown.columns[0].cells]
    assert "bitsandbytes" not in str(table_of({**audit, "settings": {}}).caption)
