"""What a run logs: running means over examples and processes, and the message for a loss that is not finite.

Nothing is read from the device until the means are needed, so logging costs one exchange between processes per log
line instead of one per metric and step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from prefopt.losses import Loss, LossOutput, PreferenceBatch
from prefopt.losses.scores import Role
from prefopt.scoring.scorer import Scored
from prefopt.trainer.learned import LearnedLoss

SHOWN = 8
"""Maximum rows that a message about a whole step quotes; all of them could fill the screen."""
_OF_ROWS = ("rewards/margins", "ratios/chosen", "ratios/rejected")
PART_OF_LOSS = "loss/"
"""Prefix of terms with their own means, each over its own examples; the means add up to `loss`."""


class RunningMeans:
    """Sums and counts by name, kept on the device they come from."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}

    def add(self, name: str, values: Tensor, count: Tensor | None = None) -> None:
        """Add (M,) per-example `values`; `count` replaces M where the mean is over something else, such as tokens."""
        # Apple GPUs have no float64.
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + values.detach().to(dtype).sum()
        entry[1] = entry[1] + (values.numel() if count is None else count.detach().to(dtype))

    def add_all(self, metrics: Mapping[str, Tensor]) -> None:
        for name, values in metrics.items():
            self.add(name, values)

    def sums(self) -> dict[str, tuple[float, float]]:
        """This process's sums and counts by name."""
        return {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}

    def load(self, sums: Mapping[str, Any]) -> None:
        """Replace the sums and counts by earlier ones."""
        self._sums = {name: [total, count] for name, (total, count) in sums.items()}

    def clear(self) -> None:
        self._sums = {}

    def copy(self) -> RunningMeans:
        """A copy of the sums and counts that later additions do not change."""
        copy = RunningMeans()
        copy._sums = {name: list(entry) for name, entry in self._sums.items()}
        return copy

    def drain(self) -> dict[str, float]:
        """Means over everything added on every process since the last call, which every process must make.

        Processes may have different names: a batch of binary feedback can lack a role.
        """
        local = self.sums()
        self._sums = {}
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for process in gather_object([local]):
            for name, (total, count) in process.items():
                sums[name][0] += total
                sums[name][1] += count
        means = {name: total / count for name, (total, count) in sums.items() if count > 0}
        if parts := [means.pop(name) for name in [*means] if name.startswith(PART_OF_LOSS)]:
            means["loss"] = sum(parts)
        return means | _unpaired_margins(means)


class RunMetrics:
    """Metrics gathered for the next log line, of training and of an evaluation.

    Attributes:
        train: means since the last log line.
        evaluation: means of the current evaluation.
        tokens: tokens trained on so far, on this process.
    """

    def __init__(self) -> None:
        self.train, self.evaluation = RunningMeans(), RunningMeans()
        self.tokens: Any = 0
        self._rows: dict[str, list[Tensor]] = {}

    def means(self, training: bool) -> RunningMeans:
        return self.train if training else self.evaluation

    def add_rows(self, metrics: Mapping[str, Tensor]) -> None:
        """Add a batch of an evaluation: its values by row, which stay on their device."""
        for name in _OF_ROWS:
            if (values := metrics.get(name)) is not None:
                self._rows.setdefault(name, []).append(values.detach().reshape(-1))

    def clear_rows(self) -> None:
        self._rows = {}

    def rows(self) -> dict[str, list[float]]:
        """The values by row of the last evaluation, on this process."""
        return {name: torch.cat(batches).float().tolist() for name, batches in self._rows.items()}

    def add_tokens(self, scored: Scored, training: bool) -> None:
        """Add a batch's token metrics: entropy, accuracy and count."""
        policy, rows, means = scored.tokens, scored.rows, self.means(training)
        chosen = rows.rows_of(Role.CHOSEN if rows.scores is None else Role.CANDIDATE)
        pairs = torch.cat([chosen, rows.rows_of(Role.REJECTED)])
        means.add("entropy", policy.entropy[pairs], policy.mask[pairs].sum())
        means.add("mean_token_accuracy", policy.is_top1[chosen], policy.mask[chosen].sum())
        if training:
            self.tokens = self.tokens + rows.attention[pairs].sum()

    def line(self, logs: Mapping[str, float], training: bool, learned: LearnedLoss | None) -> dict[str, float]:
        """The means to add to a log line, which every process must ask for.

        Args:
            logs: the log line so far; its keys tell which evaluation it belongs to.
            training: whether the model is being trained.
            learned: the optimizer of the objective's own parameters, if it has any.
        """
        # An evaluation of a named set logs under eval_<name>_.
        prefix = next((key.removesuffix("runtime") for key in logs if key.endswith("_runtime")), "")
        if training or prefix == "train_":
            prefix, means = "", self.train.drain()
        else:
            prefix, means = prefix or "eval_", self.evaluation.drain()
        if means and learned is not None and not prefix:
            means |= learned.logs()
        if means:
            means["num_tokens"] = sum(gather_object([int(self.tokens)]))
        return {f"{prefix}{name}": value for name, value in means.items()}


