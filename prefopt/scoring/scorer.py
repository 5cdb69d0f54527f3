"""From a collated batch to the batch of a loss: exactly the rows, models and quantities that the loss needs.

A `Scorer` owns the models that a batch is scored under, the layout they are called in, and the reference cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.losses import Loss, Need, PreferenceBatch, Scores
from prefopt.losses.scores import PREVIOUS_LOGPS, REFERENCE_LOGPS, Role
from prefopt.safety.errors import UsageError
from prefopt.scoring.assemble import assemble_batch, extras_for
from prefopt.scoring.cache import ReferenceCache
from prefopt.scoring.device import places_of
from prefopt.scoring.layout import Layout
from prefopt.scoring.logprobs import TokenScores
from prefopt.scoring.measure import BARE, Extras
from prefopt.scoring.model import has_adapter, peeled
from prefopt.scoring.rows import RowBatch


@dataclass(frozen=True)
class Scored:
    """A scored batch.

    Attributes:
        batch: what the loss sees.
        outputs: the policy's output for the rows that the loss is about.
        tokens: the policy's token scores.
        rows: the rows that these belong to.
    """

    batch: PreferenceBatch
    outputs: Any
    tokens: TokenScores
    rows: RowBatch


@dataclass
class Scorer:
    """Scores batches under the policy, its reference and the previous iterate, as far as a loss needs them.

    A trainer calls `score`. Your own loop calls the scorer itself:

        collate = PreferenceCollator.for_loss(loss, tokenizer.pad_token_id)
        scorer = Scorer(loss, model, reference=reference)
        output = loss(scorer(collate(rows)))  # rows: dicts with prompt_ids, chosen_ids and rejected_ids

    Make one and keep it: the first batch decides how models are called. Models are called in the mode that they are
    in, so turn dropout off, or the policy differs from its reference before training.

    Attributes:
        loss: its needs and roles decide what is computed.
        policy: the trained model, as it is called without gradient: not through what follows its backward pass.
        reference: a separate model; None where it is the policy with its adapter disabled.
        previous: the previous iterate of the policy; None where that is the reference, or comes with the data.
        layout: how models are called; default: each prompt once where that gives the model's own numbers.
        cache: of the reference's log-probabilities; None to run the reference each time.
        trusts_data: whether reference log-probabilities that come with the data are this reference's.
        policy_options: further keyword arguments of the policy, in the padded layout.
        autocast: makes the context that models without gradient run in; the caller sets that of the policy.
    """

    loss: Loss
    policy: nn.Module
    reference: nn.Module | None = None
    previous: nn.Module | None = None
    layout: Layout = field(default_factory=lambda: Layout("auto"))
    cache: ReferenceCache | None = None
    trusts_data: bool = True
    policy_options: dict[str, Any] = field(default_factory=dict)
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    def __call__(
        self, rows: RowBatch | Mapping[str, Any], model: nn.Module | None = None, *, every_role: bool = False
    ) -> PreferenceBatch:
        """What the loss is called with: a batch scored, with gradient where that is enabled.

        Args:
            rows: a batch of `PreferenceCollator`. Its tensors may be on another device than the model.
            model: the policy inside its wrapper (DDP, FSDP, DeepSpeed) if it has one; default: `policy`.
            every_role: also score chosen and rejected completions that the loss does not ask for.

        Raises:
            UsageError: if the rows are not a collated batch, lack what the loss needs, or there is no reference.
        """
        if not isinstance(rows, RowBatch):
            rows = rows_on_device(rows, self.policy)
        self._refuse_without(rows)
        return self.score(self.policy if model is None else model, rows, every_role=every_role).batch

    def score(self, model: nn.Module, rows: RowBatch, *, every_role: bool, all_logits: bool = False) -> Scored:
        """Score a batch for the loss.

        Args:
            model: the policy as it is trained, wrapped or not.
            rows: a collated batch.
            every_role: also score chosen and rejected completions that the loss does not ask for, so that they can be
                logged.
            all_logits: keep the logits of every position in the policy's output. Distributions are compared in one
                layout, so the reference follows.
        """
        if not self.trusts_data:
            given = {name: logps for name, logps in rows.given_logps.items() if name not in REFERENCE_LOGPS}
            rows = replace(rows, given_logps=given)
        if not all_logits:
            self.layout.meet(model, rows)
        scored = self._needed(rows, every_role)
        extras = extras_for(self.loss)
        reference, ref_logps = self._reference(scored, extras, all_logits)
        tokens, outputs = self.layout.score(
            model, scored, extras=extras, reference=reference, all_logits=all_logits, model_options=self.policy_options
        )
        ref_token_logps = None if reference is None else reference.logps
        ref_states = None if reference is None else reference.quantities.get("states")
        prev_logps = self._previous(scored, ref_logps, ref_token_logps, all_logits)
        batch = assemble_batch(scored, tokens, self.loss, ref_token_logps, ref_logps, prev_logps, ref_states)
        if Need.MISMATCHED in self.loss.needs:
            batch = replace(batch, mismatched=self._mismatched(model, rows, all_logits))
        return Scored(batch, outputs, tokens, scored)

    def reference_scores(
        self, rows: RowBatch, *, keep_logits: bool = False, all_logits: bool = False, layers: tuple[int, ...] = ()
    ) -> TokenScores:
        """Token scores under the reference, from the cache where there is one; with hidden states after `layers`."""
        if self.cache is None or layers:
            return self.run_reference(rows, keep_logits=keep_logits, all_logits=all_logits, layers=layers)

        def compute(missing: Tensor) -> Tensor:
            some = rows.select_rows(missing)
            # The layout runs its trial on the first two examples of its batch.
            return self.run_reference(
                replace(some, examples=torch.unique(some.examples, return_inverse=True)[1])
            ).logps

        logps = self.cache.scores(rows, compute, lambda missing: any(self.layout.gather(missing)))
        mask = rows.completion[:, 1:].bool()
        return TokenScores(logps, torch.zeros_like(logps), torch.zeros_like(mask), mask)

    def run_reference(
        self,
        rows: RowBatch,
        model: nn.Module | None = None,
        *,
        keep_logits: bool = False,
        all_logits: bool = False,
        layers: tuple[int, ...] = (),
    ) -> TokenScores:
        """Token scores under the frozen reference, computed by its model.

        Args:
            rows: a collated batch.
            model: which to call; the reference, or the policy it is a part of, if None.
            keep_logits: hand on what it takes to have the logits again.
            all_logits: in the padded layout, with whole logits.
            layers: after which ones to keep hidden states.
        """
        if model is None:
            model = self._reference_model()
        with self.as_reference():
            return self._run_frozen(model, rows, layers, keep_logits=keep_logits, all_logits=all_logits)

    def _refuse_without(self, rows: RowBatch) -> None:
        """Refuse a batch without the rows that the loss is about, or that only some collators or loops add."""
        if self.loss.grouped != (rows.scores is not None):
            these, those = ("pairs or single completions", "groups")[:: -1 if rows.scores is not None else 1]
            raise UsageError(
                f"{self.loss} is about {those}, and the batch's rows are {these}: use another loss or data"
            )
        if Need.MISMATCHED in self.loss.needs and not rows.alone and not any(rows.playing([Role.MISMATCHED])):
            raise UsageError(
                f"{self.loss} compares with completions under other prompts, and the batch has none: make its "
                "collator with PreferenceCollator.for_loss(loss, ...)"
            )
        if "sampled" in self.loss.roles and not any(rows.playing([Role.SAMPLED])):
            raise UsageError(
                f"{self.loss} needs completions sampled from the policy, and the batch has none: add them with "
                "prefopt.scoring.with_samples(rows, model, ...)"
            )

    def _reference_model(self) -> nn.Module:
        if self.reference is not None:
            return self.reference
        if not has_adapter(self.policy):
            raise UsageError(
                f"{self.loss} compares with a reference, and the scorer has none: pass Scorer(..., reference=MODEL), "
                "a frozen copy of the policy before training. (A PEFT model needs none: it is its own, with the "
                "adapter off.)"
            )
        return self.policy

    def release(self) -> None:
        """Restore the attention of all models."""
        for model in (self.policy, self.reference, self.previous):
            if model is not None:
                self.layout.release(model)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Context in which the policy gives the reference's numbers: its adapter is off if that is the reference."""
        policy: Any = peeled(self.policy)
        if self.reference is not None or not has_adapter(policy):
            yield
            return
        with _same_trainable(policy):
            if "ref" not in policy.peft_config:
                with policy.disable_adapter():
                    yield
                return
            # Training continues from an adapter: TRL keeps its frozen copy under this name.
            active = policy.active_adapter
            policy.set_adapter("ref")
            try:
                yield
            finally:
                policy.set_adapter(active)

    def _run_frozen(
        self, model: nn.Module, rows: RowBatch, layers: tuple[int, ...] = (), **options: Any
    ) -> TokenScores:
        with torch.no_grad(), self.autocast():
            return self.layout.score(model, rows, extras=replace(BARE, layers=layers), **options)[0]

    def _needed(self, rows: RowBatch, every_role: bool) -> RowBatch:
        """The rows that the policy is scored on with gradient."""
        # For rows of other collators it is unknown which inputs (such as images) belong to them, so all rows stay.
        every_role = every_role or not rows.divisible
        wanted = [r for r in Role if r.field in self.loss.roles or (every_role and r is not Role.MISMATCHED)]
        needed = rows.playing(wanted)
        return rows if all(needed) else rows.select_rows(_one_at_least(needed))

    def _reference(self, rows: RowBatch, extras: Extras, all_logits: bool) -> tuple[TokenScores | None, Tensor | None]:
        """Token scores under the reference, or its sums where these came with the data."""
        # Without a previous iterate, the reference takes its place.
        stands_in = self.previous is None and "prev_chosen_logps" not in rows.given_logps
        previous = Need.PREVIOUS if stands_in else Need.NONE
        if (
            "ref_chosen_logps" in rows.given_logps
            and not extras.beside_reference
            and self.loss.needs & (Need.REFERENCE | previous)
        ):
            return None, rows.by_row(*(rows.given_logps[name] for name in REFERENCE_LOGPS))
        if not self.loss.needs.compares:
            return None, None
        needs = {role: self.loss.needs_of(role.field) for role in Role}
        compared = rows.playing([role for role, need in needs.items() if need.compares or need & previous])
        layers = extras.layers if extras.beside_reference else ()
        # Logits are compared row by row with the policy's, so they are kept for all rows or for none.
        if extras.full_reference or not rows.divisible or all(compared):
            keep = extras.full_reference
            return self.reference_scores(rows, keep_logits=keep, all_logits=all_logits, layers=layers), None
        compared = _one_at_least(compared)
        some = self.reference_scores(rows.select_rows(compared), all_logits=all_logits, layers=layers)
        quantities = {name: _among(value, compared, rows) for name, value in some.quantities.items()}
        return replace(some, logps=_among(some.logps, compared, rows), quantities=quantities), None

    def _previous(
        self, rows: RowBatch, ref_logps: Tensor | None, ref_token_logps: Tensor | None, all_logits: bool
    ) -> Tensor | None:
        """(R,) sums under the previous iterate, where the loss needs them."""
        if Need.PREVIOUS not in self.loss.needs:
            return None
        if "prev_chosen_logps" in rows.given_logps:
            return rows.by_row(*(rows.given_logps[name] for name in PREVIOUS_LOGPS))
        if self.previous is not None:
            return self._run_frozen(self.previous, rows).logps.sum(-1)
        # The first iteration starts from the reference.
        if ref_token_logps is not None:
            return ref_token_logps.sum(-1)
        return self.reference_scores(rows, all_logits=all_logits).logps.sum(-1) if ref_logps is None else ref_logps

    def _mismatched(self, model: nn.Module, rows: RowBatch, all_logits: bool) -> Scores | None:
        """Scores of completions under other prompts: an estimate without gradient, so without a backward pass too."""
        mismatched = rows.playing([Role.MISMATCHED])
        if not any(mismatched):
            nothing = _nothing(rows)
            return assemble_batch(rows, nothing, self.loss, nothing.logps).mismatched
        moved = rows.select_rows(mismatched)
        with torch.no_grad():
            options = self.policy_options
            policy, _ = self.layout.score(model, moved, extras=BARE, all_logits=all_logits, model_options=options)
        compares = self.loss.needs.compares
        reference = self.reference_scores(moved, all_logits=all_logits).logps if compares else None
        return assemble_batch(moved, policy, self.loss, reference).mismatched


