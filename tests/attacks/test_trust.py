"""A checkpoint is data: whatever its settings say, none of its author's code runs."""

import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from attacked import LAST, command, edited, error_line, trained
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.cli.entry import main
from dpo_lightning.errors import UserError
from dpo_lightning.models.policy import add_lora, base_model_name

CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel
Path({marker!r}).write_text("ran")
class OwnConfig(GPT2Config): pass
class OwnModel(GPT2LMHeadModel): config_class = OwnConfig
"""


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "the code of a stranger ran"


@pytest.fixture
def evil(model_folder, tmp_path, marker):
    """A model folder with Python code of its own."""
    folder = shutil.copytree(model_folder, tmp_path / "evil")
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict", "last", "export"])
def test_trust_is_not_taken_from_a_checkpoint(name, evil, model_folder, tmp_path, marker):
    path = tmp_path / (LAST if name == "last" else "given.ckpt")
    given = edited(model_folder, path, {"trust_remote_code": True, "name_or_path": str(evil)})
    if name == "export":
        assert main(["export", "--ckpt_path", given, "--output_dir", "out"]) == 0
    elif name == "last":
        assert command("test", model_folder, "--ckpt_path", "last") == 0
    else:
        args = ["--trainer.max_steps", "3", "--model.trust_remote_code", "false"]
        assert command(name, model_folder, "--ckpt_path", given, *args) == 0
    assert not marker.exists()


def test_export_runs_it_on_request_alone(evil, model_folder, tmp_path, marker):
    given = edited(model_folder, tmp_path / "given.ckpt", {"name_or_path": str(evil)})
    assert main(["export", "--ckpt_path", given, "--output_dir", "out", "--trust_remote_code", "true"]) == 0
    assert marker.exists()


@pytest.mark.parametrize("option", ["--model.trust_remote_code", "--data.trust_remote_code"])
def test_trust_in_one_model_is_none_in_the_one_that_a_checkpoint_names(
    option, evil, model_folder, tmp_path, marker, capsys
):
    given = edited(model_folder, tmp_path / "given.ckpt", {"name_or_path": str(evil)})
    assert command("test", model_folder, "--ckpt_path", given, option, "true") == 2
    line = error_line(capsys)
    assert str(evil) in line and str(model_folder) in line and "trust_remote_code is true for" in line
    assert not marker.exists()


def test_lightnings_own_loading_does_not_trust_the_file(evil, model_folder, tmp_path, marker):
    given = edited(model_folder, tmp_path / "given.ckpt", {"trust_remote_code": True, "name_or_path": str(evil)})
    module = DPOModule.load_from_checkpoint(given, map_location="cpu")
    assert not module.hparams.trust_remote_code and not marker.exists()
    DPOModule.load_from_checkpoint(given, map_location="cpu", trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize(
    ("changed", "word"),
    [({"format": "os:getcwd"}, "data.format"), ({"generation": {"trust_remote_code": True}}, "data.generation")],
)
def test_the_data_of_a_checkpoint_name_no_code(changed, word, model_folder, tmp_path):
    saved = torch.load(trained(model_folder) / LAST, weights_only=True)["datamodule_hyper_parameters"]
    trusting = edited(
        model_folder, tmp_path / "a.ckpt", datamodule_hyper_parameters=saved | {"trust_remote_code": True}
    )
    assert not PreferenceDataModule.load_from_checkpoint(trusting).hparams.trust_remote_code
    given = edited(model_folder, tmp_path / "b.ckpt", datamodule_hyper_parameters=saved | changed)
    with pytest.raises(UserError, match=word):
        PreferenceDataModule.load_from_checkpoint(given)


SPEC = {"class_path": "own_class.Own", "init_args": {"where": "x"}}
ESCAPED = '{"cl\\u0061ss_path": "own_class.Own"}'


@pytest.mark.parametrize("name", ["test", "export"])
@pytest.mark.parametrize(
    "hidden",
    [SPEC, [SPEC], json.dumps(SPEC), "init_args:\n  where: a\nclass_path: own_class.Own", ESCAPED],
    ids=["dict", "list", "json", "yaml", "escaped"],
)
def test_no_class_in_a_setting_is_imported_or_made(name, hidden, model_folder, tmp_path, marker, monkeypatch, capsys):
    """jsonargparse makes an object of any class that a `class_path` within a dictionary names, at any depth."""
    (tmp_path / "own_class.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n"
        "class Own:\n    def __init__(self, where: str = 'x'): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = edited(model_folder, tmp_path / "given.ckpt", {"lora": {"r": 4, "revision": hidden}})
    if name == "export":
        assert main(["export", "--ckpt_path", given, "--output_dir", "out"]) == 2
    else:
        assert command("test", model_folder, "--ckpt_path", given) == 2
    assert "its setting lora names a class to instantiate" in error_line(capsys)
    assert not marker.exists() and "own_class" not in sys.modules


def test_peft_imports_no_module_that_options_name():
    with pytest.raises(UserError, match="megatron_config makes peft import"):
        add_lora(torch.nn.Linear(2, 2), {"megatron_config": {"x": 1}, "megatron_core": "megatron.core"})


@pytest.mark.parametrize(
    "text", ['{"base_model_name_or_path": ["a", "b"]}', '{"base_model_name_or_path": {"a": 1}}',
             '{"base_model_name_or_path": 7}', '{}', '[1]', '{', "[" * 100_000, b"\xff\xfe"],
    ids=["list", "dict", "number", "none", "not an object", "broken", "deep", "not text"],
)  # fmt: skip
def test_an_adapter_that_does_not_name_its_model_is_one_line(text, tmp_path, model_folder, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="does not name its base model|is not a PEFT config"):
        base_model_name(str(folder))
    assert command("test", folder) == 2
    assert "adapter_config.json' " in error_line(capsys)


def test_an_adapter_that_is_a_prompt_cannot_have_code_run(evil, model_folder, tmp_path, marker, capsys):
    """Older versions of peft hand `tokenizer_kwargs` of such an adapter's config to transformers as they are."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    tokenizer = json.loads((evil / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["own.OwnConfig", None]}
    (evil / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    config.base_model_name_or_path = str(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(path.read_text()) | {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "x",
        "tokenizer_name_or_path": str(evil),
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    path.write_text(json.dumps(saved))
    assert command("test", tmp_path / "adapter") == 2
    assert "cannot be loaded: it is a learned prompt" in error_line(capsys)
    assert not marker.exists()