def _unpaired_margins(means: Mapping[str, float]) -> dict[str, float]:
    """Margins of feedback without pairs: the difference of the two roles' mean rewards."""
    margins = {}
    for name, chosen in means.items():
        if name.endswith("rewards/chosen"):
            prefix = name.removesuffix("chosen")
            rejected = means.get(f"{prefix}rejected")
            if rejected is not None and f"{prefix}margins" not in means:
                margins[f"{prefix}margins"] = chosen - rejected
    return margins


def still_reference(logs: Mapping[str, float]) -> bool:
    """Whether these metrics, before the first update, show that the policy equals the reference up to rounding.

    Both completions of a pair then have the same reward, and `rewards/accuracies` counts ties and rounding.
    """
    roles = ("candidate",) if "ratios/candidate" in logs else ("chosen", "rejected")
    ratios = [(f"ratios/{role}", f"lengths/{role}") for role in roles]
    return all(abs(logs.get(ratio, math.inf)) <= 0.01 * logs.get(length, 1.0) for ratio, length in ratios)


def batch_metrics(batch: PreferenceBatch, output: LossOutput) -> dict[str, Tensor]:
    """Per-example values to log: the objective's own, and log-probabilities, ratios and lengths of each role."""
    metrics = dict(output.metrics)
    with torch.no_grad():
        for role in ("chosen", "rejected", "sampled", "candidate"):
            scores = batch.role(role)
            if scores is not None and len(scores):
                metrics[f"logps/{role}"] = scores.logps
                metrics[f"lengths/{role}"] = scores.lengths
                if scores.ref_logps is not None:
                    metrics[f"ratios/{role}"] = scores.ratios
    return metrics


def rewards_not_logged(objective: Loss) -> str | None:
    """Why a run with this objective logs no rewards, and what to do; None if it logs them.

    Also None for the package's own objectives without rewards (`sft`), which have none by design.
    """
    foreign = [
        part for part in objective.modules()
        if isinstance(part, Loss) and not type(part).__module__.startswith("prefopt.losses.")
    ]  # fmt: skip
    if objective.has_reward or not foreign:
        return None
    name = type(foreign[0]).__name__
    return (
        f"{name} has no method reward(), so rewards/*, their margins and accuracies are not logged. To log them, "
        f"derive {name} from prefopt.losses.ReferencePairLoss, whose reward is beta * log-ratio, or give it a method "
        "reward(self, scores) that returns one value per completion"
    )


def describe_non_finite(
    batch: PreferenceBatch, output: LossOutput, loss: float, texts: Mapping[str, list[str]], step: int
) -> str:
    """A message about a loss that is NaN or infinite: which examples are, and in which quantities.

    Args:
        batch: the scored batch.
        output: the objective's output for it.
        loss: the loss, auxiliary losses included.
        texts: decoded rows of each role, in the order of the batch.
        step: the optimizer step.
    """
    lines = []
    spoiled = _spoiled_values(batch, output)
    for role, decoded in texts.items():
        scores = batch.role(role)
        if scores is None:
            continue
        values = {"log-probability": scores.logps}
        if scores.ref_logps is not None:
            values["reference log-probability"] = scores.ref_logps
        for i, text in enumerate(decoded):
            numbers = [f"{name} {float(value[i].detach()):g}" for name, value in values.items()]
            finite = all(bool(torch.isfinite(value[i])) for value in values.values())
            if not finite or (role, i) in spoiled:
                numbers += spoiled.get((role, i), []) if finite else []
                lines.append(f"{role} {i}: {', '.join(numbers)}; text {shortened(text)}")
    if not lines:
        rows = [f"{role} {i}: text {shortened(text)}" for role in texts for i, text in enumerate(texts[role])]
        lines = ["no single example; the objective itself overflowed. Its rows:", *rows[:SHOWN]]
        lines += [f"and {len(rows) - SHOWN} more"] * (len(rows) > SHOWN)
    listed = "\n  ".join(lines)
    return f"the loss is {loss} at step {step}. Not finite in this batch:\n  {listed}"


def _spoiled_values(batch: PreferenceBatch, output: LossOutput) -> dict[tuple[str, int], list[str]]:
    """Rows for which the objective, or one of its terms, is not finite: (role, index) -> texts with the values."""
    roles = ("chosen", "rejected", "candidate")
    places = [(role, i) for role in roles for i in range(len(batch.role(role) or ()))]
    vectors = {name.removesuffix("/loss"): value for name, value in output.metrics.items() if name.endswith("/loss")}
    if output.per_example is not None and not vectors:
        vectors[""] = output.per_example
    spoiled: dict[tuple[str, int], list[str]] = {}
    for name, values in vectors.items():
        for index in (~torch.isfinite(values.detach())).nonzero().flatten().tolist():
            if len(values) == len(places):
                rows = [places[index]]
            elif batch.candidate is not None:  # one value per group
                groups = batch.candidate.groups.tolist()
                rows = [("candidate", i) for i, group in enumerate(groups) if group == index]
            else:  # one value per pair, or the values of one role
                rows = [(role, index) for role in ("chosen", "rejected") if index < len(batch.role(role) or ())]
            for row in rows:
                spoiled.setdefault(row, []).append(f"{name} loss {values[index].item():g}".strip())
    return spoiled


def shortened(text: str) -> str:
    """A row's text, quoted: its beginning and its end (the completion)."""
    return repr(text) if len(text) <= 240 else f"{text[:120]!r} ... {text[-120:]!r}"
