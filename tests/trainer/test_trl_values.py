"""Every objective that `trl.DPOTrainer` offers: one batch through its own trainer and through ours.

Same model, same reference, same rows; the loss and the gradient of the whole model agree to float32's precision. The
reference is not the policy, so that no log-ratio is 0 and no formula is tested where many of them meet.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.losses import PreferenceBatch, Scores, parse
from prefopt.trainer import expression_from_trl_options
from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import make_pairs, settings

ROWS = 8

# TRL's options and the expression that they mean.
SAME: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": "sigmoid", "beta": 0.3}, "dpo(beta=0.3, label_smoothing=0.0)"),
    ({"loss_type": "hinge"}, "hinge(beta=0.1)"),
    ({"loss_type": "ipo"}, "ipo(beta=0.1)"),
    ({"loss_type": "exo_pair", "label_smoothing": 1e-3}, "exo(beta=0.1, label_smoothing=0.001)"),
    ({"loss_type": "exo_pair", "label_smoothing": 0.4}, "exo(beta=0.1, label_smoothing=0.4)"),
    ({"loss_type": "nca_pair"}, "nca(beta=0.1)"),
    ({"loss_type": "robust"}, "robust(beta=0.1, label_smoothing=0.0)"),
    ({"loss_type": "robust", "label_smoothing": 0.2}, "robust(beta=0.1, label_smoothing=0.2)"),
    ({"loss_type": "bco_pair"}, "bco_pair(beta=0.1)"),
    ({"loss_type": "sppo_hard"}, "sppo(beta=0.1, reduction='sum')"),
    ({"loss_type": "aot"}, "aot(beta=0.1, label_smoothing=0.0)"),
    ({"loss_type": "aot", "label_smoothing": 0.2}, "aot(beta=0.1, label_smoothing=0.2)"),
    ({"loss_type": "aot_unpaired"}, "aot_unpaired(beta=0.1, label_smoothing=0.0)"),
    ({"loss_type": "aot_unpaired", "label_smoothing": 0.2}, "aot_unpaired(beta=0.1, label_smoothing=0.2)"),
    ({"loss_type": "apo_zero"}, "apo_zero(beta=0.1)"),
    ({"loss_type": "apo_down"}, "apo_down(beta=0.1)"),
    ({"loss_type": "discopop"}, "discopop(beta=0.1, tau=0.05)"),
    ({"loss_type": "discopop", "discopop_tau": 0.5, "beta": 0.4}, "discopop(beta=0.4, tau=0.5)"),
    ({"loss_type": "sft"}, "sft(nll='token')"),
    ({"loss_type": "sigmoid_norm", "beta": 5.0}, "dpo_norm(beta=5.0)"),
    ({"f_divergence_type": "forward_kl"}, "f_dpo(beta=0.1, divergence='forward_kl')"),
    ({"f_divergence_type": "js_divergence"}, "f_dpo(beta=0.1, divergence='js')"),
    ({"f_divergence_type": "alpha_divergence"}, "f_dpo(beta=0.1, divergence='alpha', alpha=0.5)"),
    (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
        "f_dpo(beta=0.1, divergence='alpha', alpha=1.7)",
    ),
    (
        {"f_divergence_type": "js_divergence", "loss_type": "robust", "label_smoothing": 0.1},
        "noise_robust(f_dpo(beta=0.1, divergence='js'), method='unbiased', rate=0.1)",
    ),
    ({"ld_alpha": 0.5}, "ld_dpo(beta=0.1, alpha=0.5)"),
    ({"ld_alpha": 0.0}, "ld_dpo(beta=0.1, alpha=0.0)"),
    (
        {"ld_alpha": 0.3, "loss_type": "robust", "label_smoothing": 0.1},
        "noise_robust(ld_dpo(beta=0.1, alpha=0.3), method='unbiased', rate=0.1)",
    ),
    ({"use_weighting": True}, "wpo(dpo(beta=0.1, label_smoothing=0.0))"),
    ({"use_weighting": True, "loss_type": "ipo"}, "wpo(ipo(beta=0.1))"),
    ({"use_weighting": True, "loss_type": "apo_down"}, "wpo(apo_down(beta=0.1))"),
    ({"use_weighting": True, "ld_alpha": 0.5}, "wpo(ld_dpo(beta=0.1, alpha=0.5))"),
    (
        {"use_weighting": True, "f_divergence_type": "forward_kl"},
        "wpo(f_dpo(beta=0.1, divergence='forward_kl'))",
    ),
    (
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        "0.8*dpo(beta=0.1, label_smoothing=0.0) + 0.2*bco_pair(beta=0.1) + 1.0*sft(nll='token')",
    ),
    (
        {"loss_type": ["ipo", "sft"], "loss_weights": [0.5, -0.25]},
        "0.5*ipo(beta=0.1) + -0.25*sft(nll='token')",
    ),
    (
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
        "1.0*ld_dpo(beta=0.1, alpha=0.5) + 1.0*sft(nll='token')",
    ),
    (
        {"loss_type": ["sigmoid", "exo_pair", "aot"], "label_smoothing": 0.1},
        "1.0*dpo(beta=0.1, label_smoothing=0.0) + 1.0*exo(beta=0.1, label_smoothing=0.1)"
        " + 1.0*aot(beta=0.1, label_smoothing=0.1)",
    ),
    ({"loss_type": "hinge", "loss_weights": [2.0]}, "2.0*hinge(beta=0.1)"),
    ({"loss_type": "nca_pair", "label_smoothing": 0.1}, "nca(beta=0.1)"),
    ({"loss_type": "apo_zero", "precompute_ref_log_probs": True}, "apo_zero(beta=0.1)"),
    (
        {"f_divergence_type": "forward_kl", "precompute_ref_log_probs": True},
        "f_dpo(beta=0.1, divergence='forward_kl')",
    ),
    (
        {"use_weighting": True, "precompute_ref_log_probs": True},
        "wpo(dpo(beta=0.1, label_smoothing=0.0))",
    ),
]

TRL_ALONE: list[dict[str, Any]] = [
    {"loss_type": "hinge", "ld_alpha": 0.5},
    {"loss_type": "aot", "ld_alpha": 0.5},
    {"ld_alpha": 1.5},
    {"ld_alpha": 0.5, "f_divergence_type": "js_divergence"},
    {"ld_alpha": 0.5, "precompute_ref_log_probs": True},
    {"loss_type": "ipo", "f_divergence_type": "js_divergence"},
    {"loss_type": "sigmoid_norm", "f_divergence_type": "forward_kl"},
    {"loss_type": "discopop", "f_divergence_type": "forward_kl"},
    {"f_divergence_type": "unheard_of"},
    {"loss_type": "aot", "use_weighting": True},
    {"loss_type": "aot_unpaired", "use_weighting": True},
    {"loss_type": "sft", "use_weighting": True},
    {"loss_type": ["sigmoid", "sft"], "use_weighting": True},
    {"loss_type": "exo_pair"},
    {"loss_type": "exo_pair", "label_smoothing": 0.6},
    {"loss_type": "robust", "label_smoothing": 0.5},
    {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.7},
    {"loss_type": "aot", "label_smoothing": 0.7},
    {"loss_type": "unheard_of"},
    {"loss_type": ["sigmoid", "unheard_of"]},
]


def shown(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def reference() -> Any:
    """The policy with noise on its weights: log-ratios of up to 3 nats, either way round."""
    model = make_model()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return model


def loss_and_gradient(folder: Path, trainer: Any, config: Any, options: dict[str, Any]) -> tuple[Any, float, Tensor]:
    """The trainer, its loss on one batch, and the gradient of all weights in one vector."""
    run = trainer(
        make_model(),
        reference(),
        config(**settings(folder, per_device_train_batch_size=ROWS, **options)),
        None,
        make_pairs(ROWS),
        None,
        make_tokenizer(),
    )
    # The loader, since that is where a precomputed reference is filled in; all rows are in its one batch.
    (batch,) = run.get_train_dataloader()
    run.model.train()
    loss = run.compute_loss(run.model, batch)
    loss.backward()
    return run, loss.item(), torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What TRL says without any option."""
    return loss_and_gradient(tmp_path_factory.mktemp("plain"), DPOTrainer, DPOConfig, {})[1]


