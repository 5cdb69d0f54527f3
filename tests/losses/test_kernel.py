"""Kernelized objectives: identities of the kernels, what learns from what, and the mixture's weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from prefopt.losses import HMK, KernelDPO, LossSyntaxError, PreferenceBatch, Scores, parse
from prefopt.losses.divergences import NAMES, Divergence, renyi
from prefopt.losses.kernel_functions import (
    KERNELS,
    RBF,
    Mahalanobis,
    Polynomial,
    Spectral,
    diagonal_precision,
    spectrum_of,
    unit,
)
from tests.losses.cases import make_batch, random_rows


def vectors(n: int = 20, width: int = 6, seed: int = 0) -> torch.Tensor:
    return unit(torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def scores_with(hidden: torch.Tensor, prompt: torch.Tensor, logps: float = -5.0) -> Scores:
    n = len(hidden)
    return Scores(
        torch.full((n,), logps, dtype=hidden.dtype), torch.full((n,), 3), torch.full((n,), -5.0, dtype=hidden.dtype),
        hidden=hidden, prompt_hidden=prompt, embedding=hidden, prompt_embedding=prompt,
    )  # fmt: skip


class TestKernels:
    @pytest.mark.parametrize("name", KERNELS)
    def test_one_at_the_same_vector_and_less_elsewhere(self, name):
        u, v = vectors(seed=0), vectors(seed=1)
        precision = diagonal_precision(torch.cat([u, v]), 0.5)
        kernel = KERNELS[name]()
        torch.testing.assert_close(kernel.log(u, u, precision), torch.zeros(20, dtype=torch.float64))
        assert (kernel.log(u, v, precision) < 0).all()
        torch.testing.assert_close(kernel.log(u, v, precision), kernel.log(v, u, precision))

    @pytest.mark.parametrize(
        "kernel", [Polynomial(offset=0.0), RBF(0.01), Spectral("1:1e4, 1:2e4"), Mahalanobis()], ids=repr
    )
    def test_far_vectors_do_not_underflow(self, kernel):
        u = torch.tensor([[1.0, 0.0]], requires_grad=True)
        log_kernel = kernel.log(unit(u), unit(torch.tensor([[-1.0, 1e-4]])), torch.full((2,), 1e4))
        log_kernel.sum().backward()
        assert torch.isfinite(log_kernel).all()
        assert float(log_kernel.detach()) < -20
        assert torch.isfinite(u.grad).all()

    def test_equal_variances_and_full_shrinkage_are_the_radial_kernel(self):
        u, v = vectors(seed=0), vectors(seed=1)
        spread = vectors(200, seed=2) * torch.linspace(0.1, 3, 6, dtype=torch.float64)
        radial = RBF().log(u, v)
        torch.testing.assert_close(Mahalanobis().log(u, v, diagonal_precision(spread, 1.0)), radial)
        own = diagonal_precision(spread, 0.1)
        assert (own.diff() < 0).all()  # directions of large variance count less
        assert float(own.mean()) == pytest.approx(1.0)
        same = torch.ones(5, 6, dtype=torch.float64)
        torch.testing.assert_close(diagonal_precision(same, 0.5), torch.ones(6, dtype=torch.float64))

    def test_vectors_that_do_not_count_leave_the_variances_alone(self):
        some = vectors(8)
        weights = torch.tensor([1.0] * 5 + [0.0] * 3)
        torch.testing.assert_close(diagonal_precision(some, 0.3, weights), diagonal_precision(some[:5], 0.3))

    def test_the_scale_of_embeddings_does_not_matter(self):
        batch = make_batch(random_rows(4))
        larger = replace(
            batch,
            chosen=replace(batch.chosen, hidden=1000 * batch.chosen.hidden),
            rejected=replace(batch.rejected, prompt_hidden=0.01 * batch.rejected.prompt_hidden),
        )
        for kernel in KERNELS:
            loss = KernelDPO(kernel)
            torch.testing.assert_close(loss(larger).loss, loss(batch).loss)


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("kernel_dpo(degree=3)", r"no argument 'degree': write kernel=polynomial\(degree=...\)"),
            (
                "kernel_dpo(kernel='spectral', shrinkage=0.1)",
                r"'shrinkage': write kernel=mahalanobis\(shrinkage=...\)",
            ),
            ("kernel_dpo(order=0.5)", r"no argument 'order': write divergence=renyi\(order=...\)"),
            ("kernel_dpo(divergence='f', f='triangular')", r"no argument 'f': write divergence=f\(...\)"),
            ("hmk(bandwidth=0.5)", r"no argument 'bandwidth': write rbf=rbf\(bandwidth=...\)"),
            ("kernel_dpo(kernel=rbf(degree=3))", "rbf has no argument 'degree'. Its arguments: bandwidth=1.0"),
            ("kernel_dpo(kernel=spectral(spectrum='1:1, 2'))", "spectrum holds '2': write weight:rate"),
            (
                "kernel_dpo(kernel=mahalanobis(shrinkage=0.0))",
                "shrinkage must be a positive finite number of at most 1",
            ),
            ("kernel_dpo(kernel=polynomial(degree=0))", "degree must be a whole number of at least 1"),
            ("kernel_dpo(kernel=rbf(bandwidth='1'))", "rbf's bandwidth must be a number, got '1'"),
            ("kernel_dpo(divergence=renyi(order=0))", "order must be a positive finite number"),
            ("kernel_dpo(divergence=js(order=2))", "js has no argument 'order'. It takes none"),
            ("kernel_dpo(divergence=f('cosine'))", "f's generator must be 'forward_kl' or 'total_variation'"),
            (
                "kernel_dpo(kernel=cubic(degree=3))",
                r"expected 'polynomial' or .* or rbf\(bandwidth=1.0\) .*, got 'cubic'",
            ),
            ("kernel_dpo(kernel=dpo)", "expected 'polynomial' or 'rbf' .*, got 'dpo'"),
            ("hmk(rbf=polynomial())", r"expected rbf\(bandwidth=1.0\), got 'polynomial'"),
            ("rbf(bandwidth=0.5)", "no loss is named 'rbf'"),
            ("kernel_dpo(kernel='cubic')", r"kernel must be 'polynomial' or 'rbf' .* or rbf\(bandwidth=1.0\)"),
            ("kernel_dpo(link='probit')", "link must be 'logistic' or 'linear'"),
            ("hmk(gamma=0.0)", "gamma must be a positive finite number"),
        ],
    )
    def test_a_bad_one_is_named(self, text, message):
        with pytest.raises(LossSyntaxError, match=message):
            parse(text)

    @pytest.mark.parametrize("kernel", ["polynomial(degree=3)", "rbf(0.5)", "spectral", "mahalanobis(shrinkage=1)"])
    @pytest.mark.parametrize("divergence", ["renyi(order=2.0)", "f('triangular')", "renyi", "js()"])
    def test_objects_print_as_the_text_that_makes_them(self, kernel, divergence):
        for text in (f"kernel_dpo(kernel={kernel}, divergence={divergence})", f"hmk({divergence}, rbf=rbf(0.5))"):
            loss = parse(text)
            again = parse(str(loss))
            assert str(again) == str(loss)
            assert again.hyperparameters() == loss.hyperparameters()

    def test_a_name_is_the_object_with_its_defaults(self):
        batch = make_batch(random_rows(3))
        short = KernelDPO("rbf", "kl")
        torch.testing.assert_close(
            KernelDPO(RBF(1.0), Divergence("kl"))(batch).loss, short(batch).loss, rtol=0, atol=0
        )
        assert float(KernelDPO(RBF(0.5))(batch).loss) != float(short(batch).loss)
        assert KernelDPO(divergence="renyi").divergences == KernelDPO(divergence=renyi()).divergences
        for wrong in ({"kernel": "cubic"}, {"divergence": "cosine"}):
            with pytest.raises(ValueError, match="must be one of"):
                KernelDPO(**wrong)

    def test_what_is_not_used_is_not_asked_for(self):
        asked = {text: parse(text).needs.words for text in (
            "kernel_dpo", "kernel_dpo(alpha=0.0)", "kernel_dpo(gamma=0.0)", "kernel_dpo(gamma=0.0, alpha=0.0)",
            "kernel_dpo(alpha=0.0, link='linear', embeddings='given')",
        )}  # fmt: skip
        assert list(asked.values()) == [
            "reference, divergence, hidden", "reference, hidden", "reference, divergence", "reference", "embeddings",
        ]  # fmt: skip

    def test_a_sum_asks_for_every_divergence_once(self):
        loss = parse("kernel_dpo(divergence='js') + kernel_dpo(divergence='renyi') + kernel_dpo(divergence='js')")
        assert loss.divergences == ("js", "renyi(0.9)")
        batch = make_batch(random_rows(3))
        alone = [parse(text)(batch).loss for text in ("kernel_dpo(divergence='js')", "kernel_dpo(divergence='renyi')")]
        torch.testing.assert_close(loss(batch).loss, 2 * alone[0] + alone[1])

    def test_a_divergence_that_was_not_computed_is_named(self):
        batch = make_batch(random_rows(3))
        other = {"chosen": replace(batch.chosen, divergences=tuple("abcdefgh"))}
        with pytest.raises(ValueError, match="needs the divergence 'kl', but the scores hold"):
            KernelDPO()(replace(batch, **other))

    def test_spectra_are_scaled_to_one(self):
        assert spectrum_of("1:1, 0.5:0.1") == ((2 / 3, 1.0), (1 / 3, 0.1))
        assert sum(weight for weight, _ in spectrum_of("3:1,1:2,4:9")) == pytest.approx(1)


class TestTheConstant:
    """Embeddings that do not learn: their margin is a number, whatever its weight."""

    def gradient(self, gamma: float, link: str, **options: object) -> torch.Tensor:
        batch = make_batch(random_rows(5), requires_grad=True)
        loss = KernelDPO(gamma=gamma, link=link, alpha=0.0, **options)  # type: ignore[arg-type]
        loss(batch).loss.backward()
        assert batch.chosen.logps.grad is not None
        assert batch.rejected.logps.grad is not None
        return torch.cat([batch.chosen.logps.grad, batch.rejected.logps.grad])

    @pytest.mark.parametrize("options", [{"embeddings": "given"}, {"gradient": False}], ids=str)
    def test_a_linear_link_does_not_see_it_and_a_logistic_one_does(self, options):
        torch.testing.assert_close(
            self.gradient(1.0, "linear", **options), self.gradient(0.0, "linear"), rtol=0, atol=0
        )
        with_kernel, without = (self.gradient(gamma, "logistic", **options) for gamma in (1.0, 0.0))
        assert float((with_kernel - without).norm() / without.norm()) > 0.05

    def test_hidden_states_learn_from_it_unless_told_not_to(self):
        for gradient in (True, False):
            batch = make_batch(random_rows(5), requires_grad=True)
            KernelDPO(link="linear", gradient=gradient)(batch).loss.backward()
            assert (batch.chosen.hidden.grad is not None) == gradient
            assert (batch.rejected.prompt_hidden.grad is not None) == gradient


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("divergence", NAMES)
def test_all_28_pairs_have_a_gradient_for_everything(kernel, divergence):
    loss = parse(f"kernel_dpo(kernel={kernel!r}, divergence={divergence!r})")
    name = loss.divergences[0]
    batch = make_batch(random_rows(3), requires_grad=True)
    one = {role: batch.role(role) for role in ("chosen", "rejected")}
    renamed = {role: replace(scores, divergences=(name, *scores.divergences[1:])) for role, scores in one.items()}
    output = loss(replace(batch, **renamed))
    output.loss.backward()
    for scores in one.values():
        for leaf in (scores.logps, scores.hidden, scores.prompt_hidden, scores.token_divergences):
            assert leaf.grad is not None
            assert float(leaf.grad.abs().sum()) > 0
    assert {"kernel/margins", "kernel/divergence"} <= set(output.metrics)


class TestMixture:
    def test_logits_that_pick_a_kernel_are_that_kernel(self):
        batch = make_batch(random_rows(4))
        for kernel in KERNELS:
            mixture = HMK(entropy=0.0).double()
            group, place = {"rbf": (0, 0), "polynomial": (0, 1), "spectral": (1, 0), "mahalanobis": (1, 1)}[kernel]
            with torch.no_grad():
                mixture.groups[group] = 200.0
                (mixture.local, mixture.broad)[group][place] = 200.0
            torch.testing.assert_close(mixture(batch).loss, KernelDPO(kernel)(batch).loss)

    def test_weights_sum_to_one_after_any_step(self):
        mixture = HMK().double()
        optimizer = torch.optim.SGD(mixture.parameters(), lr=50.0)
        for seed in range(5):
            optimizer.zero_grad()
            output = mixture(make_batch(random_rows(4, seed=seed)))
            output.loss.backward()
            optimizer.step()
            weights = {name: float(value) for name, value in output.metrics.items() if name.startswith("weights/")}
            assert len(weights) == 4
            assert sum(weights.values()) == pytest.approx(1)
        assert max(weights.values()) > 0.3

    def test_the_entropy_term_is_largest_at_even_weights(self):
        mixture = HMK()
        assert float(mixture.mixture_entropy().detach()) == pytest.approx(3 * math.log(2))
        with torch.no_grad():
            mixture.local[0] = 3.0
        assert float(mixture.mixture_entropy().detach()) < 3 * math.log(2) - 0.3

    def test_it_learns_on_embeddings_that_do_not(self):
        mixture = HMK(embeddings="given").double()
        mixture(make_batch(random_rows(6))).loss.backward()
        assert all(float(p.grad.abs().sum()) > 0 for p in mixture.parameters())

    @pytest.mark.parametrize(("entropy", "keeps"), [(HMK().entropy, True), (0.0, False)])
    def test_the_entropy_term_keeps_every_weight_alive(self, entropy, keeps):
        """The polynomial, whose base vanishes for opposite vectors, tells these pairs best and takes over."""
        weights = mixture_after(1000, entropy)
        assert (min(weights.values()) > 0.05) == keeps, weights


def mixture_after(steps: int, entropy: float) -> dict[str, float]:
    """The weights of a mixture trained alone, on vectors that one kernel tells apart by far the best."""
    draw = torch.Generator().manual_seed(0)
    x = unit(torch.randn(64, 8, generator=draw))
    near = unit(x + 0.1 * torch.randn(64, 8, generator=draw))
    far = unit(-x + 0.1 * torch.randn(64, 8, generator=draw))
    batch = PreferenceBatch(scores_with(near, x), scores_with(far, x))
    mixture = HMK(alpha=0.0, entropy=entropy, embeddings="given")
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        mixture(batch).loss.backward()
        optimizer.step()
    return {name: float(weight.detach().exp()) for name, weight in mixture.log_weights().items()}
