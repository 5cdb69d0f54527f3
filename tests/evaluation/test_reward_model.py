import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prefopt.evaluation.judges.base import Candidate
from prefopt.evaluation.judges.build import make_judge, parse_judge
from prefopt.safety.errors import UsageError
from tests.tiny import make_config, make_tokenizer


def save(folder, labels):
    torch.manual_seed(0)
    config = make_config()
    config.num_labels = labels
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model.eval()


def test_scores_are_the_logits_of_each_text_alone(tmp_path):
    model, tokenizer = save(tmp_path, 1), make_tokenizer()
    judge = make_judge(parse_judge(f"reward:{tmp_path},batch_size=2,device=cpu"))
    chat = [{"role": "user", "content": "what is it"}]
    completions = ["a", "the cat sat on the mat and more", "dog"]
    scores = [one.score for one in judge.score([Candidate(chat, text) for text in completions])]
    for text, score in zip(completions, scores, strict=True):
        whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": text}], tokenize=False)
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert len(set(scores)) == 3
    joined = torch.tensor([tokenizer("what is it")["input_ids"]])
    (plain,) = judge.score([Candidate("what is", " it")])
    assert plain.score == pytest.approx(model(joined).logits.item(), abs=1e-5)


def test_a_classifier_with_more_outputs_is_refused(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(UsageError, match="has 3 outputs; a reward model has one"):
        make_judge(parse_judge(f"reward:{tmp_path}"))
