"""Curves of losses: their values and gradients, what is drawn against what, what is refused, and the pictures."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from prefopt.catalogue import curves, plots
from prefopt.catalogue.curves import START, TOKENS, VOCABULARY, Curve, _pairs, trace
from prefopt.catalogue.plots import PlotError, _limits, draw, scale_hints
from prefopt.catalogue.tables import families
from prefopt.cli import app
from prefopt.losses import Need, PairLoss, available, parse, presets, register
from prefopt.losses.registry import _LOSSES
from prefopt.losses.wrappers import Wrapper
from tests.cli.test_cli import OBJECTIVES, ROOT, script


def curve(text: str, axis: str = "margin", span: float = 40.0) -> Curve:
    vary = (axis,) if axis != "sampled" else ("margin",)
    return trace([text], vary, span)[0].curves[axis]


def at(values: Curve, x: float) -> tuple[float, float]:
    place = int((values.x - x).abs().argmin())
    assert float(values.x[place]) == pytest.approx(x)
    return float(values.loss[place]), float(values.gradient[place])


class TestCurves:
    def test_dpo_against_the_margin(self):
        values = curve("dpo(beta=0.1)")
        for x in (-20.0, 0.0, 30.0):
            loss, slope = at(values, x)
            assert loss == pytest.approx(math.log1p(math.exp(-0.1 * x)))
            assert slope == pytest.approx(-0.1 / (1 + math.exp(0.1 * x)))

    def test_a_reference_free_loss_against_the_same_margin(self):
        assert at(curve("simpo(beta=2.0, gamma=1.0)"), 20.0)[0] == pytest.approx(math.log1p(math.exp(1 - 2 * 20 / 40)))

    def test_one_side_at_a_time(self):
        assert at(curve("apo_zero(beta=0.1)", "chosen"), 10.0)[0] == pytest.approx(0.5 + 1 / (1 + math.e))
        assert at(curve("apo_zero(beta=0.1)", "rejected"), 10.0)[0] == pytest.approx(0.5 + 1 / (1 + math.exp(-1)))

    def test_a_loss_on_one_role_has_its_own_axis(self):
        (npo,) = trace(["npo(beta=0.1)"])
        assert list(npo.curves) == ["rejected"]
        assert at(npo.curves["rejected"], 0.0) == (pytest.approx(20 * math.log(2)), pytest.approx(1.0))
        (online,) = trace(["kl_online"])
        assert at(online.curves["sampled"], 10.0) == (pytest.approx(10.0), pytest.approx(10.0))

    def test_token_values_follow_from_the_log_ratio(self):
        """KL(uniform || policy) and KL(policy || uniform) over 8 tokens, one at e^(u/n) / 8, by hand."""
        u = 20.0
        p = math.exp(START + u / TOKENS)
        rest = (1 - p) / (VOCABULARY - 1)
        forward = -sum(math.log(q * VOCABULARY) for q in [p] + 7 * [rest]) / VOCABULARY
        reverse = sum(q * math.log(q * VOCABULARY) for q in [p] + 7 * [rest])
        assert at(curve("kl_retain", "chosen"), u)[0] == pytest.approx(forward)
        assert at(curve("kl_retain(direction='reverse')", "chosen"), u)[0] == pytest.approx(reverse)
        # sum_v pi(v)^2 is the weight's denominator; the rejected side stays uniform, where the weight is 1.
        weight = p / (p**2 + 7 * rest**2)
        assert at(curve("wpo(dpo(beta=0.1))", "chosen"), u)[0] == pytest.approx(weight * math.log1p(math.exp(-2)))
        contrast = math.log1p(p / rest)
        assert at(curve("cringe", "rejected"), u)[0] == pytest.approx((contrast - START) / 2)

    def test_columns_are_zero_and_the_previous_iterate_is_the_reference(self):
        (line,) = trace(["dpo(beta=0.1)", "margin_dpo(beta=0.1)"])
        assert line.label == "dpo(beta=0.1) = margin_dpo(beta=0.1)"
        assert len(trace(["inpo(eta=0.5, tau=0.1)", "ipo(beta=0.5, average=False)"])) == 1

    def test_state_does_not_carry_over_from_point_to_point(self):
        values = curve("bco(beta=0.1)", "rejected")
        # delta is the mean of the two rewards of this pair alone.
        loss = math.log1p(math.exp(0.1 * 40 / 2))
        assert float(values.loss[-1]) == pytest.approx(loss)

    def test_points_alone_and_together_are_the_same(self):
        """Losses whose examples do not act on one another are evaluated in one batch."""
        loss = parse("0.5*kto + rpo - 0.1*ga(nll='sum')")
        x = torch.tensor([-30.0, -1.0, 12.0], dtype=torch.float64)
        for together, alone in zip(_pairs(loss, "margin", x, False), _pairs(loss, "margin", x, True), strict=True):
            torch.testing.assert_close(together, alone)

    def test_a_scalar_of_its_own_making_is_taken_point_by_point(self):
        class Squared(type(parse("dpo"))):
            def forward(self, batch):
                output = super().forward(batch)
                return replace(output, loss=output.loss**2)

        values, _ = _pairs(Squared(), "margin", torch.tensor([-5.0, 5.0], dtype=torch.float64), False)
        assert float(values[0]) == pytest.approx(math.log1p(math.exp(0.5)) ** 2)

    def test_marks(self):
        marks = {line.names[0]: line.label[-1] for line in trace(["aql", "aot", "tdpo", "hinge", "padll", "irpo"])}
        assert marks == {"aql": "*", "aot": "*", "tdpo": "†", "hinge": "e", "padll": "l", "irpo": "o"}

    def test_every_registered_loss_and_preset_is_a_curve(self, monkeypatch):
        monkeypatch.setattr(curves, "POINTS", 11)
        names = [f"{name}(dpo + sft)" if issubclass(cls, Wrapper) else name for name, cls in available().items()]
        # Pictures have no rows that are not to be forgotten, so this one is 0 everywhere.
        names.remove("on_forget(dpo + sft)")
        names = [name for name in (*names, *presets()) if Need.STATES not in parse(name).needs]
        lines = trace(names)
        assert sum(len(line.names) for line in lines) == len(names)
        for line in lines:
            for values in line.curves.values():
                assert torch.isfinite(values.loss).all()
                assert torch.isfinite(values.gradient).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("expressions", "options", "message"),
        [
            (["pairwise_cringe(k=9)"], {}, "asks for the 10 likeliest tokens"),
            (["dpo"], {"span": 300.0}, r"between 0 and 166\.4 nats"),
            (["dpo"], {"span": 100.0, "vary": ("chosen",)}, r"between 0 and 83\.2 nats"),
            (["rmu"], {}, "does not depend on the log-probability of the rejected completion"),
            (["npo"], {"span": 100.0}, r"between 0 and 83\.2 nats"),
            (["dpo"], {"span": math.nan}, "got nan"),
            (["npo", "ga"], {"vary": ("chosen",)}, "vary has no effect here"),
            ([], {}, "name the losses"),
        ],
    )
    def test_messages(self, expressions, options, message):
        with pytest.raises(PlotError, match=message):
            trace(expressions, **options)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (lambda batch: batch.chosen.lengths.double(), "does not depend on the margin"),
            (lambda batch: 1 / (batch.chosen.ratios - batch.chosen.ratios), "not finite everywhere"),
            (lambda batch: batch.chosen.logps + [].index(batch), "stranger cannot be plotted"),
        ],
    )
    def test_what_is_no_curve(self, body, message):
        try:

            @register("stranger")
            class Stranger(PairLoss):
                needs = Need.REFERENCE

                def per_example(self, batch):
                    return body(batch)

            with pytest.raises(PlotError, match=message):
                trace(["stranger"])
        finally:
            _LOSSES.pop("stranger", None)

    def test_without_matplotlib_the_extra_is_named(self, monkeypatch, tmp_path):
        lines = trace(["dpo"])
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(PlotError, match=r"pip install 'prefopt-trainer\[plot\]'"):
            draw(lines, tmp_path / "x.png")


class TestPicture:
    def test_a_row_of_two_panels_for_every_axis(self, tmp_path):
        one, two = tmp_path / "one.png", tmp_path / "deep" / "two.png"
        assert CliRunner().invoke(app, ["losses", "--plot", str(one), "dpo", "simpo"]).exit_code == 0
        shown = CliRunner().invoke(app, ["losses", "--plot", str(two), "dpo", "npo"], env={"COLUMNS": "300"}).output
        assert "two.png: 2 curves" in shown
        with Image.open(one) as first, Image.open(two) as second:
            assert first.format == "PNG"
            assert first.width == second.width
            assert second.height > 1.7 * first.height

    def test_steep_curves_are_cut_and_said_to_be(self):
        flat, steep = torch.linspace(1, -1, 101), 100 * torch.linspace(1, -1, 101)
        low, high = _limits([flat, flat, steep], None)
        assert -2 < low < -1
        assert 1 < high < 2
        # Alone it is shown whole.
        low, high = _limits([steep], None)
        assert low < -100 < 100 < high

    def test_a_gradient_panel_holds_zero(self):
        low, high = _limits([torch.full((11,), -0.025)], 0.0)
        assert low < -0.025 < 0 < high

    def test_a_hint_gives_the_scale(self):
        assert scale_hints(trace(["dpo", "hinge"])) == []
        (hint,) = scale_hints(trace(["dpo", "hinge", "ipo(beta=0.01, average=False)"]))
        assert hint.startswith("ipo(beta=0.01, average=False) changes ")
        assert '*ipo(beta=0.01, average=False)"' in hint


class TestPage:
    COMMANDS = script().plot_commands(OBJECTIVES)

    def test_every_family_has_a_picture_or_a_reason(self):
        drawn = {Path(words[2]).stem.removeprefix("objectives-") for words in self.COMMANDS}
        assert {family.name for family in families()} - drawn == {"batchwise", "likelihood", "conflict", "listwise"}
        assert "presets" in drawn

    @pytest.mark.parametrize("words", COMMANDS, ids=lambda words: Path(words[2]).stem)
    def test_pictures_are_there_small_and_shown(self, words):
        picture = ROOT / words[2]
        assert picture.stat().st_size < 150_000
        assert f"](images/{picture.name})" in OBJECTIVES

    @pytest.mark.parametrize("words", COMMANDS, ids=lambda words: Path(words[2]).stem)
    def test_commands_still_work(self, words, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(curves, "POINTS", 11)
        monkeypatch.setattr(plots, "draw", lambda lines, path: drawn.extend(lines))
        result = CliRunner().invoke(app, [*words[:2], str(tmp_path / "x.png"), *words[3:]])
        assert result.exit_code == 0, result.output
        shown = [name for line in drawn for name in line.names]
        assert shown
        assert set(shown) <= set(words)
