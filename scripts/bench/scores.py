"""Which objectives find the order of answers, and the optimal policy, from noisy scores of K = 8 answers a prompt?

    python scripts/bench/scores.py --plot docs/images/scores-toy.png      # a few minutes of one core

A world in which the truth is known. A prompt has 64 possible answers with 16 random features each, a reference policy,
and rewards that are linear in the features (deviation 1 over the answers). Eight answers are drawn from the reference,
and each gets a score: its reward plus noise of deviation 1. A policy that is log-linear in the features is trained
from the reference by each objective, from few prompts or many. On new prompts it is compared with the truth: the share
of all pairs of answers that its rewards order right, and the total variation between it and the optimum,
ref * exp(r / beta).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from prefopt.losses import PreferenceBatch, Scores, parse

ANSWERS, FEATURES, DRAWN = 64, 16, 8
COUNTS = (8, 64, 512)
OBJECTIVES = {
    "pairs, best and worst": "dpo(beta=1.0)",
    "pairs, all 28": "dpo(beta=1.0)",
    "scored pairs, best and worst": "rebel(eta=1.0)",
    "scored pairs, all 28": "reward_aware(beta=1.0)",
    "order of 8": "plackett_luce(beta=1.0)",
    "order of 8, win rates": "lipo_lambda(beta=1.0)",
    "8 scores": "gvpo(beta=1.0)",
    "8 scores ": "a_star_po(beta=1.0, value_beta=1.0)",
    "8 scores  ": "infonca(beta=1.0)",
    "8 scores   ": "nca_scores(beta=1.0)",
}
"""What an objective is given, and the objective; beta is that of the optimum. `rebel` on all pairs is `gvpo`."""


@dataclass(frozen=True)
class World:
    """N prompts.

    Attributes:
        features: (N, 64, 16).
        reference: (N, 64) log-probabilities.
        rewards: (N, 64).
        drawn: (N, 8) numbers of the answers that were drawn, the best score first.
        scores: (N, 8) theirs, highest first.
    """

    features: Tensor
    reference: Tensor
    rewards: Tensor
    drawn: Tensor
    scores: Tensor

    @classmethod
    def make(cls, prompts: int, truth: Tensor, generator: torch.Generator) -> World:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        features = normal(prompts, ANSWERS, FEATURES)
        rewards = features @ truth
        reference = torch.log_softmax(normal(prompts, ANSWERS), -1)
        drawn = torch.multinomial(reference.exp(), DRAWN, generator=generator)
        scores, order = (rewards.gather(1, drawn) + normal(prompts, DRAWN)).sort(dim=1, descending=True)
        return cls(features, reference, rewards, drawn.gather(1, order), scores)

    def logps(self, weights: Tensor) -> Tensor:
        """(N, 64) of the policy."""
        return torch.log_softmax(self.reference + self.features @ weights, -1)


def candidates(world: World, logps: Tensor, scores: Tensor) -> PreferenceBatch:
    own, theirs = logps.gather(1, world.drawn), world.reference.gather(1, world.drawn)
    sizes = (DRAWN,) * len(own)
    one = torch.ones(own.numel(), dtype=torch.long)
    return PreferenceBatch(
        candidate=Scores(own.flatten(), one, theirs.flatten(), score=scores.flatten(), group_sizes=sizes)
    )


def pairs(world: World, logps: Tensor, every: bool) -> PreferenceBatch:
    first, second = torch.triu_indices(DRAWN, DRAWN, 1) if every else torch.tensor([[0], [DRAWN - 1]])
    own, theirs = logps.gather(1, world.drawn), world.reference.gather(1, world.drawn)
    columns = {
        "chosen_score": world.scores[:, first].flatten(),
        "rejected_score": world.scores[:, second].flatten(),
    }
    one = torch.ones(len(own) * len(first), dtype=torch.long)
    chosen, rejected = (
        Scores(own[:, side].flatten(), one, theirs[:, side].flatten(), columns=columns) for side in (first, second)
    )
    return PreferenceBatch(chosen, rejected)


def train(name: str, world: World, steps: int = 100) -> Tensor:
    """(16,) weights of the policy after Adam, from the reference."""
    loss = parse(OBJECTIVES[name])
    scores = world.scores
    if "win rates" in name:  # as its paper has it: the mean probability to win against the others
        wins = torch.sigmoid(scores[:, :, None] - scores[:, None, :])
        scores = (wins.sum(-1) - 0.5) / (DRAWN - 1)
    weights = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        logps = world.logps(weights)
        batch = pairs(world, logps, "all" in name) if "pairs" in name else candidates(world, logps, scores)
        loss(batch).loss.backward()
        optimizer.step()
    return weights.detach()


def measured(weights: Tensor, world: World) -> tuple[float, float]:
    """Share of pairs in the right order, and total variation to the optimum, on prompts that were not trained on."""
    own = world.features @ weights
    right = (own[:, :, None] - own[:, None, :]) * (world.rewards[:, :, None] - world.rewards[:, None, :]) > 0
    order = float(right.double().sum() / (len(own) * ANSWERS * (ANSWERS - 1)))
    optimum = torch.log_softmax(world.reference + world.rewards, -1)
    return order, float((world.logps(weights).exp() - optimum.exp()).abs().sum(1).mean() / 2)


def experiment(counts: Sequence[int], seeds: int) -> dict[str, Tensor]:
    """For each objective (counts, seeds, 2) of what was measured, and the same for the reference."""
    results = {name: torch.zeros(len(counts), seeds, 2) for name in (*OBJECTIVES, "reference")}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        truth = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
        truth = truth / truth.norm()
        unseen = World.make(300, truth, generator)
        world = World.make(max(counts), truth, generator)
        for place, count in enumerate(counts):
            part = replace(world, **{name: value[:count] for name, value in vars(world).items()})
            for name in OBJECTIVES:
                results[name][place, seed] = torch.tensor(measured(train(name, part), unseen))
        results["reference"][:, seed] = torch.tensor(measured(torch.zeros(FEATURES, dtype=torch.float64), unseen))
        print(f"seed {seed + 1} of {seeds}", flush=True)
    return results


def markdown(results: dict[str, Tensor], counts: Sequence[int]) -> str:
    head = [f"{count} prompts" for count in counts]
    lines = [
        f"| it is given | objective | {' | '.join(head)} |",
        "|---|---|" + "---|" * len(counts),
    ]
    for name, expression in [*OBJECTIVES.items(), ("reference", "")]:
        means = results[name].mean(1)
        order = [f"{means[i, 0]:.1%}" if name != "reference" else "" for i in range(len(counts))]
        cells = [f"{o}, {means[i, 1]:.3f}".removeprefix(", ") for i, o in enumerate(order)]
        lines.append(f"| {name.strip()} | {f'`{expression}`' if expression else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Tensor], counts: Sequence[int], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, (name, expression) in enumerate(OBJECTIVES.items()):
        style = "--" if "pairs" in name else "-"
        label = f"{expression.partition('(')[0]}: {name.strip()}"
        for axis, column in zip(axes, (0, 1), strict=True):
            values = results[name][:, :, column].mean(1)
            axis.plot(counts, values, style, marker="o", markersize=4, color=f"C{number % 10}", label=label)
    axes[1].axhline(float(results["reference"][0, :, 1].mean()), color="grey", linewidth=1, label="reference")
    for axis, title in zip(axes, ("pairs in the right order", "total variation to the optimum"), strict=True):
        axis.set(xscale="log", xticks=counts, xticklabels=counts, xlabel="prompts with 8 scored answers", title=title)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="worlds (2)")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of prompts (8 64 512)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw it")
    args = parser.parse_args()
    if args.seeds < 1 or min(args.counts) < 1:
        parser.error("--seeds and --counts must be positive")
    torch.set_num_threads(1)
    results = experiment(args.counts, args.seeds)
    print(markdown(results, args.counts))
    if args.plot is not None:
        draw(results, args.counts, args.plot)


if __name__ == "__main__":
    main()