@pytest.mark.parametrize(("options", "expression"), SAME, ids=[shown(options) for options, _ in SAME])
def test_same_value_and_gradient(tmp_path, plain, options, expression):
    _, theirs, their_gradient = loss_and_gradient(tmp_path, DPOTrainer, DPOConfig, options)
    run, ours, our_gradient = loss_and_gradient(tmp_path, PreferenceTrainer, PreferenceConfig, options)
    assert str(run.objective) == str(parse(expression))
    # A loss near zero is what is left of log-probabilities of some dozens of nats.
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    # discopop's blend and the divergences' exponentials enlarge what float32 rounds off in the log-probabilities.
    assert (our_gradient - their_gradient).norm() <= 5e-5 * their_gradient.norm()
    # The option did something, and there is something to compare.
    assert their_gradient.norm() > 1e-3
    if options != {"loss_type": "robust"}:  # without label_smoothing it is DPO
        assert abs(theirs - plain) > 1e-4


@pytest.mark.parametrize("options", TRL_ALONE, ids=shown)
def test_left_to_trl(tmp_path, options):
    assert expression_from_trl_options(DPOConfig(**settings(tmp_path, **options))) is None


@pytest.mark.parametrize(
    ("options", "error", "theirs", "ours"),
    [
        ({"loss_type": "exo_pair"}, ValueError, "Label smoothing must be greater than 0", "label_smoothing above 0"),
        ({"loss_type": "aot", "use_weighting": True}, NotImplementedError, "WPO-style weighting is not", "with aot"),
        ({"loss_type": "sft", "use_weighting": True}, RuntimeError, "single memory location", "with sft"),
        ({"loss_type": "sigmod"}, ValueError, "Unknown loss type: sigmod", "Did you mean 'sigmoid'"),
        ({"loss_type": ["ipo", "sigmod"]}, ValueError, "Unknown loss type: sigmod", "no loss_type 'sigmod'"),
    ],
    ids=lambda value: shown(value) if isinstance(value, dict) else "",
)
def test_what_trl_refuses_while_it_trains_is_refused_before_a_model_is_loaded(tmp_path, options, error, theirs, ours):
    with pytest.raises(error, match=theirs):
        loss_and_gradient(tmp_path, DPOTrainer, DPOConfig, options)
    args = PreferenceConfig(**settings(tmp_path, **options))
    with pytest.raises(ValueError, match=ours):
        PreferenceTrainer("no/such-model", args=args, train_dataset=make_pairs(ROWS))


