"""What the generator is asked: templates in a file, which a user can replace."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from string import Template
from typing import Any

import yaml

from prefopt.safety.errors import UsageError, did_you_mean

SHIPPED = Path(__file__).parent / "prompts.yaml"

_FIELDS = {
    "questions": ("passage", "title", "count"),
    "paraphrased_question": ("question",),
    "paraphrased_answer": ("answer", "question"),
    "wrong_answers": ("answer", "question", "count"),
}
"""What each template may use, the one that it must use first."""


@dataclass(frozen=True)
class Prompts:
    """The templates, by what the generator is to write.

    Attributes:
        questions: from `$passage` and `$title`, `$count` questions with their answers.
        paraphrased_question: from `$question`, the same in other words.
        paraphrased_answer: from `$answer` to `$question`, the same in other words.
        wrong_answers: from `$answer` (the paraphrase) to `$question`, `$count` wrong answers.
    """

    questions: Template
    paraphrased_question: Template
    paraphrased_answer: Template
    wrong_answers: Template

    @classmethod
    def read(cls, path: Path | None = None) -> Prompts:
        """The shipped templates, with those of a YAML file in their place.

        Raises:
            UsageError: naming the file, the template and the field.
        """
        texts = _texts(SHIPPED) | (_texts(path) if path is not None else {})
        return cls(**{name: _template(name, text, path or SHIPPED) for name, text in texts.items()})

    def lines(self) -> set[str]:
        """Every line of every template; a reply that repeats one was copied."""
        texts = (getattr(self, field.name).template for field in fields(self))
        return {line for text in texts for line in text.splitlines()}


def _texts(path: Path) -> dict[str, str]:
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"the prompts in {path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{path} must map names to prompts; names: {', '.join(_FIELDS)}")
    for name, text in content.items():
        if name not in _FIELDS:
            raise UsageError(
                f"{path}: there is no prompt {name!r}.{did_you_mean(str(name), _FIELDS)} Known: {', '.join(_FIELDS)}"
            )
        if not isinstance(text, str):
            raise UsageError(f"{path}: {name} must be a text, not a {type(text).__name__}")
    return content


def _template(name: str, text: str, path: Path) -> Template:
    template, known = Template(text), _FIELDS[name]
    if not template.is_valid():
        raise UsageError(f"{path}: {name} has a $ without a name after it; write $$ for a dollar sign")
    used = template.get_identifiers()
    if unknown := [field for field in used if field not in known]:
        raise UsageError(f"{path}: {name} uses ${unknown[0]}; it can use {', '.join(f'${field}' for field in known)}")
    if known[0] not in used:
        raise UsageError(f"{path}: {name} does not use ${known[0]}, so every prompt would be the same")
    return template
