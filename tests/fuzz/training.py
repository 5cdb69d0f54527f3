"""From validated rows to a loss and its gradient, on a tiny model that is made once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized

from prefopt.data import drop_overlong, kind, tokenize_dataset
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_labelled, make_pairs, make_trainer

TOKENIZER = make_tokenizer()


@functools.cache
def trainer_for(form: str) -> Any:
    pairs = form == "pair"
    return make_trainer(
        Path(tempfile.mkdtemp()),
        loss="dpo + 0.1*sft" if pairs else "kto",
        train_dataset=make_pairs(4) if pairs else make_labelled(4),
        seed=0,
    )


def train_on(dataset: Any, max_length: int, mode: str = "keep_start", tokenizer: Any = TOKENIZER) -> None:
    """One loss and its gradient over the rows, as training would take them; both must be finite.

    Rows that leave no room for a completion are dropped as the trainer drops them.
    """
    form = kind(dataset)
    trainer = trainer_for(form)
    if not is_initialized():
        # A test since then has made training arguments, which resets the state that all accelerators share.
        Accelerator(cpu=True)
    tokens = drop_overlong(tokenize_dataset(dataset, tokenizer), max_length, mode, "training")
    if len(tokens) == 0:
        return
    collator = trainer.data_collator
    collator.max_length, collator.truncation_mode = max_length, mode
    trainer.model.train()
    trainer.model.zero_grad()
    columns = set(trainer._signature_columns or ()) or {*tokens.column_names}
    trainer._set_signature_columns_if_needed()
    columns = set(trainer._signature_columns)
    batch = collator([{name: row[name] for name in row if name in columns} for row in tokens])
    loss = trainer.compute_loss(trainer.model, batch)
    assert torch.isfinite(loss)
    loss.backward()
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
