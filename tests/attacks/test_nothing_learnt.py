"""Runs whose numbers look fine and which teach nothing: they say so, once, with what to do, and good runs do not."""

import json
import re
import warnings

import pytest
from transformers import AutoTokenizer

from conftest import REPO, ROWS
from dpo_lightning.callbacks import learning_checks as checks
from dpo_lightning.cli.entry import main
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.data.prompt_format import PromptFormat, write_prompt_format
from dpo_lightning.dpo.preference_loss import PreferenceLoss

GPT2, DEMO = (str(REPO / "configs" / name) for name in ("gpt2.yaml", "demo.yaml"))


def pairs(*texts, chat=False):
    return [PreferencePair(prompt, chosen, "", chat=chat) for prompt, chosen in texts]


@pytest.mark.parametrize(
    ("prompt", "completion", "wrong"),
    [
        ("Question: x\nAnswer:", "SELECT 1", True),
        ("The capital of France", "is Paris", True),
        ("Вопрос: что?", "Ответ", True),
        ("In the year (1999)", "it", True),
        ("Question: x\nAnswer:", " SELECT 1", False),
        ("Question: x\nAnswer:\n", "SELECT 1", False),
        ("Question: x\nAnswer: ", "SELECT 1", False),
        ("Answer:", "\nSELECT 1", False),
        ("f(", "x)", False),
        ("[INST] x [/INST]", "Yes", False),
        ("<|im_start|>assistant", "\nYes", False),
        ("问题:法国的首都是哪里?答案:", "巴黎", False),
        ("问题：法国的首都？答案：", "SELECT 1", False),
        ("问题:答案:", "SELECT 1", False),
        ("質問：首都は", "パリ", False),
        ("คำถาม", "คำตอบ", False),
        ("word", "...", False),
    ],
)
def test_where_a_blank_is_missing(prompt, completion, wrong):
    assert checks.runs_together(prompt, completion) is wrong
    warning = checks.joined(pairs((prompt, completion)))
    assert bool(warning) is wrong
    assert not wrong or "100%" in warning and "completion_template" in warning


def test_shares_are_told_and_accidents_are_not():
    good, bad = ("Answer:", " yes"), ("Answer:", "yes")
    assert "25%" in checks.joined(pairs(good, good, good, bad))
    assert checks.joined(pairs(*[good] * 99, bad)) is None
    assert checks.joined(pairs(bad, chat=True)) is None


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [("Answer: ", True), ("Answer:\t", True), ("Answer:", False), ("Answer:\n", False), ("", False)],
)
def test_prompts_that_end_in_a_blank(prompt, wrong):
    warning = checks.ends_in_blank(pairs((prompt, "yes")))
    assert bool(warning) is wrong
    assert not wrong or "leave it out of the prompt" in warning


def test_prompts_that_end_in_a_blank_are_counted():
    good, bad = ("Answer:", " yes"), ("Answer: ", "yes")
    assert "the prompts of 2 of 8 rows (25%) end in a blank" in checks.ends_in_blank(pairs(*[bad] * 2, *[good] * 6))
    many = pairs(*[bad] * checks.CHECKED_PAIRS)
    assert "the prompts of 1,000 of the first 1,000 rows (100%)" in checks.ends_in_blank(many)


def test_plain_prompts_for_a_chat_model():
    plain, markers = pairs(("Answer:", " yes")), {"<|im_start|>"}
    assert "data.format: messages" in checks.plain_for_a_chat_model(plain, True, markers)
    assert checks.plain_for_a_chat_model(plain, False, markers) is None
    assert checks.plain_for_a_chat_model(pairs(("Answer:", " yes"), chat=True), True, markers) is None
    rendered = pairs(("<|im_start|>user\nx<|im_start|>assistant\n", "yes"))
    assert checks.plain_for_a_chat_model(rendered, True, markers) is None


@pytest.mark.parametrize(
    ("steps", "epochs", "wanted"),
    [(10, 1, 6), (20, 2, 6), (29, 1, 3), (30, 1, None), (62, 1, None), (198, 1, None), (0, 1, None), (9, -1, None)],
)
def test_too_few_steps_say_how_many_epochs_it_takes(steps, epochs, wanted):
    warning = checks.too_few_steps(steps, epochs)
    assert warning is None if wanted is None else f"trainer.max_epochs: {wanted}," in warning


@pytest.mark.parametrize(
    ("good", "bad", "options", "wanted"),
    [
        (0, 0, {}, None),  # pairs
        (100, 100, {}, None),
        (97, 100, {}, None),  # a split is seldom exact
        (130, 100, {}, None),
        (200, 100, {}, "200 labels are true and 100 false, weighted 200 to 100, .*{undesirable_weight: 2}"),
        (100, 200, {}, "weighted 100 to 200, .*{desirable_weight: 2}"),
        (100, 200, {"desirable_weight": 2.5}, None),
        (100, 200, {"undesirable_weight": 2}, "weighted 100 to 400, .*{desirable_weight: 4}"),
        (100, 0, {}, "all 100 labels are true, but kto learns from the contrast"),
        (0, 100, {}, "all 100 labels are false"),
        (100, 100, {"undesirable_weight": 0}, "weighted 100 to 0"),
    ],
)
def test_unbalanced_labels_say_which_weight_to_set(good, bad, options, wanted):
    found = checks.unbalanced(good, bad, PreferenceLoss(["sft", "kto"], options=options))
    assert found is None if wanted is None else re.search(wanted, found)
    assert checks.unbalanced(good, bad, PreferenceLoss()) is None


