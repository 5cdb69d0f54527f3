"""NPO (2404.05868): gradient ascent runs away in a straight line, NPO slows down to a logarithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses import DPO, NPO, SFT, GradientAscent, KLRetain, Loss, PreferenceBatch, Scores
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import numbers

# ------------------------------------------------------------------------------------------------------ one parameter


def scalar_path(loss: Loss, steps: int) -> Tensor:
    """(steps + 1,) theta of gradient descent with step 0.1 on pi = sigmoid(theta), theta = 2 at the start."""
    theta = torch.tensor([2.0], dtype=torch.float64)
    reference, one = F.logsigmoid(theta), torch.ones(1, dtype=torch.long)
    path = [theta]
    for _ in range(steps):
        theta = theta.detach().requires_grad_()
        value = loss(PreferenceBatch(rejected=Scores(F.logsigmoid(theta), one, reference))).loss
        (gradient,) = torch.autograd.grad(value, theta)
        theta = theta.detach() - 0.1 * gradient
        path.append(theta)
    return torch.cat(path).detach()


def growth(steps: int = 6400) -> list[Outcome]:
    ga, strong, weak = (scalar_path(loss, steps) for loss in (GradientAscent("sum"), NPO(1.0), NPO(0.1)))
    half = steps // 2
    slopes = [float(ga[steps] - ga[half]) / half, *(float(path[steps] - path[half]) for path in (strong, weak))]
    ratio = float(ga[steps].abs() / strong[steps].abs())
    marks = [100, 400, steps]
    return [
        Outcome(
            "theta-growth",
            f"theta after {marks} steps: GA {numbers(ga[marks], '.2f')}; NPO beta 1 {numbers(strong[marks], '.3f')}; "
            f"beta 0.1 {numbers(weak[marks], '.3f')}. GA per step {slopes[0]:.4f}; NPO per doubling {slopes[1]:.3f} "
            f"(-0.693), {slopes[2]:.3f} (-6.93)",
            abs(slopes[0] + 0.1) < 1e-3
            and abs(slopes[1] / math.log(2) + 1) < 0.1
            and abs(slopes[2] / (10 * math.log(2)) + 1) < 0.1,
        ),
        Outcome(
            "theta-ratio",
            f"|theta| of GA / NPO (beta 1): {ratio:.1f}",
            ratio > (20 if steps == 6400 else 2),
        ),
    ]


# --------------------------------------------------------------------- random features, as in the paper's section 4.1


@dataclass(frozen=True)
class World:
    """The paper's synthetic data for S seeds at once: features (S, n, 128), labels (S, n), and two trained models."""

    retain: Tensor
    retain_labels: Tensor
    forget: Tensor
    forget_labels: Tensor
    idk_labels: Tensor
    eval_retain: Tensor
    eval_forget: Tensor
    finetuned: Tensor
    retrained: Tensor


