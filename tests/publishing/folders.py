"""What a saved folder says of a text, without any of our code between it and transformers or peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "<|im_start|>user\nHow does a bridge work?<|im_end|>\n<|im_start|>assistant\nIt carries loads.<|im_end|>\n"


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **options})


@torch.inference_mode()
def log_probabilities(model: Any, tokenizer: Any) -> list[float]:
    """Of every token of `TEXT` but the first."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    was_training = model.training
    logits = model.eval()(input_ids=ids).logits[0, :-1].float()
    model.train(was_training)
    return torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()


def load(folder: Path, base: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder; with `base`, the adapter in it on that model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder), tokenizer
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder), tokenizer
