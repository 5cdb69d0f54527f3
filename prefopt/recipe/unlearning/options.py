"""The options of `recipes/unlearn.py`, beside `ModelConfig` and `PreferenceConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast, get_args

from prefopt import unlearning
from prefopt.recipe.arguments import Recipe, RecipeArguments
from prefopt.unlearning.data import source_of
from prefopt.unlearning.measure import VERBATIM_PROMPT
from prefopt.unlearning.trainer import Rule

SETS_TO_MEASURE = (
    "forget_eval", "retain_eval", "real_authors", "world_facts", "holdout", "verbatim", "forget_knowledge",
    "retain_knowledge", "forget_examples", "retain_examples",
)  # fmt: skip
"""Sets beside the two that are trained on: `--NAME_set`."""

_ELSEWHERE = "forget and retain sets are named with --forget_set and --retain_set"
_PAIRS = "it is about preference pairs; " + _ELSEWHERE


@dataclass
class UnlearningArguments(RecipeArguments):
    """Sets, models and measurements of unlearning, beside `ModelConfig` and `PreferenceConfig`."""

    demo_config: ClassVar[Path] = Path(unlearning.__file__).parent / "demo.yaml"
    data_options: ClassVar[tuple[str, ...]] = ("forget_set", "retain_set")
    bundled_words: ClassVar[str] = "the bundled authors"
    no_effect: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("dataset_name", "dataset_train_split", "dataset_test_split", "dataset_config"), _ELSEWHERE),
        **dict.fromkeys(("dataset_streaming", "columns", "format", "on_bad_rows", "eval_rows", "embeddings"), _PAIRS),
        "ref_model_name_or_path": "the reference is the model before forgetting",
        "previous_model_name_or_path": "no objective of unlearning compares with a previous iterate",
        "paired_retain": "each batch holds as many rows to retain as rows to forget wherever the objective uses both",
        "entanglement_every": "rows to forget and rows to retain are not pairs",
        "eval_answers": "answers to the questions are measured at every evaluation",
        "eval_strategy": "--evaluate_every says how often to measure",
        "eval_steps": "--evaluate_every says how often to measure",
        "load_best_model_at_end": "--best says which model is the result",
        "metric_for_best_model": "--best says which model is the result",
    }

    forget_set: str | None = field(
        default=None,
        metadata={
            "help": "What to forget: a file or Hub id with question and answer, or text. A configuration and a split "
            "may follow, as in locuslab/TOFU:forget10."
        },
    )
    retain_set: str | None = field(
        default=None, metadata={"help": "What to keep, written as --forget_set; shares no question with it."}
    )
    forget_eval_set: str | None = field(
        default=None,
        metadata={
            "help": "The forget set with paraphrased_answer and perturbed_answer, to measure with. If left out, "
            "--forget_set itself."
        },
    )
    retain_eval_set: str | None = field(
        default=None, metadata={"help": "The same of the retain set. If left out, --retain_set itself."}
    )
    real_authors_set: str | None = field(
        default=None, metadata={"help": "Questions about real authors with perturbed_answer, for the model's utility."}
    )
    world_facts_set: str | None = field(
        default=None, metadata={"help": "Questions about the world with perturbed_answer, for the model's utility."}
    )
    holdout_set: str | None = field(
        default=None,
        metadata={"help": "Rows like the forget set's that no model has seen, for membership inference."},
    )
    verbatim_set: str | None = field(
        default=None,
        metadata={
            "help": "Beginnings of texts to forget (prompt) and how they go on (gt), as in "
            "muse-bench/MUSE-News:verbmem:forget."
        },
    )
    verbatim_tokens: int = field(
        default=VERBATIM_PROMPT,
        metadata={"help": "Plain texts to forget are continued after this many tokens; 0 leaves it out."},
    )
    forget_knowledge_set: str | None = field(
        default=None,
        metadata={
            "help": "Questions about texts to forget, asked after examples, as in "
            "muse-bench/MUSE-News:knowmem:forget_qa."
        },
    )
    forget_examples_set: str | None = field(
        default=None, metadata={"help": "The examples before them, as in muse-bench/MUSE-News:knowmem:forget_qa_icl."}
    )
    retain_knowledge_set: str | None = field(
        default=None, metadata={"help": "Questions about texts to retain, asked after examples."}
    )
    retain_examples_set: str | None = field(default=None, metadata={"help": "The examples before them."})
    learn: bool = field(
        default=False,
        metadata={
            "help": "First let the model learn both sets, and make the gold model, which learns only what to retain."
        },
    )
    learn_epochs: float = field(default=5, metadata={"help": "Epochs of learning."})
    learn_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of learning."})
    gold_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A model trained without the forget set: forget quality compares with it."},
    )
    models_dir: str = field(
        default="runs/learned", metadata={"help": "Where learned models are stored; other runs find them there."}
    )
    evaluate_every: float = field(
        default=1.0, metadata={"help": "How often to measure, in epochs of forgetting; 0 for before and after only."}
    )
    best: str = field(
        default="none",
        metadata={"help": "Which evaluation's model is the result; `none` is the last.", "choices": get_args(Rule)},
    )
    measured_rows: int = field(default=300, metadata={"help": "Measure at most this many rows of each set."})
    idk_answers: str | None = field(
        default=None,
        metadata={"help": 'A text file with one "I don\'t know" answer a line, for losses that train on them.'},
    )

    def data_sources(self) -> list[str]:
        """The files and Hub ids of all sets, without configurations and splits."""
        options = ("forget_set", "retain_set", *(f"{name}_set" for name in SETS_TO_MEASURE))
        names = [value for option in options if (value := getattr(self, option)) is not None]
        return list(dict.fromkeys(source_of(name)[0] for name in names))

    @property
    def rule(self) -> Rule:
        return cast("Rule", self.best)  # the parser takes no other word


def options_of(recipe: Recipe) -> UnlearningArguments:
    """The recipe's own options."""
    assert isinstance(recipe.script, UnlearningArguments)
    return recipe.script
