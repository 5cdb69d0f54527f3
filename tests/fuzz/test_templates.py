"""Chat templates of every kind: rendered in the sandbox and within a time limit, or refused with a reason."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data import DataError, validate
from prefopt.data.templates import check_template
from tests.fuzz.hostile import examples, no_hang
from tests.fuzz.training import train_on
from tests.tiny import CHATML, make_tokenizer

CONVERSATIONS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"Why {i}?"}],
            "chosen": [{"role": "assistant", "content": "So."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for i in range(2)
    ]
)

ESCAPES = (
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append(messages) }}",
    "{{ ''|attr('__class__') }}",
    "{{ '%s'.__mod__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
)

FRAGMENTS = (
    "{% for message in messages %}", "{% endfor %}", "{{ message['content'] }}", "{{ message.role }}", "{% if %}",
    "{{ messages[0]['content'] }}", "{{ messages[-1].content }}", "{{ bos_token }}", "{% endif %}", "{{", "}}", "{%",
    "{% if add_generation_prompt %}A{% endif %}", "{{ raise_exception('no') }}", "{{ messages | tojson }}", "{# #}",
    "{% set x = namespace(a=1) %}", "{{ 1 / 0 }}", "{{ range(10**9) }}", "{{ nothing.at.all }}", "{% include 'x' %}",
    "{% generation %}", "{% endgeneration %}", "text", "\n", "\0", "{{ 'x' * 5000 }}", "{{ messages|length }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% break %}",
    "{{ messages | map(attribute='content') | join }}", *ESCAPES,
)  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join) | st.text(max_size=30))
@examples(5)
def test_any_template_is_rendered_or_refused(template):
    tokenizer = make_tokenizer(template)
    with no_hang():
        try:
            check_template(tokenizer)
            report = validate(CONVERSATIONS, tokenizer=tokenizer, max_length=400)
        except DataError as error:
            message = str(error)
            assert "template" in message
            return
        if report.ok:
            train_on(CONVERSATIONS, 400, tokenizer=tokenizer)


@pytest.mark.parametrize("template", ESCAPES)
def test_the_sandbox_holds(template):
    """Nothing of Python's own comes out of a template: it is stopped, or what it asks for is not there."""
    tokenizer = make_tokenizer(CHATML + template)
    try:
        text = tokenizer.apply_chat_template(CONVERSATIONS[0]["prompt"], tokenize=False)
    except Exception as error:
        message = str(error)
        assert any(word in message for word in ("unsafe", "undefined", "no attribute"))
    else:
        assert text == make_tokenizer(CHATML).apply_chat_template(CONVERSATIONS[0]["prompt"], tokenize=False)


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr("prefopt.data.templates.SECONDS", 1.0)
    loops = "".join(f"{{% for {name} in range(90000) %}}" for name in "ijk") + "{% endfor %}" * 3
    tokenizer = make_tokenizer(loops + CHATML)
    with no_hang(), pytest.raises(DataError, match=r"not done with one conversation after 1 seconds"):
        check_template(tokenizer)
    with no_hang(), pytest.raises(DataError, match="it may never end"):
        validate(CONVERSATIONS, tokenizer=tokenizer, max_length=400)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% for %}", "line 7: not valid Jinja"),
        ("{{ ''.__class__.__mro__ }}", "the sandbox stopped it"),
        ("{{ range(10 ** 9) }}", "it failed: Range too big"),
    ],
)
def test_a_broken_template_is_told_once_and_not_row_by_row(template, message):
    tokenizer = make_tokenizer(CHATML + template)
    with pytest.raises(DataError, match=message):
        check_template(tokenizer)


def test_a_template_that_says_the_same_to_everything_has_nothing_to_teach():
    report = validate(CONVERSATIONS, tokenizer=make_tokenizer("Hello"), max_length=400)
    assert report.counts()["no tokens"] == 2
    report = validate(CONVERSATIONS, tokenizer=make_tokenizer("{{ messages | length }}"), max_length=400)
    assert report.counts()["same tokens"] == 2