def draw(
    generator: torch.Generator, count: int, centre: float, favours: int, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """ReLU features of `count` points around `centre` and labels that favour one class."""
    offsets = torch.randn(count, 16, generator=generator, dtype=torch.float64)
    lead = offsets.sum(-1) / 4 + 1  # logit of the favoured class over the other
    favoured = torch.rand(count, generator=generator, dtype=torch.float64) < torch.sigmoid(lead)
    labels = torch.where(favoured, favours, 1 - favours)
    return torch.relu((offsets + centre) @ weights.T), labels


def logps(features: Tensor, a: Tensor) -> Tensor:
    """(S, n, 2) log-probabilities of the two classes; the second class has logit 0."""
    logit = (features @ a.unsqueeze(-1)).squeeze(-1)
    return torch.stack([F.logsigmoid(logit), F.logsigmoid(-logit)], -1)


def picked(table: Tensor, labels: Tensor) -> Tensor:
    return table.gather(-1, labels.unsqueeze(-1)).squeeze(-1).flatten()


@cache
def make_world(separation: float, seeds: int = 5, fit_steps: int = 20000) -> World:
    drawn: list[list[Tensor]] = []
    for seed in range(1000, 1000 * (seeds + 1), 1000):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(128, 16, generator=generator, dtype=torch.float64) / 4
        retain, forget = draw(generator, 1000, -separation, 0, weights), draw(generator, 200, separation, 1, weights)
        idk = torch.randint(2, (200,), generator=generator)
        held_out = [draw(generator, 1000, c, f, weights)[0] for c, f in ((-separation, 0), (separation, 1))]
        drawn.append([*retain, *forget, idk, *held_out])
    data = [torch.stack(parts) for parts in zip(*drawn, strict=True)]
    points, labels, points_to_forget, labels_to_forget, idk_labels, eval_retain, eval_forget = data
    both, both_labels = torch.cat([points, points_to_forget], 1), torch.cat([labels, labels_to_forget], 1)
    return World(
        *(points, labels, points_to_forget, labels_to_forget, idk_labels, eval_retain, eval_forget),
        finetuned=fit(both, both_labels, fit_steps),
        retrained=fit(points, labels, fit_steps),
    )


def fit(features: Tensor, labels: Tensor, steps: int) -> Tensor:
    """(S, 128) parameters after full-batch gradient descent on the likelihood, step 0.05."""
    sft = SFT()
    one = torch.ones(labels.numel(), dtype=torch.long)
    a = features.new_zeros(features.shape[0], features.shape[2])
    for _ in range(steps):
        a.requires_grad_()
        value = sft(PreferenceBatch(chosen=Scores(picked(logps(features, a), labels), one))).loss
        (gradient,) = torch.autograd.grad(value, a)
        # The loss is a mean over all seeds' points, of which each seed owns a part.
        a = a.detach() - 0.05 * len(a) * gradient
    return a


def scores(features: Tensor, labels: Tensor, a: Tensor, reference: Tensor) -> Scores:
    table, ref_table = logps(features, a), logps(features, reference)
    kl = (ref_table.exp() * (ref_table - table)).sum(-1).reshape(-1, 1)
    return Scores(
        logps=picked(table, labels),
        lengths=torch.ones(labels.numel(), dtype=torch.long),
        ref_logps=picked(ref_table, labels),
        token_logps=picked(table, labels).unsqueeze(-1),
        token_mask=torch.ones(labels.numel(), 1, dtype=torch.bool),
        token_forward_kl=kl,
    )


Objective = Callable[[World, Tensor], Tensor]


def objective(forget: Loss, retain: Loss | None = None, idk: bool = False) -> Objective:
    """A forget term and a retain term; `idk`: the random labels of the forget points are the chosen completions."""

    def value(world: World, a: Tensor) -> Tensor:
        reference = world.finetuned
        bad = scores(world.forget, world.forget_labels, a, reference)
        good = scores(world.forget, world.idk_labels, a, reference) if idk else None
        total = forget(PreferenceBatch(chosen=good, rejected=bad)).loss
        if retain is not None:
            kept = scores(world.retain, world.retain_labels, a, reference)
            total = total + retain(PreferenceBatch(chosen=kept)).loss
        return total

    return value


def unlearn(world: World, loss: Objective, lr: float, steps: int, every: int) -> dict[str, Tensor]:
    """Full-batch gradient descent from the fine-tuned model. Returns (evaluations, S) values by name.

    forget, retain: KL(retrained || unlearned) on held-out forget and retain points; distance: of the parameters from
    the start; nll: of the forget labels.
    """
    a = world.finetuned
    record: dict[str, list[Tensor]] = {"forget": [], "retain": [], "distance": [], "nll": []}
    for step in range(steps + 1):
        if step % every == 0:
            for name, points in (("forget", world.eval_forget), ("retain", world.eval_retain)):
                target = logps(points, world.retrained)
                record[name].append((target.exp() * (target - logps(points, a))).sum(-1).mean(-1))
            record["distance"].append((a - world.finetuned).norm(dim=-1))
            each = picked(logps(world.forget, a), world.forget_labels).reshape(len(a), -1)
            record["nll"].append(-each.mean(-1))
        a = a.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(world, a), a)
        a = a.detach() - lr * len(a) * gradient
    return {name: torch.stack(values) for name, values in record.items()}


