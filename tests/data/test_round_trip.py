"""What is scored is what the row says: tokens read back, boundaries that are off by one found, nothing invented."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefopt.data import tokenize_row, validate
from prefopt.data.problems import KINDS
from prefopt.data.round_trip import round_trip
from prefopt.data.tokenize import tokens_of
from tests.data.test_validate import Rows
from tests.tiny import CHATML, THINKING, make_tokenizer

SHIPPED = Path(trl.__file__).parent / "chat_templates"
SIDES = ("chosen", "rejected")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def pair(prompt: list[Any], chosen: Any, rejected: Any = "I do not know.", **columns: Any) -> dict[str, Any]:
    sides = {"chosen": chosen, "rejected": rejected}
    written = {name: [answer(side)] if isinstance(side, str) else side for name, side in sides.items()}
    return {"prompt": prompt, **written, **columns}


def shipped(name: str) -> Any:
    return make_tokenizer((SHIPPED / f"{name}.jinja").read_text())


def found(row: dict[str, Any], tokenizer: Any) -> dict[str, int]:
    return validate(Rows([row]), tokenizer=tokenizer).counts()


def read(row: dict[str, Any], tokenizer: Any, name: str = "chosen") -> str:
    return str(tokenizer.decode(tokenize_row(row, tokenizer)[f"{name}_ids"]))


THOUGHT = pair([user("What is 6 times 7?")], "<think>\n6*7 = 42.\n</think>\n\n42", "<think>\nNo.\n</think>\n\n40")
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {}}}]


def calls(arguments: Any) -> list[Any]:
    function = {"name": "weather", "arguments": arguments}
    return [answer("", tool_calls=[{"id": "call00001", "type": "function", "function": function}])]


# ---- the completion's own text ------------------------------------------------------------------------------------


def test_a_thought_that_the_template_drops_is_an_error_with_both_texts() -> None:
    report = validate(Rows([THOUGHT]), tokenizer=shipped("deepseek_r1_distill"))
    (problem,) = report.problems
    assert (problem.kind, problem.rows, report.ok) == ("completion is not scored", [0], False)
    assert "6*7 = 42" in problem.explanation
    assert "scored tokens '\\n\\n42<" in problem.explanation
    assert "scored correctly" not in report.message()
    kept = shipped("deepseek_r1_distill_training")
    assert validate(Rows([THOUGHT]), tokenizer=kept).ok
    assert "6*7 = 42.\n</think>\n\n42" in read(THOUGHT, kept)


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_in_a_field_that_the_template_does_not_know_is_an_error(field: str) -> None:
    row = pair([user("What is 6 times 7?")], [answer("42", **{field: "Six sevens."})])
    assert found(row, make_tokenizer()) == {"completion is not scored": 1}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "nemotron_3_nano"])
def test_thoughts_that_templates_move_are_found(name: str) -> None:
    row = pair([user("What is 6 times 7?")], [answer("42", reasoning_content="Six sevens.")])
    assert "Six sevens." in read(row, shipped(name))
    for sound in (row, THOUGHT):
        assert validate(Rows([sound]), tokenizer=shipped(name)).ok


def test_a_thought_of_an_earlier_turn_is_only_worth_knowing() -> None:
    talk = [user("What is 6 times 7?"), answer("<think>\nHm.\n</think>\n\n42"), user("And 7 times 7?")]
    report = validate(Rows([pair(talk, "49")]), tokenizer=shipped("qwen3"))
    assert report.counts() == {"earlier thought is left out": 1}
    assert KINDS["earlier thought is left out"].severity == "info"


def test_a_thought_behind_an_empty_one_of_the_generation_prompt_is_named() -> None:
    row = pair([user("What is 6 times 7?")], [answer("42", reasoning_content="Six sevens.")])
    assert found(row, shipped("qwen3_5_nothink")) == {"generation prompt does not fit": 1}


OPENING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")


def test_an_answer_without_a_thought_behind_an_opened_one_is_named() -> None:
    tokenizer = make_tokenizer(OPENING)
    row = pair([user("What is 6 times 7?")], "42", THOUGHT["rejected"])
    assert found(row, tokenizer) == {"generation prompt does not fit": 1}
    assert found(THOUGHT, tokenizer) == {}
    assert read(THOUGHT, tokenizer) == "6*7 = 42.\n</think>\n\n42<|im_end|>\n"


def test_a_thought_behind_an_opened_one_is_found_by_tokenizers_that_change_texts() -> None:
    tokenizer = make_tokenizer(OPENING)
    tokenizer._tokenizer.normalizer = normalizers.Lowercase()
    row = pair([user("What is it?")], "<think>\nLet ME see.\n</think>\n\nSO", "<think>\nHm.\n</think>\n\nNo")
    assert found(row, tokenizer) == {}


def test_calls_that_the_template_drops_are_an_error() -> None:
    row = pair([user("Weather?")], calls({"city": "Paris"}), tools=TOOLS)
    assert found(row, shipped("llama3_training")) == {"completion is not scored": 1, "tools are not in the context": 1}
    assert found(pair([user("Weather?")], calls({"city": "Paris"})), make_tokenizer()) == {}
    talking = [{**calls({"city": "Paris"})[0], "content": "Let me look."}]
    assert found(pair([user("Weather?")], talking, tools=TOOLS), shipped("llama3_1")) == {
        "completion is not scored": 1
    }


@pytest.mark.parametrize("name", ["llama3_1", "qwen3", "gptoss", "nemotron_3_nano", "deepseekv3", "glm4moe"])
def test_arguments_are_given_in_the_form_that_the_template_prints(name: str) -> None:
    tokenizer, read_calls = shipped(name), []
    for arguments in ({"city": "Paris", "days": 3}, '{"city": "Paris", "days": 3}'):
        row = pair([user("Weather?")], calls(arguments), tools=TOOLS)
        read_calls.append(read(row, tokenizer))
        assert validate(Rows([row]), tokenizer=tokenizer).ok
    assert read_calls[0] == read_calls[1]
    assert '\\"city\\"' not in read_calls[0]


def test_nulls_and_empty_lists_are_not_printed() -> None:
    bare = pair([user("Weather?")], calls({"city": "Paris"}), "Sunny.", tools=TOOLS)
    filled = pair(
        [{**user("Weather?"), "tool_calls": None}],
        [{**calls({"city": "Paris", "unit": None})[0], "content": None}],
        [answer("Sunny.", tool_calls=[])],
        tools=[{**TOOLS[0], "strict": None}],
    )
    for name in ("qwen3", "llama3_1", "gptoss", "deepseekv3"):
        assert tokenize_row(filled, shipped(name)) == tokenize_row(bare, shipped(name))
        assert validate(Rows([filled]), tokenizer=shipped(name)).ok
    empty = pair([user("Weather?")], "Sunny.", tools=[])
    without = {name: value for name, value in empty.items() if name != "tools"}
    assert tokenize_row(empty, shipped("llama3_1")) == tokenize_row(without, shipped("llama3_1"))


@pytest.mark.parametrize("name", ["idefics3", "llama3_1", "qwen3", "gemma3"])
def test_lists_of_texts_and_texts_are_the_same(name: str) -> None:
    def part(text: str) -> list[Any]:
        return [{"type": "text", "text": text}]

    plain = pair([user("How many?")], "Eight.", "Six.")
    listed = pair([user(part("How many?"))], [answer(part("Eight."))], [answer(part("Six."))])
    tokenizer = shipped(name)
    assert tokenize_row(plain, tokenizer) == tokenize_row(listed, tokenizer)
    assert found(plain, tokenizer) == found(listed, tokenizer) == {}


# ---- the prompt ---------------------------------------------------------------------------------------------------

SYSTEM_LAST = """{%- if messages[0].role == 'system' %}\
{% set sys = messages[0].content %}{% set rest = messages[1:] %}\
{% else %}{% set rest = messages %}{% endif -%}{%- for m in rest -%}{%- if m.role == 'user' -%}\
[INST] {% if loop.last and sys is defined %}{{ sys }}\n\n{% endif %}{{ m.content }}[/INST]\
{%- else %} {{ m.content }}{{ eos_token }}{%- endif -%}{%- endfor -%}"""


def test_a_system_message_that_stands_with_the_last_message_only() -> None:
    row = pair([system("Answer in one word."), user("Capital of France?")], "Paris", "Rome")
    ids = tokenize_row(row, tokenizer := make_tokenizer(SYSTEM_LAST))
    assert tokenizer.decode(ids["prompt_ids"]) == "[INST] Answer in one word.\n\nCapital of France?[/INST]"
    assert tokenizer.decode(ids["chosen_ids"]) == " Paris<|im_end|>"
    assert found(row, tokenizer) == {"prompt is not a token prefix": 1}


def test_a_template_that_prints_the_prompt_behind_the_answer_is_refused() -> None:
    again = CHATML.replace(
        "{%- if add_generation_prompt %}", "{% if messages[-1].role == 'assistant' %}On {{ messages[0].content }}"
        "<|im_end|>{% endif %}{%- if add_generation_prompt %}",
    )  # fmt: skip
    row = pair([user("Capital of France?")], "Paris", "Rome")
    assert found(row, make_tokenizer(again)) == {"prompt is scored": 1}
    assert found(pair([user("im")], "assistant", "user"), make_tokenizer()) == {}


def test_a_system_message_that_the_template_drops_is_an_error() -> None:
    dropping = CHATML.replace(
        "{%- for message in messages %}", "{%- for message in messages if message.role != 'system' %}"
    )
    row = pair([system("Answer in one word."), user("Capital of France?")], "Paris")
    report = validate(Rows([row]), tokenizer=make_tokenizer(dropping))
    assert report.counts() == {"prompt is not in the context": 1}
    assert "'Answer in one word.'" in report.message()


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("printed", "problems"),
    [
        ("{{ message.content }}", {"prompt is not in the context": 1}),  # the literal of a list
        ("{{ message.content if message.content is string else '' }}", {"prompt is not in the context": 1}),
        ("{% for part in message.content %}{{ part.text }}{% endfor %}", {"prompt is not in the context": 1}),
        ("{% for part in message.content %}{{ part.text or '<image>' }}{% endfor %}", {}),
    ],
)
def test_an_image_that_a_template_of_texts_drops_is_an_error(printed: str, problems: dict[str, int]) -> None:
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}User: "
        + printed
        + "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    row = pair([user([IMAGE, {"type": "text", "text": "What is this?"}])], "A cat.", "A dog.")
    assert found(row, make_tokenizer(template)) == problems


def test_a_message_printed_twice_is_named() -> None:
    twice = CHATML.replace(
        "{%- if add_generation_prompt %}", "{{ messages[0].content }}{%- if add_generation_prompt %}"
    )
    row = pair([system("Answer in one word."), user("Capital of France?")], "Paris")
    assert "prompt text twice" in found(row, make_tokenizer(twice))
    quoted = pair([system("Answer in one word."), user("Why must I 'Answer in one word.'?")], "Paris")
    assert found(quoted, make_tokenizer()) == {}


def test_a_tools_answer_that_is_closed_otherwise_once_an_answer_follows() -> None:
    closing = CHATML.replace(
        "<|im_end|>\n{% endfor %}",
        "{{ '\\n' if message.role == 'tool' and not loop.last }}<|im_end|>\n{% endfor %}",
    )
    result = {"role": "tool", "name": "weather", "content": "12 degrees"}
    row = pair([user("Weather?"), *calls({"city": "Paris"}), result], "Mild.", "Hot.")
    assert read(row, tokenizer := make_tokenizer(closing)) == "Mild.<|im_end|>\n"
    assert found(row, tokenizer) == {"prompt is not a token prefix": 1}


@pytest.mark.parametrize("text", ["/no_think", "You are a pirate. /no_think", "/no_think\nYou are a pirate."])
def test_switches_that_the_template_takes_out_of_a_message_are_no_alarm(text: str) -> None:
    switching = CHATML.replace(
        "{{ message['content'] if message['content'] is string else '' }}",
        "{{ message['content'].replace('/no_think', '') if message['role'] == 'system' else message['content'] }}",
    )
    assert found(pair([system(text), user("Who?")], "Me.", "You."), make_tokenizer(switching)) == {}
    dropping = switching.replace("for message in messages", "for message in messages if message.role != 'system'")
    kept = found(pair([system(text), user("Who?")], "Me.", "You."), make_tokenizer(dropping))
    assert kept == ({} if text == "/no_think" else {"prompt is not in the context": 1})


# ---- beginnings and ends ------------------------------------------------------------------------------------------


def beginning() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    template = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer._tokenizer.post_processor = template
    return tokenizer


def test_text_rendered_before_begins_once() -> None:
    tokenizer = beginning()
    row = {"prompt": "<s>[INST] How many legs? [/INST]", "chosen": " Eight.</s>", "rejected": " Six.</s>"}
    ids = tokenize_row(row, tokenizer)
    assert tokenizer.decode(ids["prompt_ids"]) == row["prompt"]
    assert tokenizer.decode(ids["chosen_ids"]) == " Eight.</s>"
    assert found(row, tokenizer) == {}
    bare = {**row, "prompt": row["prompt"].removeprefix("<s>")}
    assert tokenize_row(bare, tokenizer) == ids
    assert found({**row, "prompt": "<s>" + row["prompt"]}, tokenizer) == {"second beginning of text": 1}
    assert found({**row, "chosen": "<s> Eight."}, tokenizer) == {"second beginning of text": 1}
    assert found(pair([user("How many legs?")], "Eight."), tokenizer) == {"no beginning of text": 1}


def lossy() -> Any:
    """Words of letters that it knows, and one token for all others."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[END]": 1, "how": 2, "so": 3, "no": 4, "user": 5}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[END]", unk_token="[UNK]")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|> \n\n"])
