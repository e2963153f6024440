import pytest
import torch

from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.predictions import ReplyWriter, model_digest
from dpo_lightning.errors import UserError
from dpo_lightning.storage.jsonl import append_lines, keep_lines, read_lines


def test_whole_lines_come_back_and_half_a_line_does_not(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = [{"text": "é\n\u2028"}, {"text": "\ud83d lone surrogate"}]
    append_lines(path, lines)
    assert read_lines(path).objects == lines and path.read_bytes().count(b"\n") == 2
    with path.open("ab") as file:
        file.write('{"text": "hal\u00e9'.encode()[:-1])
    assert read_lines(path).objects == lines
    keep_lines(path, read_lines(path), 1)
    assert read_lines(path).objects == lines[:1] and path.read_bytes().endswith(b"}\n")
    assert read_lines(tmp_path / "nowhere.jsonl").objects == []


@pytest.mark.parametrize("content", ["SELECT 1\nSELECT 2\n", "[1]\n"])
def test_other_files_are_not_taken_for_lines(tmp_path, content):
    (tmp_path / "notes").write_text(content)
    with pytest.raises(ValueError):
        read_lines(tmp_path / "notes")


@pytest.fixture
def predict(quiet_trainer, model_folder, tokenizer, rows_file, tmp_path):
    """Answers 16 or so prompts in batches of 4 into one file; gives the file and how many prompts were answered."""

    def run(dataset=rows_file, change=lambda module: None, **options):
        module = DPOModule(str(model_folder), **{"max_new_tokens": 8} | options)
        data = PreferenceDataModule(tokenizer, rows_file, predict_dataset=dataset, batch_size=4)
        answered = []
        module.configure_model()
        change(module)
        with pytest.MonkeyPatch.context() as patch:
            from dpo_lightning.models import generate as generation

            original = generation.generate

            def counting(model, input_ids, *args):
                answered.extend(input_ids.tolist())
                return original(model, input_ids, *args)

            patch.setattr(generation, "generate", counting)
            writer = ReplyWriter(str(tmp_path / "out.jsonl"))
            quiet_trainer(callbacks=[writer]).predict(module, data, return_predictions=False)
        return tmp_path / "out.jsonl", len(answered)

    return run


@pytest.mark.parametrize("cut", [0, 1, 200, 3333, -1, None])
def test_an_interrupted_prediction_is_continued_to_the_same_file(predict, cut):
    path, everything = predict()
    assert everything == 48
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept = min(whole[:cut].count(b"\n"), everything - 1)
    again, answered = predict()
    assert again.read_bytes() == whole
    assert answered == everything - kept


def test_prompts_alone_are_answered_too(predict, write_rows):
    path, answered = predict(write_rows([{"prompt": "SELECT"}, {"prompt": "Which name?"}], "prompts.jsonl"))
    lines = read_lines(path).objects
    assert answered == 2 and [line["prompt"] for line in lines] == ["SELECT", "Which name?"]
    assert set(lines[0]) == {"row", "prompt", "reply", "stopped", "model"}


def test_replies_to_other_prompts_are_not_continued(predict, write_rows):
    path, _ = predict()
    before = path.read_bytes()
    other = write_rows([{"prompt": "SELECT"}], "prompts.jsonl")
    with pytest.raises(
        UserError, match=r"out.jsonl' holds, in line 1, a reply to another prompt.*--predictions.output"
    ):
        predict(other)
    path.write_text('{"row": 1, "prompt": "SELECT", "reply": ""}\n{"row": 2, "prompt": "b", "reply": ""}\n')
    with pytest.raises(UserError, match="in line 2, a reply to another prompt"):
        predict(other)
    path.write_text("my notes\n")
    with pytest.raises(UserError, match="is not a file of replies.*delete it"):
        predict()
    assert path.read_text() == "my notes\n" and before


@pytest.mark.parametrize("case", ["weights", "limit"])
def test_replies_of_another_model_are_not_continued(predict, case):
    def nudge(module):
        with torch.no_grad():
            next(module.policy.parameters()).add_(1e-3)

    path, _ = predict()
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds replies of another model.*choose another file"):
        predict(change=nudge) if case == "weights" else predict(max_new_tokens=9)
    assert path.read_bytes() == before


def test_the_digest_follows_the_weights_and_nothing_else(model_folder):
    modules = [DPOModule(str(model_folder)) for _ in range(2)]
    for module in modules:
        module.configure_model()
    one, other = map(model_digest, modules)
    assert one == other and len(one) == 12
    modules[1].policy.train()
    assert model_digest(modules[1]) == one