@pytest.mark.parametrize(
    ("options", "expression"),
    [
        ({}, "dpo(beta=0.1, label_smoothing=0.1)"),
        ({"loss_type": ["sigmoid", "ipo"]}, "1.0*dpo(beta=0.1, label_smoothing=0.1) + 1.0*ipo(beta=0.1)"),
        ({"use_weighting": True}, "wpo(dpo(beta=0.1, label_smoothing=0.1))"),
        ({"ld_alpha": 0.5}, "noise_robust(ld_dpo(beta=0.1, alpha=0.5), method='smoothed', rate=0.1)"),
        (
            {"f_divergence_type": "js_divergence"},
            "noise_robust(f_dpo(beta=0.1, divergence='js'), method='smoothed', rate=0.1)",
        ),
    ],
    ids=lambda value: shown(value) if isinstance(value, dict) else "",
)
def test_smoothed_labels_that_trl_would_drop_are_honoured(tmp_path, options, expression):
    options = {**options, "label_smoothing": 0.1}
    assert expression_from_trl_options(DPOConfig(**settings(tmp_path, **options))) == expression
    _, theirs, _ = loss_and_gradient(tmp_path, DPOTrainer, DPOConfig, options)
    run, ours, _ = loss_and_gradient(tmp_path, PreferenceTrainer, PreferenceConfig, options)
    assert run.objective is not None
    assert abs(ours - theirs) > 1e-4


