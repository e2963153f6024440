"""The command `compare`: two models' replies to held-out prompts, judged blind by a person, by a judge, or by both."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from dpo_lightning.cli.chat_prompts import load_asked, model_folder, note
from dpo_lightning.cli.label import OPTIONS, REFERENCE, named
from dpo_lightning.cli.page import own_output, serve_views
from dpo_lightning.data.generated import draw_seed, stored_weights
from dpo_lightning.data.prompt_format import PromptFormat, read_prompt_format
from dpo_lightning.data.speakers import Sampling, Speaker
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import JudgeSetting, find_score
from dpo_lightning.page.compare import Comparison, Replies
from dpo_lightning.page.prompts import Prompt, read_prompts
from dpo_lightning.page.talk import Talk
from dpo_lightning.page.view import View
from dpo_lightning.page.work import Work
from dpo_lightning.parsing import AtLeast1, NotNegative, PositiveShare, Seed, check_settings, run_function


def compare(
    model: str,
    prompts: str,
    model_b: str = REFERENCE,
    judge: JudgeSetting | None = None,
    judge_only: bool = False,
    output: str = "comparison.jsonl",
    num_prompts: AtLeast1 | None = None,
    temperature: NotNegative = 0.0,
    top_p: PositiveShare = 1.0,
    max_new_tokens: AtLeast1 = 128,
    seed: Seed = 42,
    prompt_template: str | None = None,
    trust_remote_code: bool = False,
    **page: Any,
) -> None:
    """Says how often one model's replies are better than another's: by you, on a page of this machine, or by a judge.

    Args:
        model: A, whose win rate it is: folder of a run, folder that `fit` or `export` wrote, or a hub id.
        prompts: data set on which neither was trained, as for `fit`, or a .txt file with a question a line.
        model_b: B; `reference` for the base model of an adapter.
        judge: compares the same replies, such as sql; see docs/judges.md.
        judge_only: prints what the judge finds, without a page.
        output: file of all verdicts, a line each; an existing one is continued.
        num_prompts: to compare, drawn at random; by default all.
        temperature: divides the logits; 0 for the likeliest tokens.
        top_p: only the likeliest tokens that together have this probability are drawn.
        max_new_tokens: length limit of a reply.
        seed: of the order of the prompts, of which reply is on which side, and of the samples.
        prompt_template: the prompt, from {context} and {question}; by default that of the training of A.
        trust_remote_code: run a hub model's own Python code.
        page: where the page is served; see `serve_views`.
    """
    check_settings(compare, locals(), "--")
    check_arguments(judge, judge_only)
    sampling = Sampling(temperature, top_p, max_new_tokens)
    made: list[Comparison] = []

    def make_views(work: Work) -> list[View]:
        score = find_score(judge, "--judge") if judge is not None else None
        folder = model_folder(model, OPTIONS[0])
        other = None if model_b == REFERENCE else model_folder(model_b, OPTIONS[1])
        speakers, prompt_format = load_asked(folder, other, prompt_template, trust_remote_code, OPTIONS)
        names, models = zip(*named(speakers, model, model_b), strict=True)
        asked = prompts_for(prompts, prompt_format, speakers[-1], other)
        weights = [stored_weights(name, trust_remote_code) for name in (folder, other or names[1])]
        settings = {"weights": weights, **sampling._asdict(), "seed": seed}
        answer = partial(replies, models, sampling, seed, work)
        made.append(Comparison(names, asked, answer, path, work, settings, seed, score, num_prompts))
        return [made[0].view(), Talk(speakers, prompt_format, work, sampling).view()]

    with own_output(output) as path:
        try:
            if judge_only:
                make_views(Work())
                follow(made[0])
            else:
                serve_views(make_views, **page)
        except KeyboardInterrupt:
            if not made:
                raise
    for line in lines(made[0].state()):
        print(line)


def replies(models: Sequence[Speaker], sampling: Sampling, seed: int, work: Work, prompt: Prompt) -> Replies:
    """The reply of both models, each with the same random numbers."""
    pair = prompt.pair
    seeds = [draw_seed(seed, pair.prompt, pair.chosen)]
    a, b = (model.replies(pair.prompt, sampling, seeds, pair.chat, work.ending.is_set)[0] for model in models)
    return a, b


def prompts_for(name: str, prompt_format: PromptFormat, speaker: Speaker, other: str | None) -> list[Prompt]:
    """The different prompts of a data set; notes what the user should know of them.

    Args:
        other: the folder of B, unless it is a base model.
    """
    own = read_prompt_format(other) if other else None
    if own and (own.chat, own.prompt_template) != (prompt_format.chat, prompt_format.prompt_template):
        note(f"'{other}' was trained with other prompts than it is asked with here, and may answer worse to them")
    found, repeated = read_prompts(name, prompt_format, speaker.tokenizer)
    if repeated:
        note(f"{repeated} prompts are repeated, and asked once")
    return found


def check_arguments(judge: JudgeSetting | None, judge_only: bool) -> None:
    """Raises UserError for arguments that do not go together."""
    if judge_only and judge is None:
        raise UserError("--judge_only needs a judge, such as --judge sql")


def follow(comparison: Comparison) -> None:
    """Lets the judge compare, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("judging", total=len(comparison.prompts))
        for state in comparison.judge():
            progress.update(task, completed=judged(state["judge"]))


def judged(counts: dict[str, Any]) -> int:
    """How many prompts there are verdicts on."""
    return counts["wins"] + counts["losses"] + counts["ties"] + counts.get("unknown", 0)


def lines(state: dict[str, Any]) -> list[str]:
    """The result of a comparison, for the console."""
    a, b = state["names"]
    found = []
    for by, words in (("person", "by hand"), ("judge", "by the judge")):
        rate = state.get(by)
        if not rate or rate["rate"] is None:
            continue
        same = f" ({rate['same']} with the same reply)" if rate.get("same") else ""
        unknown = f", {rate['unknown']} without a verdict" if rate.get("unknown") else ""
        chance = "more than chance" if rate["decided"] else "chance alone could explain it"
        found += [
            f"{words}, {a} against {b}: {rate['wins']} won, {rate['losses']} lost, {rate['ties']} tied{same}{unknown}",
            f"    win rate {rate['rate']:.1%}, 95% interval {rate['low']:.1%} to {rate['high']:.1%}: {chance}",
            *(f"    {label}: {one} against {two}" for label, one, two in rate.get("means", ())),
        ]
    return found or [f"no verdicts in {state['file']}"]


def run_compare(args: Sequence[str]) -> None:
    """Runs `compare` with its arguments, the command's name first."""
    run_function(compare, args)
