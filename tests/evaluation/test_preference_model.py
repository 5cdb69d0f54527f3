import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefopt.evaluation.judgements import read_judgements
from prefopt.evaluation.judges.base import Contest
from prefopt.evaluation.judges.build import make_judge, parse_judge
from prefopt.evaluation.stage import judge_to_file
from prefopt.generation.samples import Sample, prompt_id
from prefopt.safety.errors import UsageError
from tests.tiny import make_config, make_tokenizer

CHAT = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "is it"},
]
CONTESTS = [
    Contest(CHAT, "the dog", "no"),
    Contest(CHAT, "the cat sat on the mat and more", "a"),
    Contest("what is", "dog", "cat"),
]
# As the model card of RLHFlow/pair-preference-model-LLaMA3-8B renders a conversation.
TURNS = (
    "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
    "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
)


def save(folder, kind, labels=None):
    torch.manual_seed(0)
    config = make_config()
    if labels is not None:
        config.num_labels = labels
    model = kind.from_config(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model.eval()


def shares(judge):
    choices = judge.compare(CONTESTS)
    assert all(choice.is_probability for choice in choices)
    return [choice.first for choice in choices]


def test_the_next_token_of_a_causal_model_is_a_or_b(tmp_path):
    model, tokenizer = save(tmp_path, AutoModelForCausalLM), make_tokenizer()
    found = shares(make_judge(parse_judge(f"preference:{tmp_path},batch_size=2,device=cpu")))
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB"]
    for contest, share in zip(CONTESTS, found, strict=True):
        chat = contest.prompt if contest.prompt is CHAT else [{"role": "user", "content": contest.prompt}]
        context = tokenizer.apply_chat_template(chat, chat_template=TURNS, tokenize=False)
        text = f"[CONTEXT] {context} [RESPONSE A] {contest.first} [RESPONSE B] {contest.second} \n"
        asked = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        if tokenizer.bos_token:
            whole = whole.replace(tokenizer.bos_token, "")
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        logits = model(ids).logits[0, -1, letters].double()
        assert share == pytest.approx(torch.softmax(logits, 0)[0].item(), abs=1e-6)
    assert len({round(share, 7) for share in found}) == 3


@pytest.mark.parametrize("labels", [1, 2])
def test_a_classifier_reads_both_answers_by_a_rubric(tmp_path, labels):
    model, tokenizer = save(tmp_path / "model", AutoModelForSequenceClassification, labels), make_tokenizer()
    (tmp_path / "rubric.txt").write_text("Q {prompt} A {first} B {second}")
    judge = make_judge(parse_judge(f"preference:{tmp_path / 'model'},rubric={tmp_path / 'rubric.txt'},device=cpu"))
    ids = torch.tensor([tokenizer("Q what is A dog B cat")["input_ids"]])
    logits = model(ids).logits[0].tolist()
    margin = logits[0] - (logits[1] if labels == 2 else 0)
    assert shares(judge)[2] == pytest.approx(1 / (1 + math.exp(-margin)), abs=1e-6)


def test_both_orders_are_asked_and_their_probabilities_stored(tmp_path):
    save(tmp_path / "model", AutoModelForCausalLM)
    judge = make_judge(parse_judge(f"preference:{tmp_path / 'model'},device=cpu"))
    samples = [Sample(prompt_id("what"), "what", i, text, 1, True) for i, text in enumerate(("dog", "a cat"))]
    judge_to_file(samples, [judge], tmp_path / "j.jsonl")
    lines = list(read_judgements(tmp_path / "j.jsonl"))
    assert [one.indices for one in lines] == [(0, 1), (1, 0)]
    one, other = (
        choice.first for choice in judge.compare([Contest("what", "dog", "a cat"), Contest("what", "a cat", "dog")])
    )
    assert [line.probability for line in lines] == pytest.approx([one, other], abs=1e-6)


def test_what_cannot_be_a_model_of_preferences_is_refused(tmp_path):
    save(tmp_path / "model", AutoModelForSequenceClassification, 3)
    with pytest.raises(UsageError, match="has 3 outputs; a classifier of two answers has two"):
        make_judge(parse_judge(f"preference:{tmp_path / 'model'}"))
    (tmp_path / "rubric.txt").write_text("{completion}")
    with pytest.raises(UsageError, match=r"must have \{first\} and \{second\}"):
        make_judge(parse_judge(f"preference:{tmp_path / 'model'},rubric={tmp_path / 'rubric.txt'}"))
