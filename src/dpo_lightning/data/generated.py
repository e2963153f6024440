"""Prompts -> rejected completions that the model samples before it is trained: once for every pair, kept on disk.

For data that have only good answers. Trained against its own answers, the model learns what sets the good ones apart:
the first iteration of SPIN (Chen et al. 2024, https://arxiv.org/abs/2401.01335).

A shared pass (`storage.shared_pass`) makes the replies. They are cached beside the encoded data sets, in a folder named
by a digest of everything that they depend on.
"""

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from dpo_lightning.data.batching import PromptBatch, collate_prompts
from dpo_lightning.data.columns import text_keys
from dpo_lightning.data.encoding import encode_prompts, tokenizer_fingerprint
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.internals.transformers import hub_commit
from dpo_lightning.models.hub import from_hub_or_folder, local_path
from dpo_lightning.models.policy import ADAPTER_CONFIG, base_model_name, load_policy, without_adapter
from dpo_lightning.models.sampling import Draws
from dpo_lightning.parsing import Range, check_setting, check_settings
from dpo_lightning.storage.arrow_cache import find_dataset
from dpo_lightning.storage.digests import file_digest, key_digest
from dpo_lightning.storage.shared_pass import SharedPass, run_shared_pass

if TYPE_CHECKING:
    from datasets import Dataset
    from lightning.pytorch import Trainer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1  # raise it when the same key gets other replies
ATTEMPTS = 4  # at a reply other than the chosen completion
COLUMNS = pa.schema([("text", pa.string()), ("tokens", pa.list_(pa.int32()))])
MODEL_SETTINGS = ("name_or_path", "dtype", "quantization", "attn_implementation", "trust_remote_code")


class Generation(NamedTuple):
    """Which model answers, and how it is sampled. The name and the last four are arguments of `policy.load_policy`.

    `temperature` divides the logits; only the likeliest tokens that together have `top_p` of the probability are drawn.
    """

    name_or_path: str
    temperature: Annotated[float, Range("a number above 0", lambda value: 0 < value < np.inf)] = 1.0
    top_p: Annotated[float, Range("a number above 0 and at most 1", lambda value: 0 < value <= 1)] = 1.0
    max_new_tokens: int = 64
    dtype: str = "float32"
    quantization: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False


def generation_from(options: dict[str, Any] | None, max_length: int) -> Generation:
    """`data.generation` as `Generation`.

    Args:
        max_length: tokens of a prompt and completion together.

    Raises:
        UserError: an unknown setting, a value out of its range, or no model.
    """
    options = options or {}
    if unknown := sorted(set(options) - set(Generation._fields)):
        near = did_you_mean(unknown[0], Generation._fields)
        raise UserError(f"data.generation has no '{unknown[0]}': it has {', '.join(Generation._fields)}{near}")
    if not options.get("name_or_path"):
        raise UserError(
            "data.rejected is generated, but data.generation has no name_or_path: give the model that generates"
        )
    generation = Generation(**options)
    words = f"a whole number, at least 1, that leaves room for a prompt in data.max_length = {max_length}"
    room = Annotated[int, Range(words, lambda tokens: 0 < tokens < max_length - 1)]
    check_settings(Generation, generation._asdict(), "data.generation: ")
    check_setting("data.generation: max_new_tokens", generation.max_new_tokens, room)
    return generation._replace(temperature=float(generation.temperature), top_p=float(generation.top_p))


class ReplyGenerator:
    """Makes replies to the prompts of data sets.

    Replies depend on the weights, the pairs' texts, the tokenizer, the settings and the seed: all are in the key. Each
    pair has random numbers of its own, so that batches, ranks, interruptions and the order of the rows do not change
    replies, except for the odd token where rounding decides.

    Args:
        tokenizer: that of training.
        max_length: tokens of a prompt and completion together; longer prompts are cut so that the reply has room.
        seed: of the sampling.
    """

    def __init__(
        self, generation: Generation, tokenizer: "PreTrainedTokenizerBase", max_length: int, seed: int
    ) -> None:
        self.generation, self.tokenizer, self.max_length, self.seed = generation, tokenizer, max_length, seed

    def key(self, pairs: "Dataset") -> dict[str, Any]:
        """Everything that the replies to a data set (columns prompt, chosen, chat) depend on, except rounding."""
        texts = [text_keys(pairs, name) for name in ("prompt", "chosen")]
        chat = pairs.data.column("chat").to_numpy()
        return {
            "format": FORMAT,
            "weights": stored_weights(self.generation.name_or_path, self.generation.trust_remote_code),
            "pairs": hashlib.sha256(b"".join(column.tobytes() for column in (*texts, chat))).hexdigest(),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "max_length": self.max_length,
            "seed": self.seed,
            **{name: getattr(self.generation, name) for name in Generation._fields[1:6]},
        }

    def lines(self, model: "PreTrainedModel", pairs: "Dataset", positions: list[int]) -> list[dict[str, Any]]:
        """The results for the pairs at some positions, as plain JSON with each position as "pair"."""
        raise NotImplementedError

    def prompt_ids(self, columns: dict[str, list]) -> list[list[int]]:
        """Token ids of prompts (columns prompt, chat), cut so that a reply and EOS have room."""
        room = self.max_length - self.generation.max_new_tokens - 1
        return encode_prompts(self.tokenizer, columns["prompt"], room, columns["chat"])

    def answers(
        self, pairs: "Dataset", batches: Iterator[list[int]], trainer: "Trainer | None", device: torch.device
    ) -> Iterator[list[dict[str, Any]]]:
        """Loads the model and answers the pairs, a batch of positions at a time."""
        with isolate_rng():
            model = self._load()
            if trainer:
                model = trainer.precision_plugin.convert_module(model)
            if not self.generation.quantization:  # which is loaded onto it
                model = model.to(device)
            for positions in batches:
                with trainer.precision_plugin.forward_context() if trainer else nullcontext():
                    lines = self.lines(model, pairs, positions)
                yield lines
        del model
        gc.collect()  # models have reference cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self) -> "PreTrainedModel":
        settings = {name: getattr(self.generation, name) for name in MODEL_SETTINGS}
        # Quantized weights are loaded only with an adapter; a new one does not change the output.
        new_adapter = settings["quantization"] and base_model_name(settings["name_or_path"]) == settings["name_or_path"]
        return without_adapter(load_policy(**settings, lora={} if new_adapter else None))