def test_replies_that_are_empty_or_unchanged():
    wanted = [" SELECT 1", " SELECT 2"]
    assert "as it was before" in checks.empty_replies(["", ""], ["", "\n"], wanted)
    assert "though before they were not" in checks.empty_replies(["so", ""], ["", ""], wanted)
    assert checks.empty_replies(["", ""], ["SELECT 1", ""], wanted) is None
    assert checks.empty_replies(["", ""], ["", ""], ["", ""]) is None, "nothing was wanted"
    assert "same as before" in checks.same_replies(["so", "on"], ["so", "on"], wanted)
    assert checks.same_replies(["so", "on"], ["so", "off"], wanted) is None
    assert checks.same_replies(["SELECT 1", "SELECT 2"], ["SELECT 1", "SELECT 2"], wanted) is None, "right all along"


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Runs `fit` in an empty folder; gives how often each text is among what was warned of, and the report."""
    monkeypatch.chdir(tmp_path)

    def run(model, rows, *args, config=GPT2):
        argv = ["fit", "--config", config, "--model.name_or_path", str(model), "--data.train_dataset", rows]
        argv += ["--data.val_size", "4", "--data.test_size", "4", "--data.batch_size", "4", "--data.max_length", "128"]
        argv += ["--model.max_new_tokens", "4", "--trainer.accelerator", "cpu", "--export.enabled", "false"]
        argv += ["--replies.every_n_steps", "0", *args]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main(argv) == 0
        (report,) = tmp_path.glob("lightning_logs/version_*/report.html")
        return [str(warning.message) for warning in caught], report.read_text()

    return run


NOTHING_LEARNT = {
    "chat template": "the tokenizer has a chat template",
    "blank": "follow their prompt without a blank",
    "steps": "optimizer steps, too few to change the replies",
    "same": "is the same as before",
}


def test_a_run_that_teaches_nothing_says_so_once_and_in_its_report(fit, model_folder, write_rows, tmp_path):
    import shutil

    model = shutil.copytree(model_folder, tmp_path / "instruct")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(model)
    rows = write_rows(
        [{"prompt": f"{row['question']} Answer:", "chosen": row["answer"], "rejected": ""} for row in ROWS]
    )
    said, report = fit(model, rows, "--model.learning_rate", "1e-9")
    for text in NOTHING_LEARNT.values():
        assert sum(text in warning for warning in said) == 1, text
        assert text in report


def test_a_model_that_an_earlier_run_trained_may_need_few_steps(fit, model_folder, write_rows, tmp_path):
    import shutil

    model = shutil.copytree(model_folder, tmp_path / "instruct")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(model)
    write_prompt_format(model, PromptFormat(False, "{context}\nQuestion: {question}\nAnswer:"))
    said, _ = fit(model, write_rows(ROWS), "--model.learning_rate", "1e-3")
    texts = [NOTHING_LEARNT["chat template"], NOTHING_LEARNT["steps"]]
    assert not [warning for warning in said if any(text in warning for text in texts)]


def test_the_founding_data_raise_no_alarm(fit, model_folder, write_rows):
    said, _ = fit(model_folder, write_rows(ROWS), "--trainer.max_epochs", "4", "--model.learning_rate", "1e-3")
    assert not [warning for warning in said if any(text in warning for text in NOTHING_LEARNT.values())]
    assert not [warning for warning in said if "optimizer steps" in warning or "empty" in warning]


def test_messages_for_a_chat_model_raise_no_alarm(fit, model_folder, write_rows, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}"
                        "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    rows = write_rows([
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for row in ROWS
    ])  # fmt: skip
    said, _ = fit(model_folder, rows, "--data.chat_template", str(template), "--trainer.max_epochs", "4")
    before = [text for name, text in NOTHING_LEARNT.items() if name in ("chat template", "blank")]
    assert not [warning for warning in said if any(text in warning for text in before)]


def test_the_demo_raises_no_alarm_before_it_trains():
    # Its 198 steps are of another test; here the facts that are known before.
    rows = [json.loads(line) for line in open(REPO / "src/dpo_lightning/demo/data/train.jsonl")]
    made = pairs(*[(f"{row['context']}\nQuestion: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(REPO / "src/dpo_lightning/demo/model")
    assert checks.joined(made) is checks.ends_in_blank(made) is None
    assert checks.plain_for_a_chat_model(made, bool(tokenizer.chat_template), set()) is None
    assert checks.too_few_steps(len(rows) / 16, 1) is None


@pytest.mark.parametrize("setting", ["max_steps", "max_epochs", "limit_train_batches"])
def test_a_run_of_no_steps_says_that_nothing_is_trained(fit, model_folder, write_rows, setting):
    said, _ = fit(model_folder, write_rows(ROWS), f"--trainer.{setting}", "0")
    assert sum(f"nothing is trained, because trainer.{setting} is 0" in warning for warning in said) == 1
