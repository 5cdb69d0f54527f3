"""Exponents of samples whose law is known, and of layers with and without an adapter."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt.analysis.spectra.layers import describe, layer_spectra
from prefopt.analysis.spectra.power_law import fit_power_law
from prefopt.safety.errors import UsageError
from tests.tiny import make_model


def pareto(alpha, count, seed=0):
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1 - uniform) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [2.0, 3.0, 5.0])
def test_the_exponent_of_a_pareto_sample_is_found(alpha):
    fit = fit_power_law(3 * pareto(alpha, 2000))
    assert fit.alpha == pytest.approx(alpha, abs=4 * (alpha - 1) / fit.tail**0.5)
    assert fit.tail > 500
    assert fit.distance < 0.05


def test_a_tail_is_found_above_values_that_follow_another_law():
    body = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit = fit_power_law(torch.cat([body, 2 * pareto(2.5, 1000)]))
    assert fit.smallest > 1
    assert fit.alpha == pytest.approx(2.5, abs=0.3)


def test_too_few_values_have_no_fit():
    assert fit_power_law(torch.ones(5)) is None
    assert fit_power_law(torch.ones(50)) is None
    assert fit_power_law(torch.zeros(50)) is None


def adapted(scale):
    model = get_peft_model(make_model("llama", 0), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return model


def test_layers_with_an_adapter_are_compared_with_those_below_it():
    spectra = layer_spectra(adapted(scale=0.5))
    assert len(spectra) == 4
    assert all(spectrum.before != spectrum.after and spectrum.change > 0 for spectrum in spectra)
    lines = describe(spectra)
    assert lines[0].startswith("spectra of 4 layers: median power-law exponent")
    assert "layers.0.self_attn.q_proj" in "\n".join(lines)
    assert all(spectrum.before == spectrum.after and spectrum.change == 0 for spectrum in layer_spectra(adapted(0.0)))


def test_whole_models_are_compared_by_layer():
    alone = layer_spectra(make_model("llama", 0))
    assert all(spectrum.before is None for spectrum in alone)
    assert "before" not in describe(alone)[0]
    compared = layer_spectra(make_model("llama", 0), make_model("llama", 1))
    assert [spectrum.after for spectrum in compared] == [spectrum.after for spectrum in alone]
    assert not any("lm_head" in spectrum.name for spectrum in compared)


def test_a_model_without_wide_layers_is_refused():
    with pytest.raises(UsageError, match="no trained linear layer"):
        layer_spectra(torch.nn.Linear(4, 4))
