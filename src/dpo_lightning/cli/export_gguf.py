"""For `export --format gguf`: a GGUF file and a Modelfile from a Hugging Face folder, and how their replies compare."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from dpo_lightning.callbacks.export.gguf import Comparison, compare, prepare
from dpo_lightning.callbacks.export.model_card import public_name
from dpo_lightning.callbacks.export.modelfile import modelfile
from dpo_lightning.data.encoding import load_tokenizer
from dpo_lightning.data.formats import quoted
from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.dpo.module import DPOModule
from dpo_lightning.errors import UserError
from dpo_lightning.models.llama_cpp import ENGINE, INSTALL, convert, converter_script
from dpo_lightning.storage.jsonl import read_lines
from dpo_lightning.visible import one_line

OutType = Literal["f16", "q8_0", "bf16", "f32"]
FOLDER = "huggingface"  # that is converted, and removed at the end
THINGS = (  # to ask about, where a run has fewer prompts
    "river poem clock planet verb bridge cloud market violin number desert king lens metal novel owl queue root sea "
    "town"
).split()


class GGUF(NamedTuple):
    """The settings of a conversion, and what does it."""

    outtype: OutType
    ollama: bool
    script: Path  # llama.cpp's converter
    engine: bool  # whether llama.cpp can run the file; else transformers does
    pre_tokenizer: str | None

    @classmethod
    def checked(
        cls, wanted: bool, outtype: OutType | None, ollama: bool, converter: str | None, pre_tokenizer: str | None
    ) -> "GGUF | None":
        """The settings, None if no GGUF file is wanted.

        Raises:
            UserError: a setting that has no effect, or a package or the converter is missing.
        """
        if not wanted:
            given = {"outtype": outtype, "ollama": ollama, "converter": converter, "pre_tokenizer": pre_tokenizer}
            if unused := next((name for name, value in given.items() if value), None):
                raise UserError(f"--{unused} has no effect without --format gguf: give that, or leave it out")
            return None
        engine = importlib.util.find_spec(ENGINE) is not None
        if not engine and importlib.util.find_spec("gguf") is None:
            raise UserError(f"nothing is installed that could load the GGUF file to compare it: {INSTALL}")
        return cls(outtype or "f16", ollama, converter_script(converter), engine, pre_tokenizer)

    def write(self, folder: Path, module: DPOModule, prompt_format: PromptFormat, replies: Path) -> None:
        """Converts the Hugging Face folder `FOLDER` in a folder, and says how the file's replies compare.

        Args:
            replies: the run's `replies.jsonl`, whose prompts are asked if it is there.
        """
        source, limit = folder / FOLDER, module.hparams.max_new_tokens
        name = public_name(module.hparams.name_or_path).rpartition("/")[2]  # of a hub id without its owner
        title = re.sub(r"[^\w.-]+", "-", name)
        file = folder / f"{title}-{self.outtype}.gguf"
        prepare(source, prompt_format)
        convert(self.script, source, file, self.outtype, title, self.pre_tokenizer)
        tokenizer = load_tokenizer(str(source))
        questions = [f"What is a {thing}?" for thing in THINGS]
        prompts = _prompts(replies) + [prompt_format.prompt(question, "", tokenizer) for question in questions]
        for line in _lines(compare(source, file, prompts, prompt_format, limit, self.engine), self.engine):
            print(one_line(line))
        if self.ollama:
            text = modelfile(file.name, prompt_format, tokenizer.eos_token, limit)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
        shutil.rmtree(source)


def _prompts(replies: Path) -> list[str]:
    """The prompts of a run's replies; none if there is no such file."""
    try:
        return list(dict.fromkeys(str(line["prompt"]) for line in read_lines(replies).objects))
    except (OSError, ValueError, KeyError):
        return []


def _lines(found: Comparison, engine: bool) -> Iterator[str]:
    """A comparison in words."""
    asked, by = len(found.prompts), "llama.cpp" if engine else "transformers' GGUF loader"
    pairs = list(zip(found.prompts, found.expected, found.replies, strict=True))
    unequal = [pair for pair in pairs if pair[1] != pair[2]]
    yield f"{asked - len(unequal)} of {asked} greedy replies by {by} are those of the Hugging Face folder"
    if unequal:
        prompt, expected, reply = map(quoted, unequal[0])
        yield f"the first that differs: to {prompt} the folder replies {expected}, the file {reply}"
    if found.same_tokens and found.by_tokens:
        alike = sum(map(str.__eq__, found.expected, found.by_tokens))
        yield (
            f"warning: the file's tokenizer splits {found.same_tokens.count(False)} of the {asked} prompts into other "
            f"tokens; given the folder's tokens, {alike} of {asked} replies are equal (see --pre_tokenizer)"
        )
    if found.templates:
        expected, prompt = map(quoted, found.templates)
        yield f"warning: the file's chat template makes the prompt {prompt}, where the folder's makes {expected}"
    if 2 * len(unequal) > asked:
        yield "warning: most replies are not those of the trained model"
