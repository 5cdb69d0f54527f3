"""Short runs of `PreferenceTrainer` on a device, and what their first step computed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from tests.tiny import make_tokenizer
from tests.trainer.runs import make_trainer

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "bridge", "carries", "load", "Paris", "works")


def save_small_model(folder: Path) -> str:
    """Large enough that every kernel has more than one block to compute, small enough for a CPU."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)  # else all log-probabilities are nearly equal
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def pairs(count: int, seed: int = 0) -> Dataset:
    """Pairs of random words, rows of 60 to 330 tokens, most of them longer than a block of FlexAttention (128)."""
    rng = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    rows = [
        {"prompt": text(20, 90), "chosen": f" {text(10, 60)}", "rejected": f" {text(10, 60)}"} for _ in range(count)
    ]
    return Dataset.from_list(rows)


@dataclass
class Step:
    """What a run computed.

    Attributes:
        logps: (2E,) log-probabilities of the first batch's chosen and rejected completions, on the CPU.
        gradient: of all trained weights in the first step, on the CPU in float32.
        losses: of the steps, as they were logged.
        calls: of the model with gradient in all steps.
        trainer: after training.
    """

    logps: torch.Tensor
    gradient: torch.Tensor
    losses: list[float]
    calls: int
    trainer: Any = field(repr=False)


def run(folder: Path, model: Any, device: str, *, steps: int = 1, resume: str | None = None, **options: Any) -> Step:
    """Train for a few steps and look at the first.

    Args:
        folder: for what the run writes.
        model: folder of a model, or a model.
        device: "cuda" or "cpu".
        steps: how many.
        resume: checkpoint to continue from.
        options: of the configuration, and `trainer_options`.
    """
    options = {"loss": "dpo", "train_dataset": pairs(24), "max_grad_norm": 1e9, "max_length": 512, **options}
    trainer = make_trainer(folder, model=model, use_cpu=device == "cpu", max_steps=steps, **options)
    batches: list[Any] = []
    gradients: list[torch.Tensor] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            if not gradients:
                found = [p.grad.detach().float().flatten().cpu() for p in model.parameters() if p.grad is not None]
                gradients.append(torch.cat(found))

    handle = trainer.objective.register_forward_hook(lambda module, given, output: batches.append(given[0]))
    calls: list[int] = []

    def count(module: Any, arguments: Any, keywords: Any) -> None:
        if torch.is_grad_enabled():
            calls.append(keywords["input_ids"].numel())

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=resume)
    handle.remove()
    first = [getattr(batches[0], role).logps.detach().float().cpu() for role in ("chosen", "rejected")]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Step(torch.cat(first), gradients[0], losses, len(calls), trainer)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """|one - other| / |other|."""
    return float((one.double() - other.double()).norm() / other.double().norm())
