"""`export --format gguf`: llama.cpp's own converter and engine on tiny random models of the three families."""

import importlib.util
import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from attacked import LAST, edited, error_line, trained
from dpo_lightning.callbacks.export.gguf import compare, prepare
from dpo_lightning.cli.entry import main
from dpo_lightning.cli.export_gguf import FOLDER, GGUF
from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.errors import UserError
from dpo_lightning.models.llama_cpp import PACKAGE, convert, converter_script

missing = [name for name in (PACKAGE, "xllamacpp", "gguf", "sentencepiece") if not importlib.util.find_spec(name)]
needs_llama_cpp = pytest.mark.skipif(bool(missing), reason=f"the extra gguf is not installed: no {', '.join(missing)}")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def folder(tmp_path, model_folder):
    """The tiny GPT-2, in a folder where a conversion looks for it."""
    shutil.copytree(model_folder, tmp_path / "out" / FOLDER)
    return tmp_path / "out"


def write(folder, prompt_format, outtype="f32", engine=True, pre_tokenizer="gpt-2"):
    module = SimpleNamespace(hparams=SimpleNamespace(name_or_path="a/tiny model", max_new_tokens=12))
    settings = GGUF(outtype, True, converter_script(None), engine, pre_tokenizer)
    settings.write(folder, module, prompt_format, folder / "no-replies.jsonl")
    assert {path.name for path in folder.iterdir()} == {f"tiny-model-{outtype}.gguf", "Modelfile"}
    return folder / f"tiny-model-{outtype}.gguf"


