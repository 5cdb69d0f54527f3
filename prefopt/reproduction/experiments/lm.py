"""The bundled 135M model and pairs: what a likelihood term, DiscoPOP's hill and H-DPO's alpha do in 16 steps."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.demo.data import heldout_prompts, load_demo
from prefopt.models.bundled import resolve_demo_model
from prefopt.reproduction.experiments.outcome import Outcome
from prefopt.reproduction.experiments.tables import numbers
from prefopt.scoring import token_scores

LOSSES = {
    "DPO": "dpo(beta=0.1)",
    "RPO": "rpo(beta=0.1, eta=0.005)",
    "IRPO": "irpo(beta=0.1, alpha=1.0)",
    "DPOP": "dpop(beta=0.1, lam=50.0)",
    "DPO 0.05": "dpo(beta=0.05)",
    "DiscoPOP": "discopop(beta=0.05)",
    # alpha beta scales the gradient, so it is the same for all.
    "H-DPO 0.8": "hdpo(beta=0.125, alpha=0.8)",
    "H-DPO 1.2": "hdpo(beta=0.08333333333333333, alpha=1.2)",
}
SAMPLED = ("DPO", "H-DPO 0.8", "H-DPO 1.2")
STEPS = 16
SETTINGS = (
    "SmolLM2-135M-Instruct, the bundled pairs, LoRA r 16 on all linear layers, AdamW, lr 1e-4 with linear decay, "
    "16 steps of 4 pairs, the same seed for all; 28 held-out pairs"
)


@dataclass(frozen=True)
class Result:
    """Means over the held-out pairs; `entropy` of the model's own samples, NaN where none were drawn."""

    chosen: float
    rejected: float
    accuracy: float
    entropy: float


@torch.no_grad()
def sampled_entropy(model: Any, tokenizer: Any, length: int = 48) -> float:
    """Mean next-token entropy, in nats, along answers sampled at temperature 1 for the held-out prompts."""
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        heldout_prompts(), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(
        **inputs, max_new_tokens=length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True
    )
    asked = inputs["input_ids"].shape[1]
    answers = out[:, asked:]
    ended = (answers == tokenizer.eos_token_id).cumsum(1)
    counted = ended - (answers == tokenizer.eos_token_id).long() == 0  # the end token counts, what follows does not
    attention = torch.cat([inputs["attention_mask"], counted.long()], 1)
    # Left padding: positions must start at the first real token, as they do in `generate`.
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(out, attention_mask=attention, position_ids=positions).logits[:, asked - 1 : -1]
    scored = token_scores(logits, answers, counted)
    return float(scored.entropy.sum() / counted.sum())


@cache
def train(name: str, steps: int = STEPS) -> Result:
    folder = resolve_demo_model(say=lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as output:
        trainer = PreferenceTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=PreferenceConfig(
                output,
                loss=LOSSES[name],
                max_steps=steps,
                learning_rate=1e-4,
                per_device_train_batch_size=4,
                per_device_eval_batch_size=14,
                max_length=256,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=steps,
                seed=0,
            ),
            train_dataset=load_demo("train"),
            eval_dataset=load_demo("heldout").select(range(28)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logs = trainer.evaluate()
    entropy = float("nan")
    if name in SAMPLED:
        entropy = sampled_entropy(trainer.model.eval(), tokenizer)
    result = Result(logs["eval_ratios/chosen"], logs["eval_ratios/rejected"], logs["eval_rewards/accuracies"], entropy)
    return result


def likelihood() -> list[Outcome]:
    rows = {name: train(name) for name in ("DPO", "RPO", "IRPO", "DPOP")}
    measured = "held-out log-ratio chosen / rejected in nats / accuracy: " + "; ".join(
        f"{name} {r.chosen:+.2f} / {r.rejected:+.2f} / {r.accuracy:.1%}" for name, r in rows.items()
    )
    dpo = rows["DPO"]

    def better(name: str) -> bool:
        return rows[name].chosen > dpo.chosen and dpo.accuracy - rows[name].accuracy < 0.05

    return [
        Outcome(
            "dpo-chosen-falls-135m",
            measured,
            dpo.chosen - dpo.rejected > 0 and dpo.chosen < 0,
            f"{SETTINGS}; the claim speaks of 100 steps and more",
        ),
        Outcome("rpo-likelihood-135m", "same runs", better("RPO"), SETTINGS),
        Outcome("irpo-likelihood-135m", "same runs", better("IRPO"), SETTINGS),
        Outcome("dpop-likelihood-135m", "same runs", better("DPOP"), SETTINGS),
    ]


def discovered() -> Outcome:
    results = {name: train(name) for name in ("DPO 0.05", "DiscoPOP")}
    wrong = {name: 1 - results[name].accuracy for name in ("DPO 0.05", "DiscoPOP")}
    return Outcome(
        "lrml-wrong-side-135m",
        f"held-out pairs with d <= 0: DPO {wrong['DPO 0.05']:.1%}, LRML {wrong['DiscoPOP']:.1%}; log-ratios chosen / "
        f"rejected: DPO {results['DPO 0.05'].chosen:+.2f} / {results['DPO 0.05'].rejected:+.2f}, "
        f"LRML {results['DiscoPOP'].chosen:+.2f} / {results['DiscoPOP'].rejected:+.2f}",
        wrong["DiscoPOP"] > wrong["DPO 0.05"],
        SETTINGS,
    )


def entropies() -> Outcome:
    values = [train(name).entropy for name in ("H-DPO 0.8", "DPO", "H-DPO 1.2")]
    return Outcome(
        "entropy-135m",
        f"nats a token at alpha 0.8, 1, 1.2, alpha beta 0.1: {numbers(values, '.3f')}",
        values[0] < values[1] < values[2],
        f"{SETTINGS}; 42 answers of up to 48 tokens at temperature 1, one seed",
    )
