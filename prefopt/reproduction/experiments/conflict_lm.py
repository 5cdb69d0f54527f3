"""Sums without conflict on the bundled 135M model: forgetting some answers while retaining others."""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.demo.data import load_demo
from prefopt.models.bundled import resolve_demo_model
from prefopt.reproduction.experiments.outcome import Outcome

TERMS = ("npo", "sft")
SUM = "npo(beta=0.1) + sft(nll='mean')"
LOSSES = {"plain sum": SUM, "ConFIG": f"conflict_free({SUM})", "PCGrad": f"conflict_free({SUM}, method='pcgrad')"}
STEPS, PAIRS, RATE = 12, 8, 0.02
SETTINGS = (
    f"SmolLM2-135M-Instruct, {PAIRS} bundled pairs, the rejected answers to forget (NPO, beta 0.1), the chosen ones "
    f"to retain (likelihood per token); LoRA r 8 on all linear layers, {STEPS} steps of plain gradient descent at "
    f"{RATE} on all pairs at once, gradients clipped to norm 1, the same start"
)


def train(loss: str) -> list[dict[str, float]]:
    """The log of every step."""
    folder = resolve_demo_model(say=lambda line: None)
    with tempfile.TemporaryDirectory() as output:
        trainer = PreferenceTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=PreferenceConfig(
                output,
                loss=loss,
                max_steps=STEPS,
                learning_rate=RATE,
                optim="sgd",
                lr_scheduler_type="constant",
                per_device_train_batch_size=PAIRS,
                max_length=256,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1,
                seed=0,
            ),
            train_dataset=load_demo("train").select(range(PAIRS)),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return log


def forget_and_retain() -> list[Outcome]:
    logs = {name: train(loss) for name, loss in LOSSES.items()}
    change = {name: [log[-1][f"{term}/loss"] - log[0][f"{term}/loss"] for term in TERMS] for name, log in logs.items()}
    angle = logs["ConFIG"][1]["conflict/npo,sft"]
    ends = "; ".join(f"{name} {npo:+.3f} / {sft:+.3f}" for name, (npo, sft) in change.items())
    return [
        Outcome(
            "retained-answers-135m",
            f"change of the forget / retain term over {STEPS} steps: {ends}; cosine of their gradients at step 2 "
            f"{angle:+.2f}",
            change["plain sum"][1] > 0 and max(change["ConFIG"]) < 0,
            SETTINGS,
        )
    ]
