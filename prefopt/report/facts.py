"""`run.json`: what a run was made of, for programs. The model card says the same to people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefopt.losses import Loss
from prefopt.report.card import CardFacts
from prefopt.report.folder import FACTS
from prefopt.safety.files import write_text
from prefopt.safety.redaction import redacted

VERSION = 1
"""Of the file's layout; a new field does not change it."""


def save_facts(folder: Path, card: CardFacts, more: Mapping[str, Any]) -> None:
    """Write `run.json`, whole or not at all.

    Args:
        folder: of the run.
        card: the facts of its card.
        more: further facts by name, such as `problems` of the data and `base_digest` of the model.
    """
    facts = {
        "version": VERSION,
        "name": card.name,
        "command": card.command,
        "loss": str(card.objective),
        "expression": card.expression,
        "terms": facts_of_loss(card.objective),
        "base_model": card.base_model,
        "adapter": card.adapter,
        "data": [asdict(part) for part in card.data],
        # How many steps there were is in the log.
        "settings": {name: value for name, value in card.settings.items() if name != "steps"},
        "versions": dict(card.versions),
        **more,
    }
    write_text(folder / FACTS, json.dumps(redacted(facts), indent=2, default=str) + "\n")


def facts_of_loss(loss: Loss) -> Sequence[dict[str, Any]]:
    """The terms of a loss: name, weight, hyperparameters, formula and arXiv id."""
    return [
        {
            "name": label,
            "weight": weight,
            "hyperparameters": {name: str(value) for name, value in term.hyperparameters().items()},
            "formula": term.formula,
            "paper": term.paper,
        }
        for weight, label, term in loss.terms()
    ]
