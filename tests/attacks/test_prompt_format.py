"""A model is asked as it was trained: by chat, predict, test and whoever reads its card, whatever its file says."""

import ast
import functools
import io
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from attacked import error_line
from conftest import REPO, ROWS
from dpo_lightning.cli.entry import main

GPT2 = str(REPO / "configs" / "gpt2.yaml")
TEMPLATE = "{context}\n-- {question} {{exactly}} `so`:\n"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION, SCHEMA = ROWS[0]["question"], ROWS[0]["context"]
PROMPT = TEMPLATE.format(question=QUESTION, context=SCHEMA)
RUN = Path("lightning_logs", "version_0")
USUAL = "{context}\nQuestion: {question}\nAnswer:"


def command(name, model, rows, *args):
    """A Trainer command on rows with the tiny model; the exit code."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [name, "--config", GPT2, "--model.name_or_path", str(model), "--data.train_dataset", "rows.jsonl"]
    argv += ["--data.val_size", "2", "--data.test_size", "2", "--data.batch_size", "4", "--data.max_length", "128"]
    argv += ["--model.max_new_tokens", "2", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    argv += ["--trainer.max_steps", "2", "--replies.num_prompts", "1", "--replies.every_n_steps", "0"]
    return main([*argv, "--trainer.enable_progress_bar", "false", *args])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def chatty(model_folder, tmp_path_factory):
    """The tiny model with a chat template, as SmolLM2-Instruct has one."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("chatty") / "model")
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@functools.cache
def trained(model, kind="sql", *args):
    """The folder of a run, trained once on rows of a kind."""
    rows = {
        "sql": ROWS[:16],
        "plain": [{"prompt": r["question"], "chosen": r["answer"], "rejected": ""} for r in ROWS[:16]],
        "conversations": [
            {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
            for r in ROWS[:16]
        ],
    }
    root = Path(tempfile.mkdtemp(prefix="dpo-lightning-test-prompt-format-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert command("fit", model, rows[kind], *args) == 0
    return root / RUN


@pytest.fixture
def sql_run(chatty):
    return trained(chatty, "sql", "--data.prompt_template", TEMPLATE)


@pytest.fixture
def asked(monkeypatch):
    """Chats with a model on lines and gives the token ids that it was given, a list for each reply."""

    def chat(folder, lines, *args, code=0):
        given = []

        def generate(self, input_ids, streamer=None, **kwargs):
            given.extend(input_ids.tolist())
            streamer.end()
            return input_ids

        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GPT2LMHeadModel, "generate", generate)
            assert main(["chat", "--model", str(folder), *args]) == code
        return given

    return chat


def texts(folder, ids):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(prompt) for prompt in ids]


# ---------------------------------------------------------------------- chat


def test_the_prompt_of_chat_is_the_prompt_of_training(sql_run, asked):
    folder = sql_run / "huggingface"
    found = asked(folder, f"/schema {SCHEMA}\n{QUESTION}\n")
    assert texts(folder, found) == [PROMPT]
    assert found == [AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]]


def test_the_folder_of_a_run_has_its_model(sql_run, asked, capsys):
    assert texts(sql_run / "huggingface", asked(sql_run, QUESTION, "--schema", SCHEMA)) == [PROMPT]
    assert "prompts are as in the training of" in capsys.readouterr().err


