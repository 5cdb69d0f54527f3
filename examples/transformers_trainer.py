"""Any objective in a subclass of `transformers.Trainer`, which knows nothing of preferences.

    python examples/transformers_trainer.py MODEL PAIRS.jsonl

A row of PAIRS has prompt, chosen and rejected; docs/data.md lists other layouts.
"""

import copy
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from prefopt.data import drop_overlong, read_preferences, tokenize_dataset
from prefopt.losses import Loss, parse
from prefopt.scoring import PreferenceCollator, Scorer


class ObjectiveTrainer(Trainer):
    def __init__(self, *arguments: Any, loss: Loss, reference: torch.nn.Module | None = None, **others: Any):
        super().__init__(*arguments, **others)
        self.loss = loss.to(self.args.device)
        if reference is not None:
            reference = reference.to(self.args.device).requires_grad_(False).eval()
        assert self.model is not None
        self.scorer = Scorer(self.loss, self.model, reference=reference)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = self.loss(self.scorer(inputs, model, every_role=not model.training))
        return (output.loss, {"per_example": output.per_example}) if return_outputs else output.loss


def train(name: str, pairs: str, steps: int = 100, objective: str = "ipo(beta=0.1)") -> list[float]:
    """The logged losses."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    loss = parse(objective)
    rows: Any = drop_overlong(tokenize_dataset(read_preferences(pairs), tokenizer), 512)
    trainer = ObjectiveTrainer(
        model,
        TrainingArguments(
            "out",
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # the collator reads columns that the model does not take
            prediction_loss_only=True,
            label_names=["completion_mask"],  # so that evaluate() computes the loss
        ),
        data_collator=PreferenceCollator.for_loss(loss, tokenizer.pad_token_id, max_length=512),
        train_dataset=rows,
        eval_dataset=rows.select(range(min(16, len(rows)))),
        loss=loss,
        reference=copy.deepcopy(model) if loss.needs.compares else None,
    )
    trainer.train()
    print(trainer.evaluate())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2])
