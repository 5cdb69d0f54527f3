"""Any objective in a plain PyTorch loop.

    python examples/own_loop.py MODEL PAIRS.jsonl

A row of PAIRS has prompt, chosen and rejected; docs/data.md lists other layouts.
"""

import copy
import sys
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.data import drop_overlong, read_preferences, tokenize_dataset
from prefopt.losses import parse
from prefopt.scoring import PreferenceCollator, Scorer


def train(name: str, pairs: str, steps: int = 100, objective: str = "dpo(beta=0.1) + 0.2*sft") -> list[float]:
    """The loss of each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model.to(device)
    reference = copy.deepcopy(model).requires_grad_(False).eval()

    loss = parse(objective).to(device)
    scorer = Scorer(loss, model, reference=reference)
    rows: Any = drop_overlong(tokenize_dataset(read_preferences(pairs), tokenizer), 512)
    collate = PreferenceCollator.for_loss(loss, tokenizer.pad_token_id, max_length=512)
    batches = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    history: list[float] = []
    while len(history) < steps:
        for batch in batches:
            output = loss(scorer(batch))
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            history.append(output.loss.item())
            print(f"step {len(history)}", {name: round(value, 4) for name, value in output.mean_metrics().items()})
            if len(history) == steps:
                break
    return history


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2])
