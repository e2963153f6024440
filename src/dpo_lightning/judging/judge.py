"""Reply + the pair that it answers -> what is judged of it, and the shares of many."""

from collections import Counter
from collections.abc import Sequence

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.judging.reply_metrics import repetition
from dpo_lightning.judging.sql.judge import compiles, equivalent_text, same_result
from dpo_lightning.models.generate import Reply


def judge(reply: Reply, pair: PreferencePair) -> dict[str, float | None]:
    """One reply's part in the shares of `ReplyMetrics` and, where its pair has a context, of `SQLMetrics`.

    The wanted reply is the chosen completion. None: this cannot be judged (see `dpo_lightning.judging.sql.judge`).
    """
    judged: dict[str, float | None] = {
        "reply/eos_rate": float(reply.stopped),
        "reply/length": float(len(reply.token_ids)),
        "reply/repetition": repetition(reply.token_ids),
    }
    if pair.context:
        wanted = pair.chosen.strip()
        answers = {
            "sql/valid": compiles(reply.text, pair.context),
            "sql/exact": equivalent_text(reply.text, wanted),
            "sql/execution": same_result(reply.text, wanted, pair.context),
        }
        judged |= {name: None if answer is None else float(answer) for name, answer in answers.items()}
    return judged


def shares(judged: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """Means over the replies that could be judged: [{"a": 1.0}, {"a": 0.0, "b": None}] -> {"a": 0.5}."""
    values: dict[str, list[float]] = {}
    for reply in judged:
        for name, value in reply.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def counts(judged: Sequence[dict[str, float | None]]) -> dict[str, int]:
    """How many replies each of `shares` is of: [{"a": 1.0}, {"a": 0.0, "b": None}] -> {"a": 2}."""
    return dict(Counter(name for reply in judged for name, value in reply.items() if value is not None))
