"""What `load_model` and its neighbours say where a model cannot be loaded; they end nobody's program."""

from __future__ import annotations

import json

import pytest

from prefopt.models.load import ModelError, adapter_base, limits_of, load_model, load_tokenizer
from prefopt.planning.plan import model_config
from prefopt.safety.errors import message_of


@pytest.mark.parametrize("settings", ["{", "[]", "{}"])
def test_an_adapter_whose_settings_are_broken_is_an_ordinary_error(tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(settings)
    for load in (adapter_base, lambda name: load_model(name, {}), load_tokenizer):
        with pytest.raises(ModelError, match=r"adapter_config\.json"):
            load(str(tmp_path))


def test_a_model_that_is_not_there_or_is_none_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFOPT_VERBOSE", raising=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    for name in (str(tmp_path), str(tmp_path / "nowhere"), "nobody/nothing"):
        with pytest.raises(OSError, match="no model can be loaded from") as caught:
            load_model(name, {})
        assert "\n" not in str(message_of(caught.value))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is an encoder-decoder"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "does not predict the next"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "has no language-model head"),
        ({"model_type": "vit"}, "of type 'vit', of which transformers has no causal language model"),
    ],
)
def test_another_kind_of_model_is_named_without_the_list_of_all_classes(tmp_path, settings, what):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loads = [lambda name: load_model(name, {})]
    loads += [limits_of, model_config] if "architectures" in settings else []
    for load in loads:
        with pytest.raises(ModelError, match=what) as caught:
            load(str(tmp_path))
        assert len(str(caught.value)) < len(str(tmp_path)) + 300
