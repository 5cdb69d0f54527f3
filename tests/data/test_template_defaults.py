"""Chat-template arguments for a whole run: on every road, and a row's own win."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from prefopt.data import DataError
from prefopt.data.template_defaults import set_template_defaults
from prefopt.recipe import main
from tests.recipe.test_recipe import arguments
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_pairs, make_trainer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is defined and not enable_thinking %}<off>"
    "{% endif %}{% endif %}"
)
CHAT = [{"role": "user", "content": "Hi"}]


def tokenizer():
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def shown(made, **own) -> str:
    return str(made.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, **own))


def test_they_hold_where_a_call_gives_none():
    made = tokenizer()
    assert "<off>" not in shown(made)
    set_template_defaults(made, {"enable_thinking": False})
    set_template_defaults(made, {"enable_thinking": False})
    assert shown(made).endswith("<off>")
    assert "<off>" not in shown(made, enable_thinking=True)


@pytest.mark.parametrize("value", ['it\'s "so"', 3, 0.5, True, None, ["a", "b"], {"x": [1, {"y": "z"}]}])
def test_any_value_of_json_reaches_the_template(value):
    made = make_tokenizer()
    made.chat_template = "{{ wish | tojson }}"
    set_template_defaults(made, {"wish": value})
    assert json.loads(shown(made)) == value


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "no name"])
def test_what_the_template_does_not_read_is_refused(name):
    with pytest.raises(DataError, match="has no effect"):
        set_template_defaults(tokenizer(), {name: True})


def rows(**columns):
    return make_pairs(12, **columns)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_python_api_takes_them(tmp_path, streaming):
    data = rows(chat_template_kwargs=[{"enable_thinking": i == 0} if i < 2 else None for i in range(12)])
    data = data.to_iterable_dataset() if streaming else data
    made = make_trainer(
        tmp_path, loss="dpo", train_dataset=data, chat_template_kwargs={"enable_thinking": False}, max_steps=1,
        trainer=_with_template,
    )  # fmt: skip
    texts = [made.processing_class.decode(row["prompt_ids"]) for row in made.train_dataset]
    assert [text.endswith("<off>") for text in texts] == [False] + [True] * 11


def _with_template(**options):
    from prefopt import PreferenceTrainer

    options["processing_class"].chat_template = TEMPLATE
    return PreferenceTrainer(**options)


def test_a_recipe_takes_them_and_saves_them(tmp_path, capsys):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(dict(row)) for row in rows()))
    words = [*arguments(tmp_path, str(tmp_path / "pairs.jsonl")), "--chat_template", str(tmp_path / "t.jinja"),
             "--chat_template_kwargs", '{"enable_thinking": false}', "--eval_rows", "0"]  # fmt: skip
    main("dpo", [*words, "--dry_run"])
    assert "<off>" in capsys.readouterr().out.replace("\n", "")
    main("dpo", words)
    assert shown(AutoTokenizer.from_pretrained(tmp_path / "out")).endswith("<off>")
    with pytest.raises(DataError, match="'enable_thinkin' has no effect"):
        main("dpo", [*words, "--chat_template_kwargs", '{"enable_thinkin": false}', "--dry_run"])
