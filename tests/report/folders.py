"""Run folders as a run leaves them, with numbers that follow from loss, seed and a rate."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ROWS = 60


def write_run(folder: Path, loss: str = "dpo(beta=0.1)", seed: int = 0, rate: float = 1.0, **facts: Any) -> Path:
    """A run of 40 steps: every 10th is evaluated. Accuracy rises by `rate`, with noise of the seed and of the run."""
    of_seed, of_run = random.Random(seed), random.Random(f"{loss} {seed}")
    base, lines = of_seed.gauss(0, 0.02), []
    for step in range(1, 41):
        gain = step * rate
        numbers = {
            "loss": 0.7 - 0.01 * gain,
            "rewards/accuracies": min(1, 0.5 + 0.008 * gain + base + of_run.gauss(0, 0.01)),
            "rewards/margins": 0.02 * gain,
            "ratios/chosen": -0.1 * gain,
            "ratios/rejected": -0.3 * gain,
            "kl": 0.02 * gain + abs(of_run.gauss(0, 0.01)),
        }
        lines.append({"step": step, "epoch": step / 40, "grad_norm": 1.0, **numbers})
        if step % 10 == 0:
            lines.append({"step": step, "eval_runtime": 1.0, **{f"eval_{name}": v for name, v in numbers.items()}})
    chosen = [of_run.gauss(-1, 1) for _ in range(ROWS)]
    rejected = [value - of_run.gauss(rate, 1) for value in chosen]
    texts = [{"prompt": f"question {row}", "chosen": "yes", "rejected": "no"} for row in range(ROWS)]
    values = {
        "rewards/margins": [a - b for a, b in zip(chosen, rejected, strict=True)],
        "ratios/chosen": chosen,
        "ratios/rejected": rejected,
    }
    split = {"sources": ["pairs.jsonl"], "split": "", "rows": ROWS}
    data = [{"role": "training", "fingerprint": "t", **split}, {"role": "held-out", "fingerprint": "h", **split}]
    known = {"loss": loss, "expression": loss, "base_model": "m", "base_digest": "d", "data": data, **facts}
    answers = [("It is long and carries the load.", "Because."), ("It carries the load.", "Because.")]
    stored = [
        {"step": step, "texts": list(texts), "ended": [True, True]}
        for step, texts in zip((0, 40), answers, strict=True)
    ]
    write(folder, "log_history.json", {"max_steps": 40, "global_step": 40, "log_history": lines})
    write(folder, "run.json", {"version": 1, "settings": {"seed": seed, "learning_rate": 1e-4}, **known})
    write(folder, "heldout.json", {"version": 1, "fingerprint": "h", "values": values, "texts": texts})
    write(folder, "answers.json", {"version": 1, "prompts": ["How does a bridge work?", "Why?"], "answers": stored})
    write(folder, "findings.json", {"version": 1, "findings": []})
    return folder


def write(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
