"""Messages -> PreferencePair, as a chat template renders them: the prompt up to the reply, and the replies after it.

The template is the tokenizer's own or a Jinja file. It decides what ends a reply; that token is what is trained as
the end and what replies stop at (`end_token`), so that a model never has to guess between two.
"""

import copy
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.data.pair import BadCell, PreferencePair
from dpo_lightning.data.rendering import render_chats
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import first_line, local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]
PROBE = "probe"
LARGEST_TEMPLATE = 1_000_000  # bytes


class ChatTemplate:
    """Renders conversations.

    Args:
        tokenizer: whose special tokens the template may write.
        template: a Jinja chat template; left out, the tokenizer's own.

    Raises:
        UserError: the template is not valid, or does not write what it is given.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> None:
        self.tokenizer = tokenizer
        question = [{"role": "user", "content": PROBE}]
        try:
            self.template = template or tokenizer.get_chat_template()
            replied = [*question, {"role": "assistant", "content": f"{PROBE}{PROBE}"}]
            _, whole = render_chats(tokenizer, self.template, [(question, True), (replied, False)])
        except UserError:
            raise
        except Exception as error:  # Jinja's, or whatever the template raises
            raise UserError(f"the chat template cannot be used: {first_line(error)}") from error
        _, found, self.tail = whole.rpartition(f"{PROBE}{PROBE}")
        if not found:
            raise UserError("the chat template leaves an assistant's content out, so there is nothing to train")
        special = [token for token in tokenizer.get_added_vocab() if self.tail.lstrip().startswith(token)]
        self.end_token = max(special, key=len, default=tokenizer.eos_token)  # what ends a reply

    def pair(self, prompt: Messages, chosen: Messages, rejected: Messages) -> PreferencePair:
        """A pair from the messages before the reply and from those of the two completions, either of which may be none.

        Raises:
            BadCell: the template refuses the conversation, or does not render the prompt the same with a reply.
            UserError: it takes more time or memory than any conversation does.
        """
        try:
            sides = [[*prompt, *replies] if replies else None for replies in (chosen, rejected)]
            wholes = [whole for whole in sides if whole]
            start, *texts = render_chats(
                self.tokenizer, self.template, [(prompt, True), *((whole, False) for whole in wholes)]
            )
            completions = [self._completion(start, texts.pop(0)) if whole else "" for whole in sides]
        except (BadCell, UserError):
            raise
        except Exception as error:
            raise BadCell("chat template", "", f"the chat template refuses it: {first_line(error)}") from error
        return PreferencePair(start, completions[0], completions[1], chat=True)

    def _completion(self, start: str, whole: str) -> str:
        """What follows `start` when the replies are there, without what ends the last one."""
        if not whole.startswith(start):
            raise BadCell("chat template", "", "the chat template renders the prompt differently once it is replied to")
        completion = whole[len(start) :]
        if self.end_token not in self.tail:  # the tokenizer's EOS is to follow; only blanks are in its way
            return completion.rstrip()
        before_end = self.tail.partition(self.end_token)[0]
        if completion.endswith(self.tail):
            return completion.removesuffix(self.tail) + before_end
        return completion.rstrip().removesuffix(self.end_token)


def template_source(path: str | None, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The Jinja source of a chat template.

    Args:
        path: of a file; left out, it is the tokenizer's own template.

    Raises:
        UserError: the file cannot be read.
    """
    if path is None:
        template = tokenizer.chat_template
        return json.dumps(template) if isinstance(template, dict) else template
    file = local_path(path)
    if not file.is_file():  # a pipe or a device would be read for ever
        raise UserError(f"data.chat_template '{path}' cannot be read: there is no such file")
    if file.stat().st_size > LARGEST_TEMPLATE:
        raise UserError(f"data.chat_template '{path}' has more than {LARGEST_TEMPLATE:,} bytes: it is no template")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template '{path}' cannot be read: {error}") from error


def with_template(
    tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, source: str | None
) -> "PreTrainedTokenizerBase":
    """The tokenizer as it is trained and exported with a template.

    Its EOS is the token that ends a reply in the template: that token is trained, and replies stop at it.

    Args:
        source: the template in Jinja, where it is not the tokenizer's own.
    """
    if template.end_token != tokenizer.eos_token:
        rank_zero_info(f"replies end in {template.end_token}, as in the chat template, not in {tokenizer.eos_token}")
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = template.end_token
    if source and tokenizer.chat_template != source:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = source
    return tokenizer
