"""Prompts -> a model's replies and a judge's scores, as a shared pass: resumable, and divided among the ranks."""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from dpo_lightning.data.batching import PromptBatch, collate_prompts
from dpo_lightning.data.generated import Generation, ReplyGenerator, draw_seed
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import find_score, verdicts
from dpo_lightning.models.generate import generate
from dpo_lightning.models.policy import base_model_name, load_config, position_count
from dpo_lightning.models.reply import Reply
from dpo_lightning.models.sampling import Draws
from dpo_lightning.models.vllm import Sampling, Server
from dpo_lightning.storage.digests import key_digest
from dpo_lightning.storage.shared_pass import SharedPass, run_shared_pass

if TYPE_CHECKING:
    from datasets import Dataset
    from lightning.pytorch import Trainer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1  # raise it when the same key gets other results
COLUMNS = pa.schema([("line", pa.string())])  # JSON
ASKED_AT_ONCE = 128  # prompts; vLLM batches them as it likes
COMPLETE = "rounds.vllm takes complete models of 16 or 32 bits: leave out model.lora and model.quantization"


class VLLM(NamedTuple):
    """The setting `rounds.vllm`, and a folder for what vLLM prints."""

    command: str
    folder: Path


class JudgedReplies(ReplyGenerator):
    """Samples of a model for each prompt, or its greedy reply, and what a judge says of them.

    Args:
        samples: replies to each prompt; 0 is one greedy reply, with its verdicts.
        judge: as `judging.judge.find_score` takes it.
        answers: whether the data's own answers are judged as well.
        vllm: makes the samples, in place of transformers.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        seed: int,
        samples: int,
        judge: Any,
        answers: bool = False,
        vllm: VLLM | None = None,
    ) -> None:
        super().__init__(generation, tokenizer, max_length, seed)
        self.samples, self.judge, self.score = samples, judge, find_score(judge, "rounds.judge")
        self.judges_answers, self.vllm = answers, vllm

    def key(self, pairs: "Dataset") -> dict[str, Any]:
        """As of the base class, with what the scores depend on."""
        key = super().key(pairs) | {"samples": self.samples, "judge": self.judge, "judged": FORMAT}
        key |= {"answers": self.judges_answers} | ({"sampled by": "vllm"} if self.vllm else {})
        return key if self.samples else key | {"temperature": 0, "top_p": 1, "seed": 0}  # greedy

    def make(self, pairs: "Dataset", name: str, batch_size: int, trainer: "Trainer") -> list[dict[str, Any]]:
        """The judged replies of each pair, made if they are not on disk. To be called on all ranks.

        Args:
            pairs: with the columns of PreferencePair.
            name: of the progress bar.
            batch_size: replies to generate at a time.

        Raises:
            UserError: the model cannot be loaded, the folder cannot be written, or the ranks do not share it.
        """
        task = SharedPass(
            fingerprint=key_digest(self.key(pairs)),
            sizes=pc.utf8_length(pairs.data.column("prompt")).to_numpy(),
            schema=COLUMNS,
            compute=lambda batches: self.answers(pairs, batches, trainer, trainer.strategy.root_device),
            columns=lambda results: {"line": [json.dumps(result) for result in results]},
            note=lambda results: {"model": self.generation.name_or_path},
            what=f"the replies of {name}",
            unknown=f"{name}: the replies to prompt {{row}} were not saved: check the disk, and start again",
            setting="prompts are answered by the model",
        )
        results, _ = run_shared_pass(task, max(1, batch_size // max(1, self.samples)), name, trainer.strategy)
        return [json.loads(line) for line in results["line"]]

    def answers(
        self, pairs: "Dataset", batches: Iterator[list[int]], trainer: "Trainer | None", device: torch.device
    ) -> Iterator[list[dict[str, Any]]]:
        """As of the base class, or by vLLM."""
        if self.vllm is None:
            yield from super().answers(pairs, batches, trainer, device)
            return
        generation = self.generation
        length = position_count(load_config(generation.name_or_path, generation.trust_remote_code))
        length = min(self.max_length, length or self.max_length)
        sampling = Sampling(*generation[1:4], self.samples)
        # The pool ends last: once the server is gone, whatever still waits for it fails at once.
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool, self._server(self.vllm, length, trainer, device) as server:
            waiting: deque[tuple[list[int], list[PreferencePair], list[Future]]] = deque()
            for positions in batches:
                asked, prompts = self._asked(pairs, positions)
                answers = []
                for pair, prompt in zip(asked, prompts, strict=True):
                    prompt = prompt[-max(1, length - generation.max_new_tokens) :]
                    seed = draw_seed(self.seed, pair.prompt, pair.chosen)
                    answers.append(pool.submit(server.replies, prompt, self.tokenizer, seed, sampling))
                waiting.append((positions, asked, answers))
                if len(waiting) * len(positions) >= ASKED_AT_ONCE:
                    yield self._scored(*waiting.popleft())
            while waiting:
                yield self._scored(*waiting.popleft())

    def _server(self, vllm: VLLM, length: int, trainer: "Trainer | None", device: torch.device) -> Server:
        name = self.generation.name_or_path
        if self.generation.quantization or base_model_name(name) != name:
            raise UserError(COMPLETE)
        kind = str(trainer.precision).partition("-")[0] if trainer else "32"
        return Server(
            vllm.command,
            name,
            dtype={"bf16": "bfloat16", "16": "float16"}.get(kind, self.generation.dtype),
            max_length=length,
            log=vllm.folder / f"vllm{device.index or ''}.log",
            gpu=device.index if device.type == "cuda" else None,
            trust_remote_code=self.generation.trust_remote_code,
        )

    def _scored(
        self, positions: list[int], asked: list[PreferencePair], answers: "list[Future]"
    ) -> list[dict[str, Any]]:
        made = [answer for future in answers for answer in future.result()]
        return self._results(positions, asked, [reply for reply, _ in made], [logp for _, logp in made])

    def lines(self, model: "PreTrainedModel", pairs: "Dataset", positions: list[int]) -> list[dict[str, Any]]:
        """The judged replies to the pairs at some positions."""
        asked, prompts = self._asked(pairs, positions)
        batch = PromptBatch(*(tensor.to(model.device) for tensor in collate_prompts(prompts, positions)))
        draws = self._draws(asked) if self.samples else None
        count, limit = self.samples or 1, self.generation.max_new_tokens
        made = generate(model, batch.input_ids, batch.attention_mask, self.tokenizer, limit, draws, samples=count)
        return self._results(positions, asked, made, draws.logps.tolist() if draws else [0.0] * len(asked))

    def _asked(self, pairs: "Dataset", positions: list[int]) -> tuple[list[PreferencePair], list[list[int]]]:
        """The pairs at some positions, and the token ids of their prompts."""
        rows = pairs.select_columns(list(PreferencePair._fields))[positions]
        asked = [PreferencePair(*texts) for texts in zip(*(rows[c] for c in PreferencePair._fields), strict=True)]
        return asked, self.prompt_ids(rows)

    def _results(
        self, positions: list[int], asked: list[PreferencePair], made: list[Reply], logps: list[float]
    ) -> list[dict[str, Any]]:
        """Judges replies, which come prompt by prompt."""
        count = self.samples or 1
        results = []
        for number, (position, pair) in enumerate(zip(positions, asked, strict=True)):
            own = made[number * count : (number + 1) * count]
            scores = {reply.text: self.score(reply, pair) for reply in own}  # a reply is often given twice
            judged: list[dict[str, Any]] = [
                {"text": reply.text, "score": scores[reply.text], "stopped": reply.stopped, "logp": logp}
                for reply, logp in zip(own, logps[number * count :], strict=False)
            ]
            if not self.samples:
                judged[0] |= {"verdicts": verdicts(self.score.judges, own[0], pair)}
            answer = self.score(Reply(pair.chosen, [], True), pair) if self.judges_answers else None
            results.append({"pair": position, "replies": judged, "answer": answer})
        return results

    def _draws(self, asked: Sequence[PreferencePair]) -> "ScoredDraws":
        seeds = [draw_seed(self.seed, n, pair.prompt, pair.chosen) for pair in asked for n in range(self.samples)]
        return ScoredDraws(seeds, self.generation, self.tokenizer.eos_token_id)


class ScoredDraws(Draws):
    """Draws that add up the log-prob of each reply, with its EOS if it has one, under the model at temperature 1.

    Attributes:
        logps: [rows] float32, nats.
    """

    def __init__(self, seeds: Sequence[int], generation: Generation, eos: int) -> None:
        super().__init__(seeds, generation.temperature, generation.top_p, generation.max_new_tokens)
        self.logps, self.eos = torch.zeros(len(seeds), dtype=torch.float32), eos
        self._rows, self._ended = torch.arange(len(seeds)), torch.zeros(len(seeds), dtype=torch.bool)

    def keep(self, rows: Tensor) -> None:
        """As of the base class."""
        super().keep(rows)
        self._rows, self._ended = self._rows[rows.cpu()], self._ended[rows.cpu()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As of the base class."""
        drawn = super().__call__(input_ids, scores)
        tokens = drawn.argmax(dim=-1, keepdim=True)
        logps = torch.log_softmax(scores.float(), dim=-1).gather(1, tokens)[:, 0].cpu()
        self.logps[self._rows] += logps.masked_fill(self._ended, 0.0)
        self._ended |= tokens[:, 0].cpu() == self.eos
        return drawn