def test_text_rendered_before_ends_once(end: str) -> None:
    tokenizer = make_tokenizer()
    prompt = "<|im_start|>user\nHow many legs?<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": prompt, "chosen": f"Eight.{end}", "rejected": f"Six.{end}"}
    assert read(row, tokenizer) == f"Eight.{end}"
    report = validate(Rows([row]), tokenizer=tokenizer)
    assert (report.counts(), report.notes) == ({}, [])
    assert found({**row, "chosen": "Eight.<|im_end|><|im_end|>"}, tokenizer) == {"second end of turn": 1}


def test_text_that_ends_as_the_template_ends_answers_gets_no_other_end() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    row = {"prompt": "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n", "chosen": "So.<|im_end|>\n"}
    assert read({**row, "rejected": "No."}, tokenizer) == "So.<|im_end|>\n"
    assert read({**row, "rejected": "No."}, tokenizer, "rejected") == "No.<|endoftext|>"


def test_messages_that_were_rendered_before_are_named() -> None:
    row = pair([user("How many legs?")], "Eight.<|im_end|>", "Six.")
    assert found(row, make_tokenizer()) == {"second end of turn": 1, "control token inside a text": 1}


def test_a_template_that_does_not_end_answers_is_named() -> None:
    open_ended = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    open_ended += "{% if add_generation_prompt %}\nassistant: {% endif %}"
    report = validate(Rows([pair([user("How many?")], "Eight.")]), tokenizer=make_tokenizer(open_ended))
    assert report.counts() == {"no end of turn": 1}
    assert report.ok


