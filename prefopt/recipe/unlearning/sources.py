"""What an unlearning run was made from, stored in its folder for the commands that look at the run later."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefopt.recipe.arguments import Recipe
from prefopt.recipe.unlearning.options import UnlearningArguments, options_of
from prefopt.safety.errors import UsageError
from prefopt.safety.files import is_file, write_text

SOURCES = "unlearning.json"
AUDIT = "audit.json"
"""The numbers of `prefopt unlearn audit`."""

SET_OPTIONS = (
    "forget_set", "retain_set", "forget_eval_set", "retain_eval_set", "real_authors_set", "world_facts_set",
    "holdout_set", "verbatim_set", "forget_knowledge_set", "forget_examples_set", "retain_knowledge_set",
    "retain_examples_set",
)  # fmt: skip
"""The options that name sets."""

_NUMBERS = ("measured_rows", "learn_learning_rate", "verbatim_tokens")


@dataclass(frozen=True)
class Sources:
    """The models and the sets of a run.

    Attributes:
        start: the model before forgetting, a folder or a Hub name; None if it is not known.
        gold: the gold model; None without one.
        bundled: whether the sets are the bundled ones.
        options: values of the options in `SET_OPTIONS` and `_NUMBERS`.
        models_dir: where numbers of the start and of the gold model are stored; None if no run says so.
        dtype: of the weights while forgetting.
        max_length: plain texts were cut into parts of this many tokens.
    """

    start: str | None
    gold: str | None
    bundled: bool
    options: dict[str, Any] = field(default_factory=dict)
    models_dir: str | None = None
    dtype: str | None = None
    max_length: int | None = None

    def arguments(self) -> UnlearningArguments:
        """The options as the recipe has them."""
        return UnlearningArguments(**self.options)


def store_sources(recipe: Recipe, start: str, gold: str | None) -> None:
    """Write the sources of a run into its output folder. Local names become absolute paths.

    An audit of an earlier model in the folder is deleted: it would seem to be of this one.
    """
    script = options_of(recipe)
    sources = Sources(
        absolute(start),
        None if gold is None else absolute(gold),
        recipe.bundled_data,
        {name: _stored(getattr(script, name)) for name in (*SET_OPTIONS, *_NUMBERS)},
        str(Path(script.models_dir).absolute()),
        None if recipe.model.dtype is None else str(recipe.model.dtype).removeprefix("torch."),
        recipe.training.max_length,
    )
    folder = Path(recipe.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / AUDIT).unlink(missing_ok=True)
    write_text(folder / SOURCES, json.dumps(asdict(sources), indent=2) + "\n")


def sources_of(folder: Path) -> Sources | None:
    """The sources of a run; None for a folder without them.

    Raises:
        UsageError: for a file that cannot be read.
    """
    path = folder / SOURCES
    if not is_file(path):
        return None
    try:
        return Sources(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error}. Name the models and the sets instead: --help") from None


def absolute(name: str) -> str:
    """The absolute path of a local file or folder; a Hub name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _stored(value: Any) -> Any:
    return absolute(value) if isinstance(value, str) else value
