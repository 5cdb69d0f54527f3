"""How far a round's model is from the initial one: the KL divergence, estimated on the model's own samples.

Two forward passes over one completion of each held-out prompt, with one model in memory at a time. Completions are
scored as training reads them: their texts are tokenized again, and an end token follows those that were not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from prefopt.data.conversation import answers_end
from prefopt.data.encodings import Encodings, text_tokenizer
from prefopt.evaluation.texts import sampled_kl
from prefopt.generation.memory import free_memory
from prefopt.generation.prompts import prompt_ids
from prefopt.generation.samples import PromptRow, Sample, SamplingSettings
from prefopt.scoring import PreferenceCollator, RowBatch, score_rows
from prefopt.scoring.exact import undisturbed
from prefopt.scoring.measure import BARE
from prefopt.scoring.model import positions_of

SCHEMA = "prefopt.kl/1"

ROWS_AT_ONCE = 16
"""Completions in one batch. Batches are shared out among processes whole, so that their number changes no result."""

Ids = tuple[list[int], list[int]]
"""A prompt and its completion."""


@dataclass(frozen=True)
class CompletionLogps:
    """One completion under two models.

    Attributes:
        prompt_id, index: of the sample.
        tokens: that were scored; the prompt's are not.
        logp: the log-probability of the completion under the model that drew it, in nats.
        ref_logp: the same under the initial model.
    """

    prompt_id: str
    index: int
    tokens: int
    logp: float
    ref_logp: float

    def line(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def kl_sampling(settings: SamplingSettings) -> SamplingSettings:
    """How the completions for KL are drawn: one of each prompt, at temperature 1 from all tokens.

    Under other settings they would be samples of another distribution than the model's.
    """
    plain = (settings.temperature, settings.top_p, settings.top_k) == (1.0, 1.0, 0)
    samples = settings.samples if plain else 1
    return SamplingSettings(samples, 1.0, 1.0, 0, settings.max_new_tokens, settings.stop, settings.seed)


def score_completions(
    samples: Sequence[Sample],
    prompts: Sequence[PromptRow],
    tokenizer: Any,
    loads: Sequence[Callable[[], Any]],
    stop: Sequence[str] = (),
) -> list[CompletionLogps]:
    """The log-probabilities of samples under the model that drew them and under the initial one.

    Under `accelerate launch` every process must call this, and gets all of them.

    Args:
        samples: of the first model.
        prompts: of the samples.
        tokenizer: of both models.
        loads: load the model that drew the samples, and the initial one.
        stop: texts that ended samples; what ended a sample is then not scored.
    """
    rows = _rows(samples, prompts, tokenizer, stop)
    policy, reference = (_summed_logps(load, rows, tokenizer) for load in loads)
    return [
        CompletionLogps(sample.prompt_id, sample.index, len(row[1]), logp, ref_logp)
        for sample, row, logp, ref_logp in zip(samples, rows, policy, reference, strict=True)
    ]


def kl_numbers(scored: Sequence[CompletionLogps]) -> dict[str, Any]:
    """KL(model || initial model) per completion, in nats: the mean of log p - log p_initial over prompts.

    Returns:
        `mean`, `standard_error` over prompts (None for one prompt), `completions`.
    """
    differences = sampled_kl([one.logp for one in scored], [one.ref_logp for one in scored])
    by_prompt: dict[str, list[float]] = {}
    for one, difference in zip(scored, differences, strict=True):
        by_prompt.setdefault(one.prompt_id, []).append(float(difference))
    means = np.array([np.mean(of_prompt) for of_prompt in by_prompt.values()])
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    return {"mean": float(means.mean()), "standard_error": error, "completions": len(scored)}


def _rows(samples: Sequence[Sample], prompts: Sequence[PromptRow], tokenizer: Any, stop: Sequence[str]) -> list[Ids]:
    text, encodings = text_tokenizer(tokenizer), Encodings(tokenizer)
    by_id = {row.id: (row, prompt_ids(row, tokenizer, encodings)) for row in prompts}
    template_end = text.added_tokens_encoder.get(answers_end(tokenizer), text.eos_token_id)
    rows = []
    for sample in samples:
        row, prompt = by_id[sample.prompt_id]
        completion = list(text(sample.completion, add_special_tokens=False)["input_ids"])
        end = template_end if isinstance(row.prompt, list) else text.eos_token_id
        rows.append((prompt, completion + [end] * (sample.finished and not stop and end is not None)))
    return rows


def _summed_logps(load: Callable[[], Any], rows: Sequence[Ids], tokenizer: Any) -> list[float]:
    """The log-probability of each completion under a model, which is in memory for this call only."""
    model, text, state = load(), text_tokenizer(tokenizer), PartialState()
    pad = text.eos_token_id if text.pad_token_id is None else text.pad_token_id
    collate = PreferenceCollator(pad)
    starts = range(0, len(rows), ROWS_AT_ONCE)
    sums: list[tuple[int, list[float]]] = []
    with undisturbed(model):
        for at in starts[state.process_index :: state.num_processes]:
            batch = rows[at : at + ROWS_AT_ONCE]
            sums.append((at, _of_batch(model, collate, batch)))
    del model
    free_memory()
    return [value for _, values in sorted(gather_object(sums)) for value in values]


def _of_batch(model: Any, collate: PreferenceCollator, batch: Sequence[Ids]) -> list[float]:
    limit = positions_of(model)
    # Tokenized again, a text may be a few tokens longer than it was drawn.
    examples = [{"prompt_ids": p, "completion_ids": (p + c)[:limit][len(p) :], "label": True} for p, c in batch]
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in collate(examples).items()
    }
    rows = RowBatch.of(inputs)
    tokens, _ = score_rows(model, rows.model_inputs, rows.completion, extras=BARE)
    summed: list[float] = tokens.logps.double().masked_fill(~tokens.mask, 0.0).sum(-1).tolist()
    return summed
