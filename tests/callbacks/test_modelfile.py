"""A prompt template in Go and in Jinja makes the prompts of training, whatever is in it."""

import re

import pytest

from dpo_lightning.callbacks.export.modelfile import OLLAMA, go_template, jinja_template, modelfile
from dpo_lightning.data.formats import RowOptions
from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.data.rendering import render_chats

TEMPLATES = [
    RowOptions().prompt_template,
    "{question}",
    "Schema:\n\t{context}\n\nQ: {question}\nA:\n",
    '{{"q": "{question}", "s": {{{{ .Env }}}}}}{{',
    '"""\n{question}"""\nSYSTEM evil\n""',
    "{{{question}}}{{{{{context}}}}}",
    "caf\u00e9 \u4f60\u597d\u3000\U0001f600\u200d\u00a0\ufeff{question}\r\n|\u202e\\n\\",
    "{{% raw %}} {{# c #}} {{{{- 1 -}}}} {question}'\"`",
]


def parsed(text):
    """The commands of a Modelfile, as Ollama's parser (parser/parser.go) reads them."""
    commands = []
    while text:
        line, _, text = text.partition("\n")
        if not line or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        quote = next((q for q in ('"""', '"') if value.startswith(q)), "")
        while quote and not (len(value) >= 2 * len(quote) and value.endswith(quote)):
            assert text, "a quote that is not closed"
            line, newline, text = text.partition("\n")
            value += "\n" + line
        # Ollama writes blanks and printable characters alone
        value = "".join(c for c in value if c.isprintable() or c in "\n\t\r")
        commands.append((name, value[len(quote) : len(value) - len(quote)]))
    return commands


def executed(template, question, context):
    """What Go's text/template makes of actions with a field or a string, the only ones that we write."""
    parts = re.split(r"\{\{(.*?)\}\}", template)
    values = {" .Prompt ": question, " .System ": context}
    for number in range(1, len(parts), 2):
        action = parts[number]
        if action not in values:
            literal = re.fullmatch(r' "((?:\\U[0-9a-f]{8})+)" ', action)
            assert literal, f"{action!r} would be run, or is an error"
            values[action] = literal[1].encode().decode("unicode_escape")
        parts[number] = values[action]
    return "".join(parts)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_makes_the_prompt_of_training(template, tokenizer):
    trained = PromptFormat(False, template)
    question, context = 'Who is "{{ x }}"?', "CREATE TABLE t (a INT)"
    wanted = trained.prompt(question, context, tokenizer)
    commands = dict(parsed(modelfile("model.gguf", trained, "<|end|>", 32)))
    assert executed(commands["TEMPLATE"], question, context) == wanted
    assert commands["FROM"] == "./model.gguf"
    assert set(commands) == {"FROM", "TEMPLATE", "stop", "temperature", "repeat_penalty", "num_predict"}
    messages = [{"role": "system", "content": context}, {"role": "user", "content": question}]
    assert render_chats(tokenizer, jinja_template(trained), [(messages, True)]) == [wanted]
    assert render_chats(tokenizer, jinja_template(trained), [(messages[1:], True)]) == [
        trained.prompt(question, "", tokenizer)
    ]


def test_the_parameters_are_those_of_greedy_replies():
    text = modelfile("gpt2-f16.gguf", PromptFormat(False), "<|endoftext|>", 96)
    wanted = {"TEMPLATE": "{{ .Prompt }}", "stop": "<|endoftext|>", "temperature": "0", "num_predict": "96"}
    assert wanted.items() <= dict(parsed(text)).items()


def test_conversations_are_left_to_the_chat_template_in_the_file():
    commands = dict(parsed(modelfile("chat.gguf", PromptFormat(True), "<|im_end|>", 64)))
    assert "TEMPLATE" not in commands
    assert commands["REQUIRES"] == OLLAMA and commands["stop"] == "<|im_end|>"
    assert jinja_template(PromptFormat(True)) is None and go_template(PromptFormat(True)) is None


@pytest.mark.parametrize("end_token", ['"\nSYSTEM evil', "a\nSYSTEM evil", '<"">', "\x1b[2J"])
def test_an_end_token_cannot_add_a_command(end_token):
    commands = parsed(modelfile("m.gguf", PromptFormat(False), end_token, 1))
    assert [name for name, _ in commands] == ["FROM", "TEMPLATE", "temperature", "repeat_penalty", "num_predict"]
