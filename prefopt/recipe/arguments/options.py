"""The options of a recipe, and the `Recipe` made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from trl import ModelConfig, ScriptArguments

from prefopt.data import parse_sources
from prefopt.data.embed import DEFAULT
from prefopt.data.formats import NAMES
from prefopt.losses import Loss, LossFile, register_file
from prefopt.trainer import PreferenceConfig
from prefopt.trainer.config import resolve_objective


@dataclass
class RecipeArguments(ScriptArguments):  # type: ignore[misc]
    """Data and behaviour of a recipe, beside `ModelConfig` and `PreferenceConfig`; `--help` explains each.

    Recipes for other data derive from it.

    Attributes:
        demo_config: settings of the bundled job; they are the defaults if neither model nor data are named.
        data_options: the options that name the data; the bundled data are used if the first is not set.
        bundled_words: what the bundled data are called.
        no_effect: options of this class that a derived recipe does not use, and what to do instead.
        replaced_by: options that do nothing once another is set, and the other.
    """

    demo_config: ClassVar[Path] = Path(__file__).parents[2] / "demo" / "config.yaml"
    data_options: ClassVar[tuple[str, ...]] = ("dataset_name",)
    bundled_words: ClassVar[str] = "the bundled pairs"
    no_effect: ClassVar[Mapping[str, str]] = {}
    replaced_by: ClassVar[Mapping[str, str]] = {}

    demo: bool = field(
        default=False,
        metadata={"help": "Use the bundled model, pairs and training settings; only the loss of a config is kept."},
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "How the data set names its columns, e.g. prompt=question chosen=good rejected=bad"},
    )
    format: str | None = field(
        default=None,
        metadata={"help": f"The data set's layout, where it is not recognised: {', '.join(NAMES)}.", "choices": NAMES},
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "A Jinja chat template, or a file with one, in place of the tokenizer's own."},
    )
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The frozen reference, if it is not the model that training starts from."},
    )
    previous_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The previous iterate of the policy, for losses that compare with it, such as inpo."},
    )
    on_bad_rows: str = field(
        default="error",
        metadata={
            "help": "Rows that cannot be trained on: stop with an error, or drop them into a file.",
            "choices": ["error", "drop"],
        },
    )
    loss_file: str | None = field(
        default=None,
        metadata={"help": "A Python file of yours with losses for --loss. It is run, so name only what you trust."},
    )
    embeddings: str | None = field(
        default=None,
        metadata={"help": f"A frozen encoder for losses with embeddings='given': a folder, a Hub name or {DEFAULT}."},
    )
    eval_rows: int = field(
        default=100,
        metadata={"help": "Rows to hold out of the training split if there is no test split; 0 for none."},
    )
    eval_answers: int = field(
        default=0,
        metadata={"help": "Held-out prompts that are answered greedily at every evaluation, for the run's page."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check the data, show the settings, one batch, steps and memory; train nothing."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Overwrite an earlier run in the folder that --output_dir names. Without it such a folder is "
            "refused; the default folder is moved aside."
        },
    )
    stop_on: list[str] | None = field(
        default=None,
        metadata={"help": "End training at findings of these levels or rules, e.g. serious (docs/numbers.md)."},
    )
    entanglement_every: int | None = field(
        default=None,
        metadata={
            "help": "Measure gradient entanglement on 16 held-out pairs every so many steps; each time costs as much "
            "as training on about 40 pairs (docs/numbers.md). Not set: never."
        },
    )
    evaluate_first: bool = field(default=True, metadata={"help": "Evaluate before training as well as after."})

    def data_sources(self) -> list[str]:
        """The files and Hub ids of the data, where they are not bundled."""
        return [] if self.dataset_name is None else [source for source, _ in parse_sources(self.dataset_name)]


LOSS_FILE = "loss_file.py"
"""The copy of the user's own file of losses in the output folder."""


@dataclass(frozen=True)
class Recipe:
    """The arguments of one run. Results of later steps are in their return values, never in here.

    Attributes:
        script: data and behaviour.
        training: of the trainer, with the loss.
        model: the model to train and its adapter.
        console: prints to the screen, only on the main process.
        paper: a paper config's section about its source (`paper:`); `--dry_run` shows it, training ignores it.
        command: the command line without secrets, for the model card.
        output_named: whether the output folder was named, instead of the default.
    """

    script: RecipeArguments
    training: PreferenceConfig
    model: ModelConfig
    console: Console
    paper: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None
    output_named: bool = True

    @cached_property
    def objective(self) -> Loss | None:
        """The loss, to read its needs; None if TRL computes it. The trainer makes its own."""
        return resolve_objective(None, self.training)

    @property
    def objective_text(self) -> str:
        """The loss as it was written, for messages."""
        return str(self.training.loss or self.training.loss_type)

    @property
    def loss_file(self) -> LossFile | None:
        """The user's own file of losses, if one was named."""
        return None if self.script.loss_file is None else register_file(self.script.loss_file)

    @property
    def bundled_model(self) -> bool:
        return self.model.model_name_or_path is None

    @property
    def bundled_data(self) -> bool:
        return getattr(self.script, self.script.data_options[0]) is None
