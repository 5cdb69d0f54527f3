"""What a run leaves for its page and for comparisons: `run.json`, `answers.json`, `heldout.json` and `report.html`.

None of it may cost a run: what cannot be written is said in one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefopt.data.encodings import text_tokenizer
from prefopt.data.findings import Report
from prefopt.generation.answers import Answer, Prompt
from prefopt.models.base_sample import digest
from prefopt.recipe.arguments import Recipe
from prefopt.report import write_run_page
from prefopt.report.facts import save_facts
from prefopt.report.folder import ANSWERS, FACTS, PAGE, PAIRS
from prefopt.safety.files import write_text
from prefopt.safety.redaction import redact
from prefopt.trainer import PreferenceTrainer

_VERSION = 1
_TEXTS = 1000
"""Held-out rows whose texts are stored, shortened."""
_CHARACTERS = 300


def save_start(recipe: Recipe, trainer: PreferenceTrainer) -> None:
    """Write `run.json`: loss, data, settings and versions, and by which the model can be recognised."""
    if not trainer.is_world_process_zero() or trainer.objective is None:
        return
    with _optional(recipe, FACTS):
        more: dict[str, Any] = {"base_digest": digest(trainer.accelerator.unwrap_model(trainer.model))}
        if trainer.notes.problems is not None:
            more["problems"] = [problem for report in trainer.notes.problems for problem in _problems(report)]
        save_facts(Path(recipe.training.output_dir), trainer.card_facts(), more)


def save_answers(recipe: Recipe, prompts: Sequence[Prompt], answers: Mapping[int, Sequence[Answer]]) -> None:
    """Write `answers.json`: answers to the same prompts by step, 0 for those before training."""
    with _optional(recipe, ANSWERS):
        content = {
            "version": _VERSION,
            "prompts": [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts],
            "answers": [
                {"step": step, "texts": [one.text for one in given], "ended": [one.ended for one in given]}
                for step, given in sorted(answers.items())
            ],
        }
        write_text(Path(recipe.training.output_dir) / ANSWERS, json.dumps(content, indent=2) + "\n")


def save_pairs(recipe: Recipe, trainer: PreferenceTrainer) -> None:
    """Write `heldout.json`: the rewards and log-ratios of each held-out pair in the last evaluation.

    Only of a run on one process that evaluates one set of pairs: elsewhere rows come in another order.
    """
    values, rows = trainer.evaluated_rows(), trainer.eval_dataset
    if not trainer.is_world_process_zero() or not values or trainer.accelerator.num_processes > 1:
        return
    with _optional(recipe, PAIRS):
        if any(len(column) != len(rows) for column in values.values()):
            return
        heldout = [part for part in trainer.card_facts().data if part.role.startswith("held-out")]
        content = {
            "version": _VERSION,
            "step": trainer.state.global_step,
            "fingerprint": heldout[0].fingerprint if len(heldout) == 1 else None,
            "values": {name: [float(f"{value:.6g}") for value in column] for name, column in values.items()},
            "texts": _texts(rows, text_tokenizer(trainer.processing_class)),
        }
        write_text(Path(recipe.training.output_dir) / PAIRS, json.dumps(content) + "\n")


def write_page(recipe: Recipe, trainer: PreferenceTrainer, say: bool = True) -> None:
    """Write `report.html`, and say where it is."""
    if trainer.is_world_process_zero():
        with _optional(recipe, PAGE):
            page = write_run_page(Path(recipe.training.output_dir))
            if say:
                recipe.console.print(f"The run's page: {page}", soft_wrap=True, markup=False)


@contextmanager
def _optional(recipe: Recipe, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, the model matters more
        what = redact(f"{name} of {recipe.training.output_dir} could not be written: {type(error).__name__}: {error}")
        recipe.console.print(f"{what}. Nothing else is affected.", soft_wrap=True, markup=False, highlight=False)


def _problems(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "kind": problem.kind,
            "severity": problem.severity,
            "rows": len(problem.rows),
            "first": report.first_rows(problem),
            "text": f"{problem.explanation} {problem.advice}".strip(),
        }
        for problem in report.problems
    ]


def _texts(rows: Any, tokenizer: Any) -> list[dict[str, str]]:
    """The first rows as text, shortened; [] for rows without token ids."""
    columns = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    if not set(columns.values()) <= set(rows.column_names or ()):
        return []
    return [
        {name: _shortened(tokenizer.decode(row[ids], skip_special_tokens=True)) for name, ids in columns.items()}
        for row in rows.select(range(min(len(rows), _TEXTS)))
    ]


def _shortened(text: str) -> str:
    """Its end for what was asked last, and its beginning."""
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS // 2]} ... {text[-_CHARACTERS // 2 :]}"
