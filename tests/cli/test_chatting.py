import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_lightning.cli.chat import converse, show
from dpo_lightning.cli.entry import main
from dpo_lightning.data import speakers
from dpo_lightning.data.batching import collate_prompts
from dpo_lightning.data.speakers import Sampling, load_speakers, side_by_side, stream
from dpo_lightning.models.generate import generate
from dpo_lightning.models.sampling import Draws

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def adapter_folder(model_folder, tmp_path_factory):
    """An adapter without a tokenizer beside it, which changes what its base model says."""
    folder = tmp_path_factory.mktemp("adapter") / "sft"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=True))
    torch.manual_seed(3)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    policy.save_pretrained(folder)
    return folder


def typed(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_questions_from_a_pipe_are_answered_by_both(model_folder, adapter_folder, monkeypatch, capsys):
    typed(monkeypatch, "Which name has age 3?\n\n/schema CREATE TABLE singer (name VARCHAR)\nWhich title?")
    args = ["--model", str(adapter_folder), "--reference", str(model_folder), "--max_new_tokens", "6"]
    assert main(["chat", *args]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if ":" in line] == ["reference", "policy"] * 2
    assert lines[0].partition(":")[2] != lines[1].partition(":")[2]


def test_an_adapter_is_compared_with_its_base_model(model_folder, adapter_folder):
    reference, policy = load_speakers(str(adapter_folder), None, False)
    (base,) = load_speakers(str(model_folder), None, False)
    prompt = "Which name has age 3?"
    said = {speaker: "".join(speaker.answer(prompt, 8)) for speaker in (reference, policy, base)}
    assert said[reference] == said[base] != said[policy]


def test_a_reply_is_streamed_and_is_the_one_that_training_shows(model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    prompt = "Which name has age 3?"
    pieces = list(stream(model, tokenizer, prompt, 8))
    assert len(pieces) > 1
    ids = tokenizer(prompt)["input_ids"]
    assert "".join(pieces) == generate(model, *collate_prompts([ids], [0])[:2], tokenizer, 8)[0].text


def test_who_stops_listening_stops_the_generation(model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    calls = []
    model.transformer.register_forward_hook(lambda *args: calls.append(1))
    model.generation_config.eos_token_id = None
    pieces = stream(model, tokenizer, "Which name?", 100)
    next(pieces)
    pieces.close()
    assert len(calls) < 100


def test_an_error_in_the_model_reaches_the_caller(model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    model.transformer.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream(model, tokenizer, "Which name?", 4))


def test_sampled_replies_are_drawn_from_their_seed(model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()

    def said(seed, *sampling):
        return "".join(stream(model, tokenizer, "Which name?", 8, draws=Draws([seed], *sampling)))

    assert said(1, 1.0, 1.0, 8) == said(1, 1.0, 1.0, 8) != said(2, 1.0, 1.0, 8)
    assert said(1, 1.0, 1e-9, 8) == "".join(stream(model, tokenizer, "Which name?", 8))  # a nucleus of one token


def test_replies_grow_side_by_side_unless_the_weights_are_shared(model_folder, adapter_folder):
    def order(reference):
        speakers = load_speakers(str(adapter_folder), reference, False)
        pieces = side_by_side(speakers, "Which name?", GREEDY._replace(max_new_tokens=12), 0)
        return [name for name, _ in pieces]

    together, shared = order(str(model_folder)), order(None)
    assert together[:2] == ["reference", "policy"] and together[2] == "reference"
    assert shared == sorted(shared, reverse=True) and set(shared) == {"reference", "policy"}


def test_who_stops_listening_stops_all_replies(model_folder):
    speakers = load_speakers(str(model_folder), str(model_folder), False)
    calls = []
    for speaker in speakers:
        speaker.model.transformer.register_forward_hook(lambda *args: calls.append(1))
        speaker.tokenizer.eos_token = speaker.tokenizer.convert_ids_to_tokens(5)  # which they hardly ever say
    pieces = side_by_side(speakers, "Which name?", GREEDY._replace(max_new_tokens=100), 0)
    next(pieces)
    pieces.close()
    assert len(calls) < 200


def test_a_schema_stays_until_it_is_changed():
    prompts = []

    def reply(prompt):
        prompts.append(prompt)
        yield "ok"

    lines = io.StringIO("one\n/schema T\ntwo\nthree\n/schema\nfour\n")
    converse({"policy": reply}, lambda question, schema: f"{schema}|{question}", "S", lines)
    assert prompts == ["S|one", "T|two", "T|three", "|four"]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reply_cannot_move_the_cursor(terminal, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    show({"reference": iter(["a\x1b[2J", "\x07"]), "policy": iter(["[bold]b[/bold]"])})
    out = capsys.readouterr().out
    assert "a\\x1b[2J\\x07" in out and "[bold]b[/bold]" in out
    assert "\x1b[2J" not in out and "\x07" not in out


def test_a_tokenizer_with_a_chat_template_is_asked_as_it_wants(model_folder, tokenizer, tmp_path, monkeypatch, capsys):
    import shutil

    shutil.copytree(model_folder, tmp_path / "chatty")
    (tmp_path / "chatty" / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    asked = []
    monkeypatch.setattr(speakers, "stream", lambda model, tokenizer, prompt, *_: asked.append(prompt) or iter("x"))
    typed(monkeypatch, "hello\n")
    assert main(["chat", "--model", str(tmp_path / "chatty")]) == 0
    typed(monkeypatch, "hello\n")
    assert main(["chat", "--model", str(tmp_path / "chatty"), "--prompt_template", "Q {question} A"]) == 0
    assert asked == ["<hello>", "Q hello A"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "./nowhere"], "no such folder"),
        (["--model", "x", "--max_new_tokens", "0"], "at least 1"),
        ([], "model"),
    ],
)
def test_a_mistake_is_one_line(args, words, capsys):
    assert main(["chat", *args]) == 2
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith("error: ") and words in error and "Traceback" not in error
