"""The report's tiles and the closing line: of how many, since when, and nothing that was not measured."""

import re

import pytest

from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.export.callback import ExportCallback
from dpo_lightning.callbacks.replies import RepliesCallback, Showing
from dpo_lightning.callbacks.report.callback import ReportCallback
from dpo_lightning.callbacks.report.outcome import closing_lines
from dpo_lightning.judging.quantities import percent


@pytest.fixture
def parts(model_folder, tokenizer, rows_file):
    def make(rows=rows_file, **settings):
        module = DPOModule(str(model_folder), max_new_tokens=8, **{"learning_rate": 1e-3} | settings)
        return module, PreferenceDataModule(tokenizer, rows, val_size=4, test_size=4, batch_size=4)

    return make


def tiles(folder):
    html = (folder / "report.html").read_text()
    found = re.findall(r'<div class="tile">(.*?)</div>', html)
    return [re.sub(r"(<[^>]+>)+", "|", tile).strip("|") for tile in found]


def closing(caplog):
    return caplog.records[-1].getMessage()


def test_tiles_say_of_how_many_and_only_what_was_measured(parts, quiet_trainer, tmp_path):
    callbacks = [RepliesCallback(every_n_steps=0, num_prompts=3, num_shown=0), ReportCallback()]
    trainer = quiet_trainer(callbacks=callbacks, max_steps=8, val_check_interval=4, log_every_n_steps=2)
    trainer.fit(*parts())
    pairs = len(trainer.datamodule.datasets["val"])
    found = {tile.split("|")[1]: tile.split("|") for tile in tiles(tmp_path)}
    for words in ("valid SQL", "replies that end by themselves"):
        assert found[words][2] == "on 3 questions"
    for words in ("validation loss", "pairs with a positive margin"):
        assert found[words][2] == f"of {pairs} validation pairs, after 4 and 8 steps"
        assert "→" in found[words][0]


def test_one_validation_is_no_change(parts, quiet_trainer, tmp_path):
    quiet_trainer(callbacks=[ReportCallback()], max_steps=4, val_check_interval=4).fit(*parts())
    for tile in tiles(tmp_path):
        assert "→" not in tile and tile.endswith("after 4 steps")
    assert len(tiles(tmp_path)) == 2


def test_the_closing_lines_of_a_run_without_replies_or_export(parts, quiet_trainer, tmp_path, caplog):
    quiet_trainer(callbacks=[ReportCallback(), ExportCallback(enabled=False)], max_steps=2).fit(*parts())
    assert closing(caplog) == f"trained for 2 steps\nreport: {tmp_path / 'report.html'}"


def test_the_closing_lines_says_where_model_and_report_are(parts, quiet_trainer, tmp_path, caplog):
    callbacks = [RepliesCallback(every_n_steps=0, num_prompts=3, num_shown=0), ExportCallback(), ReportCallback()]
    quiet_trainer(callbacks=callbacks, max_steps=2).fit(*parts())
    result, *files = closing(caplog).split("\n")
    assert files == [f"model: {tmp_path / 'huggingface'}", f"report: {tmp_path / 'report.html'}"]
    assert "on 3 questions" in result


@pytest.mark.parametrize(
    "asked, still", [(3, "all 3 replies are still what they were"), (1, "the only reply is still what it was")]
)
def test_replies_that_did_not_change_are_said_to_be_the_same(parts, quiet_trainer, tmp_path, caplog, asked, still):
    callbacks = [RepliesCallback(every_n_steps=0, num_prompts=asked, num_shown=0), ReportCallback()]
    quiet_trainer(callbacks=callbacks, max_steps=2).fit(*parts(learning_rate=0.0))
    assert closing(caplog).startswith(f"{still} before training (valid SQL: 0%)")


def test_data_without_sql_are_told_by_their_ends(parts, quiet_trainer, write_rows, caplog):
    rows = write_rows([{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(40)], "plain.jsonl")
    callbacks = [RepliesCallback(every_n_steps=0, num_prompts=3, num_shown=0), ReportCallback()]
    quiet_trainer(callbacks=callbacks, max_steps=6).fit(*parts(rows))
    assert "replies that end by themselves" in closing(caplog) and "SQL" not in closing(caplog)


def test_a_resumed_run_tells_from_its_very_beginning(parts, quiet_trainer, tmp_path, caplog):
    def callbacks():
        return [RepliesCallback(every_n_steps=4, num_prompts=3, num_shown=0), ReportCallback()]

    first = quiet_trainer(callbacks=callbacks(), max_steps=4)
    first.fit(*parts())
    first.save_checkpoint(tmp_path / "four.ckpt")
    again = callbacks()
    quiet_trainer(callbacks=again, max_steps=8).fit(*parts(), ckpt_path=tmp_path / "four.ckpt")
    assert [showing.step for showing in again[0].showings] == [0, 4, 8]
    assert "since step" not in closing(caplog) and "on 3 questions" in closing(caplog)
    assert all("since" not in tile for tile in tiles(tmp_path))


def showing(step, share, changed, judged=96):
    shares, counts = {"sql/valid": share, "reply/eos_rate": 1.0}, {"sql/valid": judged, "reply/eos_rate": 96}
    return Showing(step, [], [], shares, counts, changed)


@pytest.mark.parametrize(
    ("showings", "line"),
    [
        ([showing(0, 0.0, 0), showing(198, 0.857, 96)], "valid SQL 0% → 86% on 96 questions"),
        ([showing(50, 0.2, 0), showing(198, 0.857, 96)], "valid SQL 20% → 86% on 96 questions, since step 50"),
        ([showing(0, 0.0, 0, 93), showing(9, 0.5, 1)], "valid SQL 0% → 50% on 93 to 96 questions"),
        ([showing(0, 0.0, 0), showing(9, 0.0, 7)],
         "valid SQL still 0% on 96 questions; 7 of the 96 replies have changed"),
        ([Showing(0, [], [], {"sql/valid": 0.0}), showing(9, 0.999, 7)], "valid SQL 0% → >99% on 96 questions"),
        ([showing(0, 0.0, 0)], "trained for 198 steps"),
        ([], "trained for 198 steps"),
    ],
)  # fmt: skip
def test_closing_lines(showings, line):
    assert closing_lines(showings, 198, {"report": "r.html"}) == f"{line}\nreport: r.html"


def test_none_and_all_are_only_what_is_none_and_all():
    assert [percent(share) for share in (0, 1 / 400, 0.5, 399 / 400, 1)] == ["0%", "<1%", "50%", ">99%", "100%"]
