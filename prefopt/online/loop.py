"""Rounds: sample, judge, pair, train, evaluate, again. Each stage is durable, and continues where it was killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout

from prefopt.evaluation.judgements import read_judgements
from prefopt.evaluation.stage import NO_PAIRS, Comparisons, nothing_judged
from prefopt.generation.from_file import FileGenerator
from prefopt.generation.processes import on_main
from prefopt.generation.samples import Generator, PromptRow, SamplingSettings, read_samples
from prefopt.generation.stage import sample_to_file
from prefopt.online.best import best_round, check_metric, name_in_card, run_summary
from prefopt.online.comparisons import comparisons_of
from prefopt.online.engines import whole_models
from prefopt.online.folders import Manifest, RoundFolder
from prefopt.online.generators import Generators
from prefopt.online.heldout import answers_in, compared, heldout_numbers, unscored
from prefopt.online.judging import Judges
from prefopt.online.kl import kl_numbers, kl_sampling, score_completions
from prefopt.online.options import heldout_sampling_of, options_of, pairing_of, sampling_of
from prefopt.online.pairing import write_pairs
from prefopt.online.policy import RoundPlan, plan_round, prompts_of
from prefopt.online.start import drawn_by
from prefopt.online.summary import heldout_line, judge_lines, judge_numbers, rounds_table, sample_numbers
from prefopt.online.training import average_models, remove_checkpoints, train_round
from prefopt.recipe import Recipe
from prefopt.recipe.build import load_to_sample
from prefopt.recipe.ready import Ready
from prefopt.safety.errors import UsageError
from prefopt.safety.files import UNFINISHED, write_text
from prefopt.safety.jsonl import json_lines
from prefopt.safety.redaction import redacted
from prefopt.trainer.config import default_of

_WITHOUT_EFFECT = re.compile(
    r"output_dir|run_name|project|report_to|push_to_hub|hub_.*|trackio_.*|logging_.*|log_.*|disable_tqdm|do_.*|save_.*"
    r"|eval_.*|dataloader_(num_workers|pin_memory|prefetch_factor|persistent_workers)|dataset_num_proc|.*_token|demo"
    r"|dry_run|rounds|best_round_by|(heldout_)?prompts|per_device_eval_batch_size|model_init_kwargs|.*_plugin|.*_config"
    r"|use_cpu|deepspeed|fsdp.*|resume_from_checkpoint|server_(url|restart|key_variable|concurrency)"
)
"""Options that the files of a run do not depend on, or that stand elsewhere in its settings."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run.

    Attributes:
        train: to sample from.
        heldout: to evaluate on; may be empty.
    """

    train: list[PromptRow]
    heldout: list[PromptRow]


class Rounds:
    """A run of rounds; every process of `accelerate launch` has one and calls `run`.

    Args:
        recipe: the options.
        ready: the initial model, and its tokenizer.
        prompts: of the run.
        judges: of samples; None if no builder needs a score.
        generators: make the generator of a model.
        heldout_judges: of held-out answers; those of samples if left out.
    """

    def __init__(
        self,
        recipe: Recipe,
        ready: Ready,
        prompts: Prompts,
        judges: Judges | None,
        generators: Generators,
        heldout_judges: Judges | None = None,
    ):
        self._recipe, self._ready, self._prompts = recipe, ready, prompts
        self._judges, self._generators = judges, generators
        self._heldout_judges = heldout_judges or judges
        self._script, self._seed = options_of(recipe), int(recipe.training.seed)
        self._run = Path(recipe.training.output_dir)
        self._pairing = pairing_of(self._script, None if judges is None else judges.weights, self._seed)
        if judges is None and self._pairing.builder.needs_scores:
            raise UsageError(f"pairs {self._pairing.builder} needs scores: name a judge with --judges")
        self._manifest = Manifest(self._run, _settings(recipe, prompts, judges, heldout_judges))

    def run(self) -> list[dict[str, Any]]:
        """All rounds, from where an earlier call got to.

        Returns:
            The summaries of the initial model and of each round.
        """
        lock = FileLock(self._run / "rounds.lock", timeout=0)
        try:
            on_main(partial(self._lock, lock))
            return self._all_rounds()
        except KeyboardInterrupt:
            self._say(f"Interrupted. The same command continues the run in {self._run} where it stopped.")
            raise
        finally:
            lock.release()

    def _lock(self, lock: FileLock) -> None:
        """Keep another command out of this run's folder for as long as this one runs."""
        self._run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(
                f"another command runs rounds in {self._run} at this moment: wait for it, or name another --output_dir"
            ) from None

    def _all_rounds(self) -> list[dict[str, Any]]:
        if self._manifest.begun:
            self._say(f"Continuing the run in {self._run}")
        self._remove_unfinished()
        self._store_prompts()
        summaries = [self._initial()]
        if self._prompts.heldout:
            check_metric(summaries[0], self._script.best_round_by)
        for number in range(1, self._script.rounds + 1):
            summaries.append(self._round(number))
            self._recipe.console.print(rounds_table(summaries, self._pairing.builder.rows))
            self._name_best(summaries)
        self._generators.close()
        for judges in (self._judges, self._heldout_judges):
            if judges is not None:
                judges.close()
        return summaries

    def _name_best(self, summaries: Sequence[Mapping[str, Any]]) -> None:
        """Print the best round so far, and store it beside the manifest and in the last model's card."""
        best = best_round(summaries, self._script.best_round_by, self._ready.model)
        self._write(self._run / "summary.json", run_summary(summaries, best))
        if best is None:
            return
        self._say(self._short(str(best)))
        if PartialState().is_main_process and (number := len(summaries) - 1) == self._script.rounds:
            name_in_card(RoundFolder(self._run, number).model / "README.md", number, best)

    # ---- one round -------------------------------------------------------------------------------------------------

    def _initial(self) -> dict[str, Any]:
        """The held-out evaluation of the model before the first round."""
        folder = RoundFolder(self._run, 0)
        with whole_models(self._recipe.training):
            return self._evaluated(folder, self._ready.model, {"round": 0})

    def _round(self, number: int) -> dict[str, Any]:
        folder, once = RoundFolder(self._run, number), self._manifest.once
        plan = plan_round(self._script, self._run, self._ready.model, str(self._recipe.training.loss), number)
        prompts = prompts_of(self._script, self._prompts.train, number, self._seed)
        words = {name: self._short(text) for name, text in plan.words.items()} | {"prompts": str(len(prompts))}
        self._say(f"Round {number}: " + ", ".join(f"{name} {text}" for name, text in words.items()))

        policy = partial(self._generators.open, plan.sampler)
        comparisons = comparisons_of(self._pairing)
        judge = partial(self._judge, self._judges, folder.samples, folder.judgements, prompts, comparisons, policy)
        with whole_models(self._recipe.training):
            once(number, "sample", [folder.samples], partial(self._sample, folder, plan.sampler, prompts))
            once(number, "judge", [folder.judgements], judge)
        once(number, "pair", [folder.pairs, folder.counts], partial(self._pair, folder, prompts))
        self._generators.close()  # its memory is for training
        once(number, "train", [folder.training], partial(self._train, folder, plan))
        remove_checkpoints(folder)
        with whole_models(self._recipe.training):
            return self._evaluated(folder, str(folder.model), self._facts(folder, words))

    def _sample(self, folder: RoundFolder, model: str, prompts: Sequence[PromptRow]) -> None:
        settings = sampling_of(self._script, folder.number, self._seed)
        generator = self._generators.of_round(model, folder.number)
        if isinstance(generator, FileGenerator):
            coverage = generator.coverage(prompts, settings, folder.number)
            self._say(f"{generator.path}: {str(coverage) or 'samples of all prompts'}")
        self._draw(folder.samples, generator, prompts, settings, folder.number)

    def _draw(
        self, path: Path, generator: Generator, prompts: Sequence[PromptRow], settings: SamplingSettings, number: int
    ) -> None:
        self._say(f"Sampling {settings.samples} completions of each of {len(prompts)} prompts")
        sample_to_file(generator, prompts, settings, path, number)

    def _judge(
        self,
        judges: Judges | None,
        samples: Path,
        path: Path,
        prompts: Sequence[PromptRow],
        comparisons: Comparisons,
        policy: Callable[[], Generator] | None = None,
    ) -> None:
        if judges is None or (policy is None and not judges.has_others):
            self._write(path, "")
            return
        self._say("Judging")
        judges.to_file(list(read_samples(samples)), prompts, path, comparisons, policy)
        # Other judges of held-out answers may fail: training does not wait for them.
        if judges is self._judges and (why := nothing_judged(list(read_judgements(path)))):
            raise UsageError(
                f"the judges failed on everything that they were asked: {why}. When they work, the same command "
                f"continues with the samples in {samples}"
            )

    def _pair(self, folder: RoundFolder, prompts: Sequence[PromptRow]) -> None:
        if PartialState().is_main_process:
            samples, judgements = list(read_samples(folder.samples)), list(read_judgements(folder.judgements))
            counts = write_pairs(folder.pairs, samples, judgements, self._pairing, prompts)
            write_text(folder.counts, _json(counts.as_json()))
            for line in counts.lines(self._pairing.builder.rows):
                self._say(line)
        PartialState().wait_for_everyone()

    def _train(self, folder: RoundFolder, plan: RoundPlan) -> None:
        pairs = int(json.loads(folder.counts.read_text(encoding="utf-8"))["pairs"])
        rows = self._pairing.builder.rows
        if not pairs:
            raise UsageError(
                f"round {plan.number} has no {rows} to train on; {folder.counts} says why. The model of the round "
                f"before is the result; or change how {rows} are made, in another --output_dir"
            )
        if self._judges is not None:
            self._judges.close()
        if plan.reference == str(folder.reference):
            older = RoundFolder(self._run, plan.number - 1).reference
            old = str(older) if plan.number > 2 else self._ready.model
            average_models(old, plan.sampler, self._script.average_decay, folder.reference, self._ready)
        keeps = self._script.round_optimizer == "keep"
        quantized = self._recipe.model.load_in_4bit or self._recipe.model.load_in_8bit
        comparable = self._script.generator == "transformers" and not quantized
        digests = drawn_by(self._run, self._ready.model, plan) if comparable else {}
        trained = train_round(self._recipe, plan, folder, pairs, keeps, digests)
        self._write(folder.training, _json(vars(trained)))

    def _evaluated(self, folder: RoundFolder, model: str, facts: dict[str, Any]) -> dict[str, Any]:
        """The facts of a round with its held-out numbers; they are stored as its summary."""
        if self._manifest.is_done(folder.number, "evaluate"):
            summary: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"))
            return summary
        files = [folder.summary]
        if heldout := self._prompts.heldout:
            settings = heldout_sampling_of(self._script, self._seed)
            self._draw(folder.heldout_samples, self._generators.open(model), heldout, settings, folder.number)
            self._judge(self._heldout_judges, folder.heldout_samples, folder.heldout_judgements, heldout, NO_PAIRS)
            files += [folder.heldout_samples, folder.heldout_judgements]
            facts = {**facts, "heldout": self._heldout(folder)}
            files += [file for file in (folder.against_start, folder.against_previous) if file.exists()]
            if self._heldout_judges is not None and self._heldout_judges is not self._judges:
                self._heldout_judges.close()
            if self._script.heldout_kl and folder.number:
                facts["kl"] = self._kl(folder, model, settings)
                files += [file for file in (folder.kl_samples, folder.kl) if file.exists()]
        self._write(folder.summary, _json(facts))
        self._manifest.done(folder.number, "evaluate", files)
        for line in (*judge_lines(facts), heldout_line(facts)):
            if line:
                self._say(line)
        return facts

    def _heldout(self, folder: RoundFolder) -> dict[str, Any]:
        prompts, judges = self._prompts.heldout, self._heldout_judges
        weights, column = (None, "answer") if judges is None else (judges.weights, judges.answer_column)
        answers = answers_in(folder, weights)
        numbers = heldout_numbers(answers, prompts, column)
        if missing := unscored(list(read_judgements(folder.heldout_judgements))):
            numbers["unscored"] = missing

        def against(number: int, path: Path) -> dict[str, Any]:
            return compared(answers, answers_in(RoundFolder(self._run, number), weights), prompts, judges, path)

        if folder.number:
            start = numbers["against_start"] = against(0, folder.against_start)
            numbers["against_previous"] = (
                start if folder.number == 1 else against(folder.number - 1, folder.against_previous)
            )
        return numbers

    def _kl(self, folder: RoundFolder, model: str, heldout: SamplingSettings) -> dict[str, Any]:
        settings, file = kl_sampling(heldout), folder.heldout_samples
        if settings != heldout:
            file = folder.kl_samples
            self._draw(file, self._generators.open(model), self._prompts.heldout, settings, folder.number)
        self._generators.close()
        loads = [partial(load_to_sample, name, self._recipe, self._ready) for name in (model, self._ready.model)]
        scored = score_completions(
            list(read_samples(file)), self._prompts.heldout, self._ready.tokenizer, loads, settings.stop
        )
        self._write(folder.kl, "".join(json.dumps(one.line()) + "\n" for one in scored))
        return kl_numbers(scored)

    def _facts(self, folder: RoundFolder, words: Mapping[str, str]) -> dict[str, Any]:
        samples, judgements = list(read_samples(folder.samples)), list(read_judgements(folder.judgements))
        return {
            "round": folder.number,
            "policy": dict(words),
            "samples": sample_numbers(samples, judgements, self._pairing.weights),
            **judge_numbers(judgements, samples),
            "pairs": json.loads(folder.counts.read_text(encoding="utf-8")),
            "training": json.loads(folder.training.read_text(encoding="utf-8")),
        }

    # ---- files and the screen --------------------------------------------------------------------------------------

    def _remove_unfinished(self) -> None:
        """Files that a killed process had not finished."""
        if PartialState().is_main_process:
            for pattern in (f"*{UNFINISHED}", f"round-*/*{UNFINISHED}"):
                for path in self._run.glob(pattern):
                    path.unlink() if path.is_file() else shutil.rmtree(path)
        PartialState().wait_for_everyone()

    def _store_prompts(self) -> None:
        for name, rows in (("prompts", self._prompts.train), ("heldout_prompts", self._prompts.heldout)):
            lines = ({"prompt_id": row.id, "prompt": row.prompt, **row.columns} for row in rows)
            if rows:  # written again on resuming: whether the file is there may look different to each process
                self._write(self._run / f"{name}.jsonl", json_lines(lines))

    def _write(self, path: Path, text: str) -> None:
        if PartialState().is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        PartialState().wait_for_everyone()

    def _short(self, text: str) -> str:
        """Without the folder of the run, and the initial model by that name."""
        return text.replace(f"{self._run}/", "").replace(self._ready.model, "the initial model")

    def _say(self, line: str) -> None:
        self._recipe.console.print(line, soft_wrap=True, markup=False)


def _settings(
    recipe: Recipe, prompts: Prompts, judges: Judges | None, heldout_judges: Judges | None
) -> dict[str, Any]:
    """All that the files of a run depend on."""
    changed = {
        option.name: redacted(getattr(value, "value", value), option.name)
        for part in (recipe.script, recipe.training, recipe.model)
        for option in dataclasses.fields(part)
        if (value := getattr(part, option.name)) != default_of(option) and not _WITHOUT_EFFECT.fullmatch(option.name)
    }
    if heldout_judges is not None and heldout_judges is not judges:
        changed["settings of heldout_judges"] = heldout_judges.digest
    return {
        **changed,
        "loss": recipe.training.loss,
        "seed": recipe.training.seed,
        "content of prompts": _digest(prompts.train),
        "content of heldout_prompts": _digest(prompts.heldout),
        "settings of judges": "" if judges is None else judges.digest,
    }


def _digest(rows: Sequence[PromptRow]) -> str:
    lines = json.dumps([(row.id, dict(row.columns)) for row in rows], sort_keys=True, default=str)
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()[:16]


def _json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