def test_the_demo_is_asked_as_it_was_trained(asked):
    data = REPO / "src" / "dpo_lightning" / "demo" / "data"
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:8]]
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["fit", "--config", str(REPO / "configs" / "demo.yaml"), "--trainer.max_steps", "1"]
    args += ["--model.name_or_path", str(REPO / "src" / "dpo_lightning" / "demo" / "model")]
    args += ["--data.train_dataset", "few.jsonl", "--data.val_dataset", "few.jsonl", "--data.batch_size", "2"]
    args += ["--model.max_new_tokens", "2", "--replies.num_prompts", "1", "--replies.every_n_steps", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_lightning.callbacks.storyboard.StoryboardCallback.on_fit_end", lambda *_: None)
        assert main([*args, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]) == 0
    lines = "".join(f"/schema {row['context']}\n{row['question']}\n" for row in rows)
    found = texts(RUN / "huggingface", asked(RUN, lines))
    assert found == [USUAL.format(**row) for row in rows]


def test_bos_goes_before_a_bare_prompt_as_in_training(model_folder, tmp_path, asked):
    folder = shutil.copytree(model_folder, tmp_path / "bos")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    run = trained(folder, "plain")
    ((first, *rest),) = asked(run, QUESTION)
    assert first == tokenizer.bos_token_id and tokenizer.decode(rest) == QUESTION


def test_a_model_of_bare_prompts_gets_the_line_as_it_is(model_folder, asked, capsys):
    run = trained(model_folder, "plain")
    assert texts(run / "huggingface", asked(run, "  two blanks before \n")) == ["  two blanks before "]
    said = capsys.readouterr().err
    assert "each line is used as a prompt" in said and "do not use a schema" in said


@pytest.fixture
def chat_run(model_folder, tmp_path):
    """A run on conversations with a chat template of a file, whose end of turn is not the tokenizer's EOS."""
    folder = tmp_path.parent / "for conversations"
    if not folder.exists():
        shutil.copytree(model_folder, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.save_pretrained(folder)
        model = GPT2LMHeadModel.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
        (folder.parent / "chatml.jinja").write_text(CHATML)
    return trained(folder, "conversations", "--data.chat_template", str(folder.parent / "chatml.jinja"))


@pytest.mark.parametrize("by", ["fit", "export"])
def test_a_model_of_conversations_is_asked_by_the_template_that_rendered_them(chat_run, asked, by, tmp_path):
    folder = chat_run / "huggingface"
    if by == "export":
        folder = tmp_path / "exported"
        last = str(chat_run / "checkpoints" / "last.ckpt")
        assert main(["export", "--ckpt_path", last, "--output_dir", str(folder)]) == 0
    found = asked(folder, QUESTION)
    assert texts(folder, found) == [f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"]
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    end = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert end == AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")


def test_an_adapter_and_an_exported_checkpoint_say_it_too(chatty, asked, tmp_path):
    lora = ("--config", str(REPO / "configs" / "lora.yaml"), "--model.lora.r", "2")
    run = trained(chatty, "sql", "--data.prompt_template", TEMPLATE, *lora)
    last = str(run / "checkpoints" / "last.ckpt")
    assert main(["export", "--ckpt_path", last, "--output_dir", str(tmp_path / "merged"), "--merge", "true"]) == 0
    assert (run / "huggingface" / "adapter_config.json").is_file()
    for folder in (run / "huggingface", tmp_path / "merged"):
        found = texts(folder, asked(folder, QUESTION, "--schema", SCHEMA))
        assert set(found) == {PROMPT}


def test_of_an_older_export_it_is_said_what_is_assumed(sql_run, model_folder, asked, capsys):
    old = shutil.copytree(sql_run / "huggingface", "old")
    for path in Path("old").glob("dpo_lightning.json"):
        path.unlink()
    assert texts(old, asked(old, QUESTION))[0].startswith("<|im_start|>user\n")
    said = capsys.readouterr().err
    assert "the prompt format of 'old' is unknown" in said and "using the tokenizer's chat template" in said
    asked(model_folder, QUESTION)
    assert "using the template" in capsys.readouterr().err


def test_another_template_than_that_of_training_is_used_with_a_word(sql_run, asked, capsys):
    assert texts(sql_run / "huggingface", asked(sql_run, QUESTION, "--prompt_template", "Q {question}")) == [
        f"Q {QUESTION}"
    ]
    assert "may make its replies worse" in capsys.readouterr().err


# ---------------------------------------------------------------------- predict and test


def prompts(name="replies.jsonl"):
    return [json.loads(line)["prompt"] for line in Path(name).read_text().splitlines()]


def test_predict_asks_an_exported_model_as_it_was_trained(sql_run, caplog):
    args = ["--data.predict_dataset", "rows.jsonl"]
    assert command("predict", sql_run / "huggingface", ROWS[:3], *args) == 0
    assert prompts() == [TEMPLATE.format(**row) for row in ROWS[:3]]
    assert "data.prompt_template is" in caplog.text and "huggingface' was trained" in caplog.text


def test_a_template_that_was_set_is_kept_with_a_warning(sql_run, recwarn):
    args = ["--data.predict_dataset", "rows.jsonl", "--data.prompt_template", "Q {question}"]
    assert command("predict", sql_run / "huggingface", ROWS[:3], *args) == 0
    assert prompts() == [f"Q {row['question']}" for row in ROWS[:3]]
    said = [str(warning.message) for warning in recwarn if "was trained with" in str(warning.message)]
    assert len(said) == 1 and "leave data.prompt_template out" in said[0]


def test_the_usual_template_is_kept_too_where_it_was_set(sql_run, recwarn):
    args = ["--data.predict_dataset", "rows.jsonl", "--data.prompt_template", USUAL]
    assert command("predict", sql_run / "huggingface", ROWS[:3], *args) == 0
    assert prompts() == [USUAL.format(**row) for row in ROWS[:3]]
    assert any("was trained with" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("name", ["test", "predict"])
def test_a_checkpoint_is_asked_as_it_was_trained(sql_run, chatty, name, monkeypatch):
    from dpo_lightning import PreferenceDataModule

    seen = []
    original = PreferenceDataModule.setup

    def setup(self, stage):
        original(self, stage)
        if name in self.datasets:
            seen.extend(pair.prompt for pair in self.pairs(name, [0]))

    monkeypatch.setattr(PreferenceDataModule, "setup", setup)
    last = str(sql_run / "checkpoints" / "last.ckpt")
    assert command(name, chatty, ROWS[:16], "--ckpt_path", last) == 0
    assert seen and set(seen) <= {TEMPLATE.format(**row) for row in ROWS}


# ---------------------------------------------------------------------- the card


def how_to_ask(folder):
    (section,) = re.findall(r"## How to ask\n(.*?)\n## ", (folder / "README.md").read_text(), re.S)
    return section


def test_the_card_says_how_to_ask(sql_run):
    section = how_to_ask(sql_run / "huggingface")
    (code,) = re.findall(r"```python\n(.*?)\n```", section, re.S)
    _, assignment, *_ = ast.parse(code).body
    assert assignment.targets[0].id == "template" and assignment.value.value == TEMPLATE
    examples = re.findall(r"```text\n(.*?)\n```", section, re.S)
    assert examples[0] == TEMPLATE
    assert any(examples[1] == TEMPLATE.format(**row) for row in ROWS)
    assert "was **not** trained" in section and "<|endoftext|>" in section


def test_the_card_of_conversations_and_of_bare_prompts(chat_run, model_folder):
    assert "ask through it" in how_to_ask(chat_run / "huggingface")
    section = how_to_ask(trained(model_folder, "plain") / "huggingface")
    assert "as they stand" in section and "chat template" not in section


# ---------------------------------------------------------------------- hostile files

GOOD = {"chat": False, "prompt_template": "{question}"}
HOSTILE = {
    "padding": GOOD | {"prompt_template": "{question:>999999999}"},
    "nested": GOOD | {"prompt_template": "{question:{context}}"},
    "attribute": GOOD | {"prompt_template": "{question.__class__.__mro__}"},
    "index": GOOD | {"prompt_template": "{question[0]}"},
    "conversion": GOOD | {"prompt_template": "{question!r}"},
    "position": GOOD | {"prompt_template": "{}{0}"},
    "other": GOOD | {"prompt_template": "{answer}{question}"},
    "broken": GOOD | {"prompt_template": "{question"},
    "huge": GOOD | {"prompt_template": "{question}" * 50_000},
    "type": GOOD | {"prompt_template": 7},
    "list": GOOD | {"prompt_template": ["{question}"]},
    "chat": GOOD | {"chat": "false"},
    "both": GOOD | {"chat": True},
    "token": GOOD | {"end_token": 3},
    "half": GOOD | {"prompt_template": "{question}\ud800"},
    "not a mapping": [GOOD],
    "empty": {},
    "null": None,
}


def hostile_folder(model_folder, content):
    folder = shutil.copytree(model_folder, "hostile")
    path = Path(folder, "dpo_lightning.json")
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("by", ["chat", "predict"])
def test_a_hostile_file_is_one_line(model_folder, asked, capsys, name, by):
    folder = hostile_folder(model_folder, HOSTILE[name])
    if by == "chat":
        assert asked(folder, QUESTION, code=2) == []
    else:
        assert command("predict", folder, ROWS[:3]) == 2
    line = error_line(capsys)
    assert "dpo_lightning.json" in line and len(line) < 600


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 100_000, b'"' + b"x" * 2_000_000 + b'"', b'{"chat": 1e999}', b"9" * 10_000]
)
def test_what_is_no_json_is_one_line(model_folder, asked, capsys, content):
    assert asked(hostile_folder(model_folder, content), QUESTION, code=2) == []
    assert "dpo_lightning.json" in error_line(capsys)


def test_a_pipe_in_its_place_is_not_read(model_folder, asked, capsys):
    import os

    folder = shutil.copytree(model_folder, "hostile")
    os.mkfifo(Path(folder, "dpo_lightning.json"))
    assert asked(folder, QUESTION, code=2) == []
    assert "dpo_lightning.json" in error_line(capsys)


def test_a_template_cannot_command_the_terminal(model_folder, asked, capsys):
    folder = hostile_folder(
        model_folder, GOOD | {"prompt_template": "\x1b]0;x\x07{question}\u202e", "format": "\x1b[2J"}
    )
    assert len(asked(folder, QUESTION)) == 1
    captured = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e"} & set(captured.err + captured.out)


def test_names_that_are_not_known_are_left_out(model_folder, asked):
    folder = hostile_folder(
        model_folder, GOOD | {"trust_remote_code": True, "device": "x", "chat_template": "{{ 1/0 }}"}
    )
    assert texts(folder, asked(folder, QUESTION)) == [QUESTION]


@pytest.mark.parametrize("values", [3, {"chat": False, "prompt_template": "{question:>99999}"}, {"chat": None}])
def test_a_checkpoint_that_says_it_wrongly_is_one_line(sql_run, tmp_path, capsys, values):
    checkpoint = torch.load(sql_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["dpo_lightning_asking"]["prompt_template"] == TEMPLATE
    torch.save(checkpoint | {"dpo_lightning_asking": values}, tmp_path / "edited.ckpt")
    args = ["export", "--ckpt_path", str(tmp_path / "edited.ckpt"), "--output_dir", str(tmp_path / "out")]
    assert main(args) == 2
    assert "how to ask" in error_line(capsys) and not (tmp_path / "out").exists()