def methods(separated: bool) -> dict[str, tuple[Objective, float]]:
    """The official code's objectives and step sizes for a = 1 (separated) and a = 0 (overlapping)."""
    ascent, beta, dpo_beta = (5e-4, 1.0, 0.1) if separated else (1e-4, 10.0, 5.0)
    ours, dpo_rt = (5e-3, 5e-3) if separated else (5e-2, 2e-2)
    ga, sft = GradientAscent("mean"), SFT()
    return {
        "GA": (objective(ga), ascent),
        "GA+KL": (objective(ga, KLRetain()), ascent),
        "GradDiff": (objective(ga, sft), ascent),
        "IDK": (objective(sft, sft, idk=True), ascent),
        "NPO": (objective(NPO(beta)), ours),
        "NPO+KL": (objective(NPO(beta), KLRetain()), ours),
        "NPO+RT": (objective(NPO(beta), sft), ours),
        "DPO": (objective((2 / dpo_beta) * DPO(dpo_beta), idk=True), ours),
        "DPO+RT": (objective((2 / dpo_beta) * DPO(dpo_beta), sft, idk=True), dpo_rt),
        "DPO+KL": (objective((2 / dpo_beta) * DPO(dpo_beta), KLRetain(), idk=True), ours),
    }


def retain_at_equal_forget(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, float, int]:
    """Mean retain divergence of two methods at the forget divergences that both pass on their way down, per seed."""
    means, wins, seeds = [], 0, one["forget"].shape[1]
    for seed in range(seeds):
        curves = []
        for record in (one, other):
            low = int(record["forget"][:, seed].argmin())
            curves.append((record["forget"][: low + 1, seed], record["retain"][: low + 1, seed]))
        level = max(float(forget[-1]) for forget, _ in curves)
        # Half way down from the common start to the deepest level that both reach.
        level = level + 0.1 * (float(curves[0][0][0]) - level)
        at = [float(retain[int((forget <= level).nonzero()[0])]) for forget, retain in curves]
        means.append(at)
        wins += at[0] < at[1]
    table = torch.tensor(means)
    return float(table[:, 0].mean()), float(table[:, 1].mean()), wins


def retain_at_equal_nll(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, float, int]:
    """Mean retain divergence of two methods where the forget labels have become equally unlikely, per seed.

    The level is the highest likelihood loss of the forget labels that both reach.
    """
    means, wins, seeds = [], 0, one["nll"].shape[1]
    for seed in range(seeds):
        level = min(float(record["nll"][:, seed].max()) for record in (one, other))
        at = [float(r["retain"][:, seed][int((r["nll"][:, seed] >= level).nonzero()[0])]) for r in (one, other)]
        means.append(at)
        wins += at[0] < at[1]
    table = torch.tensor(means)
    return float(table[:, 0].mean()), float(table[:, 1].mean()), wins


def separated() -> list[Outcome]:
    return stability(1.0)


def overlapping() -> list[Outcome]:
    return stability(0.0)


