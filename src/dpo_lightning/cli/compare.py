"""The command `compare`: two models' replies to held-out prompts, judged blind by people, by a judge, or by both."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_lightning.cli.chat_prompts import load_asked, model_folder, note
from dpo_lightning.cli.label import REFERENCE
from dpo_lightning.cli.page import serve_page
from dpo_lightning.data.generated import draw_seed, stored_weights
from dpo_lightning.data.prompt_format import PromptFormat, read_prompt_format
from dpo_lightning.data.speakers import Sampling, Speaker
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import JudgeSetting, Score, find_score
from dpo_lightning.models.policy import base_model_name
from dpo_lightning.page.compare import Comparison, Replies
from dpo_lightning.page.prompts import Prompt, read_prompts
from dpo_lightning.page.work import Work
from dpo_lightning.parsing import AtLeast1, NotNegative, PositiveShare, Seed, check_settings, run_function
from dpo_lightning.storage.locks import hold, in_use, let_go
from dpo_lightning.visible import one_line

if TYPE_CHECKING:
    from dpo_lightning.page.view import View


def compare(
    model: str,
    prompts: str,
    model_b: str | None = None,
    judge: JudgeSetting | None = None,
    judge_only: bool = False,
    output: str = "comparison.jsonl",
    num_prompts: AtLeast1 | None = None,
    temperature: NotNegative = 0.0,
    top_p: PositiveShare = 1.0,
    max_new_tokens: AtLeast1 = 96,
    seed: Seed = 0,
    prompt_template: str | None = None,
    runs: str = "lightning_logs",
    host: str = "127.0.0.1",
    port: AtLeast1 = 7865,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Says how often a model's replies are better than another's: on a local page, or by a judge alone.

    Args:
        model: A, whose win rate is counted: folder of a run, folder that `fit` or `export` wrote, or a hub id.
        prompts: held-out rows as for training (a file, folder or hub id), or a .txt file with a question a line.
        model_b: B; by default, and as `reference`, the base model of an adapter.
        judge: verdicts on the replies, as `replies.judge` of a run.
        judge_only: no page: the judge compares, and the result is printed.
        output: file of the verdicts, a JSON line each; an interrupted comparison is continued.
        num_prompts: that are compared, drawn at random; by default all.
        temperature: of the sampling; 0 takes the likeliest token each time.
        top_p: only the likeliest tokens that together have this probability are drawn.
        max_new_tokens: length limit of a reply.
        seed: of the order of the prompts and of the sampling.
        prompt_template: the prompt, from {context} and {question}; by default that of the model's training.
        runs: folder of runs, for the page's list.
        host: address to serve the page at; any but this machine's own needs a token.
        port: of the page.
        token: a secret in the page's address, without which nothing is served.
        trust_remote_code: run a hub model's own Python code.
    """
    check_settings(compare, locals(), "--")
    if judge_only and judge is None:
        raise UserError("--judge_only needs --judge, such as --judge sql")
    score = find_score(judge, "--judge") if judge is not None else None
    sampling = Sampling(temperature, top_p, max_new_tokens)
    path = Path(output)
    lock = path.with_name(f".{path.name}.lock")

    def make(work: Work) -> "tuple[Comparison, list[Speaker], PromptFormat]":
        other = None if model_b == REFERENCE else model_b
        speakers, prompt_format = load_asked(model, other, prompt_template, trust_remote_code, ("--model", "--model_b"))
        if len(speakers) < 2:
            raise UserError("compare needs two models: give --model_b as well (only an adapter has a base model)")
        found, repeated = read_prompts(prompts, prompt_format, speakers[-1].tokenizer)
        if repeated:
            note(f"{repeated} rows repeat a prompt, which is asked once")
        folders = [model_folder(name, "") for name in (model, other or base_model_name(model_folder(model, "")))]
        warn_of_other_format(folders[1], prompt_format)
        settings = {"weights": [stored_weights(folder, trust_remote_code) for folder in folders], **sampling._asdict()}
        settings |= {"prompt_format": prompt_format._replace(format=None)._asdict(), "seed": seed}
        if not hold(lock):
            raise in_use(f"'{one_line(output)}'", "choose another --output")
        names = (model, other or folders[1])
        answers = answering(speakers, sampling, seed, prompt_format.chat, work)
        comparison = Comparison(names, found, answers, path, work, settings, seed, score, num_prompts)
        return comparison, speakers, prompt_format

    def views(work: Work) -> "list[View]":
        from dpo_lightning.page.runs import Runs
        from dpo_lightning.page.talk import Talk

        comparison, speakers, prompt_format = make(work)
        chat = Talk(speakers, prompt_format, work, sampling)
        return [comparison.view(), chat.view(), Runs(Path(runs)).view()]

    try:
        if judge_only:
            print_judged(make(Work())[0])
        else:
            serve_page(views, host, port, token)
    finally:
        let_go(lock, remove=True)
