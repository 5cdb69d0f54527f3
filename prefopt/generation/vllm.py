"""Samples from vLLM in this process (`pip install "prefopt-trainer[vllm]"`).

Tested against a stand-in for the module; it was not run with vLLM itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState

from prefopt.data.encodings import Encodings
from prefopt.generation.endpoint import CUT
from prefopt.generation.memory import free_memory
from prefopt.generation.processes import from_main
from prefopt.generation.prompts import before_stop, prompt_ids
from prefopt.generation.samples import PromptRow, Sample, SamplingSettings, sample_seed, stored_settings
from prefopt.safety.errors import UsageError

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmGenerator:
    """Draws samples with vLLM, which holds the model itself; the prompts are the token ids of training.

    Args:
        model: a name or a folder, as vLLM takes it.
        tokenizer: the model's.
        adapter: the folder of a LoRA adapter to draw with.
        name: what stands in `Sample.model`; the names of model and adapter if left out.
        options: other arguments of `vllm.LLM`, such as `gpu_memory_utilization`.

    Of several processes, the main one holds the model and draws.

    Raises:
        UsageError: if vLLM is not installed.
    """

    chunk_prompts = 256

    def __init__(
        self, model: str, tokenizer: Any, *, adapter: Path | None = None, name: str | None = None, **options: Any
    ):
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UsageError(f'{error.name} is not installed: pip install "prefopt-trainer[vllm]"') from None
        self._tokenizer = tokenizer
        if adapter is not None:
            options = {"max_lora_rank": _rank_for(adapter), **options}
        is_main = PartialState().is_main_process
        self._llm = LLM(model=model, enable_lora=adapter is not None, **options) if is_main else None
        self._adapter = None if adapter is None else LoRARequest(adapter.name, 1, str(adapter))
        self.name = name or (model if adapter is None else f"{model}+{adapter}")

    def sample(
        self, prompts: Sequence[PromptRow], settings: SamplingSettings, round_number: int = 0
    ) -> Iterator[list[Sample]]:
        """The K samples of each prompt, in the order of the prompts."""

        def groups() -> Iterator[list[Sample]]:
            rows = iter(prompts)
            while chunk := list(islice(rows, self.chunk_prompts)):
                yield from self._chunk(chunk, settings, round_number)

        yield from from_main(groups)

    def close(self) -> None:
        """Free the memory that vLLM holds."""
        self._llm = None
        free_memory()

    def _chunk(
        self, prompts: Sequence[PromptRow], settings: SamplingSettings, round_number: int
    ) -> Iterator[list[Sample]]:
        from vllm import SamplingParams

        encodings = Encodings(self._tokenizer)
        indices = range(settings.samples)
        jobs = [(row, i, sample_seed(settings.seed, round_number, row.id, i)) for row in prompts for i in indices]
        ids = {row.id: prompt_ids(row, self._tokenizer, encodings) for row in prompts}
        assert self._llm is not None
        parameters = [
            SamplingParams(
                seed=seed, temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k or -1,
                max_tokens=settings.max_new_tokens, stop=list(settings.stop),
            )
            for _, _, seed in jobs
        ]  # fmt: skip
        asked = [{"prompt_token_ids": ids[row.id]} for row, _, _ in jobs]
        replies = self._llm.generate(asked, parameters, use_tqdm=False, lora_request=self._adapter)
        facts = stored_settings(settings)
        samples = [
            Sample(
                row.id, row.prompt, index, before_stop(answer.text, settings.stop), len(answer.token_ids),
                answer.finish_reason not in CUT, round_number, seed, facts, self.name,
            )
            for (row, index, seed), answer in zip(jobs, (reply.outputs[0] for reply in replies), strict=True)
        ]  # fmt: skip
        for at in range(0, len(samples), settings.samples):
            yield samples[at : at + settings.samples]


def _rank_for(adapter: Path) -> int:
    """The smallest of the ranks that vLLM allows which the adapter fits in; vLLM itself assumes 16."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([int(settings["r"]), *map(int, (settings.get("rank_pattern") or {}).values())])
    return next((allowed for allowed in _RANKS if allowed >= rank), rank)
