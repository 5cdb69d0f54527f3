"""`prefopt unlearn audit`: attack an unlearned model and the gold model, store every attack's numbers, show one table.

The numbers of an attack on a model are stored when they are there, under a key of all that they depend on. A second
call reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from prefopt import __version__
from prefopt.models.load import load_model, load_tokenizer
from prefopt.recipe.arguments.threads import use_every_core
from prefopt.recipe.unlearning.sets import Sets, read_sets
from prefopt.recipe.unlearning.sources import AUDIT, SET_OPTIONS, Sources, sources_of
from prefopt.safety.errors import UsageError, did_you_mean
from prefopt.safety.files import is_file, write_text
from prefopt.safety.noise import quiet_libraries
from prefopt.scoring import Layout
from prefopt.unlearning.audit import Attack, Quantization, Relearning, Sampling, Values, Wording, plain
from prefopt.unlearning.audit.quantization import bitsandbytes_runs
from prefopt.unlearning.audit.relearning import split_rows
from prefopt.unlearning.audit.report import attack_summary, plain_summary, table_of
from prefopt.unlearning.data import Question
from prefopt.unlearning.learn import digest, model_key
from prefopt.unlearning.measure import Measured, check_gold, measure, numbers, stored
from prefopt.unlearning.report import intervals

ATTACKS = (Relearning.name, Quantization.name, Sampling.name, Wording.name)

MAX_LENGTH = 1024
"""Tokens of a part of a plain text where no run says it: the default of the recipes."""


@dataclass(frozen=True)
class AuditOptions:
    """What to audit, and how.

    Attributes:
        model: the folder of a run of `recipes/unlearn.py`, or an unlearned model: a folder or a Hub name.
        gold: the gold model, in place of the one that the run stored.
        start: the model before forgetting, likewise.
        sets: the options that name sets (`forget_set`, ...), likewise; all of them if there is one.
        output_dir: where the numbers go; the folder of the model if None.
        attacks: names of `ATTACKS`.
        samples: answers drawn to each question.
        relearn_steps, relearn_share, relearn_learning_rate: of relearning; the learning rate is that of learning if
            None.
        max_new_tokens: of an answer.
        max_length: plain texts are cut into parts of this many tokens; as the run did, or `MAX_LENGTH`, if None.
        dtype: of the weights; that of the run, or float32, if None.
        seed: of all draws.
    """

    model: str
    gold: str | None = None
    start: str | None = None
    sets: Mapping[str, str] = field(default_factory=dict)
    output_dir: str | None = None
    attacks: Sequence[str] = ATTACKS
    samples: int = 16
    relearn_steps: int = 8
    relearn_share: float = 0.25
    relearn_learning_rate: float | None = None
    max_new_tokens: int = 64
    max_length: int | None = None
    dtype: str | None = None
    seed: int = 0


def main(options: AuditOptions, console: Console | None = None) -> dict[str, Any]:
    """Audit a model, and print what was found.

    Returns:
        The content of `audit.json`.

    Raises:
        UsageError: for an unknown attack, sets that are not named, or a gold model that knows the forget set.
        UnlearningDataError: for sets that cannot be used.
        ModelError: for a model that cannot be loaded.
    """
    quiet_libraries()
    console = Console() if console is None else console
    audit = _Audit.of(options, lambda line: console.print(line, soft_wrap=True, markup=False))
    results = audit.run()
    write_text(audit.folder / AUDIT, json.dumps(results, indent=2) + "\n")
    console.print(table_of(results))
    for name, section in results["attacks"].items():
        console.print(f"{name}: {section['finding']['words']}", markup=False)
    console.print(f"Saved to {audit.folder / AUDIT}", soft_wrap=True, markup=False)
    return results


@dataclass(frozen=True)
class _Audit:
    """Models, sets and the places of their numbers.

    Attributes:
        models: names by role, see `report.ROLES`.
        folders: by role, where the numbers of the model are stored.
        folder: of `audit.json`.
    """

    options: AuditOptions
    sources: Sources
    models: dict[str, str]
    folders: dict[str, Path]
    folder: Path
    questions: Sets
    tokenizer: Any
    say: Callable[[str], object]
    layout: Layout = field(default_factory=lambda: Layout("auto"))

    @classmethod
    def of(cls, options: AuditOptions, say: Callable[[str], object]) -> _Audit:
        for name in options.attacks:
            if name not in ATTACKS:
                raise UsageError(
                    f"there is no attack {name!r}.{did_you_mean(name, ATTACKS)} Known: {', '.join(ATTACKS)}"
                )
        rate = options.relearn_learning_rate
        if rate is not None and not 0 < rate < math.inf:
            raise UsageError(f"--relearn_learning_rate must be above 0, got {rate:g}")
        sources = _sources(options)
        questions = read_sets(sources.arguments(), sources.bundled)
        folder = _folder(options)
        named = {"before": sources.start, "unlearned": options.model, "gold": sources.gold}
        models = {role: name for role, name in named.items() if name is not None}
        tokenizer = load_tokenizer(options.model)
        if PartialState().device.type == "cpu":
            use_every_core()
        own = folder / "audit"
        shared = own if sources.models_dir is None else Path(sources.models_dir)
        folders = {"before": shared, "unlearned": own, "gold": shared}
        return cls(options, sources, models, folders, folder, questions, tokenizer, say)

    def run(self) -> dict[str, Any]:
        measured = {role: self._measured(role) for role in self.models}
        if "gold" not in self.models:
            self.say("There is no gold model to compare with: name one with --gold_model_name_or_path")
        elif "before" in self.models:
            check_gold(measured["before"], measured["gold"])
        results: dict[str, Any] = {
            "models": self.models,
            "questions": len(self._asked),
            "numbers": _numbers(measured),
            "plain": plain_summary({role: plain(of["forget"]) for role, of in measured.items()}),
            "attacks": {},
            "skipped": {},
            "settings": {},
        }
        for name in self.options.attacks:
            try:
                attack = self._attack(name)
            except UsageError as error:  # this attack cannot be made, the others can
                results["skipped"][name] = str(error)
                self.say(f"{name} is skipped: {error}")
                continue
            results["settings"][name] = _settings(attack)
            results["attacks"][name] = attack_summary(attack, self._values(attack))
        return results

    @property
    def _asked(self) -> tuple[Question, ...]:
        return tuple(self.questions.measured["forget"])

    def _attack(self, name: str) -> Attack:
        options, asked = self.options, self._asked
        most, seed = options.max_new_tokens, options.seed
        if name == Relearning.name:
            learned, others = split_rows(asked, options.relearn_share, seed)
            rate = options.relearn_learning_rate
            rate = self.sources.arguments().learn_learning_rate if rate is None else rate
            return Relearning(
                learned, others, options.relearn_steps, rate, seed=seed, max_new_tokens=most,
                max_length=self.sources.max_length,
            )  # fmt: skip
        if name == Quantization.name:
            return Quantization(asked, bitsandbytes_runs(PartialState().device), most, self.sources.max_length)
        if name == Sampling.name:
            return Sampling(asked, options.samples, seed, most)
        wording = Wording(asked, most)
        if wording.lacking is not None:
            self.say(f"{name}: {wording.lacking}")
        return wording

    def _values(self, attack: Attack) -> dict[str, Values]:
        roles = [role for role in self.models if role != "before" or attack.cheap]
        return {role: self._values_of(attack, role) for role in roles}

    def _values_of(self, attack: Attack, role: str) -> Values:
        """The numbers of an attack on a model, stored or made now."""
        facts = [model_key(self.models[role]), asdict(attack), self._dtype, __version__]
        path = self.folders[role] / f"{attack.name}-{digest(facts)}.json"
        if not is_file(path):
            self.say(f"{attack.title}: {_WORDS[role]}")
            values = attack(self._load(role), self.tokenizer)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(values))
        found: Values = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _measured(self, role: str) -> Measured:
        most, beginning = self.sources.max_length, self.sources.arguments().verbatim_tokens

        def now() -> Measured:
            self.say(f"Measuring {_WORDS[role]}")
            model = self._load(role)
            return measure(
                model, self.tokenizer, self.questions.measured, max_length=most, verbatim_tokens=beginning,
                layout=self.layout,
            )  # fmt: skip

        return stored(self.folders[role], self.models[role], self.questions.measured, now, most, beginning)

    def _load(self, role: str) -> Any:
        model = load_model(self.models[role], {"dtype": self._dtype})
        # Weights are rounded and trained as a whole.
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        return model.to(PartialState().device)

    @property
    def _dtype(self) -> str:
        return self.options.dtype or self.sources.dtype or "float32"


_WORDS = {"before": "the model before forgetting", "unlearned": "the unlearned model", "gold": "the gold model"}


def _settings(attack: Attack) -> dict[str, Any]:
    """The attack's settings, without its questions."""
    return {name: value for name, value in asdict(attack).items() if name not in ("asked", "learned")}


