import html
import re

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.curves import CHARTS
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.callbacks.storyboard import RESULTS, StoryboardCallback
from dpo_lightning.judging.quantities import reply_tag
from dpo_lightning.judging.views import markdown_table

JUDGED = ("sql/valid", "sql/exact", "sql/execution", "reply/eos_rate", "reply/repetition")
HOSTILE = (
    "<script>alert(1)</script> ![x](http://127.0.0.1/x.png) [y](javascript:z) | cell |\n# head\n\n* a_b_ `c` <b>&amp;"
    "\x1b[31m ~~~ --- 1. \\| http://127.0.0.1 \u202e"
)


@pytest.mark.filterwarnings("ignore")
def test_a_reply_cannot_inject_markup_into_a_text_page():
    shown = markdown_to_safe_html(markdown_table(("policy", "reference"), [(HOSTILE, "b"), ("c", HOSTILE)]))
    assert set(re.findall(r"</?([a-z0-9]+)", shown)) == {"table", "thead", "tbody", "tr", "th", "td", "br"}
    assert shown.count("<tr>") == 3 and shown.count("<td>") == 4
    cells = [html.unescape(cell.replace("<br>", "\n")) for cell in re.findall(r"<td>(.*?)</td>", shown, re.S)]
    assert cells == [HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e"), "b", "c", cells[0]]


@pytest.fixture(scope="module")
def fitted(model_folder, tokenizer, tmp_path_factory):
    """A short run with TensorBoard; its module, trainer and events."""
    import json

    from lightning.pytorch import Trainer

    from conftest import ROWS

    folder = tmp_path_factory.mktemp("run")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    module = DPOModule(str(model_folder), max_new_tokens=8, learning_rate=1e-3)
    data = PreferenceDataModule(tokenizer, str(rows), val_size=4, test_size=4, batch_size=4)
    trainer = Trainer(
        accelerator="cpu", logger=TensorBoardLogger(folder, default_hp_metric=False), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=2, log_every_n_steps=2,
        val_check_interval=4, max_steps=8, gradient_clip_val=1.0,
        callbacks=[RepliesCallback(every_n_steps=4, num_prompts=2, num_shown=0), StoryboardCallback()],
    )  # fmt: skip
    trainer.fit(module, data)
    events = EventAccumulator(trainer.log_dir, size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    return module, trainer, events


def test_every_chart_has_curves_and_every_important_curve_a_chart(fitted):
    _, _, events = fitted
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    scalars = events.Tags()["scalars"]
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    drawn = {title: {tag for tag in scalars if any(re.match(p, tag) for p in tags)} for title, tags in charts.items()}
    assert not [title for title, tags in drawn.items() if not tags]
    assert {chart.title for chart in CHARTS} - set(drawn) == {"Reference point of kto"}
    assert drawn["Loss"] == {"train/loss", "val/loss"}
    assert drawn["Replies: ended, repetition"] == {"replies/eos_rate", "replies/repetition"}
    assert drawn["SQL: valid, exact, same result"] == {f"replies/sql/{x}" for x in ("valid", "exact", "execution")}
    assert {"train/learning_rate", "train/grad_norm", "train/pairs_per_second", "train/kl"} <= set().union(
        *drawn.values()
    )


def test_hparams_hold_the_settings_and_name_results_that_exist(fitted):
    _, trainer, events = fitted
    experiment = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    tags = {info.name.tag for info in experiment.experiment.metric_infos}
    judged = {reply_tag(name) for name in JUDGED}
    assert not any(tag.startswith("replies/reply/") for tag in events.Tags()["scalars"])
    assert tags == set(RESULTS) | judged and tags <= set(events.Tags()["scalars"])
    started = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    values = started.session_start_info.hparams
    assert values["beta"].number_value == 0.1 and values["loss_type"].string_value == "sigmoid"
    assert values["batch_size"].number_value == 4 and values["precision"].string_value == "32-true"
    assert values["gradient_clip_val"].number_value == 1.0 and values["val_size"].number_value == 4
    assert not {"lora", "warmup_steps", "num_workers", "devices", "tokenizer", "label_smoothing"} & set(values)
    assert events.Scalars("val/loss")[-1].value == pytest.approx(trainer.callback_metrics["val/loss"].item())
    assert [event.step for event in events.Scalars("val/loss")] == [3, 7], "no made-up point among the results"


def test_each_validation_leaves_a_histogram_of_all_its_pairs(fitted):
    module, trainer, events = fitted
    histograms = events.Histograms("margins/val")
    assert [event.step for event in histograms] == [4, 8], "the sanity check leaves none"
    pairs = len(trainer.datamodule.datasets["val"])
    for event, margin in zip(histograms, events.Scalars("val/rewards/margins"), strict=True):
        assert event.histogram_value.num == pairs
        assert event.histogram_value.sum / pairs == pytest.approx(margin.value, rel=1e-4)
    assert module.val_metrics.all_margins().numel() == 0, "each validation starts anew"


def test_the_text_page_puts_policy_and_reference_side_by_side(fitted):
    _, _, events = fitted
    pages = events.Tensors("replies/text_summary")
    assert [page.step for page in pages] == [0, 4, 8]
    first, last = (page.tensor_proto.string_val[0].decode().splitlines() for page in (pages[0], pages[-1]))
    assert first[0] == "| prompt | policy | reference | wanted | the policy's reply is |"
    assert len(first) == 4
    for one, other in zip(first[2:], last[2:], strict=True):
        before, now = one.split(" | "), other.split(" | ")
        assert before[1] == before[2] == now[2] != now[1], "the reference's replies are those before training"