# ---- what TRL keeps in trl.experimental -----------------------------------------------------------------------------


def completions(n: int = 16) -> PreferenceBatch:
    """Random sums of plausible size, float64."""
    torch.manual_seed(0)

    def role() -> Scores:
        lengths = torch.randint(1, 30, (n,))
        logps = -lengths * (0.05 + 3 * torch.rand(n, dtype=torch.float64))
        return Scores(logps.requires_grad_(), lengths)

    return PreferenceBatch(chosen=role(), rejected=role())


def experimental(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(pytest.importorskip(f"trl.experimental.{module}"), name)


# loss_type, beta, simpo_gamma, alpha, label_smoothing of TRL's CPO trainer, and the expression that they mean.
CPO_VALUES = [
    ("sigmoid", 0.1, 0.5, 0.0, 0.0, "cpo(beta=0.1)"),
    ("sigmoid", 0.3, 0.5, 0.0, 0.1, "cpo(beta=0.3, label_smoothing=0.1)"),
    ("simpo", 2.0, 1.0, 0.0, 0.0, "simpo(beta=2.0, gamma=1.0)"),
    ("simpo", 2.5, 0.25, 0.25, 0.0, "alpha_po(beta=2.5, gamma=0.25, alpha=0.25)"),
    ("simpo", 2.5, 0.25, -0.5, 0.0, "alpha_po(beta=2.5, gamma=0.25, alpha=-0.5)"),
    ("hinge", 0.7, 0.5, 0.0, 0.0, "0.7*slic(delta=1.4285714285714286)"),
]


def summed_gradients(loss: Tensor, batch: PreferenceBatch) -> Tensor:
    return torch.cat(torch.autograd.grad(loss, [batch.chosen.logps, batch.rejected.logps]))


@pytest.mark.parametrize("case", CPO_VALUES, ids=lambda case: case[-1])
def test_values_of_trls_cpo_trainer(case):
    loss_type, beta, gamma, alpha, label_smoothing, expression = case
    batch = completions()
    settings_of_trl = SimpleNamespace(
        loss_type=loss_type,
        beta=beta,
        simpo_gamma=gamma,
        alpha=alpha,
        label_smoothing=label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    # Its trainer averages per token for simpo and sums otherwise, before this method.
    average = loss_type == "simpo"
    theirs, *_ = experimental("cpo", "CPOTrainer").cpo_loss(
        settings_of_trl, *(s.mean_logps if average else s.logps for s in (batch.chosen, batch.rejected))
    )
    ours = parse(expression)(batch)
    torch.testing.assert_close(ours.per_example, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        summed_gradients(ours.loss, batch), summed_gradients(theirs.mean(), batch), rtol=1e-9, atol=1e-12
    )


def test_values_of_trls_orpo_trainer():
    batch = completions()
    settings_of_trl = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    gain, *_ = experimental("orpo", "ORPOTrainer").odds_ratio_loss(
        settings_of_trl, batch.chosen.mean_logps, batch.rejected.mean_logps
    )
    ours = parse("0.1*orpo(beta=1.0)")(batch)
    # TRL works in float32 here and subtracts the gain from the likelihood loss.
    torch.testing.assert_close(ours.per_example, -gain.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        summed_gradients(ours.loss, batch), summed_gradients(-gain.mean(), batch), rtol=1e-4, atol=1e-7
    )
