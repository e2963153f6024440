"""Every example of docs/data.md, and what a chat template's tokens become."""

import json
import re
from copy import deepcopy

import pytest
import torch

from conftest import REPO, ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.data.batching import to_pairs
from dpo_lightning.data.chat import ChatTemplate
from dpo_lightning.data.formats import FORMATS, shared_messages, shared_text
from dpo_lightning.errors import UserError

DOC = (REPO / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"```json\n(.*?)```\s+```text\n(.*?)```", DOC, re.S)
FUNCTION = re.search(r"```python\n(.*?)```", DOC, re.S).group(1)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER, REPLY = {"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}
TURNS = {"chosen": [USER, REPLY], "rejected": [USER, REPLY | {"content": "Green."}]}


@pytest.fixture
def chat(tokenizer):
    """The test tokenizer as a ChatML model has it: its EOS ends a turn."""
    chat = deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    chat.chat_template = CHATML
    return chat


@pytest.fixture
def load(write_rows):
    def load(tokenizer, rows, **options):
        data = PreferenceDataModule(tokenizer, write_rows(rows), **{"val_size": 0, "test_size": 0} | options)
        data.setup("fit")
        return data

    return load


def trained(data):
    """The first pair of the first training batch, decoded."""
    pair = to_pairs(next(iter(data.train_dataloader())))[0]
    return [data.tokenizer.decode(ids) for ids in pair[:3]]


@pytest.mark.parametrize(("row", "becomes"), EXAMPLES, ids=[re.sub(r"\W+", "-", row)[:40] for row, _ in EXAMPLES])
def test_an_example_of_the_docs_becomes_what_they_say(chat, load, tmp_path, monkeypatch, row, becomes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rows.py").write_text(FUNCTION)
    row = json.loads(row)
    data = load(chat, [row], format="my_rows:from_votes" if "votes" in str(row) else None)
    texts = [json.loads(line[9:]) for line in becomes.splitlines()]
    assert list(data.pairs("train", [0])[0][:3]) == [text or "" for text in texts]
    assert trained(data) == [texts[0], *("" if text is None else text + "<|im_end|>" for text in texts[1:])]


def test_the_docs_show_every_format():
    assert len(EXAMPLES) == 13
    assert all(f"| `{name}`" in DOC for name in FORMATS)


def test_weights_and_margins_reach_the_batch(tokenizer, load):
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": "r", "weight": 0.5, "margin": -1},
        {"prompt": "p", "chosen": "d", "rejected": "r", "weight": None},
    ]
    batch = next(iter(load(tokenizer, rows, shuffle=False).train_dataloader()))
    assert (batch.weight.tolist(), batch.margin.tolist()) == ([0.5, 1.0], [-1.0, 0.0])


def test_a_template_of_a_file_and_its_end_of_turn_become_what_replies_stop_at(tokenizer, load, tmp_path, caplog):
    other = deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<start>", "<end>"]})
    path = tmp_path / "template.jinja"
    path.write_text(CHATML.replace("<|im_start|>", "<start>").replace("<|im_end|>", "<end>"))
    data = load(other, [TURNS], chat_template=str(path))
    assert trained(data) == ["<start>user\nSky?<end>\n<start>assistant\n", "Blue.<end>", "Green.<end>"]
    assert data.tokenizer.eos_token == "<end>" and other.eos_token == "<|endoftext|>"
    text = load(other, ROWS[:1], chat_template=str(path))
    assert text.tokenizer.eos_token == "<|endoftext|>"  # only conversations end as the template says


def test_a_template_without_an_end_of_turn_gets_eos(tokenizer, load, tmp_path):
    path = tmp_path / "plain.jinja"
    path.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant: ")
    path.write_text(path.read_text().replace("assistant: ", "{% if add_generation_prompt %}assistant: {% endif %}"))
    assert trained(load(tokenizer, [TURNS], chat_template=str(path))) == [
        "user: Sky?\nassistant: ",
        "Blue.<|endoftext|>",
        "Green.<|endoftext|>",
    ]


def test_a_template_adds_its_own_bos_and_the_tokenizer_no_second_one(chat, load):
    from tokenizers import processors

    bos = ("<|im_start|>", chat.convert_tokens_to_ids("<|im_start|>"))
    chat._tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert trained(load(chat, [TURNS]))[0].startswith("<|im_start|>user")
    assert trained(load(chat, ROWS[:1]))[0].startswith("<|im_start|>CREATE")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "the chat template cannot be used"),
        ("{{ messages[0].content }}", "leaves an assistant's content out"),
        (None, "tokenizer has no chat template: give data.chat_template a Jinja file"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tokenizer, load, tmp_path, template, message):
    path = tmp_path / "template.jinja"
    path.write_text(template or "")
    rows = [{"prompt": [USER, REPLY, USER], "chosen": [REPLY], "rejected": [REPLY | {"content": "No."}]}]
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load(tokenizer, rows, chat_template=str(path) if template else None)
    assert "\n" not in str(error.value)


