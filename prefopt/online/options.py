"""The options of rounds, beside those of a recipe: prompts, sampling, judges, pairs, and the policy of each round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, cast

from prefopt.generation.samples import SamplingSettings
from prefopt.online.best import METRICS
from prefopt.online.builders import parse_builder
from prefopt.online.pairing import PairSettings
from prefopt.online.tasks import TASKS
from prefopt.recipe.arguments import Recipe, RecipeArguments
from prefopt.safety.errors import UsageError

_PAIRS = "the pairs of a round are drawn from the model: prompts are named with --prompts"
_POLICY = "--round_reference says which model is the reference of a round"
_OWN = "a run of rounds continues by itself where it was stopped: start the same command again"


@dataclass
class RoundsArguments(RecipeArguments):
    """What a run of rounds needs beside `ModelConfig` and `PreferenceConfig`."""

    demo_config: ClassVar[Path] = Path(__file__).parent / "demo.yaml"
    data_options: ClassVar[tuple[str, ...]] = ("prompts",)
    bundled_words: ClassVar[str] = "the bundled prompts"
    no_effect: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("dataset_name", "dataset_train_split", "dataset_test_split", "dataset_config"), _PAIRS),
        **dict.fromkeys(("dataset_streaming", "columns", "format", "eval_rows", "embeddings"), _PAIRS),
        **dict.fromkeys(("ref_model_name_or_path", "previous_model_name_or_path"), _POLICY),
        **dict.fromkeys(("resume_from_checkpoint", "overwrite_output_dir", "evaluate_first"), _OWN),
        "eval_answers": "samples of each round are in its folder",
        "stop_on": "each round is trained to its end, and then its findings are printed. Leave it out; to train on "
        "one round's pairs until a finding, use prefopt train --dataset_name RUN/round-1/pairs.jsonl --stop_on ...",
        **dict.fromkeys(
            ("metric_for_best_model", "greater_is_better"),
            f"--best_round_by names the held-out number that the best round is chosen by: {', '.join(METRICS)}",
        ),
        "eval_strategy": "each round ends with an evaluation on --heldout_prompts",
        "load_best_model_at_end": "each round ends with its last step; --best_round_by names the best round",
    }
    replaced_by: ClassVar[Mapping[str, str]] = {"loss": "round_losses"}

    task: str = field(
        default="arithmetic",
        metadata={"help": "The bundled prompts and their judge, used without --prompts.", "choices": list(TASKS)},
    )
    prompts: str | None = field(
        default=None, metadata={"help": "A .jsonl file with one prompt a line, and columns for judges and --gold."}
    )
    heldout_prompts: str | None = field(
        default=None, metadata={"help": "A file like --prompts, of other prompts: each round is evaluated on them."}
    )
    rounds: int = field(default=3, metadata={"help": "How many times to sample, judge, pair and train."})
    samples: int = field(default=8, metadata={"help": "Samples of each prompt in a round."})
    temperature: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Of sampling; one number a round, the last for all others."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Draw among the likeliest tokens with this much probability."})
    top_k: int = field(default=0, metadata={"help": "Draw among this many likeliest tokens; 0 for all."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Where a sample is cut; 256, or what a bundled task needs."}
    )
    stop: list[str] | None = field(default=None, metadata={"help": "Texts that end a sample."})
    generator: str = field(
        default="transformers",
        metadata={
            "help": "What draws the samples: transformers (the model in memory), a server, vllm in this process, or a "
            "file of samples.",
            "choices": ["transformers", "server", "vllm", "file"],
        },
    )
    samples_file: str | None = field(
        default=None,
        metadata={"help": "For the generator file: samples of another program; {round} stands for the number."},
    )
    server_url: str | None = field(
        default=None, metadata={"help": "Of an OpenAI-compatible server: http://localhost:8000/v1."}
    )
    served_as: str | None = field(
        default=None, metadata={"help": "The server's name for the initial model, if it has another there."}
    )
    server_send: str = field(
        default="messages",
        metadata={
            "help": "What the server gets: messages, or the tokens of training (vLLM, SGLang).",
            "choices": ["messages", "tokens"],
        },
    )
    server_restart: str | None = field(
        default=None,
        metadata={
            "help": "A command that ends the server and starts it with {model}, a folder, known as {name}. Without "
            "one, adapters are loaded into a running vLLM."
        },
    )
    server_key_variable: str = field(
        default="OPENAI_API_KEY", metadata={"help": "The environment variable with the server's API key."}
    )
    server_concurrency: int = field(default=16, metadata={"help": "Requests to the server at once."})
    generator_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "More fields of each request to a server, or arguments of vllm.LLM, as JSON."},
    )
    judges: list[str] | None = field(
        default=None, metadata={"help": "Judges of samples, as in: number,column=answer  my_judges:score,weight=0.5"}
    )
    heldout_judges: list[str] | None = field(
        default=None, metadata={"help": "Judges of held-out answers, if they are not those of --judges."}
    )
    pairs: str = field(
        default="best_worst",
        metadata={"help": "Makes the pairs of a prompt: round_robin(pairs=10), tournament, ...; or groups."},
    )
    gold: str | None = field(
        default=None, metadata={"help": "The prompts' column with a gold answer that joins the winners."}
    )
    unfinished: str = field(
        default="drop", metadata={"help": "Samples that were cut: drop or keep them.", "choices": ["drop", "keep"]}
    )
    duplicates: str = field(
        default="merge",
        metadata={"help": "Samples with the same text: merge or keep them.", "choices": ["merge", "keep"]},
    )
    round_reference: str = field(
        default="previous",
        metadata={
            "help": "The reference of a round: the initial model, the model of the previous round (which drew the "
            "samples), a moving average of the rounds' models, or none, for losses without one.",
            "choices": ["initial", "previous", "moving_average", "none"],
        },
    )
    average_decay: float = field(
        default=0.9, metadata={"help": "Share of the old average in a moving average, per round."}
    )
    round_start: str = field(
        default="continue",
        metadata={
            "help": "Where the weights of a round start: continue from the last round, or from the initial model.",
            "choices": ["continue", "initial"],
        },
    )
    round_optimizer: str = field(
        default="new",
        metadata={"help": "The optimizer's state in a round: new, or kept from the last.", "choices": ["new", "keep"]},
    )
    round_prompts: str = field(
        default="all",
        metadata={
            "help": "Prompts of a round: all, disjoint parts of --prompts_per_round, or as many drawn at random.",
            "choices": ["all", "disjoint", "sampled"],
        },
    )
    prompts_per_round: int = field(default=0, metadata={"help": "How many, for disjoint and sampled."})
    round_losses: list[str] | None = field(
        default=None, metadata={"help": "The loss of each round, if they differ; the last for all others."}
    )
    heldout_samples: int = field(
        default=1, metadata={"help": "Samples of each held-out prompt; a single one is the likeliest (greedy)."}
    )
    heldout_kl: bool = field(
        default=True,
        metadata={
            "help": "Estimate each round's KL to the initial model. It costs one more sample of each held-out prompt "
            "and two forward passes over it."
        },
    )
    best_round_by: str = field(
        default="mean_score",
        metadata={"help": "The held-out number that the best round is chosen by.", "choices": list(METRICS)},
    )

    def __post_init__(self) -> None:
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        task = TASKS[self.task] if self.prompts is None else None
        if self.max_new_tokens is None:
            self.max_new_tokens = 256 if task is None else task.max_new_tokens
        if task is not None:
            self.stop = list(task.stop) if self.stop is None else self.stop
            self.judges = self.judges or [task.judge]
        for name in ("rounds", "samples", "max_new_tokens", "heldout_samples", "server_concurrency"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.temperature or min(self.temperature) < 0:
            raise UsageError(f"temperature must be numbers of 0 or more, got {self.temperature}")
        if not 0 <= self.average_decay <= 1:
            raise UsageError(f"average_decay must be from 0 to 1, got {self.average_decay}")
        if (self.round_prompts != "all") != (self.prompts_per_round > 0):
            raise UsageError(
                f"prompts_per_round is {self.prompts_per_round} and round_prompts {self.round_prompts}: `disjoint` "
                "and `sampled` need a number, and `all` takes none"
            )
        if self.round_optimizer == "keep" and self.round_start == "initial":
            raise UsageError("round_optimizer keep is of no use with round_start initial: it belongs to other weights")
        if self.best_round_by in ("pass_at_k", "majority_vote") and self.heldout_samples == 1:
            raise UsageError(f"best_round_by {self.best_round_by} needs several answers: set heldout_samples")
        if self.best_round_by != "mean_score" and task is None and self.heldout_prompts is None:
            raise UsageError(f"best_round_by {self.best_round_by} needs heldout_prompts")
        if self.heldout_judges and task is None and self.heldout_prompts is None:
            raise UsageError("heldout_judges need heldout_prompts")
        parse_builder(self.pairs)
        self._check_generator()

    def _check_generator(self) -> None:
        for name, owner in (("samples_file", "file"), ("server_url", "server"), ("server_restart", "server")):
            if getattr(self, name) is not None and self.generator != owner:
                raise UsageError(f"--{name} needs --generator {owner}; the generator is {self.generator}")
        for name, owner in (("samples_file", "file"), ("server_url", "server")):
            if getattr(self, name) is None and self.generator == owner:
                raise UsageError(f"--generator {owner} needs --{name}")
        if isinstance(self.generator_options, str):
            try:
                self.generator_options = json.loads(self.generator_options)
            except ValueError as error:
                raise UsageError(f"generator_options must be JSON: {error}") from None
        if not isinstance(self.generator_options, (dict, NoneType)):
            raise UsageError(
                f'generator_options must be a mapping, as in {{"min_p": 0.1}}, got {self.generator_options!r}'
            )
        if self.generator_options and self.generator not in ("server", "vllm"):
            raise UsageError("--generator_options is for the generators server and vllm")


def options_of(recipe: Recipe) -> RoundsArguments:
    """The recipe's own options."""
    assert isinstance(recipe.script, RoundsArguments)
    return recipe.script