def test_a_template_that_begins_another_answer_behind_each_is_named() -> None:
    always = CHATML.replace(
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "{{ '<|im_start|>assistant\\n' }}"
    )
    tokenizer = make_tokenizer(always)
    row = pair([user("How many?")], "Eight.")
    assert read(row, tokenizer) == "Eight.<|im_end|>\n<|im_start|>assistant\n"
    assert found(row, tokenizer) == {"another answer begins": 1}
    # A mark that stands in front of each message begins no answer, and answers may hold the words that do.
    bare = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    assert found(row, make_tokenizer(bare)) == {}
    assert "another answer begins" not in found(pair([user("Say it")], "x<|im_start|>assistant\n"), make_tokenizer())


def test_unknown_characters_at_the_end_are_no_end_tokens() -> None:
    tokenizer = lossy()
    row = pair([user("how")], "so ☃☃", "no ☃")
    assert tokenizer.unk_token_id in tokenize_row(row, tokenizer)["chosen_ids"]
    assert found(row, tokenizer) == {}
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.thinking %}{{ m.thinking + eos_token }}{% endif %}"
        "{{ ' user ' if m.role == 'assistant' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    assert found(pair([user("how")], [answer("☃", thinking="so")], "no"), tokenizer) == {}


def test_plain_text_beside_a_chat_template_gets_one_line() -> None:
    row = {"prompt": "How many legs?", "chosen": " Eight.", "rejected": " Six."}
    report = validate(Rows([row, {**row, "prompt": "Why?"}]), tokenizer=make_tokenizer())
    assert report.counts() == {}
    (note,) = report.notes
    assert "chat template is not applied" in note
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert validate(Rows([row]), tokenizer=tokenizer).notes == []
    assert validate(Rows([pair([user("How?")], "So.")]), tokenizer=make_tokenizer()).notes == []


