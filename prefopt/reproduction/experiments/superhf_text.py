"""SuperHF (2310.16763) on a small model of characters: reward, KL and likeness of answers over the KL weight."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from prefopt.evaluation.texts import similarity
from prefopt.losses import Loss, PreferenceBatch, Scores, presets
from prefopt.reproduction.experiments.cringe import PROMPT, Text, base_model, read_text
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tiny_lm import Rows, TinyLM

LENGTH, SAMPLES, PROMPTS, STEPS, RATE = 60, 16, 2, 150, 1e-3
WEIGHTS = (0.0, 0.35, 1.0)
SETTINGS = (
    "a GRU of 96 units on the characters of the bundled answers; reward: share of the letter e in 60 characters; 2 "
    f"prompts a step, best of 16 samples at temperature 1, {STEPS} steps of Adam, lr {RATE:g} (ours), 3 seeds; "
    "similarity: mean METEOR by equal words of answers to different held-out prompts"
)


def scored(model: TinyLM, reference: TinyLM, own: Rows) -> Scores:
    """What SuperHF's loss reads: likelihood of each token, and the KL of the whole next-token distribution."""
    logps = torch.log_softmax(model(own.tokens[:, :-1]), -1)
    with torch.no_grad():
        ref = torch.log_softmax(reference(own.tokens[:, :-1]), -1)
    mask = own.mask[:, 1:]
    token_logps = logps.gather(-1, own.tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    return Scores(
        logps=(token_logps * mask).sum(-1),
        lengths=mask.sum(-1),
        token_logps=token_logps,
        token_mask=mask,
        token_forward_kl=(ref.exp() * (ref - logps)).sum(-1),
    )


def continued(model: TinyLM, prompts: Tensor, generator: torch.Generator) -> Rows:
    tokens = torch.cat([prompts, model.continue_rows(prompts, LENGTH, generator)], 1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, PROMPT:] = True
    return Rows(tokens, mask)


def rewards(text: Text, own: Rows) -> Tensor:
    return (own.tokens[:, PROMPT:] == text.symbols.index("e")).float().mean(1)


def trained(text: Text, base: TinyLM, loss: Loss, seed: int) -> TinyLM:
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        prompts = text.windows(text.train, PROMPTS, generator).tokens[:, :PROMPT]
        own = continued(model, prompts.repeat_interleave(SAMPLES, 0), generator)
        best = rewards(text, own).reshape(PROMPTS, SAMPLES).argmax(1) + SAMPLES * torch.arange(PROMPTS)
        optimizer.zero_grad()
        loss(PreferenceBatch(chosen=scored(model, base, own[best]))).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


@torch.no_grad()
def state(text: Text, base: TinyLM, model: TinyLM, seed: int) -> tuple[float, float, float]:
    """Mean reward, KL per token to the base model and similarity of 128 samples for held-out prompts."""
    prompts = text.windows(text.heldout, 128, torch.Generator().manual_seed(seed)).tokens[:, :PROMPT]
    own = continued(model, prompts, torch.Generator().manual_seed(seed + 1))
    kl = scored(model, base, own).token_logps, scored(base, base, own).token_logps
    assert kl[0] is not None
    assert kl[1] is not None
    answers = text.decode(own.tokens[:, PROMPT:])
    alike = similarity({str(number): answer for number, answer in enumerate(answers)}, seed=seed)
    return (
        float(rewards(text, own).mean()),
        float((kl[0] - kl[1])[:, PROMPT - 1 :].mean()),
        math.nan if alike is None else alike,
    )


def kl_sweep() -> list[Outcome]:
    text, base = read_text(), base_model(1000, 0)
    seeds = (0, 1, 2)
    start = [state(text, base, base, seed) for seed in seeds]
    ends = {
        kl: [state(text, base, trained(text, base, presets()["superhf"].build(kl=kl), seed), seed) for seed in seeds]
        for kl in WEIGHTS
    }
    by_name = {"start": start, **{f"lambda {kl:g}": values for kl, values in ends.items()}}
    mean = {name: torch.tensor(values, dtype=torch.float64).mean(0).tolist() for name, values in by_name.items()}
    measured = "mean of 3 seeds, reward / KL a token / similarity: " + "; ".join(
        f"{name} {reward:.3f} / {kl:.3f} / {alike:.3f}" for name, (reward, kl, alike) in mean.items()
    )

    def column(at: int) -> dict[str, list[float]]:
        return {name: [value[at] for value in values] for name, values in by_name.items()}

    lines = {"SuperHF": [(mean[f"lambda {kl:g}"][0], mean[f"lambda {kl:g}"][2]) for kl in WEIGHTS]}
    picture = Picture("similarity against reward, lambda 0, 0.35, 1", "reward", "METEOR between prompts", lines)
    return [
        Outcome("prior-lowers-similarity", measured, settings=SETTINGS, numbers=column(2), picture=picture),
        Outcome("prior-lowers-kl", "same runs", settings=SETTINGS, numbers=column(1)),
        Outcome("reward-above-start", "same runs", settings=SETTINGS, numbers=column(0)),
    ]
