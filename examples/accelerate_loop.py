"""Any objective in a loop with accelerate, on one or several processes; with LoRA, which is its own reference.

    accelerate launch examples/accelerate_loop.py MODEL PAIRS.jsonl

A row of PAIRS has prompt, chosen and rejected; docs/data.md lists other layouts.
"""

import sys
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.data import drop_overlong, read_preferences, tokenize_dataset
from prefopt.losses import parse
from prefopt.scoring import PreferenceCollator, Scorer


def train(name: str, pairs: str, steps: int = 100, objective: str = "dpo(beta=0.1)") -> list[float]:
    """The loss of each step, as a mean over the processes."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    policy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))

    loss = parse(objective).to(accelerator.device)
    with accelerator.main_process_first():
        rows: Any = drop_overlong(tokenize_dataset(read_preferences(pairs), tokenizer), 512)
    collate = PreferenceCollator.for_loss(loss, tokenizer.pad_token_id, max_length=512)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    # Each process has its own loader: accelerate would cut a batch by rows, and a pair has two.
    shard = rows.shard(accelerator.num_processes, accelerator.process_index)
    batches = DataLoader(shard, batch_size=8, shuffle=True, drop_last=True, collate_fn=collate)
    model, optimizer = accelerator.prepare(policy, optimizer)
    scorer = Scorer(loss, policy)

    history: list[float] = []
    while len(history) < steps:
        for batch in batches:
            with accelerator.autocast():
                scores = scorer(batch, model)  # called through its wrapper, so that gradients are averaged
            output = loss(scores)
            accelerator.backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
            history.append(accelerator.reduce(output.loss.detach(), "mean").item())
            accelerator.print(f"step {len(history)} loss {history[-1]:.4f}")
            if len(history) == steps:
                break
    return history


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2])
