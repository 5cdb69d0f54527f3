"""A reference's fingerprint: the same however its weights are spread, another wherever its numbers are."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefopt.scoring.fingerprint import fingerprint, is_sharded
from tests.processes import torchrun
from tests.tiny import make_model


def continued(alpha: float = 8, seed: int = 0, trained_seed: int = 0):
    """A model whose adapter is trained on, beside the frozen copy that TRL keeps under the name "ref"."""
    config, model = LoraConfig(target_modules="all-linear", lora_alpha=alpha, init_lora_weights=False), make_model()
    torch.manual_seed(seed)
    model = get_peft_model(model, config, adapter_name="ref")
    torch.manual_seed(trained_seed)
    model.add_adapter("default", config)
    return model


def test_a_fingerprint_is_of_the_weights_that_make_the_reference():
    base, other = fingerprint(make_model(seed=0)), fingerprint(make_model(seed=1))
    assert base != other
    assert base == fingerprint(make_model(seed=0))
    assert base != fingerprint(make_model(seed=0).to(torch.bfloat16))
    assert base != fingerprint(make_model(seed=0), about="bf16")
    adapted = get_peft_model(make_model(seed=0), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert fingerprint(adapted, trained_adapter="default") == base
    assert fingerprint(adapted) != base


def test_settings_that_change_the_numbers_count_and_names_do_not(tmp_path):
    base = fingerprint(make_model())
    model = make_model()
    model.save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == base
    model.config.use_cache, model.config.pad_token_id = False, 3
    assert fingerprint(model) == base
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}
    assert fingerprint(model) != base


def test_whole_weights_keep_their_fingerprint():
    """Caches on disk are found by it."""
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.fill_(3.0)
    assert fingerprint(model, about="float32 no") == "884d9b37d607caf3"
    assert not is_sharded(model)


def test_the_copy_of_a_continued_adapter_counts_and_the_trained_one_does_not():
    here = fingerprint(continued(), trained_adapter="default")
    assert here != fingerprint(make_model())
    assert here == fingerprint(continued(trained_seed=5), trained_adapter="default")
    assert here != fingerprint(continued(seed=5), trained_adapter="default")
    # The same matrices, scaled otherwise.
    assert here != fingerprint(continued(alpha=16), trained_adapter="default")


def test_weights_that_are_nowhere_are_refused():
    with pytest.raises(ValueError, match=r"weight is on the meta device.*reference_cache='off'"):
        fingerprint(make_model().to("meta"))


@pytest.mark.distributed
def test_weights_sharded_by_fsdp_have_the_fingerprint_of_whole_ones(tmp_path):
    torchrun("tests.scoring.shard_processes", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["world"] == 2
    assert found["plain"] == found["adapter"] == fingerprint(make_model())
    assert found["bfloat16"] == fingerprint(make_model(dtype=torch.bfloat16))
    assert found["other"] == fingerprint(make_model(seed=1))
    for how in ("flat", "flat, own names"):
        assert "use FSDP2 (fsdp_version: 2 in fsdp_config)" in found[how]
