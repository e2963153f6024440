"""The judges of a run, the verdict that decides whether a reply is right, and the means of all verdicts.

A setting names one or several of `kinds.JUDGES`, or functions of the user's own, with or without options:

    sql
    my_module:my_function
    {regex: {pattern: "^SELECT", name: starts}}
    [sql, {python: {function: my_module:my_function, timeout: 30}}]
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.judging.kinds import JUDGES, Verdict
from dpo_lightning.judging.quantities import QUANTITIES, UNJUDGED
from dpo_lightning.models.reply import Reply
from dpo_lightning.parsing import Positive, check_setting, check_settings
from dpo_lightning.visible import visible
from dpo_lightning.worker import Worker, WorkerError

JudgeSetting = str | dict[str, Any] | list[str | dict[str, Any]]
FAILURES = 8  # of a judge that has not judged any reply yet, after which the run ends


class Judge:
    """A judge of a run: a reply and the pair that it answers -> verdicts by name.

    A judge in a process of its own can fail on a reply: it raises an exception, or takes more time or memory than it
    may. Then `unjudged` is its one verdict, and a warning says why, once.

    Args:
        kind: in `JUDGES`.
        where: the name of the setting, for messages.
        options: of the kind; and `name`, which is in front of the verdicts (`name/verdict`), and for a judge in a
            process of its own `timeout`, in seconds for one reply, and `memory`, in GiB.

    Attributes:
        verdicts: the names of its verdicts, as far as they are known.
        decides: the verdict that means "right".
        failure: why it failed, the first time; "" if it has not.

    Raises:
        UserError: the options are wrong, or it has failed on each of the first `FAILURES` replies.
    """

    def __init__(self, kind: str, where: str, options: Mapping[str, Any]) -> None:
        self.kind, self.where = JUDGES[kind], f"{where}: {kind}"
        parameters = signature(self.kind.make).parameters
        common = ["name", "timeout", "memory"] if self.kind.contained else ["name"]
        if unknown := [option for option in options if option not in (*parameters, *common)]:
            known = [*parameters, *common]
            near = did_you_mean(unknown[0], known)
            raise UserError(f"{self.where} has no option '{unknown[0]}': it has {', '.join(known)}{near}")
        if missing := [name for name, one in parameters.items() if one.default is one.empty and name not in options]:
            raise UserError(f"{self.where} needs {missing[0]}: {{{kind}: {{{missing[0]}: ...}}}}")
        own = {name: value for name, value in options.items() if name in parameters}
        check_settings(self.kind.make, own, f"{self.where}.")
        for option, allowed in {"name": str, "timeout": Positive, "memory": Positive}.items():
            if option in options:
                check_setting(f"{self.where}.{option}", options[option], allowed)
        try:
            judge, self.decides = self.kind.make(**own)
        except ValueError as error:
            raise UserError(f"{self.where}: {error}") from error
        self.name: str = options.get("name") or (own["function"].rpartition(":")[2] if kind == "python" else kind)
        unasked = {verdict for verdict, option in self.kind.optional.items() if not own.get(option)}
        self.verdicts = [verdict for verdict in self.kind.verdicts if verdict not in unasked]
        self.margin = own.get("margin", 0.0)
        self.failure = ""
        self._failed = self._judged = 0
        if not self.kind.contained:
            self._judge = judge
            return
        self._worker = Worker(
            "dpo_lightning.judging.kinds:contained",
            (kind, own),
            what=f"{self.where} '{self.name}'",
            seconds=options.get("timeout", 10.0),
            megabytes=round(options.get("memory", 4.0) * 1024),
            stderr=None,
        )

    def __call__(self, reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
        """The verdicts on a reply."""
        if not self.kind.contained:
            return dict(self._judge(reply, pair))
        try:
            found = self._worker.ask((reply, pair))
        except WorkerError as error:
            self._fail(visible(str(error)))
            return {UNJUDGED: True}
        self._judged += 1
        return found | {UNJUDGED: found.get(UNJUDGED, False)}

    def _fail(self, why: str) -> None:
        self._failed += 1
        if not self.failure:
            self.failure = why
            rank_zero_warn(
                f"{self.where} '{self.name}' {why}: this reply gets no verdict, nor does any other on which it fails; "
                f"{self.name}/{UNJUDGED} is their share"
            )
        if self._failed == FAILURES and not self._judged:
            raise UserError(f"{self.where} '{self.name}' failed on each of the first {FAILURES} replies: it {why}")

    def failed_on_all(self) -> None:
        """Warns that it failed on all replies of a round; raises UserError if it has never judged any."""
        message = f"{self.where} '{self.name}' failed on every reply: it {self.failure}"
        if not self._judged:
            raise UserError(message)
        rank_zero_warn(message)


def find_judges(setting: JudgeSetting, where: str = "replies.judge") -> dict[str, Judge]:
    """The judges that a setting names and `reply`, which is part of every run, by name.

    Args:
        where: the name of the setting, for messages.

    Raises:
        UserError: a name is unknown, an option is wrong, a function cannot be imported, or two judges share a name.
    """
    check_setting(where, setting, JudgeSetting)
    judges: dict[str, Judge] = {}
    for kind, options in _named(setting, where):
        judge = Judge(kind, where, options)
        name = judge.name
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{judge.where}.name is {name!r}: it must be letters, digits, _ and -")
        if name in judges or name in JUDGES and name != kind:
            raise UserError(
                f"{judge.where}: there is another judge called {name}: give this one a name of its own, "
                f"{{{kind}: {{name: ..., ...}}}}"
            )
        judges[name] = judge
        if name != kind:  # two regular expressions must be told apart wherever their verdicts are
            for verdict in judge.verdicts:
                words = QUANTITIES[f"{kind}/{verdict}"]
                word = words.word and f"{words.word} ({name})"
                QUANTITIES.setdefault(f"{name}/{verdict}", words._replace(label=f"{words.label} ({name})", word=word))
    return judges | {"reply": Judge("reply", where, {})}


def _named(setting: JudgeSetting, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The kinds and options of a setting: `sql` -> ("sql", {}), {regex: x} -> ("regex", {"pattern": "x"}), ..."""
    for item in setting if isinstance(setting, list | tuple) else [setting]:
        if isinstance(item, str) and ":" in item:
            yield "python", {"function": item}
            continue
        for kind, options in item.items() if isinstance(item, Mapping) else [(item, None)]:
            if kind not in JUDGES:
                raise UserError(
                    f"{where} '{kind}' is unknown: one of {', '.join(JUDGES)}, or my_module:my_function"
                    f"{did_you_mean(kind, JUDGES)}"
                )
            if isinstance(options, str):  # its first option, on its own
                options = {next(iter(signature(JUDGES[kind].make).parameters), "options"): options}
            if not isinstance(options, Mapping | None):
                raise UserError(f"{where}: {kind} is {options!r}: it must be its options (name: value)")
            yield kind, dict(options or {})


