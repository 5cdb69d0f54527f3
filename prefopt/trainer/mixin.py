"""`LossMixin`: the methods of `trl.DPOTrainer` that are overridden.

The work is done by objects that `LossMixin` owns, one file each; `__init__.py` lists them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefopt.data.prompts import refuse_to_guess
from prefopt.data.template_defaults import set_template_defaults
from prefopt.losses import ConflictFree, Loss, LossOutput, PairNormalized, PreferenceBatch
from prefopt.losses.conflict import OwnGradient
from prefopt.models import base_sample
from prefopt.report.card import CardFacts
from prefopt.safety.errors import UsageError, retold
from prefopt.safety.weights import check_folder
from prefopt.scoring.layout import Layout
from prefopt.scoring.rows import COUNTED, RowBatch
from prefopt.scoring.scorer import Scored, Scorer
from prefopt.trainer import adapters, data, evaluation, overrides
from prefopt.trainer.accumulation import with_mean_sizes
from prefopt.trainer.budget import Parts, parts_of
from prefopt.trainer.dropout import without_configured_dropout
from prefopt.trainer.facts import RunFacts, RunNotes
from prefopt.trainer.finite import StepGuard
from prefopt.trainer.first_batch import FirstBatch
from prefopt.trainer.learned import LearnedLoss, learned_of
from prefopt.trainer.metrics import RunMetrics, batch_metrics, rewards_not_logged
from prefopt.trainer.moving_reference import sync_before_step
from prefopt.trainer.options import ungrouped
from prefopt.trainer.output_slot import SLOT, OutputSlot
from prefopt.trainer.paired import paired_rows
from prefopt.trainer.publishing import Publisher, repository_errors, without_secrets
from prefopt.trainer.saving.checkpoints import CheckpointError
from prefopt.trainer.saving.random_numbers import same_random_numbers
from prefopt.trainer.saving.run import Checkpoints
from prefopt.trainer.saving.state import leave_out_tied
from prefopt.trainer.scoring import draw_samples, make_scorer
from prefopt.trainer.search import search
from prefopt.trainer.setup import Setup, remaker
from prefopt.trainer.start import StartCheck
from prefopt.trainer.term_gradients import TermGradients, check_engine
from prefopt.trainer.tokens import lengths_to_sample_by
from prefopt.trainer.trackers import track

if TYPE_CHECKING:
    # So that type checkers accept a user's `class Mine(LossMixin, TheirTrainer)`.
    from trl import DPOTrainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)


class LossMixin(_Trainer):
    """Gives a `trl.DPOTrainer` subclass a `loss` argument: `class Mine(LossMixin, TheirTrainer): ...`.

    Args:
        loss: a `Loss` or a loss expression. Without one, `args.loss` is used, then TRL's options in `args`. An
            objective that only TRL has is computed and logged by TRL alone.
        previous_model: the previous iterate of the policy, for objectives that compare with it (`inpo`); frozen. Its
            log-probabilities may be columns of the data instead (`prev_chosen_logps`, `prev_rejected_logps`). Without
            either, the reference is used, as in a first iteration.

    Attributes:
        objective: the loss; None where TRL computes it.
        notes: facts for the model card that only the code that makes the trainer knows; may be set at any time.

    A training step, outermost first (`training_step`):
        1. dropout rates in models' configurations are 0, under `disable_dropout`;
        2. `Parts` splits the batch, under `token_budget`, and into single pairs for `pair_normalized`: the following
           happens to each part;
        3. `TermGradients` runs one backward pass per term, for `conflict_free`; else transformers runs one;
        4. `compute_loss`, with overrides of subclasses, ends in `_compute_loss`: the batch is scored, the first one
           checked, the objective computed and checked to be finite, the metrics gathered.
    Before the optimizer's step its callbacks run in this order: `StartCheck` samples weights, `StepGuard` refuses a
    gradient that is not finite, `LearnedLoss` steps the objective's own parameters. `RunFlow`, added last, decides
    whether the step ends with a checkpoint.

    A save, outermost first:
        1. `_save_checkpoint`: `Checkpoints` makes the folder; its manifest, written last, makes it complete;
        2. `save_model`: secrets are removed from the pickled arguments; outside of a checkpoint the model is
           written to a folder beside the old one and then replaces it;
        3. `_save`: transformers writes the weights; with an adapter, a few elements of its base are saved too;
        4. the card is written, and then the folder is pushed.
    """

    objective: Loss | None
    data_collator: Any
    notes: RunNotes = RunNotes()

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        overrides.check_order(cls, LossMixin)

    # ---- set-up ---------------------------------------------------------------------------------------------------

    def __init__(
        self, *arguments: Any, loss: Loss | str | None = None, previous_model: Any = None, **keywords: Any
    ) -> None:
        self._wrapped = overrides.check(type(self), LossMixin)
        self._remake = remaker(type(self), arguments, {**keywords, "loss": loss, "previous_model": previous_model})
        setup = Setup(super().__init__, arguments, keywords, loss, previous_model)
        setup.check_run()
        setup.refuse_models()
        setup.prepare()
        self._before_trl(setup)
        with setup.around_trl():
            super().__init__(**setup.bound)
        self._after_trl(setup)

    def _before_trl(self, setup: Setup) -> None:
        """Attributes that TRL's constructor may read."""
        self.objective, self._own_collator = setup.objective, setup.collator
        self._run_metrics = RunMetrics()
        self._facts = RunFacts(self)
        self._publisher = Publisher(self)
        self._batches_scored = 0
        self._parts: Parts | None = None
        self._term_gradients: TermGradients | None = None
        self._learned: LearnedLoss | None = None
        self._scorer: Scorer | None = None

    def _after_trl(self, setup: Setup) -> None:
        # Data sets with images are not prepared ahead.
        set_template_defaults(self.processing_class, getattr(self.args, "chat_template_kwargs", None))
        self._base_sample = adapters.sample_of_base(self.model)
        self.add_callback(StartCheck(self))
        if (objective := self.objective) is not None:
            setup.check_result(self)
            setup.settle_models(self)
            sync_before_step(self)
            objective.to(self.accelerator.device)
            text = self._own_collator is not None
            self._scorer = make_scorer(self, objective, setup.previous_model, text)
            if isinstance(objective, OwnGradient):
                check_engine(self, objective)
            self._parts = parts_of(self, objective, self._scorer.layout, text)
            if isinstance(objective, ConflictFree):
                overrides.refuse_dropped_gradient(type(self), LossMixin, objective)
                self._term_gradients = TermGradients(self, objective, self._run_metrics)
            self._learned = learned_of(objective, self.args, self.accelerator)
            self._first_batch = FirstBatch(self, objective, setup.reference_is_initial_policy(self))
            setup.settle_batches(self)
        elif "weight" in setup.sample:
            logger.warning("the weight column has no effect: TRL computes this objective itself")
        cache = None if self._scorer is None else self._scorer.cache
        self._checkpoints = Checkpoints(self, objective, self._run_metrics, self._learned, cache)
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        if self.objective is not None:
            self._guard = StepGuard(self, self.objective, self._run_metrics, self._checkpoints)
            # Before `LearnedLoss`, which takes its step in the same callback.
            self.add_callback(self._guard)
            if self._learned is not None:
                self.add_callback(self._learned)
            if self.accelerator.is_main_process and (line := rewards_not_logged(self.objective)) is not None:
                logger.warning(line)
            tracked = track(self.objective, self.callback_handler.callbacks, self.args.output_dir)
            if tracked is not None:
                self.add_callback(tracked)
        # Last, as it decides how a step ends.
        self.add_callback(self._checkpoints.flow)

    def hyperparameter_search(self, *arguments: Any, **keywords: Any) -> Any:
        """Train with many settings and return the best; takes what `prefopt.trainer.search.search` does after `args`.

        A new trainer is made for each trial, with the arguments of this one, which needs its model as a name.
        """
        return search(self._remake, self.args, *arguments, **keywords)

    # ---- data -----------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        set_template_defaults(processing_class, getattr(args, "chat_template_kwargs", None))
        if self.objective is None:
            refuse_to_guess(dataset)
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        with args.main_process_first(local=False, desc=f"preparing the {dataset_name} set"):
            return data.prepare(dataset, processing_class, args, dataset_name, self.objective, self._own_collator)

    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh and self.objective is not None and self._signature_columns is not None:
            more = data.columns_of_batches(self.objective)
            self._signature_columns += [name for name in more if name not in self._signature_columns]

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return data.without_empty_tables(super()._remove_unused_columns(dataset, description))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Of all columns: transformers passes the rows without those that batches do not need.
        if (paired := paired_rows(self.train_dataset, self.args)) is not None:
            return paired
        rows = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(lengths_to_sample_by(rows, self.args))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        with ungrouped(self.args):  # grouped by length, predictions would not be in the order of the rows
            return super()._get_eval_sampler(eval_dataset)

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        batches, count = super().get_batch_samples(*arguments, **keywords)
        return batches if self.objective is None else with_mean_sizes(batches), count

    # ---- training -------------------------------------------------------------------------------------------------

    def checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """The folder to resume from, the same on every process; None to start from the beginning.

        Args:
            asked: a folder; True for the newest complete checkpoint of the output folder; "auto" for the same, or to
                start from the beginning if there is none.

        Raises:
            CheckpointError: if the named folder is not complete, or True finds none; it says what is missing.
        """
        return self._checkpoints.choose(asked)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            check_folder(Path(resume_from_checkpoint))
        train = super().train
        try:
            folder = self.checkpoint_to_resume(resume_from_checkpoint)
            return self._checkpoints.train(folder, lambda start: train(start, *arguments, **keywords))
        finally:
            if self._scorer is not None:
                self._scorer.release()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        beginning = (
            f"cannot resume from {checkpoint}: its optimizer's state does not fit the parameters that are trained "
            "now. Train the same ones (requires_grad), with the same optimizer"
        )
        with retold(CheckpointError, beginning, (ValueError,)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One batch's forward and backward passes; the class says in which order."""
        step = super().training_step if self._term_gradients is None else self._term_gradients.step
        models = (self.model, self.ref_model) if self.objective is not None and self.args.disable_dropout else ()
        with without_configured_dropout(model for model in models if model is not None):
            if self._parts is None:
                return step(model, inputs, num_items_in_batch)
            model.train()
            rows = RowBatch.of(self._prepare_inputs(inputs))
            with self.compute_loss_context_manager():
                parts = self._parts.of(model, rows)
            return self._parts.step(model, parts, lambda part: step(model, part, num_items_in_batch))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.objective is not None and not self._wrapped:
            return self._compute_loss(model, inputs, return_outputs)
        before = self._batches_scored
        loss = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if self.objective is not None and self._batches_scored == before:
            raise UsageError(
                f"{self._wrapped[0].__name__}.compute_loss does not call super().compute_loss, so {self.objective} "
                "has no effect: call it and change what it returns, or leave `loss` out"
            )
        return loss

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        """The objective's loss. TRL's `compute_loss` calls this, so an overridden `compute_loss` wraps around it."""
        if self.objective is None:
            return super()._compute_loss(model, inputs, return_outputs)
        self._batches_scored += 1
        slot = inputs.get(SLOT) or OutputSlot()
        rows = RowBatch.of({name: value for name, value in inputs.items() if name != SLOT})
        self._first_batch.check_causal(model, rows)
        scored = self._score(model, rows, all_logits=return_outputs)
        batch, outputs = scored.batch, scored.outputs
        self._first_batch.check_reference(batch)
        self.objective.train(self.model.training)
        slot.output = output = self._output(model, batch)
        loss, means = output.loss, self._run_metrics.means(self.model.training)
        if getattr(self, "aux_loss_enabled", False):
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            means.add("aux_loss", outputs.aux_loss.reshape(1))
        self._guard.check_loss(loss, batch, output, rows)
        if rows.share > 0:
            self._run_metrics.add_tokens(scored, self.model.training)
            metrics = batch_metrics(batch, output)
            means.add_all(metrics)
            if not self.model.training:
                self._run_metrics.add_rows(metrics)
        loss = loss * rows.share
        return (loss, outputs) if return_outputs else loss

    def _output(self, model: Any, batch: PreferenceBatch) -> LossOutput:
        if isinstance(self.objective, PairNormalized) and torch.is_grad_enabled():
            return self.objective.normalized(batch, model.parameters())
        assert self.objective is not None
        return self.objective(batch)

    def _score(self, model: Any, rows: RowBatch, all_logits: bool) -> Scored:
        assert self.objective is not None
        if "sampled" in self.objective.roles:
            rows = draw_samples(self, model, rows)
        every_role = all_logits or not self.model.training
        try:
            return self._scorer_of(self.objective).score(model, rows, every_role=every_role, all_logits=all_logits)
        except ValueError as error:
            if "mage features and image tokens do not match" not in str(error) or self.args.max_length is None:
                raise
            raise UsageError(
                f"max_length={self.args.max_length} cuts off image tokens while the image stays whole; raise "
                "max_length, or set it to None"
            ) from error

    def _scorer_of(self, objective: Loss) -> Scorer:
        """The scorer, with the loss and the models that the trainer has now."""
        if self._scorer is None:
            # TRL precomputes reference log-probabilities while it sets up, where nothing but the models is known.
            self._scorer = Scorer(
                objective, self.model, self.ref_model, layout=Layout("padded"), autocast=self.accelerator.autocast
            )
        # FSDP wraps the policy when training starts; a callback may set another reference.
        self._scorer.loss, self._scorer.policy, self._scorer.reference = objective, self.model, self.ref_model
        return self._scorer

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed reference log-probabilities of a collated batch, for TRL's precomputation: (E,) chosen, rejected.

        For unpaired data both are those of the single completions, in row order.
        """
        if self.objective is None:
            logps: tuple[Tensor, Tensor] = super().compute_ref_log_probs(model, inputs)
            return logps
        rows = RowBatch.of(inputs)
        sums = self._scorer_of(self.objective).run_reference(rows, model).logps.sum(-1)
        chosen, rejected = sums.chunk(2) if rows.paired else (sums, sums)
        return chosen, rejected

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.objective is not None:
            logs.update(self._run_metrics.line(logs, self.model.training, self._learned))
        super().log(logs, start_time)
        self._facts.log(logs)

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, *arguments: Any, **keywords: Any) -> Any:
        """As in transformers, but training does not depend on it: the random state is restored afterwards."""
        with same_random_numbers(self.accelerator.device):
            return super().evaluate(*arguments, **keywords)

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """As in transformers, for `evaluate` and `predict`: means are over the rows of this loop only."""
        self._run_metrics.evaluation.clear()
        self._run_metrics.clear_rows()
        try:
            return super().evaluation_loop(*arguments, **keywords)
        except BaseException:
            self._run_metrics.evaluation.clear()
            raise

    def evaluated_rows(self) -> dict[str, list[float]]:
        """Rewards and log-ratios of each pair in this process's last evaluation, in its order, by name.

        `rewards/margins`, `ratios/chosen`, `ratios/rejected`, where the objective has them. {} before any.
        """
        return self._run_metrics.rows()

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """As in transformers; takes raw rows as `evaluate` does, and its metrics include the objective's."""
        if self.objective is None:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        if not self._is_vision_dataset:
            test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")
            if self.args.precompute_ref_log_probs and "ref_chosen_logps" not in (test_dataset.column_names or ()):
                raise UsageError(
                    "predict needs rows with ref_chosen_logps and ref_rejected_logps here, as "
                    "precompute_ref_log_probs=True keeps no reference: pass them to evaluate, which computes these"
                )
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        means = {f"{metric_key_prefix}_{name}": value for name, value in self._run_metrics.evaluation.drain().items()}
        return output._replace(metrics={**output.metrics, **means})

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.objective is None:
            return super().prediction_step(model, inputs, *arguments, **keywords)
        rows = RowBatch.of(inputs)
        if (counted := evaluation.examples_that_count(self.accelerator, rows)) is not None:
            rows, inputs = replace(rows, counted=counted), {**inputs, COUNTED: counted}
        slot = OutputSlot()
        # Pairs need no slot: an overridden compute_loss may expect tensors alone.
        inputs = inputs if rows.paired else {**inputs, SLOT: slot}
        prediction = super().prediction_step(model, inputs, *arguments, **keywords)
        evaluation.add_loss(
            self._run_metrics.evaluation, self.objective, prediction[0], slot, rows, self.accelerator.num_processes
        )
        return prediction

    def check_best_metric(self, metrics: Mapping[str, float]) -> None:
        """Refuse a `metric_for_best_model` that is not in `metrics`, as `evaluate` returns them.

        Raises:
            UsageError: naming the metrics that exist.
        """
        evaluation.check_best_metric(self.args.metric_for_best_model, metrics)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self.check_best_metric(metrics)
        better: bool = super()._determine_best_metric(metrics, trial)
        return better

    # ---- saving and publishing ------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        write = super()._save_checkpoint
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self._checkpoints.save(folder, lambda: write(model, trial)) and self.args.push_to_hub:
            self._publisher.push_checkpoint(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and card; weights of an earlier save stay until the new ones are on the disk.

        Pushes them too under `push_to_hub`, as transformers' trainer does.
        """
        save = super().save_model
        folder = Path(output_dir or self.args.output_dir)
        with without_secrets(self.args):
            self._checkpoints.save_model(folder, lambda place: save(place, _internal_call=True))
        if self.objective is not None and self.args.should_save:
            # PEFT writes an empty card into an adapter's folder.
            self._publisher.write_card(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=getattr(self.args, "hub_revision", None))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self._base_sample:
            base_sample.write(Path(output_dir or self.args.output_dir), self._base_sample)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        leave_out_tied(load_result, self.model)
        super()._issue_warnings_after_load(load_result)

    def started_from(self, logs: Mapping[str, float] | None) -> None:
        """The results of an evaluation before training, for the card of a resumed run."""
        self._facts.started_from(logs)

    def card_facts(self, name: str | None = None, dataset: str | None = None, tags: Any = ()) -> CardFacts:
        """What the model card says of the run as it is now."""
        return self._facts.card(name, dataset, tags)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **others: Any
    ) -> None:
        """Write the card into `args.output_dir`; takes what TRL's method takes."""
        if self.objective is None:
            super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        elif self.is_world_process_zero():
            self._publisher.write_card(Path(self.args.output_dir), model_name, dataset_name, tags)

    def init_hf_repo(self, *arguments: Any, **keywords: Any) -> None:
        """Create the repository, or find it; `PushError` if the Hub refuses."""
        with repository_errors(self.args):
            super().init_hf_repo(*arguments, **keywords)

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None,
        revision: str | None = None, private: bool | None = None, **card: Any,
    ) -> Any:  # fmt: skip
        """Save and push the output folder, without what is in `NOT_PUBLISHED`; takes what transformers' method takes.

        Raises:
            PushError: if the Hub refuses it. The folder is complete anyway.
        """
        return self._publisher.push(str(commit_message), blocking, token, revision, private, card)
