"""Everything a test needs without a network: a small tokenizer, tiny random models, rows in the founding format."""

import os
import tempfile

# Before datasets and transformers are imported: an own cache, and no word to the hub.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dpo-lightning-test-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it does

REPO = Path(__file__).parents[1]
SHARED = REPO.parent / "shared"
CHROMIUM = Path("/usr/bin/chromium")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared with real rows is not here")

ROWS = [
    {
        "question": f"Which {column} has {other} {value}?",
        "context": f"CREATE TABLE {table} ({column} VARCHAR, {other} INTEGER)",
        "answer": f"SELECT {column} FROM {table} WHERE {other} = {value}",
    }
    for table in ("singer", "stadium", "flight", "book", "river", "city", "museum", "player")
    for column, other in (("name", "age"), ("title", "year"), ("country", "size"))
    for value in (3, 41)
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's: EOS, no pad token, no BOS added."""
    bpe = ByteLevelBPETokenizer()
    texts = [" ".join(row.values()) for row in ROWS]
    bpe.train_from_iterator(
        texts, vocab_size=400, min_frequency=1, special_tokens=["<|endoftext|>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=128
    )


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with dropout in its config, saved with its tokenizer as a Hugging Face folder."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    assert config.resid_pdrop == 0.1
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a .jsonl file and gives its path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def rows_file(write_rows: Callable[..., str]) -> str:
    """The founding rows as a file."""
    return write_rows(ROWS)


@pytest.fixture
def pairs(tokenizer, write_rows, tmp_path, monkeypatch):
    """Pairs, and a cache of their own."""
    from dpo_lightning import PreferenceDataModule

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = PreferenceDataModule(tokenizer, write_rows(ROWS[:6]), val_size=0, test_size=0, max_length=100)
    data.setup("fit")
    return data.datasets["train"]


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A Trainer on the CPU in float32 that prints and writes nothing unless asked to."""

    def make(**options: Any) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_epochs": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(**defaults | options)

    return make


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; for tests that are skipped without playwright and `CHROMIUM`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()
