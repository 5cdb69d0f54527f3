"""What `prefopt.generation.vllm` uses of the module vllm; it keeps what it was asked."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any


def install(monkeypatch: Any) -> list[Any]:
    """Put the stand-in where `import vllm` finds it, and return the list of its engines."""
    engines: list[Any] = []

    class LLM:
        def __init__(self, **options: Any):
            self.options, self.calls = options, []
            engines.append(self)

        def generate(self, prompts: Any, parameters: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
            self.calls.append((prompts, parameters, lora_request))
            return [
                SimpleNamespace(
                    outputs=[SimpleNamespace(text=f"{p.seed} END", token_ids=[1, 2], finish_reason="length")]
                )
                for p in parameters
            ]

    def lora_request(name: str, number: int, path: str) -> Any:
        return SimpleNamespace(name=name, path=path)

    module, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams, request.LoRARequest = LLM, SimpleNamespace, lora_request  # type: ignore[attr-defined]
    for name, each in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, each)
    return engines
