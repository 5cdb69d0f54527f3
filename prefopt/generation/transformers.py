"""Samples from a model in memory: the default generator.

Prompts are dealt into chunks in file order, and a chunk is drawn by one process: so a run that resumes at a chunk, and
a run with more processes, repeats the same computations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from prefopt.data.encodings import Encodings
from prefopt.generation.decode import Drawn, Request, Rows, decode
from prefopt.generation.memory import free_memory
from prefopt.generation.prompts import Reader, end_tokens, pad_token, prompt_ids
from prefopt.generation.samples import PromptRow, Sample, SamplingSettings, sample_seed, stored_settings
from prefopt.generation.sharded import whole_weights
from prefopt.safety.errors import UsageError
from prefopt.scoring.fingerprint import fingerprint
from prefopt.scoring.model import positions_of

ROWS_AT_ONCE = {"cpu": 64, "elsewhere": 256}
"""Samples in one batch, by kind of device."""


class TransformersGenerator:
    """Draws samples from a transformers model, with or without a LoRA adapter.

    Args:
        model: in memory, taken out of wrappers; its mode and weights are left as they are. Weights that DeepSpeed
            ZeRO-3 or FSDP2 shard are gathered while samples are drawn.
        tokenizer: the model's, or a processor.
        name: what stands in `Sample.model`; a digest of the weights if left out.
        rows_at_once: samples in one batch; by kind of device if left out.
        chunk_prompts: prompts that are drawn together, by one process; a file of samples resumes at a multiple.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        rows_at_once: int | None = None,
        chunk_prompts: int = 16,
    ):
        self._model, self._tokenizer = model, tokenizer
        self.name = fingerprint(model) if name is None else name
        self.chunk_prompts = chunk_prompts
        self._rows_at_once = rows_at_once or ROWS_AT_ONCE["cpu" if model.device.type == "cpu" else "elsewhere"]
        self._ends = end_tokens(model, tokenizer)

    def sample(
        self, prompts: Sequence[PromptRow], settings: SamplingSettings, round_number: int = 0
    ) -> Iterator[list[Sample]]:
        """The K samples of each prompt, in the order of the prompts.

        Under `accelerate launch` every process must call this with the same arguments, and gets all samples.
        """
        encodings = Encodings(self._tokenizer)
        ids = [prompt_ids(row, self._tokenizer, encodings) for row in prompts]
        self._check_length(prompts, ids, settings)
        processes = PartialState()
        chunks = range(0, len(prompts), self.chunk_prompts)
        with whole_weights(self._model):
            for turn in range(0, len(chunks), processes.num_processes):
                mine = turn + processes.process_index
                samples: list[list[Sample]] = []
                if mine < len(chunks):
                    part = slice(chunks[mine], chunks[mine] + self.chunk_prompts)
                    samples = self._chunk(prompts[part], ids[part], settings, round_number)
                yield from gather_object(samples)

    def close(self) -> None:
        """Forget the model, and give cached memory of the device back."""
        self._model = None
        free_memory()

    def _chunk(
        self, prompts: Sequence[PromptRow], ids: Sequence[list[int]], settings: SamplingSettings, round_number: int
    ) -> list[list[Sample]]:
        seeds = [
            [sample_seed(settings.seed, round_number, row.id, i) for i in range(settings.samples)] for row in prompts
        ]
        drawn = self._draw(ids, seeds, settings)
        reader = Reader(self._tokenizer, self._ends, settings.stop)
        facts = stored_settings(settings)
        return [
            [
                Sample(
                    row.id, row.prompt, index, reader.text(one.tokens), len(one.tokens), one.finished, round_number,
                    seed, facts, self.name,
                )
                for index, (one, seed) in enumerate(zip(of_row, its_seeds, strict=True))
            ]
            for row, of_row, its_seeds in zip(prompts, drawn, seeds, strict=True)
        ]  # fmt: skip

    def _draw(
        self, ids: Sequence[list[int]], seeds: Sequence[list[int]], settings: SamplingSettings
    ) -> list[list[Drawn]]:
        """Draw in the order of length."""
        starts = list(accumulate((len(its_seeds) for its_seeds in seeds), initial=0))
        at_once = self._rows_at_once
        requests = [
            Request(ids[n], range(starts[n + 1])[start : start + at_once])
            for n in sorted(range(len(ids)), key=lambda n: (len(ids[n]), n))
            for start in range(starts[n], starts[n + 1], at_once)
        ]
        stops = Reader(self._tokenizer, self._ends, settings.stop).stops
        pad = pad_token(self._tokenizer, self._ends)
        rows = Rows(list(chain.from_iterable(seeds)), settings, self._ends, stops, self._model.device)
        with _evaluating(self._model):
            decode(self._model, requests, rows, pad, at_once)
        drawn = rows.drawn()
        return [drawn[start:end] for start, end in pairwise(starts)]

    def _check_length(
        self, prompts: Sequence[PromptRow], ids: Sequence[list[int]], settings: SamplingSettings
    ) -> None:
        longest = positions_of(self._model)
        if not longest:
            return
        for row, tokens in zip(prompts, ids, strict=True):
            if len(tokens) + settings.max_new_tokens > longest:
                raise UsageError(
                    f"prompt {row.id} has {len(tokens)} tokens; with max_new_tokens={settings.max_new_tokens} that is "
                    f"more than the model's {longest} positions. Shorten it, leave it out, or lower max_new_tokens"
                )


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