def stability(separation: float, steps: int = 2000) -> list[Outcome]:
    world = make_world(separation)
    apart = "separated" if separation == 1 else "overlapping"
    records = {name: unlearn(world, *method, steps, 25) for name, method in methods(separation == 1).items()}
    rise = {name: r["forget"][-1] / r["forget"].min(0).values for name, r in records.items()}
    lowest = {name: float(r["forget"].min(0).values.mean()) for name, r in records.items()}
    retain_end = {name: float(r["retain"][-1].mean()) for name, r in records.items()}
    rt, diff, wins = retain_at_equal_forget(records["NPO+RT"], records["GradDiff"])
    plain_npo, plain_ga, plain_wins = retain_at_equal_nll(records["NPO"], records["GA"])
    seeds = len(rise["GA"])
    return [
        Outcome(
            f"ascent-climbs-{apart}",
            f"last / smallest forget divergence by seed: GA {numbers(rise['GA'], '.2f')}; "
            f"NPO {numbers(rise['NPO'], '.2f')}. "
            "All methods, mean: "
            + "; ".join(f"{name} {float(rise[name].mean()):.3g} (smallest {lowest[name]:.3g})" for name in records),
            numbers={"gradient ascent": rise["GA"].tolist(), "NPO": rise["NPO"].tolist()},
            picture=Picture(
                "KL of the retrained model to the unlearned one, forget points, mean of the seeds",
                "step",
                "divergence",
                {
                    name: [(25.0 * n, float(value)) for n, value in enumerate(records[name]["forget"].mean(1))]
                    for name in ("GA", "GradDiff", "NPO", "NPO+RT", "DPO")
                },
                log="y",
            ),
        ),
        Outcome(
            f"retain-at-end-{apart}",
            "retain divergence at the end: " + "; ".join(f"{name} {retain_end[name]:.3g}" for name in records),
            retain_end["NPO"] < retain_end["GA"]
            and retain_end["NPO+RT"] < retain_end["GradDiff"]
            and retain_end["NPO+KL"] < retain_end["GA+KL"],
        ),
        Outcome(
            f"retain-at-equal-forget-{apart}",
            f"mean retain divergence NPO+RT {rt:.3g}, GradDiff {diff:.3g}; lower in {wins} of {seeds} seeds",
            rt < diff and wins == seeds,
            "compared where both have gone 90% of the way to the deepest forget divergence that both reach",
        ),
        Outcome(
            f"retain-at-equal-likelihood-{apart}",
            f"mean retain divergence NPO {plain_npo:.4g}, GA {plain_ga:.4g}; NPO's is lower in {plain_wins} of "
            f"{seeds} seeds",
            plain_npo < plain_ga and plain_wins == seeds,
            "compared at the highest likelihood loss of the forget labels that both reach",
        ),
    ]


def r_squared(times: Tensor, values: Tensor) -> float:
    """Of a straight line through (times, values)."""
    design = torch.stack([times, torch.ones_like(times)], -1)
    residual = values - design @ torch.linalg.lstsq(design, values.unsqueeze(-1)).solution.squeeze(-1)
    return float(1 - residual.var() / values.var())


def speed(steps: int = 10000) -> list[Outcome]:
    world = make_world(1.0)
    betas = (0.01, 0.1, 0.2, 0.5, 1.0)
    paths = {"GA": unlearn(world, objective(GradientAscent("mean")), 5e-4, steps, 50)["distance"]}
    for beta in betas:
        paths[f"NPO {beta:g}"] = unlearn(world, objective(NPO(beta)), 5e-4, steps, 50)["distance"]
    last = {name: float(path[-1].mean()) for name, path in paths.items()}
    t = torch.arange(1, len(paths["GA"]), dtype=torch.float64) * 50
    later = t > steps / 10  # a logarithm is about late times
    fits = {
        name: (r_squared(t[later], p[1:].mean(1)[later]), r_squared(t[later].log(), p[1:].mean(1)[later]))
        for name, p in paths.items()
    }
    ordered = [last["GA"], *(last[f"NPO {beta:g}"] for beta in betas)]
    return [
        Outcome(
            "distance-by-beta",
            f"after {steps} steps: " + "; ".join(f"{name} {value:.3g}" for name, value in last.items()),
            ordered == sorted(ordered, reverse=True) and len(set(ordered)) == len(ordered),
        ),
        Outcome(
            "line-and-logarithm",
            "R^2 of a line in t / in log t: "
            + "; ".join(f"{name} {a:.4f} / {b:.4f}" for name, (a, b) in fits.items()),
            fits["GA"][0] > fits["GA"][1] and fits["NPO 1"][1] > fits["NPO 1"][0],
            "fitted to the mean over seeds, without the first tenth of the steps",
        ),
    ]
