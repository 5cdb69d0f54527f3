"""KL from a reference, estimated on a model's own samples with the exact KL of each next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prefopt.generation.answers import draw_each
from prefopt.generation.prompts import end_tokens, pad_token
from prefopt.generation.samples import SamplingSettings
from prefopt.losses import Need, parse
from prefopt.scoring import PreferenceCollator
from prefopt.scoring.exact import undisturbed
from prefopt.scoring.layout import Layout
from prefopt.scoring.measure import Extras
from prefopt.scoring.model import has_adapter
from prefopt.scoring.scorer import Scorer, rows_on_device

_SCORED_AT_ONCE = 4
"""Rows whose logits are in memory together, of both models."""


def has_reference(model: Any, reference: Any) -> bool:
    """Whether there is something to compare a model with: another model, or itself without its adapter."""
    return reference is not None or has_adapter(model)


def kl_of_samples(
    model: Any, reference: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, seed: int = 0
) -> list[float]:
    """KL(model || reference) of the first `max_new_tokens` tokens of an answer, in nats, estimated for each prompt.

    One answer is drawn from the model at temperature 1 from all tokens, and KL(model || reference) of the next token
    is summed over its positions, each from both whole distributions. The mean over prompts is an unbiased estimate of
    the KL of whole answers (up to that length), with less variance than the mean log-ratio of the answers.

    Args:
        model: in memory, whole on this process's device; its mode is left as it is.
        reference: on the same device; None for the model without its adapter.
        tokenizer: of both, or a processor.
        prompts: token ids, none of them empty.
        max_new_tokens: maximum length of an answer.
        seed: of the draws. The same prompts and seed have the same random numbers in every run.
    """
    settings = SamplingSettings(samples=1, temperature=1.0, max_new_tokens=max_new_tokens)
    seeds = [seed * 1_000_003 + number for number in range(len(prompts))]
    drawn = draw_each(model, tokenizer, prompts, settings, seeds)
    pad = pad_token(tokenizer, end_tokens(model, tokenizer))
    # One process may call this alone, so the layout is tried out without the others.
    collate, layout = PreferenceCollator(pad), Layout("padded", gather=lambda value: [value])
    scorer = Scorer(parse("kl_online"), model, reference, layout=layout)
    values: list[float] = []
    with undisturbed(model):
        for at in range(0, len(drawn), _SCORED_AT_ONCE):
            part = slice(at, at + _SCORED_AT_ONCE)
            examples = [
                {"prompt_ids": prompt, "completion_ids": one.tokens, "label": True}
                for prompt, one in zip(prompts[part], drawn[part], strict=True)
            ]
            rows = rows_on_device(collate(examples), model)
            of_reference = scorer.run_reference(rows, keep_logits=True)
            extras = Extras(Need.REVERSE_KL, statistics=False)
            tokens, _ = layout.score(model, rows, extras=extras, reference=of_reference)
            kl: Tensor = tokens.quantities["token_reverse_kl"]
            values += kl.double().masked_fill(~tokens.mask, 0.0).sum(-1).tolist()
    return values
