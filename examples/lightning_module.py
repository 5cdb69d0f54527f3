"""Any objective in a Lightning module.

    pip install lightning && python examples/lightning_module.py MODEL PAIRS.jsonl

A row of PAIRS has prompt, chosen and rejected; docs/data.md lists other layouts.
"""

import copy
import sys
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.data import drop_overlong, read_preferences, tokenize_dataset
from prefopt.losses import parse
from prefopt.scoring import PreferenceCollator, Scorer


class Preferences(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module, objective: str):
        super().__init__()
        self.model, self.loss = model, parse(objective)
        reference = copy.deepcopy(model).requires_grad_(False) if self.loss.needs.compares else None
        self.scorer = Scorer(self.loss, model, reference=reference)
        self.reference = reference  # a submodule, so that it is moved to the device
        self.history: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        output = self.loss(self.scorer(batch))
        self.log_dict(
            output.mean_metrics() | {"loss": output.loss}, prog_bar=True, batch_size=int(batch["examples"].max()) + 1
        )
        self.history.append(output.loss.item())
        return output.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5)


def train(name: str, pairs: str, steps: int = 100, objective: str = "simpo(beta=2.0)") -> list[float]:
    """The loss of each step."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    module = Preferences(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), objective)
    rows: Any = drop_overlong(tokenize_dataset(read_preferences(pairs), tokenizer), 512)
    collate = PreferenceCollator.for_loss(module.loss, tokenizer.pad_token_id, max_length=512)
    batches = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
    trainer = lightning.Trainer(max_steps=steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False)
    trainer.fit(module, batches)
    return module.history


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2])
