"""Sampling from a model in memory: samples of a prompt share its key-value cache, and finished rows leave the batch.

A model whose cache cannot be reordered by rows, or that computes its positions itself, goes through its own `generate`
with the same draws: slower, with the same samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from prefopt.generation.cache import can_pick, pick_rows
from prefopt.generation.draw import TokenSampler
from prefopt.generation.samples import SamplingSettings

_SHRINK = 8
"""Finished rows leave the batch when they are one in this many; the rest is copied then."""

_WITHOUT_LOSS = {"output_router_logits": False}


@dataclass(frozen=True)
class Request:
    """A prompt in token ids, and the seeds of the samples to draw."""

    prompt: list[int]
    seeds: list[int]


@dataclass
class Drawn:
    """The tokens of a completion, its end included; `finished` is False if it was cut."""

    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class Rows:
    """The completions of a batch while they grow.

    Args:
        seeds: of each row.
        settings: how tokens are drawn, and the maximum length.
        ends: token ids that end a completion.
        stops: whether these tokens of a row hold a stop text; None without stop texts.
        device: of the logits.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        settings: SamplingSettings,
        ends: Sequence[int],
        stops: Callable[[list[int]], bool] | None,
        device: torch.device,
    ):
        self.longest = settings.max_new_tokens
        self._sampler = TokenSampler(settings, seeds, device)
        self._ends = torch.tensor(sorted(ends), device=device)
        self._stops = stops
        self._tokens = torch.zeros(len(seeds), self.longest, dtype=torch.long, device=device)
        self._lengths = torch.zeros(len(seeds), dtype=torch.long, device=device)
        self._finished = torch.zeros(len(seeds), dtype=torch.bool, device=device)

    def step(self, logits: Tensor, rows: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Draw the token at `position` for these rows, none of which has finished.

        Returns:
            (N,) the tokens, and (N,) whether the row has finished with it.
        """
        tokens = self._sampler.draw(logits, rows, position)
        self._tokens[rows, position] = tokens
        self._lengths[rows] = position + 1
        ended = torch.isin(tokens, self._ends)
        if self._stops is not None:
            drawn = self._tokens[rows, : position + 1].tolist()
            stopped = [self._stops(row) for row in drawn]
            ended = ended | torch.tensor(stopped, device=ended.device)
        self._finished[rows] = ended
        return tokens, ended

    def drawn(self) -> list[Drawn]:
        tokens, lengths = self._tokens.tolist(), self._lengths.tolist()
        rows = zip(tokens, lengths, self._finished.tolist(), strict=True)
        return [Drawn(row[:length], finished) for row, length, finished in rows]


def decode(model: Any, requests: Sequence[Request], rows: Rows, pad: int) -> None:
    """Draw all samples of the requests into `rows`, request by request.

    Args:
        model: a causal language model in evaluation mode.
        requests: prompts of similar length, since they are padded to the longest.
        rows: with the seeds of the requests, in order.
        pad: the padding token.
    """
    with torch.inference_mode():
        if _takes_positions(model):
            cache, logits, mask = _prefill(model, requests, pad)
            if can_pick(cache):
                _decode_shared(model, rows, cache, logits, mask)
                return
        _generate(model, requests, rows, pad)


def _prefill(model: Any, requests: Sequence[Request], pad: int) -> tuple[Any, Tensor, Tensor]:
    """Run the prompts once each, and repeat what comes out for their samples.

    Returns:
        The cache, (N, V) logits of the first token, (N, L) which tokens of the cache are attended to.
    """
    ids, mask = _padded([request.prompt for request in requests], pad, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **_options(model))
    cache, logits = out.past_key_values, out.logits[:, -1]
    owner = [number for number, request in enumerate(requests) for _ in request.seeds]
    index = torch.tensor(owner, device=model.device)
    if can_pick(cache):
        pick_rows(cache, index)
    return cache, logits[index], mask[index]


def _decode_shared(model: Any, rows: Rows, cache: Any, logits: Tensor, mask: Tensor) -> None:
    active = torch.arange(len(mask), device=mask.device)  # the row of each line of the batch
    left = torch.ones_like(active, dtype=torch.bool)  # lines that have not finished
    lengths = mask.sum(-1)
    options = _options(model)
    for position in range(rows.longest):
        tokens = torch.zeros_like(active)
        tokens[left], ended = rows.step(logits[left], active[left], position)
        left[left.clone()] = ~ended
        remaining = int(left.sum())
        if remaining == 0 or position + 1 == rows.longest:
            return
        if (len(left) - remaining) * _SHRINK >= len(left):
            index = left.nonzero()[:, 0]
            pick_rows(cache, index)
            active, tokens, mask, lengths = active[index], tokens[index], mask[index], lengths[index]
            left = torch.ones_like(active, dtype=torch.bool)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=(lengths + position)[:, None],
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        logits = out.logits[:, -1]


def _padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def _network(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _takes_positions(model: Any) -> bool:
    network = _network(model)
    taken = inspect.signature(network.forward).parameters
    return {"position_ids", "past_key_values"} <= set(taken) and not network.config.is_encoder_decoder


def _options(model: Any) -> dict[str, Any]:
    """Logits of the last position alone, and no auxiliary loss of experts, where the model has such arguments."""
    taken = inspect.signature(_network(model).forward).parameters
    return {name: value for name, value in {**_WITHOUT_LOSS, "logits_to_keep": 1}.items() if name in taken}


class _FromRows(LogitsProcessor):  # type: ignore[misc]
    """Lets `generate` take the tokens that `Rows` draws: all others get no probability."""

    def __init__(self, rows: Rows, count: int, prompt_length: int, pad: int, device: torch.device):
        self._rows, self._prompt_length, self._pad = rows, prompt_length, pad
        self._every = torch.arange(count, device=device)
        self.left = torch.ones(count, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        left, tokens = self.left, torch.full_like(self._every, self._pad)
        position = input_ids.shape[1] - self._prompt_length
        tokens[left], ended = self._rows.step(scores[left], self._every[left], position)
        left[left.clone()] = ~ended
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class _AllFinished(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, processor: _FromRows):
        self._processor = processor

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        return ~self._processor.left


def _generate(model: Any, requests: Sequence[Request], rows: Rows, pad: int) -> None:
    prompts = [request.prompt for request in requests for _ in request.seeds]
    ids, mask = _padded(prompts, pad, model.device)
    processor = _FromRows(rows, len(prompts), ids.shape[1], pad, ids.device)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=rows.longest,
        pad_token_id=pad,
        eos_token_id=None,
    )
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([processor]),
        **{name: value for name, value in _options(model).items() if name in _WITHOUT_LOSS},
        stopping_criteria=StoppingCriteriaList([_AllFinished(processor)]),
    )
