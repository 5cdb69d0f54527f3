"""The catalogue of problems: severity, meaning, and what to do. Reports list them in this order.

An error makes a row unusable for training, a warning keeps the row, and an info is for the user to know.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.data.findings import Severity


@dataclass(frozen=True)
class Kind:
    severity: Severity
    explanation: str
    advice: str


_COMPLETIONS = ("chosen", "rejected", "completion", "completions")

# Explanation and advice.
_ERRORS = {
    "wrong role: prompt ends with assistant": (
        "The last message of 'prompt' is the assistant's, so there is nothing to answer.",
        "Move that message to the completions.",
    ),
    "wrong type: text beside messages": (
        "Some of the row's texts are plain and some are lists of messages.",
        "Write all of them one way.",
    ),
    "wrong type: messages written as text": (
        "A text of the row is messages written out, as JSON or as Python prints them.",
        "Write the row's texts like the others'.",
    ),
    "wrong type: date": (
        "A text, a tool or a call's argument is a date: the reader took text for one, so it is not as it was written.",
        "Read the file with prefopt.data.load_preferences, or write dates as text.",
    ),
    "wrong type: label": ("Column 'label' is not true or false.", "Write true or false."),
    "fewer than two completions": (
        "The group has one completion or none, so there is nothing to compare.",
        "Add others, or delete the row.",
    ),
    "all completions are equal": (
        "All completions of the group are the same, so there is no preference to learn.",
        "Delete the row.",
    ),
    "bad scores": (
        "Column 'scores' is not a list of finite numbers, each between -1e30 and 1e30.",
        "Write a number for each completion, in their order; the highest is the best. Leave the column out if "
        "'completions' are in order, the best first.",
    ),
    "scores do not fit": (
        "Column 'scores' holds more or fewer numbers than 'completions' has answers.",
        "Write a number for each completion, in their order.",
    ),
    "chosen equals rejected": ("Both sides are the same, so there is no preference to learn.", "Delete the row."),
    "wrong type: tools": (
        "Column 'tools' is neither a list of functions' descriptions nor the JSON text of one.",
        'Write [{"type": "function", "function": {...}}], or null.',
    ),
    "wrong type: chat_template_kwargs": (
        "Column 'chat_template_kwargs' is not a mapping, or sets what is not the template's (tools, tokenize, ...).",
        "Write a mapping of the template's own variables, or null.",
    ),
    "wrong type: ids": (
        "The row's token ids are not a list of whole numbers from 0 on, or are beyond the tokenizer's vocabulary.",
        "Remove the columns that end in _ids to have the texts tokenized, or make them with this tokenizer.",
    ),
    "bad log-probability": (
        "A column of given log-probabilities (ref_chosen_logps, ref_rejected_logps, prev_chosen_logps, "
        "prev_rejected_logps) is missing, or not a finite number.",
        "Compute it, or remove these columns to have them computed.",
    ),
    "bad weight": (
        "Column 'weight' is missing, not a number, not finite, negative or above 1e9.",
        "Write a number of 0 or more (1 is neutral).",
    ),
    "refused by the chat template": (
        "The tokenizer's chat template raised an error on this conversation.",
        "Templates may want alternating roles or no system message; rewrite the row or choose another template.",
    ),
    "refused by the tokenizer": ("The tokenizer raised an error on this text.", "Look at the row's characters."),
    "no tokens": (
        "The prompt or a completion has no token: it is empty, or the tokenizer or the chat template drops its text.",
        "Look at the row, or at what the template does with its messages.",
    ),
    "same tokens": (
        "'chosen' and 'rejected', or all completions of a group, differ, but come out as the same tokens, so there is "
        "no preference to learn: the chat template drops what differs (parts of a content that is a list, say), or "
        "the tokenizer does.",
        "Write contents as plain text, or choose another template.",
    ),
    "beyond the vocabulary": (
        "The tokenizer gives a token that the model has no embedding for.",
        "Use the model's own tokenizer, or resize the model's embeddings and save it.",
    ),
    "no room for a completion": (
        "The prompt alone fills max_length, so no completion token is left.",
        "Raise max_length or shorten the prompt.",
    ),
    "same tokens at this length": (
        "'chosen' and 'rejected', or all completions of a group, differ only in what max_length cuts off, so there is "
        "no preference left to learn at this length.",
        "Raise max_length, or delete the row.",
    ),
    "completion is not scored": (
        "Part of the completion (its text, its thought or a tool call) is not among the scored tokens: the chat "
        "template drops or changes it.",
        "Choose a template that prints it (--chat_template; TRL has *_training.jinja files for many models), or take "
        "it out of the row.",
    ),
    "prompt is scored": (
        "The scored tokens hold text of the prompt, which would be trained as the answer: the chat template prints "
        "the prompt otherwise once an answer follows.",
        "Choose another template (--chat_template).",
    ),
    "prompt is not in the context": (
        "A message of the prompt is not in the context: the chat template drops or changes it (some know no system "
        "message).",
        "Choose a template that prints it (--chat_template), or move its text to another message.",
    ),
    "tokens are not the row's": (
        "The tokens do not read as the row's prompt followed by its completion.",
        "Look at the row and at the tokenizer.",
    ),
}

_WARNINGS = {
    "duplicate row": ("The same texts are in an earlier row, so they count twice.", "Delete it if not intended."),
    "contradicts an earlier row": (
        "An earlier row prefers the opposite; the two cancel out.",
        "Keep one of them.",
    ),
    "equal completions": (
        "Two completions of the group are the same, so they count twice.",
        "Delete one if not intended.",
    ),
    "all scores are equal": (
        "All completions of the group have the same score: losses that compare completions learn nothing from it.",
        "Nothing to do for losses on the scores themselves; otherwise delete the row.",
    ),
    "messages read as text": (
        "A text looks like messages, but cannot be read as such (it may be cut off, or quoted wrongly), so it is "
        "trained as text.",
        "Write the messages as a list, in JSON lines or Parquet.",
    ),
    "truncated completion": (
        "Prompt and completion exceed max_length, so part of a completion is cut off.",
        "Raise max_length if answers should be learnt to their end.",
    ),
    "tools are not in the context": (
        "The row has tools, and the chat template does not print them (or not as they are written).",
        "Choose a template that knows tools, or remove the column.",
    ),
    "generation prompt does not fit": (
        "The chat template ends the prompt in another way than this completion begins (an empty thought where the "
        "completion has one, say, or an opened thought that it does not close), and the model is trained on the two "
        "together.",
        "Choose the template's other mode (chat_template_kwargs), another template, or answers of the other kind.",
    ),
    "prompt text twice": ("The chat template prints a message of the prompt twice.", "Look at the template."),
    "second beginning of text": (
        "More than one beginning-of-text token: the text holds one, and the tokenizer or the template adds another.",
        "Remove it from the text.",
    ),
    "second end of turn": (
        "The completion ends with two end tokens: the text holds one, and the template or the tokenizer adds another.",
        "Remove it from the text.",
    ),
    "no end of turn": (
        "The chat template prints nothing behind an answer, so the model does not learn to stop.",
        "Choose a template that ends answers, with {{ eos_token }} for example.",
    ),
    "another answer begins": (
        "The chat template prints the beginning of another answer behind this one, whether it is asked to or not, so "
        "the model is trained to write it.",
        "Put it inside of {% if add_generation_prompt %}, or choose another template (--chat_template).",
    ),
    "control token inside a text": (
        "A message holds a control token of the template or the tokenizer, as text that was rendered before does.",
        "Give the messages as they were before they were rendered, or the rendered text as plain text.",
    ),
}

_INFOS = {
    "prompt is not a token prefix": (
        "The prompt's tokens are not the first tokens of prompt + completion (the chat template ends the prompt "
        "otherwise, or tokens merge across the boundary).",
        "Nothing to do. The tokens were read back: the whole prompt is kept as context and the completion is scored "
        "correctly.",
    ),
    "prompt is not a token prefix (not read back)": (
        "The prompt's tokens are not the first tokens of prompt + completion, and the row holds more than text, so "
        "what is scored was not checked.",
        "Look at the first batch with --dry_run.",
    ),
    "earlier thought is left out": (
        "The chat template leaves out the thought of an earlier answer in the prompt, as templates of reasoning "
        "models do.",
        "Nothing to do if the model is used that way. Otherwise choose a template that prints it.",
    ),
    "no beginning of text": (
        "The tokenizer begins plain text with its beginning-of-text token, and the chat template does not print it.",
        "Nothing to do if the model was trained that way. Otherwise add {{ bos_token }} to the template.",
    ),
}


def _errors_of_columns() -> dict[str, tuple[str, str]]:
    errors = {
        "unreadable messages": (
            "A column of messages written as JSON or Python text has a text that cannot be parsed: it may be cut "
            "off, or quoted wrongly.",
            "Repair or delete the row.",
        ),
        "unparseable transcript": (
            "'chosen' or 'rejected' does not alternate '\\n\\nHuman: ' and '\\n\\nAssistant: ' up to an answer of the "
            "assistant, or the two (or a column 'prompt') differ in what the human says.",
            "Repair the text, or give prompt, chosen and rejected as columns.",
        ),
    }
    for column in ("prompt", *_COMPLETIONS):
        # The prompt may be the beginning of the completions: there may be no column of that name.
        what = "The prompt" if column == "prompt" else f"Column '{column}'"
        what = "A text in 'completions'" if column == "completions" else what
        errors[f"null {column}"] = (f"{what} is null.", "Fill it in or delete the row.")
        errors[f"empty {column}"] = (
            f"{what} has no text: it is empty, only white space, or its last message is.",
            "Fill it in or delete the row.",
        )
        errors[f"wrong type: {column}"] = (
            f"{what if column == 'completions' else f'Column {column!r}'} is neither text nor a list of messages with "
            "a 'role' and a 'content'.",
            "Write it as text, or as [{\"role\": ..., \"content\": ...}] (not 'from'/'value'). From a list of "
            f"several texts, --columns {column}={column}.0 takes the first.",
        )
        errors[f"wrong role: unknown in {column}"] = (
            f"A message in column '{column}' has a role that chat templates do not know.",
            "Use system, developer, user, assistant or tool (human -> user, gpt -> assistant).",
        )
        if column != "prompt":
            errors[f"wrong role: {column} is not the assistant's"] = (
                f"Column '{column}' must begin and end with the assistant's or a tool's message.",
                "Move what comes before the answer to 'prompt', and delete what follows it.",
            )
    return errors


_USER_TURNS = {
    f"user turn inside {column}": (
        f"Column '{column}' holds turns that the model does not write; they are trained on like the others.",
        "End the completion at its first answer if that is not meant.",
    )
    for column in _COMPLETIONS
}

_GRAVEST_FIRST: tuple[tuple[Severity, dict[str, tuple[str, str]]], ...] = (
    ("error", _errors_of_columns() | _ERRORS),
    ("warning", _USER_TURNS | _WARNINGS),
    ("info", _INFOS),
)
KINDS = {name: Kind(severity, *texts) for severity, kinds in _GRAVEST_FIRST for name, texts in kinds.items()}
