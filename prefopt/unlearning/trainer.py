"""The trainer that forgets: its evaluations measure what was forgotten and what was kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from prefopt.safety.errors import UsageError
from prefopt.scoring.fingerprint import is_sharded
from prefopt.trainer import PreferenceConfig, PreferenceTrainer
from prefopt.trainer.saving.random_numbers import same_random_numbers
from prefopt.unlearning.measure import Measured, numbers

Rule = Literal["quality_and_utility", "muse", "none"]
"""Which evaluation's model is the result.

`quality_and_utility`: the one with the largest harmonic mean of forget quality (a p-value) and model utility.
`muse`: the first that says no more of the forgotten answers than the gold model (ROUGE-L recall of answers, F1 of the
continuations of plain texts); training stops there.
`none`: the last.
"""

REACHED = "gold_reached"


class UnlearningTrainer(PreferenceTrainer):
    """`PreferenceTrainer` whose evaluations are measurements of forgetting.

    Args:
        measure: measures the model, beside the model before forgetting if that is at hand.
        gold: the gold model, measured; None without one.
        rule: which evaluation is the best. `settle` sets the training arguments that go with it.

    All other arguments are those of `PreferenceTrainer`.

    Attributes:
        measured: by each evaluation of this process, by its step.
    """

    control: Any

    def __init__(
        self,
        *arguments: Any,
        measure: Callable[[Any, Any], Measured],
        gold: Measured | None = None,
        rule: Rule = "none",
        **keywords: Any,
    ) -> None:
        if rule == "muse" and gold is not None and not (gold["forget"].rouge or gold["forget"].f1):
            raise UsageError(
                "best='muse' compares what both models say, and plain texts are not continued: set --verbatim_tokens "
                "above 0"
            )
        super().__init__(*arguments, **keywords)
        self._measure, self._gold, self.rule = measure, gold, rule
        self.measured: dict[int, Measured] = {}

    def _start(self) -> Any:
        """The model before forgetting, where it is in memory as a model of its own; else None."""
        start = None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        return None if start is None or self.args.sync_ref_model or is_sharded(start) else start

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The numbers of the model; with the rule `muse`, also whether the gold model's level is reached."""
        with same_random_numbers(self.accelerator.device):
            measured = self._measure(self.accelerator.unwrap_model(self.model), self._start())
        self.measured[self.state.global_step] = measured
        values = numbers(measured, self._gold)
        if self.rule == "muse":
            what = "forget_rouge" if "forget_rouge" in values else "forget_f1"
            reached = values[what] <= values[f"gold_{what}"]
            # The first evaluation that reaches it counts, not the last.
            before = any(entry.get(f"{metric_key_prefix}_{REACHED}") for entry in self.state.log_history)
            values[REACHED] = float(reached and not before)
            self.control.should_training_stop |= reached
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def result(self) -> Measured:
        """The numbers of the model that training ended with: of the evaluation that chose it, or measured now."""
        best = self.state.best_global_step if self.rule != "none" else None
        step = self.state.global_step if best is None else best
        if step not in self.measured:  # evaluated before the run was resumed
            self.evaluate()
            step = self.state.global_step
        return self.measured[step]


def check_rule(rule: Rule, every: float, gold: bool) -> None:
    """Refuse a rule that cannot choose; the arguments are those of `settle`.

    Raises:
        UsageError: if the rule is unknown, or needs a gold model or evaluations that there are none of.
    """
    if rule not in get_args(Rule):
        raise UsageError(f"best={rule!r} is not a rule; the rules are {', '.join(get_args(Rule))}")
    if rule != "none" and not gold:
        raise UsageError(f"best={rule!r} compares with a gold model, and there is none: name one, or take best='none'")
    if rule != "none" and not every:
        raise UsageError(f"best={rule!r} chooses among evaluations: set evaluate_every above 0, or take best='none'")


def settle(args: PreferenceConfig, rule: Rule, every: float, rows: int, gold: bool) -> None:
    """Set the training arguments that evaluations and the rule need, in place.

    Args:
        args: of the trainer.
        rule: which evaluation is the best.
        every: how often to measure, in epochs; 0 for only before and after.
        rows: of an epoch.
        gold: whether there is a gold model.

    Raises:
        UsageError: if the rule is unknown, or needs a gold model or evaluations that there are none of.
    """
    check_rule(rule, every, gold)
    if not every:
        return
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = max(1, round(every * math.ceil(rows / batch)))
    strategy = type(args.eval_strategy)("steps")
    args.eval_strategy, args.eval_steps = strategy, steps
    if rule == "none":
        return
    args.save_strategy, args.save_steps = type(args.save_strategy)("steps"), steps
    args.save_total_limit = args.save_total_limit or 2
    args.load_best_model_at_end, args.greater_is_better = True, True
    args.metric_for_best_model = REACHED if rule == "muse" else "quality_and_utility"
