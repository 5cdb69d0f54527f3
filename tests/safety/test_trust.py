"""Nothing that comes with a model, an adapter, a checkpoint or a data set is executed, unless it was asked for."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.data import DataError, load_preferences
from prefopt.models.load import check_weights, load_model, load_tokenizer
from prefopt.recipe import main
from prefopt.safety.errors import is_ours
from tests.recipe.test_recipe import arguments, pairs_file
from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import make_trainer, save_model

TRAP = """
from pathlib import Path
Path({mark!r}).write_text("executed")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "trapped"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def mark(tmp_path):
    """The file that every trap writes; it must not be there in the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def trapped_model(folder: Path, mark: Path, model_type: str = "llama") -> str:
    """A model's folder with code of its own, which transformers runs where it is trusted."""
    path = folder / f"trapped-{model_type}"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    (path / "trap.py").write_text(TRAP.format(mark=str(mark)))
    for name, classes in (
        ("config.json", {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "trap.Tokenizer"]}),
    ):
        settings = json.loads((path / name).read_text())
        settings["auto_map"] = classes
        if name == "config.json":
            settings["model_type"] = model_type
        (path / name).write_text(json.dumps(settings))
    return str(path)


def adapter_of(folder: Path, base: str) -> str:
    path = folder / "adapter"
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(path)
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    return str(path)


def words(tmp_path: Path, *more: str) -> list[str]:
    return [*arguments(tmp_path, pairs_file(tmp_path), "--eval_rows", "0", "--max_steps", "1"), *more]


def test_the_trap_works_where_it_is_asked_for(tmp_path):
    mark = tmp_path / "executed"
    load_tokenizer(trapped_model(tmp_path, mark, "trapped"), trust_remote_code=True)
    assert mark.exists()


@pytest.mark.parametrize("model_type", ["llama", "trapped"])
class TestCodeOfAModel:
    """Of a kind that transformers knows (its own code is used then), and of one that only its own code can load."""

    @pytest.mark.parametrize("more", [[], ["--dry_run"]])
    def test_a_recipe(self, tmp_path, mark, model_type, more):
        self.ends(tmp_path, model_type, ["--model_name_or_path", trapped_model(tmp_path, mark, model_type), *more])

    def test_a_reference(self, tmp_path, mark, model_type):
        self.ends(tmp_path, model_type, ["--ref_model_name_or_path", trapped_model(tmp_path, mark, model_type)])

    def test_a_previous_model(self, tmp_path, mark, model_type):
        trapped = trapped_model(tmp_path, mark, model_type)
        self.ends(tmp_path, model_type, ["--loss", "inpo", "--previous_model_name_or_path", trapped])

    def test_an_adapters_model(self, tmp_path, mark, model_type):
        adapter = adapter_of(tmp_path, trapped_model(tmp_path, mark, model_type))
        self.ends(tmp_path, model_type, ["--model_name_or_path", adapter])

    def test_the_check_command(self, tmp_path, mark, model_type):
        trapped = trapped_model(tmp_path, mark, model_type)
        # It would wait for an answer to "run the custom code?" if it asked.
        result = CliRunner().invoke(app, ["check", pairs_file(tmp_path), "--model", trapped], input="y\n")
        assert result.exit_code in (0, 1)
        assert "custom code" not in result.output or "no tokenizer can be loaded" in result.output

    @staticmethod
    def ends(tmp_path, model_type, more):
        if model_type == "llama":
            main("dpo", words(tmp_path, *more))
        else:
            with pytest.raises((ValueError, OSError), match=r"trust_remote_code|custom code"):
                main("dpo", words(tmp_path, *more))


class Bomb:
    """What a pickle can do: writes a file when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "executed")


def test_the_bomb_goes_off(tmp_path):
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    pickle.loads((tmp_path / "bomb").read_bytes())
    assert (tmp_path / "executed").exists()


class TestPickledWeights:
    def pickled(self, folder: str, mark: Path, name: str) -> str:
        for path in Path(folder).glob("*.safetensors"):
            path.unlink()
        torch.save({"weight": torch.zeros(1), "bomb": Bomb(mark)}, Path(folder) / name)
        return folder

    def test_a_model(self, tmp_path, mark):
        shutil.copytree(save_model(tmp_path), tmp_path / "pickled")
        folder = self.pickled(str(tmp_path / "pickled"), mark, "pytorch_model.bin")
        for more in (["--model_name_or_path", folder], ["--ref_model_name_or_path", folder]):
            with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\)") as caught:
                main("dpo", words(tmp_path, *more))
            assert is_ours(caught.value)
        with pytest.raises(ValueError, match="save_pretrained"):
            load_model(folder, {})

    def test_an_adapter(self, tmp_path, mark):
        folder = self.pickled(adapter_of(tmp_path, save_model(tmp_path)), mark, "adapter_model.bin")
        with pytest.raises(ValueError, match=r"only pickled weights \(adapter_model.bin\)"):
            main("dpo", words(tmp_path, "--model_name_or_path", folder))

    def test_an_adapters_model(self, tmp_path, mark):
        shutil.copytree(save_model(tmp_path), tmp_path / "pickled")
        base = self.pickled(str(tmp_path / "pickled"), mark, "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\)"):
            check_weights(adapter_of(tmp_path, base))

    def test_safetensors_cannot_be_put_aside(self, tmp_path):
        with pytest.raises(ValueError, match="use_safetensors cannot be turned off"):
            main("dpo", words(tmp_path, "--model_init_kwargs", '{"use_safetensors": false}'))

    def test_damaged_safetensors_are_told_before_anything_is_loaded(self, tmp_path):
        folder = Path(save_model(tmp_path))
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
            main("dpo", words(tmp_path))


class TestCheckpoints:
    @pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_pickles_in_one_do_not_go_off(self, tmp_path, mark, file):
        checkpoint = self.checkpoint(tmp_path)
        torch.save({"state": {}, "bomb": Bomb(mark)}, checkpoint / file)
        # As in a folder of plain TRL, which has no list of sizes that would tell.
        for name in ("complete.json", "prefopt.json"):
            (checkpoint / name).unlink()
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(checkpoint))

    def test_pickled_weights_in_one_are_refused(self, tmp_path, mark):
        checkpoint = self.checkpoint(tmp_path)
        torch.save({**load_file(checkpoint / "model.safetensors"), "b": Bomb(mark)}, checkpoint / "pytorch_model.bin")
        (checkpoint / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="only pickled weights"):
            make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(checkpoint))

    @staticmethod
    def checkpoint(folder: Path) -> Path:
        make_trainer(folder, max_steps=2, save_strategy="steps", save_steps=2).train()
        return folder / "run" / "checkpoint-2"


class TestData:
    @pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.npy", "rows.py"])
    def test_files_that_may_hold_code_are_of_no_known_format(self, tmp_path, mark, name):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(DataError, match="ending is not a known format"):
            load_preferences(str(tmp_path / name))

    @pytest.mark.parametrize("name", ["folder.py", "rows.pkl", "rows.pickle"])
    def test_nor_are_they_run_or_read_in_a_folder(self, tmp_path, mark, name):
        folder = tmp_path / "folder"
        folder.mkdir()
        content = TRAP.format(mark=str(mark)).encode() if name.endswith(".py") else pickle.dumps(Bomb(mark))
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match="folder"):
            load_preferences(str(folder))
