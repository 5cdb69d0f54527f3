"""The measures on vectors whose values are known: right angles, normal clouds, heavy tails, chance alone."""

from __future__ import annotations

import pytest
import torch

from prefopt.analysis.kernel_choice.measures import FEWEST, SLACK, Triplets, distribution, geometry, measure


def repeated(prompt, chosen, rejected, times=FEWEST):
    return Triplets(*(torch.tensor([row] * times, dtype=torch.float64) for row in (prompt, chosen, rejected)))


def cloud(n=4000, width=6, apart=0.0, noise=None, seed=0):
    """Texts near one point of the sphere, so that their places around it are those of the noise."""
    generator = torch.Generator().manual_seed(seed)

    def made():
        return (
            torch.randn(n, width, generator=generator, dtype=torch.float64) if noise is None else noise(generator, n)
        )

    def on_sphere(tangent):
        return torch.cat([torch.full((n, 1), 1e3, dtype=torch.float64), tangent], 1)

    prompt, chosen, rejected = made(), made(), made()
    chosen[:, 0] += apart
    return Triplets(on_sphere(prompt), on_sphere(chosen), on_sphere(rejected))


def unequal(vectors):
    """Three times as far from their middle; texts near one point of the sphere stay near it."""
    middle = vectors.mean(0)
    return middle + 3 * (vectors - middle)


class TestGeometry:
    def test_a_chosen_completion_that_is_the_prompt_and_a_rejected_one_at_right_angles(self):
        found = geometry(repeated([1.0, 0.0], [2.0, 0.0], [0.0, 3.0]))
        assert (found.pnd, found.pnav, found.pad, found.nad, found.tat) == (1.0, 0.0, 0.0, 1.0, 0.0)
        assert (found.nag, found.nag_error) == (1.0, 0.0)

    def test_the_same_the_other_way_round(self):
        found = geometry(repeated([1.0, 0.0], [0.0, 1.0], [1.0, 0.0]))
        assert found.nag == -1.0
        assert found.tat == pytest.approx(1 + SLACK)

    def test_half_of_the_rows_each_way(self):
        one, other = repeated([1, 0], [1, 0], [0, 1], 20), repeated([1, 0], [0, 1], [1, 0], 20)
        both = Triplets(*(torch.cat([getattr(t, k) for t in (one, other)]) for k in ("prompt", "chosen", "rejected")))
        found = geometry(both)
        assert found.nag == 0.0
        assert found.pnav == pytest.approx(40 / 39)  # +-1 each, of the sample
        assert found.tat == pytest.approx((1 + SLACK) / 2)
        assert found.spread == pytest.approx((40 / 39) ** 0.5 / 0.5)

    def test_texts_that_are_all_alike_have_no_gap(self):
        found = geometry(repeated([1.0, 1.0], [1.0, 1.0], [1.0, 1.0]))
        assert found.nag == pytest.approx(0.0, abs=1e-9)
        assert found.spread == 0.0 or found.pad == pytest.approx(0.0, abs=1e-12)


class TestDistribution:
    @pytest.mark.parametrize("apart", [0.0, 0.5, 2.0])
    def test_normal_clouds(self, apart):
        found = distribution(cloud(apart=apart))
        normal = torch.distributions.Normal(0.0, 1.0)
        assert found.drift == pytest.approx(apart, abs=0.08)
        assert found.overlap == pytest.approx(2 * float(normal.cdf(torch.tensor(-apart / 2))), abs=0.05)
        assert found.kurtosis == pytest.approx(0.0, abs=0.2)
        assert 0.5 < found.roughness < 2.0

    @pytest.mark.parametrize(("n", "least"), [(40, 0.85), (120, 0.92), (240, 0.94), (1000, 0.97)])
    def test_few_rows_of_one_distribution_share_as_much_as_many(self, n, least):
        # The bare histograms share 0.76, 0.86, 0.89 and 0.94: fewer rows would be another divergence.
        found = [distribution(cloud(n=n, seed=seed)).overlap for seed in range(20)]
        assert least < sum(found) / 20 <= 1.0

    def test_chance_separates_nothing_in_many_dimensions(self):
        triplets = cloud(n=120, width=384)
        assert distribution(triplets).drift < 0.5
        # Along the direction that fits all pairs the same noise looks like two sets far apart.
        direction = (triplets.chosen - triplets.rejected).mean(0)
        chosen, rejected = triplets.chosen @ direction, triplets.rejected @ direction
        assert float((chosen.mean() - rejected.mean()) / chosen.std()) > 1.5

    def test_heavy_tails(self):
        student = torch.distributions.StudentT(torch.tensor(4.0, dtype=torch.float64))
        torch.manual_seed(0)
        found = distribution(cloud(noise=lambda _, n: student.sample((n, 1)), apart=0.5))
        assert found.kurtosis > 1.0

    def test_normal_clouds_of_unequal_width_have_light_tails(self):
        same = cloud()
        found = distribution(Triplets(same.prompt, cloud(seed=1).chosen, unequal(cloud(seed=2).rejected)))
        assert found.kurtosis == pytest.approx(0.0, abs=0.2)

    def test_values_on_a_grid_are_rough(self):
        found = distribution(cloud(noise=lambda g, n: torch.randint(3, (n, 1), generator=g).double(), apart=0.0))
        assert found.roughness > 5.0

    def test_texts_that_are_all_alike(self):
        found = distribution(repeated([1.0, 0.0], [0.0, 1.0], [0.0, 1.0]))
        assert (found.overlap, found.drift, found.kurtosis) == (1.0, 0.0, 0.0)


def test_neither_scale_nor_rotation_of_the_vectors_matters():
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(60, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    before = measure(Triplets(*parts)).as_dict()
    after = measure(Triplets(*(7 * part @ turn for part in parts))).as_dict()
    assert after == pytest.approx(before, rel=1e-6, abs=1e-9)


class TestErrors:
    def test_too_few_pairs(self):
        with pytest.raises(ValueError, match=f"at least {FEWEST} pairs are needed to measure a preference set, got 3"):
            measure(repeated([1.0], [1.0], [1.0], 3))

    def test_vectors_of_different_widths(self):
        with pytest.raises(ValueError, match=r"one shape \(N, H\), got \(2, 3\), \(2, 3\), \(2, 4\)"):
            Triplets(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4))

    def test_a_vector_that_is_not_finite_is_named(self):
        bad = torch.ones(4, 2)
        bad[2, 1] = torch.nan
        with pytest.raises(ValueError, match="embedding of the rejected text in row 2"):
            Triplets(torch.ones(4, 2), torch.ones(4, 2), bad)