def metadata(file):
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@needs_llama_cpp
def test_a_checkpoint_becomes_a_file_that_answers_as_its_folder(model_folder, tmp_path, monkeypatch, capfd):
    shutil.copytree(trained(model_folder), here := tmp_path / "here")
    monkeypatch.chdir(here)
    capfd.readouterr()
    command = ["export", "--ckpt_path", str(LAST), "--output_dir", "out", "--format", "gguf", "--ollama"]
    assert main([*command, "--pre_tokenizer", "gpt-2"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[-1] == "model written to out" and " of 20 greedy replies by llama.cpp are those of" in said[0]
    assert "FROM ./tiny-gpt2-f16.gguf\n" in Path("out", "Modelfile").read_text()
    values = metadata(Path("out", "tiny-gpt2-f16.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert "Question: " in values["tokenizer.chat_template"]
    Path("out", "mine.txt").write_text("mine")
    assert main(command) == 2
    assert "it contains 'mine.txt'" in error_line(capfd)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("chat", [False, True])
def test_each_family_with_and_without_a_chat_template(family, chat, folder, tokenizer, capfd):
    torch.manual_seed(1)
    source = folder / FOLDER
    if family != "gpt2":
        adds_bos = AutoTokenizer.from_pretrained(source)
        adds_bos.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        )
        adds_bos.save_pretrained(source)
        config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
        sizes = SMALL | {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": 128}
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        model(config(initializer_range=0.2, **sizes, **ids)).save_pretrained(source)
    if chat:
        loaded = AutoTokenizer.from_pretrained(source)
        loaded.chat_template = ("<|endoftext|>" if family != "gpt2" else "") + CHATML
        loaded.save_pretrained(source)
    prompt_format = PromptFormat(chat, None if chat else "Q: {question}\n{context}A:", end_token="<|endoftext|>")
    file = write(folder, prompt_format)
    said = capfd.readouterr().out
    equal, rest = said.split(maxsplit=1)
    assert int(equal) >= 17 and rest.startswith("of 20 greedy replies by llama.cpp are")  # near ties, of random weights
    assert "warning" not in said  # the same tokens, and the same prompts by the chat template
    values = metadata(file)
    assert values["tokenizer.ggml.add_bos_token"] is (family != "gpt2")
    assert (CHATML in values["tokenizer.chat_template"]) is chat


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("outtype", ["q8_0", "bf16"])
def test_smaller_types(outtype, folder, capfd):
    write(folder, PromptFormat(False), outtype)
    assert "greedy replies by llama.cpp" in capfd.readouterr().out


@needs_llama_cpp
@pytest.mark.slow
def test_what_differs_is_shown(folder, capfd):
    """Another splitting of text, and weights that are not those of the folder."""
    source, prompts = folder / FOLDER, [f"Which name has age {n} or 1234567?" for n in range(20)]
    prepare(source, PromptFormat(False))
    with pytest.raises(UserError, match="splits alike, such as --pre_tokenizer gpt-2"):
        convert(converter_script(None), source, folder / "a.gguf", "f32", "a", None)
    convert(converter_script(None), source, file := folder / "a.gguf", "f32", "a", "superbpe")
    found = compare(source, file, prompts, PromptFormat(False), 8, engine=True)
    assert not all(found.same_tokens) and found.by_tokens == found.expected and found.templates is None
    by_transformers = compare(source, file, prompts, PromptFormat(False), 8, engine=False)
    assert by_transformers.replies == by_transformers.expected and by_transformers.same_tokens is None
    other = compare(source, file, prompts, PromptFormat(False, "Answer: {question}"), 8, engine=True)
    assert other.templates and other.templates[0].startswith("Answer: ") and not other.templates[1].startswith("Answer")
    from transformers import GPT2LMHeadModel

    changed = GPT2LMHeadModel.from_pretrained(source)
    torch.nn.init.normal_(changed.transformer.h[0].mlp.c_fc.weight)
    changed.save_pretrained(source)
    later = compare(source, file, prompts, PromptFormat(False), 8, engine=True)
    assert later.by_tokens == found.by_tokens and later.by_tokens != later.expected


@needs_llama_cpp
def test_code_in_the_folder_is_not_run(folder, tmp_path, capfd):
    """The converter gives `trust_remote_code=True` itself."""
    evil, ran = tmp_path / "evil", tmp_path / "ran"
    evil.mkdir()
    (evil / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    source = folder / FOLDER
    prepare(source, PromptFormat(False))
    shutil.copy(evil / "evil.py", source)
    path = source / "tokenizer_config.json"
    known = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [f"{evil}--evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(known | {"tokenizer_class": "Evil"}))
    with suppress(UserError):
        convert(converter_script(None), source, folder / "a.gguf", "f16", "a", "gpt-2")
    assert not ran.exists()
    path.write_text(json.dumps(known))
    prepare(source, PromptFormat(False))
    assert "auto_map" not in path.read_text()


@needs_llama_cpp
@pytest.mark.parametrize(
    ("config", "words"),
    [({"architectures": ["NewForCausalLM"]}, "NewForCausalLM is not supported"), ({"n_embd": 7}, "cannot convert")],
)
def test_a_model_that_llama_cpp_does_not_know_is_one_line(config, words, folder):
    path = folder / FOLDER / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(UserError, match=words) as error:
        convert(converter_script(None), folder / FOLDER, folder / "a.gguf", "f16", "a", None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ollama"], "--ollama has no effect without --format gguf"),
        (["--outtype", "q8_0"], "--outtype has no effect without --format gguf"),
        (["--format", "gguf", "--outtype", "q4"], "it must be one of f16, q8_0, bf16, f32"),
        (["--format", "gguf", "--converter", "nowhere"], "--converter 'nowhere' is neither llama.cpp's"),
        (["--format", "ggml"], "it must be one of huggingface, gguf"),
    ],
)
def test_a_wrong_setting_is_one_line_before_the_checkpoint_is_read(args, words, capsys, tmp_path):
    assert main(["export", "--ckpt_path", "no.ckpt", "--output_dir", str(tmp_path / "out"), *args]) == 2
    assert words in error_line(capsys)


def test_a_missing_converter_is_one_line_that_says_where_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dpo-lightning\[gguf\]', or get https://\S+/llama.cpp "):
        converter_script(None)


def test_edited_prompt_formats_reach_neither_the_modelfile_nor_the_converter(model_folder, tmp_path, capsys):
    checkpoint = edited(
        model_folder, tmp_path / "given" / "a.ckpt", dpo_lightning_asking={"chat": False, "prompt_template": 3}
    )
    out = tmp_path / "out"
    assert main(["export", "--ckpt_path", checkpoint, "--output_dir", str(out), "--format", "gguf", "--ollama"]) == 2
    assert "how to ask its model" in error_line(capsys) or missing
    assert not out.exists()
