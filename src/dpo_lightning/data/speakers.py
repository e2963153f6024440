"""Loaded models that answer prompts, for `chat` and the page of `label`."""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dpo_lightning.data.encoding import encode_prompts, load_tokenizer
from dpo_lightning.errors import UserError
from dpo_lightning.models.generate import generate, prompt_room
from dpo_lightning.models.policy import load_policy, tokenizer_name
from dpo_lightning.models.reply import Reply
from dpo_lightning.models.sampling import Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sampling(NamedTuple):
    """How replies are drawn: see `models.sampling.draw`; at temperature 0, each token is the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64


class Speaker(NamedTuple):
    """A model that replies while the context of `switch` is active."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    switch: Callable[[], AbstractContextManager] = nullcontext

    def answer(
        self, prompt: str, max_new_tokens: int, chat: bool = False, draws: Draws | None = None
    ) -> Generator[str, None, None]:
        """The pieces of a reply: see `stream`."""
        with self.switch():
            yield from stream(self.model, self.tokenizer, prompt, max_new_tokens, chat, draws)

    def replies(
        self,
        prompt: str,
        sampling: Sampling,
        seeds: Sequence[int],
        chat: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Reply]:
        """A reply for each seed, or one greedy reply at temperature 0.

        Args:
            chat: a chat template has rendered the prompt.
            stopped: asked at each token whether to end at once; what is returned then means nothing.

        Raises:
            UserError: the prompt has no tokens.
        """
        ids = _prompt_ids(self.model, self.tokenizer, prompt, sampling.max_new_tokens, chat)
        draws = Draws(seeds, *sampling) if sampling.temperature else None
        count = len(seeds) if draws else 1
        options = {"stopping_criteria": _stopping(stopped)}
        mask = torch.ones_like(ids)
        with self.switch():
            return generate(self.model, ids, mask, self.tokenizer, sampling.max_new_tokens, draws, count, **options)


def load_speakers(model: str, reference: str | None, trust_remote_code: bool) -> list[Speaker]:
    """Loads the reference, if there is one, and the policy, in this order; UserError if one cannot be loaded."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"

    def load(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        policy = load_policy(name, dtype=dtype, trust_remote_code=trust_remote_code).eval().to(device)
        return policy, load_tokenizer(tokenizer_name(name), trust_remote_code)

    policy, tokenizer = load(model)
    speakers = [Speaker("policy", policy, tokenizer)]
    if reference is not None:
        speakers.insert(0, Speaker("reference", *load(reference)))
    elif hasattr(policy, "disable_adapter"):
        speakers.insert(0, Speaker("reference", policy, tokenizer, policy.disable_adapter))
    return speakers


def stream(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    max_new_tokens: int,
    chat: bool = False,
    draws: Draws | None = None,
) -> Iterator[str]:
    """The pieces of a reply as they are generated; closing the iterator stops the generation.

    Args:
        chat: a chat template has rendered the prompt, so it has its special tokens already.
        draws: random numbers of one reply; without them it is greedy.

    Raises:
        UserError: the prompt has no tokens.
    """
    from transformers import TextIteratorStreamer

    ids = _prompt_ids(model, tokenizer, prompt, max_new_tokens, chat)
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped, errors = threading.Event(), []

    def work() -> None:
        try:
            mask, criteria = torch.ones_like(ids), _stopping(stopped.is_set)
            generate(model, ids, mask, tokenizer, max_new_tokens, draws, stopping_criteria=criteria, streamer=pieces)
        except Exception as error:  # raised again in the reader's thread
            errors.append(error)
            pieces.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from pieces
    finally:
        stopped.set()
        thread.join()
    if errors:
        raise errors[0]


def side_by_side(
    speakers: Sequence[Speaker], prompt: str, sampling: Sampling, seed: int, chat: bool = False
) -> Iterator[tuple[str, str]]:
    """The pieces of all speakers' replies with their speakers' names; closing the iterator stops all of them.

    The replies grow together, a piece of each in turn. Those of an adapter and its base model, which share their
    weights, come one after the other. Each has the same random numbers.
    """

    def answer(speaker: Speaker) -> Generator[str, None, None]:
        draws = Draws([seed], *sampling) if sampling.temperature else None
        return speaker.answer(prompt, sampling.max_new_tokens, chat, draws)

    replies = {speaker.name: answer(speaker) for speaker in speakers}
    together = len({id(speaker.model) for speaker in speakers}) == len(speakers)
    try:
        yield from _in_turn(replies) if together else _one_by_one(replies)
    finally:
        for reply in replies.values():
            reply.close()


def _in_turn(replies: Mapping[str, Iterator[str]]) -> Iterator[tuple[str, str]]:
    going = dict(replies)
    while going:
        for name, reply in list(going.items()):
            piece = next(reply, None)
            if piece is None:
                del going[name]
            else:
                yield name, piece


def _one_by_one(replies: Mapping[str, Iterator[str]]) -> Iterator[tuple[str, str]]:
    for name, reply in replies.items():
        for piece in reply:
            yield name, piece


def _prompt_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, max_new_tokens: int, chat: bool
) -> Tensor:
    """A prompt's tokens as in training, [1, T], cut from the left so that the reply has room."""
    room = prompt_room(model, max_new_tokens)
    (ids,) = encode_prompts(tokenizer, [prompt], room, [chat])
    if not ids:
        raise UserError("the prompt has no tokens, so there is nothing to answer")
    return torch.tensor([ids], device=model.device)


def _stopping(stopped: Callable[[], bool]) -> list[Callable[..., Tensor]]:
    """As a stopping criterion of transformers."""

    def stop(input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return torch.full((len(input_ids),), stopped(), device=input_ids.device)

    return [stop]