def rows_on_device(rows: Mapping[str, Any], policy: nn.Module) -> RowBatch:
    """The rows of a collated mapping, on the device of the policy.

    Raises:
        UsageError: for anything else than a batch of `PreferenceCollator`.
    """
    if not isinstance(rows, Mapping) or not {"input_ids", "completion_mask"} <= set(rows):
        what = f"a mapping with {', '.join(map(str, rows))}" if isinstance(rows, Mapping) else type(rows).__name__
        raise UsageError(
            f"a Scorer takes a batch of PreferenceCollator, got {what}: collate tokenized rows first, with "
            "PreferenceCollator.for_loss(loss, tokenizer.pad_token_id)(rows)"
        )
    device = next(policy.parameters()).device
    return RowBatch.of({k: v.to(device) if isinstance(v, Tensor) else v for k, v in rows.items()})


def _one_at_least(rows: list[bool]) -> list[bool]:
    """`rows`, or the first row where they are none.

    A micro-batch of single completions may lack every role that a model is asked about. No model can be called without
    a row, and it must be called all the same: other processes wait for it, in an exchange of shards, gradients or
    cached values. What the row that stands in gives belongs to a role that the loss does not read.
    """
    return rows if any(rows) else [row == 0 for row in range(len(rows))]


def _among(values: Tensor, some: list[bool], rows: RowBatch) -> Tensor:
    """(R, T - 1, ...) the values of some rows at their places among all, zero elsewhere.

    Args:
        values: (S, U, ...) of the rows that `some` is true for, U at most T - 1.
        some: of all R rows, whether it is one of them.
        rows: all of them, of T tokens.
    """
    everywhere = values.new_zeros((len(some), rows.ids.shape[1] - 1, *values.shape[2:]))
    everywhere[places_of(some, values.device), : values.shape[1]] = values
    return everywhere


def _nothing(rows: RowBatch) -> TokenScores:
    mask = torch.zeros_like(rows.ids, dtype=torch.bool)
    zeros = torch.zeros(mask.shape, device=mask.device)
    return TokenScores(zeros, zeros, mask, mask)


@contextlib.contextmanager
def _same_trainable(model: nn.Module) -> Iterator[None]:
    """Parameters that want gradients are the same afterwards: PEFT's switching of adapters unfreezes them."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, wanted in before:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
