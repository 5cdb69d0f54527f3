"""Sampling from a model in memory: samples of a prompt share its key-value cache, and finished rows
leave the batch, where rows of the next prompts take their place.

A model whose cache cannot be reordered by rows, or that computes its positions itself, goes through its own `generate`
with the same draws: slower, with the same samples.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as padded
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from prefopt.generation.cache import can_join, can_pick, join, pick_rows
from prefopt.generation.draw import TokenSampler
from prefopt.generation.samples import SamplingSettings

_SHRINK = 8
"""Finished rows leave the batch when they are one in this many; the rest is copied then."""
_REFILL = 4
"""New rows come in when one in this many places is free."""

_WITHOUT_LOSS = {"output_router_logits": False}


@dataclass(frozen=True)
class Request:
    """A prompt in token ids, and which of the rows are its samples."""

    prompt: list[int]
    rows: Sequence[int]


@dataclass
class Drawn:
    """The tokens of a completion, its end included; `finished` is False if it was cut."""

    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class Rows:
    """Completions while they grow.

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

    def step(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the next token of these rows, none of which is done.

        Returns:
            (N,) the tokens, and (N,) whether the row is done with it: ended, or as long as it may be.
        """
        positions = self._lengths[rows]
        tokens = self._sampler.draw(logits, rows, positions)
        self._tokens[rows, positions] = tokens
        self._lengths[rows] = positions + 1
        ended = torch.isin(tokens, self._ends)
        if self._stops is not None:
            drawn = zip(self._tokens[rows].tolist(), positions.tolist(), strict=True)
            stopped = [self._stops(row[: position + 1]) for row, position in drawn]
            ended = ended | torch.tensor(stopped, device=ended.device)
        self._finished[rows] = ended
        return tokens, ended | (positions + 1 == self.longest)

    def drawn(self) -> list[Drawn]:
        tokens, lengths = self._tokens.tolist(), self._lengths.tolist()
        rows = zip(tokens, lengths, self._finished.tolist(), strict=True)
        return [Drawn(row[:length], finished) for row, length, finished in rows]


def decode(model: Any, requests: Sequence[Request], rows: Rows, pad: int, at_once: int) -> None:
    """Draw all samples of the requests into `rows`; where rows leave the batch, those of the next requests come in.

    Args:
        model: a causal language model in evaluation mode.
        requests: ordered by length, since neighbours are padded to the longest; none has more than `at_once` rows.
        rows: what is drawn goes there.
        pad: the padding token.
        at_once: maximum rows of the batch.
    """
    waiting = deque(requests)
    lines: _Lines | None = None
    with torch.inference_mode():
        while waiting or lines is not None:
            if lines is None or (lines.can_grow and lines.free(at_once) * _REFILL >= at_once):
                batch = _next_batch(waiting, at_once if lines is None else lines.free(at_once))
                if batch and not _takes_positions(model):
                    _generate(model, batch, rows, pad)
                    continue
                if batch:
                    begun = _prefill(model, batch, pad)
                    if not can_pick(begun.cache):
                        _generate(model, batch, rows, pad)
                        continue
                    pick_rows(begun.cache, begun.owner)
                    lines = begun if lines is None else lines.join(begun)
            lines = lines.step(model, rows) if lines is not None else None


def _next_batch(waiting: deque[Request], free: int) -> list[Request]:
    """Take the requests that fit."""
    batch: list[Request] = []
    while waiting and len(waiting[0].rows) <= free:
        free -= len(waiting[0].rows)
        batch.append(waiting.popleft())
    return batch


@dataclass
class _Lines:
    """The lines of a batch that is being decoded, one a row.

    Attributes:
        cache: keys and values of what was read.
        mask: (N, L) which tokens of the cache are attended to.
        rows: (N,) the row of each line.
        logits: (N, V) of the next token.
        left: (N,) which lines are not done.
        owner: (N,) the prompt of each line, after `_prefill`.
    """

    cache: Any
    mask: Tensor
    rows: Tensor
    logits: Tensor
    left: Tensor
    owner: Tensor

    @property
    def can_grow(self) -> bool:
        return can_join(self.cache)

    def free(self, at_once: int) -> int:
        return at_once - int(self.left.sum())

    def step(self, model: Any, rows: Rows) -> _Lines | None:
        """Draw a token of each line and run the model on it; None if all are done."""
        tokens = torch.zeros_like(self.rows)
        tokens[self.left], done = rows.step(self.logits[self.left], self.rows[self.left])
        self.left[self.left.clone()] = ~done
        remaining = int(self.left.sum())
        if remaining == 0:
            return None
        if (len(self.left) - remaining) * _SHRINK >= len(self.left):
            tokens = tokens[self.left]
            self._drop_done()
        positions = self.mask.sum(-1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        out = model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            **_options(model),
        )
        self.logits = out.logits[:, -1]
        return self

    def join(self, other: _Lines) -> _Lines:
        """Both as one batch, the shorter one padded on the left."""
        self._drop_done()
        unused = int(self.mask.any(0).int().argmax())  # what only lines that are gone had
        first, second = self.mask[:, unused:], other.mask
        length = max(first.shape[1], second.shape[1])
        join(self.cache, other.cache, unused)
        self.mask = torch.cat([padded(mask, (length - mask.shape[1], 0)) for mask in (first, second)])
        self.rows, self.logits = torch.cat([self.rows, other.rows]), torch.cat([self.logits, other.logits])
        self.left = torch.ones_like(self.rows, dtype=torch.bool)
        return self

    def _drop_done(self) -> None:
        index = self.left.nonzero()[:, 0]
        if len(index) < len(self.left):
            pick_rows(self.cache, index)
            self.mask, self.rows, self.logits = self.mask[index], self.rows[index], self.logits[index]
            self.left = torch.ones_like(self.rows, dtype=torch.bool)


def _prefill(model: Any, requests: Sequence[Request], pad: int) -> _Lines:
    """Run the prompts once each; the cache has a line a prompt still, everything else a line a sample."""
    ids, mask = _padded([request.prompt for request in requests], pad, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **_options(model))
    owner = [number for number, request in enumerate(requests) for _ in request.rows]
    index = torch.tensor(owner, device=model.device)
    rows = torch.tensor([row for request in requests for row in request.rows], device=model.device)
    left = torch.ones_like(rows, dtype=torch.bool)
    return _Lines(out.past_key_values, mask[index], rows, out.logits[:, -1][index], left, index)


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

    def __init__(self, rows: Rows, numbers: Tensor, pad: int):
        self._rows, self._numbers, self._pad = rows, numbers, pad
        self.left = torch.ones_like(numbers, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        left, tokens = self.left, torch.full_like(self._numbers, self._pad)
        tokens[left], done = self._rows.step(scores[left], self._numbers[left])
        left[left.clone()] = ~done
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class _AllFinished(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, processor: _FromRows):
        self._processor = processor

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        return ~self._processor.left


def _generate(model: Any, requests: Sequence[Request], rows: Rows, pad: int) -> None:
    prompts = [request.prompt for request in requests for _ in request.rows]
    numbers = torch.tensor([row for request in requests for row in request.rows], device=model.device)
    ids, mask = _padded(prompts, pad, model.device)
    processor = _FromRows(rows, numbers, pad)
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
