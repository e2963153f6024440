"""The command `label`: a local page in the browser, on which people say which of two replies is better."""

import getpass
import random
from collections.abc import Sequence
from typing import Any, Literal

from dpo_lightning.cli.chat_prompts import load_asked, note
from dpo_lightning.cli.page import own_output, serve_views
from dpo_lightning.data.speakers import Sampling, Speaker
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import JudgeSetting, find_score
from dpo_lightning.models.policy import without_adapter
from dpo_lightning.page.clicks import Clicks
from dpo_lightning.page.label import Labelling
from dpo_lightning.page.prompts import Prompt, read_prompts
from dpo_lightning.page.talk import Talk
from dpo_lightning.page.tasks import TaskMaker, Tasks
from dpo_lightning.page.view import View
from dpo_lightning.page.work import Work
from dpo_lightning.parsing import AtLeast1, NotNegative, PositiveShare, Seed, check_settings, run_function

REFERENCE = "reference"  # as --model_b: the base model of an adapter
AHEAD, CHOICE = 4, 16  # prompts with replies ready: to read next, or to find the greatest disagreement among


def label(
    model: str,
    prompts: str,
    model_b: str | None = None,
    output: str = "labels.jsonl",
    mode: Literal["pairs", "thumbs"] = "pairs",
    next: Literal["random", "disagree"] = "random",
    judge: JudgeSetting | None = None,
    temperature: NotNegative = 1.0,
    top_p: PositiveShare = 1.0,
    max_new_tokens: AtLeast1 = 128,
    seed: Seed = 42,
    labeller: str | None = None,
    prompt_template: str | None = None,
    trust_remote_code: bool = False,
    **page: Any,
) -> None:
    """Serves a page on this machine, on which you say which of two replies is better, and writes a data set of it.

    Args:
        model: folder of a run, folder that `fit` or `export` wrote, or a hub id.
        prompts: data set with prompts, as for `fit`, or a .txt file with a question a line.
        model_b: of the second replies; `reference` is an adapter's base model; by default both are samples of `model`.
        output: file to write, which `fit` trains on; an existing one is continued.
        mode: `pairs` to choose the better of two replies, `thumbs` to find one reply good or bad.
        next: which prompt comes next, one drawn at random or, of 16, the one on whose replies the judge's verdicts, or
            else the words, differ most.
        judge: shows its verdicts beside the replies, such as sql; see docs/judges.md.
        temperature: divides the logits; 0 for the likeliest tokens.
        top_p: only the likeliest tokens that together have this probability are drawn.
        max_new_tokens: length limit of a reply.
        seed: of the samples, of the order of the prompts, and of which reply is on which side.
        labeller: your name in the file; by default that of your account.
        prompt_template: the prompt, from {context} and {question}; by default that of the model's training or, if its
            folder does not have it, the tokenizer's chat template, else the default of training.
        trust_remote_code: run a hub model's own Python code.
        page: where the page is served; see `serve_views`.
    """
    check_settings(label, locals(), "--")
    check_arguments(mode, next, model_b, temperature)

    def make_views(work: Work) -> list[View]:
        score = None if judge is None else find_score(judge, "--judge")
        other = None if model_b == REFERENCE else model_b
        speakers, prompt_format = load_asked(model, other, prompt_template, trust_remote_code, OPTIONS)
        asked = labelled(read_prompts(prompts, prompt_format, speakers[-1].tokenizer), clicks, seed)
        sampling = Sampling(temperature, top_p, max_new_tokens)
        make = TaskMaker(named(speakers, model, model_b), sampling, seed, mode == "pairs", score, work.ending.is_set)
        tasks = Tasks(asked, make, work, CHOICE if next == "disagree" else AHEAD, next == "disagree")
        told = {"sampling": sampling._asdict(), "seed": seed, "labeller": labeller or account()}
        code = score is not None and any(one.kind.syntax for one in score.judges.values())
        labelling = Labelling(tasks, clicks, mode == "pairs", told, code)
        return [labelling.view(), Talk(speakers, prompt_format, work, sampling).view()]

    with own_output(output) as path:
        clicks = Clicks(path)
        try:
            serve_views(make_views, **page)
        except KeyboardInterrupt:  # the usual end
            note(f"{len(clicks.decided)} prompts are labelled; to train on them: fit --data.train_dataset {path}")


OPTIONS = ("--model", "--model_b")


def check_arguments(mode: str, next_: str, model_b: str | None, temperature: float) -> None:
    """Raises UserError for arguments that do not go together."""
    if mode == "thumbs" and (next_ == "disagree" or model_b):
        raise UserError("--mode thumbs shows one reply of one model: leave --model_b and --next disagree out")
    if mode == "pairs" and not temperature and not model_b:
        raise UserError("--temperature 0 makes the same reply twice: raise it, or give --model_b")


def labelled(found: tuple[list[Prompt], int], clicks: Clicks, seed: int) -> list[Prompt]:
    """The prompts that are still to be labelled, in random order; says what became of the others."""
    prompts, repeated = found
    left = [prompt for prompt in prompts if prompt.key not in clicks.decided]
    random.Random(seed).shuffle(left)
    lines = [
        (clicks.torn, f"the last line of {clicks.journal} was cut short by a kill and is removed"),
        (repeated, f"{repeated} prompts are repeated, and asked once"),
        (clicks.decided, f"{len(prompts) - len(left)} of {len(prompts)} prompts are labelled already"),
    ]
    for holds, line in lines:
        if holds:
            note(line)
    return left


def named(speakers: Sequence[Speaker], model: str, model_b: str | None) -> list[tuple[str, Speaker]]:
    """The models that reply, with their names for the file.

    Raises:
        UserError: there is no reference.
    """
    if model_b is None:
        return [(model, speakers[-1])]
    if len(speakers) == 1:
        raise UserError(f"--model_b {REFERENCE}: '{model}' is no adapter: name the model to compare with")
    other = without_adapter(speakers[0].model).name_or_path if model_b == REFERENCE else model_b
    return [(model, speakers[-1]), (other, speakers[0])]


def account() -> str:
    """The name of the user's account; "unknown" where there is none, as in some containers."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def run_label(args: Sequence[str]) -> None:
    """Runs `label` with its arguments, the command's name first."""
    run_function(label, args)
