import json

import pytest

pytest.importorskip("starlette", reason="the page needs the extra `ui`")
from transformers import AutoModelForCausalLM

from dpo_lightning.cli.compare import lines
from dpo_lightning.cli.entry import main


@pytest.fixture(scope="module")
def other_folder(model_folder, tokenizer, tmp_path_factory):
    """A model that says something else."""
    folder = tmp_path_factory.mktemp("models") / "other"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.weight.data = -model.lm_head.weight.data
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_judge_compares_without_a_page_and_a_second_run_goes_on(
    model_folder, other_folder, rows_file, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "verdicts.jsonl"
    args = ["compare", "--model", str(model_folder), "--model_b", str(other_folder), "--prompts", rows_file]
    args += ["--judge", "exact", "--judge_only", "true", "--max_new_tokens", "3", "--output", str(output)]
    assert main([*args, "--num_prompts", "4"]) == 0
    out = capsys.readouterr().out
    assert "by the judge" in out and "0 won, 0 lost, 4 tied" in out and "win rate 50.0%, 95% interval" in out
    first = output.read_text().splitlines()
    assert len(first) == 4 and {json.loads(line)["by"] for line in first} == {"judge"}
    assert main([*args, "--num_prompts", "6"]) == 0
    assert "6 tied" in capsys.readouterr().out and output.read_text().splitlines()[:4] == first
    assert len(output.read_text().splitlines()) == 6
    assert main([*args, "--num_prompts", "6", "--seed", "1"]) == 0  # another comparison, in the same file
    assert "6 tied" in capsys.readouterr().out and len(output.read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--judge_only", "true"], "--judge_only needs a judge"),
        (["--output", "x.csv"], "must end in .jsonl"),
        (["--host", "0.0.0.0"], "needs --token"),
        (["--judge", "exakt", "--judge_only", "true"], "did you mean 'exact'?"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_a_mistake_is_one_line(args, words, model_folder, rows_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--model", str(model_folder), "--prompts", rows_file, *args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not (tmp_path / "comparison.jsonl").exists()


def test_a_second_model_is_asked_for(model_folder, rows_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--judge", "exact", "--judge_only", "true"]
    assert main(["compare", "--model", str(model_folder), "--prompts", rows_file, *args]) == 2
    assert "is no adapter" in capsys.readouterr().err


def test_runs_needs_a_folder(tmp_path, capsys):
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_the_result_says_what_was_not_decided():
    rate = {"wins": 6, "losses": 1, "ties": 3, "rate": 0.75, "low": 0.46, "high": 0.91, "decided": False}
    state = {"names": ["new", "old"], "person": rate | {"same": 2}, "file": "x.jsonl"}
    assert lines(state) == [
        "by hand, new against old: 6 won, 1 lost, 3 tied (2 with the same reply)",
        "    win rate 75.0%, 95% interval 46.0% to 91.0%: chance alone could explain it",
    ]
    judge = rate | {"unknown": 4, "means": [("valid SQL", "90%", "10%")], "decided": True}
    text = "\n".join(lines(state | {"person": rate | {"rate": None}, "judge": judge}))
    assert "4 without a verdict" in text and "more than chance" in text and "valid SQL: 90% against 10%" in text