# ---- other tokenizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_tokenizers_that_change_texts_raise_no_alarm(template: str) -> None:
    tokenizer = make_tokenizer(template)
    lowering = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents()]
    tokenizer._tokenizer.normalizer = normalizers.Sequence(lowering)
    row = pair([system("Être BREF"), user("Où est-ce ①?")], "Là-BAS ﬁn")
    assert set(found(row, tokenizer)) <= {"prompt is not a token prefix"}
    text = {"prompt": "Où est-ce ①?", "chosen": " Là-BAS ﬁn", "rejected": " NON"}
    assert found(text, tokenizer) == {}


# ---- the check itself: every change of the tokens is found ---------------------------------------------------------


def problems_of(row: dict[str, Any], tokenizer: Any, tokens: Any) -> set[str]:
    findings = round_trip(row, SIDES, tokens, tokenizer)
    assert findings is not None
    return {finding.kind for finding in findings if KINDS[finding.kind].severity == "error"}


TALK = pair([system("Be brief."), user("Is it?"), answer("Perhaps."), user("Tell me.")], "It is so.", "It is not.")


@pytest.mark.parametrize("template", [CHATML, THINKING, SYSTEM_LAST])
@pytest.mark.parametrize(
    "row", [TALK, pair([user("a")], "i", "s"), {"prompt": "a b", "chosen": " c", "rejected": " d"}]
)
def test_a_boundary_that_is_off_by_one_is_found(template: str, row: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(template)
    sound = tokens_of(row, SIDES, tokenizer)
    assert problems_of(row, tokenizer, sound) == set()
    later = (sound.prompt + sound.completions[0][:1], (sound.completions[0][1:], *sound.completions[1:]))
    sooner = (sound.prompt[:-1], (sound.prompt[-1:] + sound.completions[0], *sound.completions[1:]))
    for prompt, completions in (later, sooner, (sound.prompt, later[1]), (sound.prompt, sooner[1])):
        changed = dataclasses.replace(sound, prompt=prompt, completions=completions)
        assert problems_of(row, tokenizer, changed)


def test_other_texts_are_found() -> None:
    tokenizer = make_tokenizer()
    sound = tokens_of(TALK, SIDES, tokenizer)
    other = pair([system("Be long."), *TALK["prompt"][1:]], TALK["chosen"], TALK["rejected"])
    swapped = dataclasses.replace(sound, prompt=tokens_of(other, SIDES, tokenizer).prompt)
    assert "prompt is not in the context" in problems_of(TALK, tokenizer, swapped)
    crossed = dataclasses.replace(sound, completions=sound.completions[::-1])
    assert problems_of(TALK, tokenizer, crossed) == {"completion is not scored"}