def verdicts(judges: Mapping[str, Judge], reply: Reply, pair: PreferencePair) -> dict[str, Verdict]:
    """All judges' verdicts on one reply: {"sql/valid": True, "sql/execution": None, "reply/length": 12, ...}."""
    return {f"{name}/{key}": verdict for name, judge in judges.items() for key, verdict in judge(reply, pair).items()}


class Score:
    """Is a reply right? 1.0, 0.0, or any number of a function of the user's own: the higher, the better.

    None means that the judge cannot tell, or failed. The first judge of a setting decides.

    Attributes:
        judges: all judges of the setting.
        name: of the verdict that decides, such as "sql/execution". If a function returns a single verdict that is not
            called `score`, its name is known only after the first reply.
        margin: by how much the score of one reply must exceed another's for it to count as better.
    """

    def __init__(self, judges: Mapping[str, Judge]) -> None:
        self.judges = judges
        self._judge = next(iter(judges.values()))
        self.name, self.margin = f"{self._judge.name}/{self._judge.decides}", self._judge.margin

    def __call__(self, reply: Reply, pair: PreferencePair) -> float | None:
        """The score of a reply."""
        return self.read(verdicts({self._judge.name: self._judge}, reply, pair))

    def read(self, found: Mapping[str, Verdict]) -> float | None:
        """The score in a reply's verdicts, as `verdicts` returns them.

        Raises:
            UserError: a function returns several verdicts, none of which is called `score`.
        """
        prefix = f"{self._judge.name}/"
        own = [name for name in found if name.startswith(prefix) and name != f"{prefix}{UNJUDGED}"]
        if self.name not in own and len(own) > 1:
            raise UserError(
                f"{self._judge.where} '{self._judge.name}' returns {len(own)} verdicts, none of which is called score: "
                "call the one that means right score"
            )
        self.name = own[0] if len(own) == 1 else self.name
        verdict = found.get(self.name)
        if verdict is None and found.get(f"{prefix}exact"):
            verdict = True  # the wanted query is right also where results say nothing
        return None if verdict is None else float(verdict)


def find_score(setting: JudgeSetting, where: str = "replies.judge") -> Score:
    """What decides whether a reply is right, by a setting of judges. Raises UserError as `find_judges` does."""
    return Score(find_judges(setting, where))


class VerdictMeans:
    """Means of verdicts by name, each over the replies that had that verdict.

    Attributes:
        totals: for each name the sum of the verdicts that are not None, and how many there are.
    """

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, int]] = {}

    def update(self, judged: Iterable[Mapping[str, Verdict]]) -> None:
        """Adds the verdicts on more replies."""
        for found in judged:
            self.merge({name: (0.0, 0) if value is None else (float(value), 1) for name, value in found.items()})

    def merge(self, totals: Mapping[str, tuple[float, int]]) -> None:
        """Adds other replies' `totals`; the names may differ."""
        for name, (total, count) in totals.items():
            before, counted = self.totals.get(name, (0.0, 0))
            self.totals[name] = (before + total, counted + count)

    def gathered(self) -> "VerdictMeans":
        """The means over the replies of all processes, each of which must call this."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        processes: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(processes, self.totals)
        means = VerdictMeans()
        for totals in processes:
            means.merge(totals)
        return means

    def compute(self) -> dict[str, float]:
        """The means, nan where no reply had a verdict."""
        return {name: total / count if count else math.nan for name, (total, count) in self.totals.items()}


def check_round(judges: Mapping[str, Judge], means: VerdictMeans) -> None:
    """Checks, given the means of a round of replies, that each judge has judged any: see `Judge.failed_on_all`."""
    for name, judge in judges.items():
        failed, replies = means.totals.get(f"{name}/{UNJUDGED}", (0, 0))
        if judge.failure and failed == replies > 0:
            judge.failed_on_all()