class RejectedGenerator(ReplyGenerator):
    """Makes and finds one reply to each prompt, to be its rejected completion."""

    def find(self, pairs: "Dataset", name: str) -> "Dataset | None":
        """The replies to a data set (`COLUMNS`, a row per pair), if they are on disk."""
        found = find_dataset(key_digest(self.key(pairs)))
        return None if found is None else logged(name, *found)

    def make(self, pairs: "Dataset", name: str, batch_size: int, trainer: "Trainer | None" = None) -> "Dataset":
        """The same, made if they are not on disk. To be called on all ranks, which share the work.

        Args:
            name: of the data set, for messages.
            batch_size: prompts to answer at a time.
            trainer: its devices and precision are used; without one, this process's GPU if it has one.

        Raises:
            UserError: the model cannot be loaded, the folder cannot be written, or the ranks do not share it.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        strategy = trainer.strategy if trainer else SingleDeviceStrategy(device)
        key = self.key(pairs)

        def note(results: list[dict[str, Any]]) -> dict[str, Any]:
            counts = {name: sum(result[name] for result in results) for name in ("cut", "same")}
            return {"model": self.generation.name_or_path, "key": key} | counts

        task = SharedPass(
            fingerprint=key_digest(key),
            sizes=pc.utf8_length(pairs.data.column("prompt")).to_numpy(),
            schema=COLUMNS,
            compute=lambda batches: self.answers(pairs, batches, trainer, strategy.root_device),
            columns=lambda results: {name: [result[name] for result in results] for name in COLUMNS.names},
            note=note,
            what=f"the rejected completions of {name}",
            unknown=f"{name}: the reply to pair {{row}} was not saved: check the disk, and start the run again",
            setting="data.rejected is generated",
        )
        return logged(name, *run_shared_pass(task, batch_size, f"Rejected, {name}", strategy))

    def lines(self, model: "PreTrainedModel", pairs: "Dataset", positions: list[int]) -> list[dict[str, Any]]:
        """A reply to each pair, another one than its chosen completion if `ATTEMPTS` find one."""
        from dpo_lightning.models.generate import Reply, generate

        rows = pairs.select_columns(["prompt", "chosen", "chat"])[positions]
        texts = list(zip(rows["prompt"], rows["chosen"], strict=True))
        prompts = self.prompt_ids(rows)
        replies: dict[int, Reply] = {}
        todo = list(range(len(positions)))
        for attempt in range(ATTEMPTS):
            batch = PromptBatch(
                *(tensor.to(model.device) for tensor in collate_prompts([prompts[i] for i in todo], todo))
            )
            seeds = [draw_seed(self.seed, attempt, *texts[i]) for i in todo]
            draws = Draws(seeds, *self.generation[1:4])
            limit = self.generation.max_new_tokens
            results = generate(model, batch.input_ids, batch.attention_mask, self.tokenizer, limit, draws)
            replies |= dict(zip(todo, results, strict=True))
            todo = [i for i in todo if replies[i].text.strip() == rows["chosen"][i].strip()]
            if not todo:
                break
        lines = []
        for i, position in enumerate(positions):
            text, tokens, stopped = replies[i]
            lines.append({"pair": position, "text": text, "tokens": tokens, "cut": not stopped, "same": i in todo})
        return lines


def logged(name: str, replies: "Dataset", note: dict[str, Any]) -> "Dataset":
    """Logs what the replies to a data set are, and warns of those that equal the chosen completion."""
    key, pairs = note["key"], len(replies)
    rank_zero_info(
        f"{name}: the rejected completions of its {pairs} pairs are replies of {note['model']} (temperature "
        f"{key['temperature']}, top_p {key['top_p']}); {note['cut']} of them were cut off at "
        f"{key['max_new_tokens']} tokens"
    )
    if note["same"]:
        rank_zero_warn(
            f"{name}: {note['same']} of {pairs} pairs teach nothing but are kept: {ATTEMPTS} times the model gave the "
            "chosen completion itself"
        )
    return replies


def draw_seed(*parts: Any) -> int:
    """The seed of a reply's random numbers, from plain JSON that identifies it."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "little")


def stored_weights(name_or_path: str, trust_remote_code: bool = False) -> str:
    """Identifies a model's weights by what is stored: a digest of a folder's files and of an adapter's base; a commit.

    It is not `weights_digest`, which reads the weights of a loaded model: replies are looked up before, and mostly
    instead of, loading one. Changing it would change the keys of all cached replies.

    Raises:
        UserError: there is no such model.
    """
    base = base_model_name(name_or_path)
    if base != name_or_path:
        return _files_digest(local_path(name_or_path)) + stored_weights(base, trust_remote_code)
    if (folder := local_path(base)).is_dir():
        return _files_digest(folder)
    from transformers import AutoConfig

    from_hub_or_folder("model", base, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    return f"{base}@{hub_commit(base)}"


def _files_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".py") or path.name in ("config.json", ADAPTER_CONFIG):
            digest.update(f"{path.name} {file_digest(path)} ".encode())
    return digest.hexdigest()
