"""Messages -> PreferencePair, as a chat template renders them: the prompt up to the reply, then the completions.

The template is the tokenizer's own or a Jinja file. It decides which token ends a reply (`end_token`): that one is
trained and generation stops at it, so that a model never has two to choose from.
"""

import copy
import json
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.data.pair import BadCell, PreferencePair
from dpo_lightning.data.rendering import Messages, render_chats
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import first_line, local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "probe"
LARGEST_TEMPLATE = 1_000_000  # bytes


class ChatTemplate:
    """Renders conversations.

    Args:
        tokenizer: its special tokens are known to the template.
        template: Jinja source; left out, the tokenizer's own template.

    Raises:
        UserError: the template is not valid, or leaves out the content of messages.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> None:
        self.tokenizer = tokenizer
        question = [{"role": "user", "content": PROBE}]
        try:
            self.template = template or tokenizer.get_chat_template()
            replied = [*question, {"role": "assistant", "content": f"{PROBE}{PROBE}"}]
            _, rendered = render_chats(tokenizer, self.template, [(question, True), (replied, False)])
        except UserError:
            raise
        except Exception as error:  # Jinja's, or whatever the template raises
            raise UserError(f"the chat template cannot be used: {first_line(error)}") from error
        _, content, self.tail = rendered.rpartition(f"{PROBE}{PROBE}")
        if not content:
            raise UserError("the chat template leaves an assistant's content out, so there is nothing to train")
        special = [token for token in tokenizer.get_added_vocab() if self.tail.lstrip().startswith(token)]
        self.end_token = max(special, key=len, default=tokenizer.eos_token)  # what ends a reply

    def pair(self, prompt: Messages, chosen: Messages, rejected: Messages) -> PreferencePair:
        """A pair from the messages of the prompt and of the two completions; a completion may have none.

        Raises:
            BadCell: the template refuses the conversation, or a reply changes how it renders the prompt.
            UserError: it takes more time or memory than any conversation does.
        """
        try:
            chats = [([*prompt, *replies], False) for replies in (chosen, rejected) if replies]
            start, *texts = render_chats(self.tokenizer, self.template, [(prompt, True), *chats])
            completions = [self._completion(start, texts.pop(0)) if replies else "" for replies in (chosen, rejected)]
        except (BadCell, UserError):
            raise
        except Exception as error:
            raise BadCell("chat template", "", f"the chat template refuses it: {first_line(error)}") from error
        return PreferencePair(start, completions[0], completions[1], chat=True)

    def _completion(self, start: str, rendered: str) -> str:
        """What follows `start` in a rendered conversation, without what ends its last reply."""
        if not rendered.startswith(start):
            raise BadCell("chat template", "", "the chat template renders the prompt differently once it is replied to")
        completion = rendered[len(start) :]
        if self.end_token not in self.tail:  # the tokenizer's EOS will follow
            return completion.rstrip()
        before_end = self.tail.partition(self.end_token)[0]
        if completion.endswith(self.tail):
            return completion.removesuffix(self.tail) + before_end
        return completion.rstrip().removesuffix(self.end_token)


def template_source(path: str | None, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The Jinja source of a chat template.

    Args:
        path: of a Jinja file; left out, the tokenizer's own template.

    Raises:
        UserError: the file cannot be read.
    """
    if path is None:
        template = tokenizer.chat_template
        return json.dumps(template) if isinstance(template, dict) else template
    file = local_path(path)
    if not file.is_file():  # a pipe or a device could be read forever
        raise UserError(f"data.chat_template '{path}' cannot be read: there is no such file")
    if file.stat().st_size > LARGEST_TEMPLATE:
        raise UserError(f"data.chat_template '{path}' has more than {LARGEST_TEMPLATE:,} bytes: it is not a template")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template '{path}' cannot be read: {error}") from error


def with_template(
    tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, source: str | None
) -> "PreTrainedTokenizerBase":
    """The tokenizer to train and export with a template: its EOS is the token that ends a reply in the template.

    Args:
        source: Jinja source of the template, if it is not the tokenizer's own.
    """
    if template.end_token != tokenizer.eos_token:
        rank_zero_info(f"replies end in {template.end_token}, as in the chat template, not in {tokenizer.eos_token}")
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = template.end_token
    if source and tokenizer.chat_template != source:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = source
    return tokenizer