def _numbers(measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Forget quality and model utility, by the words of the table and by role."""
    values = {role: numbers(of, measured.get("gold")) for role, of in measured.items()}
    shown = {"forget quality (p)": "forget_quality", "model utility": "model_utility"}
    rows: dict[str, dict[str, Any]] = {}
    for words, name in shown.items():
        # The gold model's comparison with itself says nothing.
        roles = [role for role in values if not (name == "forget_quality" and role == "gold")]
        of = {role: values[role][name] for role in roles if name in values[role]}
        if of:
            rows[words] = of
    if "model utility" in rows:
        rows["model utility"]["interval"] = list(intervals(measured["unlearned"])["model_utility"])
    return rows


def _sources(options: AuditOptions) -> Sources:
    """What the run stored, under what was named.

    Raises:
        UsageError: if neither names the sets.
    """
    run = sources_of(Path(options.model).expanduser())
    if options.sets:
        named = run.options if run is not None else {}
        values = {**{name: value for name, value in named.items() if name not in SET_OPTIONS}, **options.sets}
        run = replace(run or Sources(None, None, False, {}), bundled=False, options=values)
        if "forget_set" not in options.sets:
            raise UsageError(f"--{next(iter(options.sets))} replaces the sets of the run: name --forget_set too")
    if run is None:
        raise UsageError(
            f"{options.model} has no unlearning.json, so it is not the folder of a run of recipes/unlearn.py: name "
            "--forget_set, --retain_set and --gold_model_name_or_path"
        )
    return replace(
        run,
        start=options.start or run.start,
        gold=options.gold or run.gold,
        max_length=options.max_length or run.max_length or MAX_LENGTH,
    )


def _folder(options: AuditOptions) -> Path:
    if options.output_dir is not None:
        folder = Path(options.output_dir).expanduser()
    elif (folder := Path(options.model).expanduser()).is_dir():
        return folder
    else:
        raise UsageError(f"{options.model} is not a folder: say with --output_dir where the numbers go")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
