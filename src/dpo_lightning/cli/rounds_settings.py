"""The settings of `rounds`."""

from dataclasses import dataclass

from dpo_lightning.judging.judge import JudgeSetting, find_score
from dpo_lightning.judging.verified import Chosen, Rejected, Rule
from dpo_lightning.models.vllm import installed
from dpo_lightning.parsing import AtLeast1, Count, NotNegative, Positive, PositiveShare, check_settings


@dataclass(frozen=True)
class Rounds:
    """How a model learns from its own verified mistakes.

    Args:
        folder: for everything that is made; the same command goes on with what is there.
        count: rounds of sampling, judging and training.
        sft_epochs: passes of supervised training on the data's answers before the first round; the one with the best
            held-out replies is kept. 0 for none.
        sft_learning_rate: its learning rate; left out, `model.learning_rate`.
        prompt_dataset: whose prompts the rounds answer, in place of those of the training data. Its answers are not
            needed: a row without one is learnt from where the model itself gives a right and a wrong reply.
        prompts: of these, how many are answered in a round, drawn anew for each; left out, all of them.
        samples: replies to each of them.
        temperature: divides the logits.
        top_p: only the likeliest tokens that together have this probability are drawn.
        vllm: the command of vLLM (https://docs.vllm.ai) to sample with, and more options of its `serve` if you like:
            "vllm --gpu-memory-utilization 0.8". It may be of another environment. Left out, transformers samples.
        judge: says which replies are right, as `replies.judge` does; the first of several decides.
        margin: left out, that of the judge; if it has none, a score of 1 is right and less is wrong. For a judge of
            other scores: the least difference between chosen and rejected, which then are the best and the worst reply.
        chosen: the data's answer, or where the model has given one its own right reply.
        rejected: which wrong reply: the likeliest under the model, or the most frequent.
    """

    folder: str = "rounds"
    count: AtLeast1 = 1
    sft_epochs: Count = 0
    sft_learning_rate: Positive | None = None
    prompt_dataset: str | None = None
    prompts: AtLeast1 | None = None
    samples: AtLeast1 = 4
    temperature: Positive = 1.0
    top_p: PositiveShare = 1.0
    vllm: str | None = None
    judge: JudgeSetting = "sql"
    margin: NotNegative | None = None
    chosen: Chosen = "data"
    rejected: Rejected = "likeliest"

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "rounds.")
        if self.vllm is not None:
            installed(self.vllm)
        margin = find_score(self.judge, "rounds.judge").margin
        if self.margin is None and margin:
            object.__setattr__(self, "margin", margin)  # frozen

    @property
    def rule(self) -> Rule:
        """How pairs are made."""
        return Rule(self.chosen, self.rejected, self.margin)