def test_a_prompt_that_changes_once_it_is_replied_to_is_a_bad_row(chat, load):
    chat.chat_template = "{{ messages|length }}" + CHATML
    with pytest.raises(UserError, match="line 1: the chat template renders the prompt differently once it is replied"):
        load(chat, [TURNS])
    chat.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system!') }}{% endif %}" + CHATML
    row = {"messages": [{"role": "system", "content": "s"}, USER, REPLY]}
    with pytest.raises(UserError, match="line 1: the chat template refuses it: no system!"):
        load(chat, [row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "column 'messages': found an empty list where messages belong"),
        ({"messages": "Hi"}, "column 'messages': found str 'Hi' where a list of messages belongs"),
        ({"messages": [USER, {"role": "assistant"}]}, "found null where the content of message 2, text, belongs"),
        ({"messages": [USER, "Blue."]}, "found str 'Blue.' where message 2, a role and a content, belongs"),
        ({"messages": [USER]}, "found a last message by 'user' where a reply belongs"),
        ({"chosen": [USER], "rejected": [USER]}, "found no assistant's reply after what it shares with rejected"),
        ({"chosen": [USER, REPLY], "rejected": "Green."}, "column 'rejected': found str 'Green.' where a list of mess"),
    ],
)
def test_a_bad_conversation_is_named(chat, load, row, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(chat, [row])


def test_what_two_texts_share():
    assert shared_text("same", "same") == 0  # no blank to end the prompt at: told as identical later
    assert shared_text("a b", "a c") == shared_text("a b", "a  c") == 1
    assert shared_text("12", "34") == 0
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert shared_text(turns + " d e", turns + " d f") == len(turns)
    assert shared_messages([USER, REPLY], [USER, REPLY]) == 1
    assert shared_messages([USER, REPLY, USER, REPLY], [USER, REPLY]) == 1
    assert shared_messages([REPLY], [REPLY]) is None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "data.format 'my_rows:row' cannot be imported: ModuleNotFoundError: No module named 'my_rows'"),
        ("x = 1", "cannot be imported: AttributeError"),
        ("row = 1", "data.format 'my_rows:row' is int, not a function"),
        ("def row(row): return row['x']", "rows.jsonl, line 1: my_rows:row raised KeyError: 'x'; fix or remove"),
        ("def row(row): return 5", "line 1: my_rows:row returned int 5 where a PreferencePair or a dict belongs"),
        ("def row(row): return {'prompt': 'p', 'chosen': 5}", "line 1, column 'chosen': found int 5 where text"),
    ],
)
def test_a_function_that_fails_is_one_line(tokenizer, load, tmp_path, monkeypatch, code, message):
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rows", raising=False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.startswith(str(tmp_path.parent))])
    if code:
        (tmp_path / "my_rows.py").write_text(code)
    with pytest.raises(UserError, match=re.escape(message)):
        load(tokenizer, ROWS[:3], format="my_rows:row")


def pairs_of(name, count):
    return [{"prompt": f"{name} {i}", "chosen": " c", "rejected": " r"} for i in range(count)]


def test_data_sets_are_mixed_by_weight_and_still_know_their_rows(tokenizer, write_rows):
    a, b = write_rows(pairs_of("a", 20), "a.jsonl"), write_rows(["{", *ROWS[:40]], "b.jsonl")
    options = {"on_bad_row": "skip", "val_size": 6, "test_size": 0}

    def load(train, **more):
        data = PreferenceDataModule(tokenizer, train, **options | more)
        data.setup("fit")
        return data

    once, mixed = load([a, b]), load({a: 2.5, b: 0.5})
    assert once.datasets["val"]["prompt"] == mixed.datasets["val"]["prompt"]
    held_out = set(once.datasets["val"]["prompt"])
    from_a = {f"a {i}" for i in range(20)} - held_out
    prompts = list(mixed.datasets["train"]["prompt"])
    counts = {prompt: prompts.count(prompt) for prompt in from_a}
    assert set(counts.values()) == {2, 3} and sum(counts.values()) == round(2.5 * len(from_a))
    others = [prompt for prompt in prompts if prompt not in from_a]
    assert len(others) == round(0.5 * len([p for p in once.datasets["train"]["prompt"] if p not in from_a]))
    assert not held_out & set(prompts)
    for position, prompt in enumerate(prompts):
        (where,) = mixed.locations("train", [position])
        line = int(where.rpartition(" ")[2])
        if prompt in from_a:
            assert where.startswith(f"{a}, line ") and prompt == f"a {line - 1}"
        else:
            assert where.startswith(f"{b}, line ") and ROWS[line - 2]["question"] in prompt
    assert prompts == list(load({a: 2.5, b: 0.5}).datasets["train"]["prompt"])
    assert prompts != list(load({a: 2.5, b: 0.5}, seed=1).datasets["train"]["prompt"])


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a", "a"], "names 'a' twice"), ({"a": 0}, "the weight of 'a' is 0: it must be above 0")],
)
def test_a_mixture_that_cannot_be_meant_is_refused(tokenizer, names, message):
    with pytest.raises(UserError, match=re.escape(message)):
        PreferenceDataModule(tokenizer, names)


def test_conversations_train_and_replies_stop_at_the_turns_end(chat, load, quiet_trainer, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(chat), n_embd=16, n_layer=1, n_head=2, n_positions=128)).save_pretrained(
        tmp_path / "model"
    )
    module = DPOModule(str(tmp_path / "model"))
    data = load(chat, [TURNS, {**TURNS, "chosen": [USER, REPLY | {"content": "Grey."}]}], batch_size=2)
    quiet_trainer(max_steps=1).fit(module, data)
    assert ChatTemplate(chat).end_token == data.tokenizer.eos_token == "<|im_end|>"
