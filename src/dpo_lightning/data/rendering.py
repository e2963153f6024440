"""Chat template + messages -> text, in a process of its own with limits on time and memory.

A chat template is a program that may come from strangers. Jinja's sandbox keeps it from files and from Python, but not
from endless loops or from filling the memory (`10**10**10`, `'x' * 10**10`, doubling a text 40 times), and neither does
a list of forbidden operations. Ending the process does (`worker`). One process serves all templates.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dpo_lightning.errors import UserError
from dpo_lightning.worker import Worker, WorkerEnded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
SECONDS = 5  # for one conversation, which usually takes milliseconds
MEGABYTES = 512
LONGEST = 20_000_000  # characters of a rendered conversation

_WORKER = Worker("dpo_lightning.data.rendering:renderer", what="chat templates", seconds=SECONDS, megabytes=MEGABYTES)


def render_chats(
    tokenizer: "PreTrainedTokenizerBase", template: str | None, chats: Sequence[tuple[Messages, bool]]
) -> list[str]:
    """The result of `tokenizer.apply_chat_template` for each chat, within limits on time and memory.

    Args:
        template: Jinja source; None: the tokenizer's own.
        chats: messages, each with whether the text should end where a reply begins.

    Raises:
        ValueError: the template cannot be compiled or refuses the messages.
        UserError: it takes more time or memory than any conversation does.
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:  # it does not use Jinja
        render = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
        return [render(list(messages), add_generation_prompt=reply_follows) for messages, reply_follows in chats]
    if not all(messages for messages, _ in chats):
        raise ValueError("there is no message")
    shared = {"chat_template": tokenizer.get_chat_template(template), **tokenizer.special_tokens_map}
    requests = [
        {"conversations": [list(messages)], "add_generation_prompt": reply_follows, **shared}
        for messages, reply_follows in chats
    ]
    for _ in range(2):  # something else may have ended the process, such as a suspended machine
        try:
            answer = _WORKER.ask(requests)
        except WorkerEnded:
            continue
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["texts"]
    raise UserError(
        f"the chat template takes more than {_WORKER.seconds} seconds or {MEGABYTES} MiB of memory for one "
        "conversation: fix it, or take another one"
    )


def renderer() -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """What the process runs: arguments of transformers' rendering -> the texts, or an error."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return partial(_answer, render_jinja_template)


def _answer(render: Callable[..., Any], requests: list[dict[str, Any]]) -> dict[str, Any]:
    from dpo_lightning.models.hub import first_line

    texts = []
    for request in requests:
        try:
            ((text,), _) = render(**request)
        except MemoryError:
            raise
        except Exception as error:  # Jinja's, or whatever the template raises
            return {"error": first_line(error)}
        if len(text) > LONGEST:
            return {"error": f"it makes {len(text):,} characters of one conversation, more than {LONGEST:,}"}
        texts.append(text)
    return {"texts": texts}
