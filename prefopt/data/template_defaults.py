"""Arguments of a chat template for a whole run, such as Qwen's `enable_thinking`: written into the template itself.

So everything that renders with the tokenizer uses them: the check, the recipe, the Python API, streams, and users of
the trained model. A row's own `chat_template_kwargs` take precedence. It imports this folder's errors alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefopt.data.errors import DataError
from prefopt.safety.errors import did_you_mean

_NOT_THE_TEMPLATES = {"messages", "tools", "add_generation_prompt", "tokenize", "documents"}


def set_template_defaults(processing_class: Any, values: Mapping[str, Any] | None) -> None:
    """Give the chat template of a tokenizer or processor default values for these arguments, once or again.

    Raises:
        DataError: for a name that is not an argument of the template.
    """
    template = getattr(processing_class, "chat_template", None)
    if not values:
        return
    if not template:
        raise DataError("chat_template_kwargs has no effect: the tokenizer has no chat template. Leave it out.")
    if isinstance(template, dict):
        processing_class.chat_template = {name: _with(text, values) for name, text in template.items()}
    else:
        processing_class.chat_template = _with(template, values)


def _with(template: str, values: Mapping[str, Any]) -> str:
    start = "".join(
        f"{{%- set {name} = {name} if {name} is defined else {value!r} -%}}" for name, value in values.items()
    )
    if template.startswith(start):
        return template
    words = set(re.findall(r"[A-Za-z_]\w*", " ".join(re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))))
    for name in values:
        if name in _NOT_THE_TEMPLATES or not name.isidentifier() or name not in words:
            raise DataError(
                f"chat_template_kwargs: {name!r} has no effect: the chat template has no such argument."
                f"{did_you_mean(name, words)} Name one that it reads, or leave it out."
            )
    return start + template
