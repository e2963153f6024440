"""How a model is to be prompted, in the languages of llama.cpp (Jinja) and Ollama (a Modelfile with a Go template).

A model that was trained on conversations keeps its chat template in the GGUF file, where llama.cpp, LM Studio and
Ollama find it; it cannot be translated to Go's language in general. A model that was trained on a prompt template gets
that template in both languages: the question is what the user says, the context is the system message.
"""

import json
import re
import string
from collections.abc import Callable

from dpo_lightning.data.prompt_format import PromptFormat

# From this version on, Ollama renders conversations by the GGUF file's own chat template.
OLLAMA = "0.30.0"
# What a Go template would run, what ends a text in a Modelfile, and characters that Ollama's parser may drop.
UNSAFE_IN_GO = re.compile(r'\{(?=\{|\Z)|"(?="")|[^ -~\n\t]')


def jinja_template(prompt_format: PromptFormat) -> str | None:
    """The chat template of a GGUF file; None: the tokenizer's own, with which the model was trained."""
    if prompt_format.chat:
        return None
    system = "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}"
    values = {"question": "{{ messages[-1]['content'] }}", "context": "{{ system }}"}
    return system + _filled(prompt_format, values, lambda text: f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}")


def go_template(prompt_format: PromptFormat) -> str | None:
    """The template in a Modelfile; None: the chat template in the GGUF file."""
    if prompt_format.chat:
        return None
    return _filled(prompt_format, {"question": "{{ .Prompt }}", "context": "{{ .System }}"}, _in_go)


def _filled(prompt_format: PromptFormat, values: dict[str, str], literal: Callable[[str], str]) -> str:
    template = "{question}" if prompt_format.prompt_template is None else prompt_format.prompt_template
    parts = string.Formatter().parse(template)
    return "".join((literal(text) if text else "") + (values[name] if name else "") for text, name, _, _ in parts)


def _in_go(text: str) -> str:
    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character not in '{"' and character.isprintable():
            return character
        return f'{{{{ "\\U{ord(character):08x}" }}}}'

    return UNSAFE_IN_GO.sub(escaped, text)


def modelfile(file: str, prompt_format: PromptFormat, end_token: str, max_new_tokens: int) -> str:
    """The text of an Ollama Modelfile: greedy replies to prompts as in training.

    Args:
        file: name of the GGUF file beside it.
        end_token: what replies end with; the GGUF file has it too.
        max_new_tokens: longest reply.
    """
    lines = ["# Written by dpo-lightning. To use it: ollama create NAME -f Modelfile, then ollama run NAME"]
    lines.append(f"FROM ./{file}")
    template = go_template(prompt_format)
    if template is None:
        lines += [
            "# No TEMPLATE: conversations are rendered by the chat template in the GGUF file.",
            f"REQUIRES {OLLAMA}",
        ]
    else:
        if prompt_format.uses_schema:
            lines.append("# The system message is the prompt's {context}: /set system CREATE TABLE ...")
        lines.append(f'TEMPLATE """{template}"""')
    if end_token.isprintable() and '"' not in end_token:
        lines.append(f'PARAMETER stop "{end_token}"')
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0", f"PARAMETER num_predict {max_new_tokens}"]
    return "\n".join(lines) + "\n"
