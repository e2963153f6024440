"""Reply + the pair that it answers -> verdicts, and what becomes of them over many replies.

A judge is one function that takes a `Reply` and the `PreferencePair` it answers and returns its verdicts by name: True
or False, a number, or None where it cannot tell. Adding one is a function and a line in `JUDGES`; a user's own is a
function named in YAML (`my_pkg.my_module:my_judge`). `QUANTITIES` says what verdicts are called where people read them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from numbers import Real
from typing import Any

import torch
import torchmetrics

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.judging.sql.judge import sql
from dpo_lightning.models.generate import Reply
from dpo_lightning.parsing import imported_function

Verdict = bool | float | None
Judge = Callable[[Reply, PreferencePair], Mapping[str, Verdict]]

NGRAM = 4


def any_reply(reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
    """What any reply shows, whatever it is about: it ended by itself, its tokens, how far it repeats itself."""
    return {
        "eos_rate": reply.stopped,
        "length": len(reply.token_ids),
        "repetition": repetition(reply.token_ids),
    }


def repetition(token_ids: Sequence[int]) -> float:
    """The share of 4-grams that came before: [1, 2, 3, 4] -> 0.0, [7] * 8 -> 0.8, 0.0 below 4 tokens."""
    ngrams = [tuple(token_ids[start : start + NGRAM]) for start in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


JUDGES: dict[str, Judge] = {"sql": sql, "reply": any_reply}


def find_judges(names: str | Sequence[str]) -> dict[str, Judge]:
    """The judges of these names, and `reply`, which judges in every run, by the name that goes before their verdicts.

    Raises:
        UserError: there is none of a name, it cannot be imported, or two of them would share a name.
    """
    found: dict[str, Judge] = {}
    for name in [names] if isinstance(names, str) else names:
        if ":" not in name and name not in JUDGES:
            near = did_you_mean(name, JUDGES)
            raise UserError(
                f"replies.judge '{name}' is unknown: one of {', '.join(JUDGES)}, or my_module:my_judge{near}"
            )
        short = name.rpartition(":")[2]
        if short in found or ":" in name and short in JUDGES:
            raise UserError(f"replies.judge '{name}': there is another judge called {short}: rename the function")
        found[short] = _checked(name, imported_function(name, "replies.judge")) if ":" in name else JUDGES[name]
    return found | {"reply": any_reply}


def _checked(name: str, function: Callable[..., Any]) -> Judge:
    """A user's function, which fails in one line, and only returns what can be averaged."""

    def judge(reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
        try:
            verdicts = dict(function(reply, pair))
        except Exception as error:  # whatever a user's function does
            raise UserError(f"replies.judge '{name}' raised {type(error).__name__}: {error}") from error
        for key, verdict in verdicts.items():
            if not isinstance(key, str) or not isinstance(verdict, Real | None):
                raise UserError(
                    f"replies.judge '{name}' returned {key!r}: {verdict!r}: its verdicts are names with True, False, a "
                    "number, or None where it cannot tell"
                )
        return {
            key: verdict if isinstance(verdict, bool | None) else float(verdict) if math.isfinite(verdict) else None
            for key, verdict in verdicts.items()
        }

    return judge


def verdicts(judges: Mapping[str, Judge], reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
    """What all judges say of one reply: {"sql/valid": True, "sql/execution": None, "reply/length": 12, ...}."""
    return {f"{name}/{key}": verdict for name, judge in judges.items() for key, verdict in judge(reply, pair).items()}


class Judged(torchmetrics.Metric):
    """Means of verdicts by name, over the replies of all processes; nan where none of a name could be judged.

    Args:
        kwargs: of `torchmetrics.Metric`; `sync_on_compute=False` where all processes judge the same replies.

    Attributes:
        sums, counts: [names] float32, of the replies that could be judged.
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names: list[str] = []
        self.add_state("sums", default=torch.zeros(0), dist_reduce_fx="sum")
        self.add_state("counts", default=torch.zeros(0), dist_reduce_fx="sum")

    def update(self, judged: Sequence[Mapping[str, Verdict]]) -> None:
        """judged: the verdicts on each reply."""
        self._rename(list(dict.fromkeys(chain(self.names, *judged))))
        values = [[one[name] for one in judged if one.get(name) is not None] for name in self.names]
        self.sums += torch.tensor([float(sum(known)) for known in values], device=self.device)
        self.counts += torch.tensor([float(len(known)) for known in values], device=self.device)

    def compute(self) -> dict[str, torch.Tensor]:
        """The means, each a scalar."""
        return dict(zip(self.names, (self.sums / self.counts).unbind(), strict=True))

    def sync(self, *args: Any, should_sync: bool = True, **kwargs: Any) -> None:
        """As Metric's, which adds up states by position, once all processes have the same names in the same order."""
        if should_sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            names: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(names, self.names)
            self._rename(list(dict.fromkeys(chain(*names))))
        super().sync(*args, should_sync=should_sync, **kwargs)

    def _rename(self, names: list[str]) -> None:
        """Orders the states by `names`, which hold all of `self.names`; new ones are 0."""
        index = torch.tensor([names.index(name) for name in self.names], dtype=torch.long, device=self.device)
        for state in ("sums", "counts"):
            known = getattr(self, state)
            setattr(self, state, known.new_zeros(len(names)).index_copy(0, index, known))
        self.names = names

    def reset(self) -> None:
        """Forgets all replies."""
        super().reset()
        self.names = []