def sampling_of(script: RoundsArguments, number: int, seed: int) -> SamplingSettings:
    """How the samples of a round are drawn."""
    temperature = script.temperature[min(number, len(script.temperature)) - 1]
    assert script.max_new_tokens is not None
    return SamplingSettings(
        script.samples, temperature, script.top_p, script.top_k, script.max_new_tokens, tuple(script.stop or ()), seed
    )


def heldout_sampling_of(script: RoundsArguments, seed: int) -> SamplingSettings:
    """How held-out prompts are answered: a single answer greedily, several as the first round samples."""
    sampling = sampling_of(script, 1, seed)
    greedy = script.heldout_samples == 1
    return SamplingSettings(
        script.heldout_samples,
        0.0 if greedy else sampling.temperature,
        1.0 if greedy else sampling.top_p,
        0 if greedy else sampling.top_k,
        sampling.max_new_tokens,
        sampling.stop,
        seed,
    )


def pairing_of(script: RoundsArguments, weights: Mapping[str, float] | None, seed: int) -> PairSettings:
    """How samples become pairs."""
    return PairSettings(
        parse_builder(script.pairs),
        weights,
        script.gold,
        cast("Literal['drop', 'keep']", script.unfinished),
        cast("Literal['merge', 'keep']", script.duplicates),
        seed,
    )
