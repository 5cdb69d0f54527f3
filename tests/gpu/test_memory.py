"""The peak of a step against what `prefopt plan` says of it."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.losses import parse
from prefopt.planning.activations import causal_model, made_up_rows
from prefopt.planning.plan import Job, ways_of
from tests.bench.made_up import pairs_of, word_tokenizer

WITHIN = 0.15
PROMPT, COMPLETION, PAIRS = 256, 64, 4


def config_of(device: str) -> LlamaConfig:
    """0.3 billion weights on a GPU, so that what libraries keep for themselves is little beside them."""
    hidden, layers, vocabulary = (1024, 16, 32000) if device == "cuda" else (128, 2, 512)
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=1, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def adapter() -> LoraConfig:
    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def measured(job: Job, config: LlamaConfig, device: str, folder: Path) -> int:
    """Bytes at the peak of the second step, when the optimizer has its state, beyond what was there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    dtype = getattr(torch, job.dtype_of(job.method))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lora = job.method == "lora"

    class Forget(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1 and device == "cuda":
                torch.cuda.reset_peak_memory_stats()

    trainer = PreferenceTrainer(
        model,
        ref_model=None if lora else copy.deepcopy(model),
        args=PreferenceConfig(
            str(folder), loss="dpo", per_device_train_batch_size=PAIRS, max_steps=2, max_length=None, bf16=True,
            gradient_accumulation_steps=job.gradient_accumulation_steps, report_to="none", save_strategy="no",
            gradient_checkpointing=job.gradient_checkpointing, use_cpu=device == "cpu", disable_tqdm=True,
            layout="tree", step0_check="off",
        ),
        train_dataset=Dataset.from_list(pairs_of(f"{PROMPT}+{COMPLETION}", PAIRS * 4, config.vocab_size)),
        processing_class=word_tokenizer(config.vocab_size),
        peft_config=adapter() if lora else None,
        callbacks=[Forget()],
    )  # fmt: skip
    trainer.train()
    return torch.cuda.max_memory_allocated() - before if device == "cuda" else 0


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora", "gradient_checkpointing": False},
        {"method": "full", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ],
    ids=["lora", "full, checkpointed, accumulated"],
)
def test_the_plan_says_what_a_step_takes(tmp_path, device, note, options):
    config = config_of(device)
    job = Job(
        model="1B", per_device_train_batch_size=PAIRS, max_length=PROMPT + COMPLETION, prompt_length=PROMPT, **options
    )
    rows = made_up_rows(PAIRS, PROMPT, COMPLETION, 2, padded=False)
    with torch.device("meta"):
        network = causal_model(config)
    ways = ways_of(job, parse(job.loss), network, copy.deepcopy(config), rows)
    way = next(way for way in ways if way.engine == "ddp")
    peak = measured(job, config, device, tmp_path)
    note("MB", {"plan": round(way.need.total / 1e6), "measured": round(peak / 1e6), "parts": way.need.parts})
    # On a CPU nothing counts tensors; scripts/bench/memory.py measures the process there.
    assert device == "cpu" or abs(way.need.total / peak - 1) < WITHIN
