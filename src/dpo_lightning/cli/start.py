"""The command `start`: from a file of rows to a chat with a model that was trained on them, with one question asked.

It looks at the rows, chooses settings (`start_rules`), measures a few steps (`probe`), shows all of that, and trains as
`fit --config` does with the settings that it writes:

    FOLDER/settings.yaml      what was chosen, for `fit --config`
    FOLDER/start.json         what it was chosen for
    FOLDER/lightning_logs/    the run

The same command goes on with what is there: with the run if it was stopped, else with the chat.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from dpo_lightning.callbacks.checkpoint_files import checkpoint_folders
from dpo_lightning.callbacks.context import run_folder
from dpo_lightning.callbacks.learning_checks import about_data
from dpo_lightning.callbacks.times import duration
from dpo_lightning.cli.chat import chat
from dpo_lightning.cli.entry import program
from dpo_lightning.cli.find import quiet
from dpo_lightning.cli.inspect import account_lines, decoded_pair
from dpo_lightning.cli.memory import Choice, bytes_of, chosen, merged
from dpo_lightning.cli.peaks import Probe
from dpo_lightning.cli.start_rules import Facts, plan, savings
from dpo_lightning.cli.trainer import run_trainer
from dpo_lightning.data.columns import context_keys, id_counts, numeric_column, thumbs
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.encoding import MAX_LENGTH
from dpo_lightning.data.formats import find_format
from dpo_lightning.data.prompt_format import read_prompt_format, resolved_template
from dpo_lightning.data.sources import Source, open_source
from dpo_lightning.errors import UserError
from dpo_lightning.models.hardware import available_memory
from dpo_lightning.models.hub import local_path, switch_offline_if_unreachable
from dpo_lightning.models.policy import load_config, parameter_count, position_count, tokenizer_name
from dpo_lightning.storage.atomic import atomic_file
from dpo_lightning.visible import one_line, visible

BASE, INSTRUCT = "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"  # by default, for plain rows and for conversations
DEMO = "dpo_lightning/demo/model"
SETTINGS, BEGUN = "settings.yaml", "start.json"
SHARE = 0.8  # of the free memory, which leaves some to other programs
SHOWN, TIMED = 3, 4  # pairs that are shown decoded; batches that are timed


def run_start(args: Sequence[str]) -> None:
    """Runs `start` with its arguments, the command's name first.

    Raises:
        UserError: the rows or the model cannot be used, or the folder was begun with others.
    """
    given = arguments(args)
    source = open_source(given.rows, "train")
    folder = Path(given.folder or f"start-{Path(given.rows).stem}")
    own = settings_of(given.settings)
    asked = {"rows": source.fingerprint, "model": given.model, "memory": given.memory, "settings": own}
    if (folder / SETTINGS).exists():
        check_begun(folder, asked)
        print(visible(f"{folder} was begun before: going on with {folder / SETTINGS}"))
    else:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"'{folder}' has other content: choose another with --folder")
        settings = prepared(given.rows, given.model, str(folder), given.memory, own)
        if not (given.yes or confirmed()):
            print("nothing was trained")
            return
        write(folder, settings, asked)
    model = trained(folder) or train(folder)
    if model is None:
        return
    again = f"{program()} chat --model {shlex.quote(str(model))}"
    if not sys.stdin.isatty():
        print(visible(f"to ask it: {again}"))
        return
    print(visible(f"\nNow ask it; later: {again}"))
    chat(str(model))


def arguments(args: Sequence[str]) -> argparse.Namespace:
    """The command line, its name first; `settings` has what is not an option of its own."""
    parser = argparse.ArgumentParser(
        f"{program()} start",
        usage="%(prog)s ROWS [--model FOLDER] [--memory 8GiB] [--yes] [--folder FOLDER] [--KEY VALUE ...]",
        description="Train a model on a file of rows, with settings that are chosen for it, and ask the model.",
        epilog="Any setting of `fit` can be given as well, such as --trainer.max_epochs 3.",
        allow_abbrev=False,
    )
    parser.add_argument("rows", help="a .jsonl, .json, .csv or .parquet file, a folder, or a data set of the hub")
    parser.add_argument("--model", help=f"a folder or a hub id; {BASE} by default, for conversations {INSTRUCT}")
    parser.add_argument("--memory", help="what the run may take, such as 8GiB; by default most of what is free")
    parser.add_argument("--yes", action="store_true", help="train without asking")
    parser.add_argument("--folder", help="for the settings and the run; by default start-NAME, from the rows' name")
    given, settings = parser.parse_known_args(args[1:])
    given.settings = settings
    return given


def settings_of(flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    """["--trainer.max_epochs", "3"] -> {"trainer": {"max_epochs": 3}}.

    Raises:
        UserError: they are not settings of a section.
    """
    settings: dict[str, dict[str, Any]] = {}
    rest = list(flags)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        section, dot, key = name.removeprefix("--").partition(".")
        if name.split("=")[0] == "--config":
            raise UserError("start chooses the settings itself: to train with a configuration, use fit --config")
        if not name.startswith("--") or not dot or not (equals or rest):
            raise UserError(f"start does not know '{name}': settings are given as --trainer.max_epochs 3")
        text = value if equals else rest.pop(0)
        try:
            settings.setdefault(section, {})[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{name} is '{text}', which is not valid YAML") from error
    return settings


# ---------------------------------------------------------------------- the plan


def prepared(
    rows: str, model: str | None, folder: str, memory: str | None, own: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Looks at the rows, chooses settings, and shows both.

    Args:
        memory: size that the run may take; None for most of what is free.
        own: settings that the user gives, which come before those that are chosen.

    Raises:
        UserError: the rows or the model cannot be used, or no settings fit.
    """
    limit = bytes_of(memory, "--memory") if memory else None
    source = open_source(rows, "train")
    format_name = find_format(source.columns, source.name, own.get("data", {}).get("format"))
    model = model or own.get("model", {}).get("name_or_path") or (INSTRUCT if conversations(source) else BASE)
    config = model_config(model)
    data = looked_at(rows, model, own.get("data", {}), position_count(config))
    facts = facts_of(data, rows, model, folder, format_name)._replace(parameters=parameter_count(config))
    settings, reasons = plan(facts, own)
    show(f"rows are read as {format_name}", *(line for a in data.accounts.values() for line in account_lines(a)))
    show(f"model: {one_line(model)}, {facts.parameters / 1e6:.4g} million parameters", *reasons)
    show(*(f"warning: {warning}" for warning in about_data(data)))
    show("\nas trained, with ⟦ ⟧ around the tokens that are learnt (chosen) or unlearnt (rejected):")
    for position in range(min(SHOWN, facts.pairs)):
        show(*decoded_pair(data, position))
    show("\na few steps are tried now, to measure time and memory")
    free = available_memory(own.get("trainer", {}).get("accelerator") or "auto")
    if limit is None and free is None:
        raise UserError("this system does not say how much memory is free: give --memory, such as --memory 8GiB")
    choice = chosen(settings, limit or int(SHARE * (free or 0)), savings(facts), TIMED)
    show(*choice.lines, time_line(choice, settings, numeric_column(data.datasets["train"], "length")))
    return merged(settings, choice.changes)


def looked_at(rows: str, model: str, own: dict[str, Any], positions: int | None) -> PreferenceDataModule:
    """The rows, all as training pairs, read and encoded as the run will do.

    Args:
        own: settings of the data that the user gives.
        positions: of the model, None if it has no limit.
    """
    settings: dict[str, Any] = {
        "max_length": min(MAX_LENGTH, positions or MAX_LENGTH),
        **{"on_bad_row": "skip", "tokenizer": tokenizer_name(model), "train_dataset": rows},
        **own,
        **{"val_size": 0, "test_size": 0},
        "prompt_template": resolved_template(own.get("prompt_template"), read_prompt_format(model), model),
    }
    data = PreferenceDataModule(**settings)
    data.generates = False
    with quiet():
        data.setup("fit")
    return data


def show(*lines: str) -> None:
    """Prints lines."""
    for line in lines:
        print(visible(line), flush=True)


def conversations(source: Source) -> bool:
    """Whether the first row has messages."""
    _, row = next(iter(source.rows(())))
    cells = row.values() if isinstance(row, Mapping) else ()
    return any(isinstance(cell, list) and cell and isinstance(cell[0], Mapping) for cell in cells)


def model_config(model: str) -> Any:
    """The config of the model to train.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return load_config(model)
    except UserError as error:
        if model not in (BASE, INSTRUCT) or local_path(model).exists() or switch_offline_if_unreachable():
            raise
        raise UserError(
            f"{model} would be trained, but it is not on this machine and the Hugging Face hub cannot be reached: "
            f"connect to a network, or give --model FOLDER; --model {DEMO}, which ships with the package, is a tiny "
            "model to try it with"
        ) from error


def facts_of(data: PreferenceDataModule, rows: str, model: str, folder: str, format_name: str) -> Facts:
    """What the rules need to know of the rows, which are set up as training pairs."""
    train = data.datasets["train"]
    good, bad = thumbs(train)
    chosen_tokens, rejected_tokens = (id_counts(train, f"{side}_ids") for side in ("chosen", "rejected"))
    path = local_path(rows)
    return Facts(
        rows=str(path.absolute()) if path.exists() else rows,
        model=str(local_path(model).absolute()) if local_path(model).exists() else model,
        folder=folder,
        format=format_name,
        pairs=len(train),
        contexts=len(np.unique(context_keys(train))),
        rejected=bool((rejected_tokens > 1).any()),  # an empty one is EOS alone
        good=good,
        bad=bad,
        longest_answers=float(np.quantile(chosen_tokens, 0.95)),
        parameters=0,
    )


def time_line(choice: Choice, settings: dict[str, Any], lengths: np.ndarray) -> str:
    """How long the run takes here."""
    final = merged(settings, choice.changes)
    trainer, data, replies = (final.get(section, {}) for section in ("trainer", "data", "replies"))
    epochs, held_out = trainer.get("max_epochs") or 1, data.get("val_size") or 0
    pairs = len(lengths) - (held_out if held_out >= 1 else held_out * len(lengths))
    per_step = data["batch_size"] * (trainer.get("accumulate_grad_batches") or 1)
    steps = epochs * pairs / per_step
    if 0 <= (most := trainer.get("max_steps", -1)) < steps:
        steps = most
    seconds = training_seconds(choice.probe, steps * per_step * lengths.mean(), steps)
    every = replies.get("every_n_steps") or 0
    showings = 2 + (int(steps / every) if every else 0)
    return f"time: about {about(seconds + showings * choice.probe.replies)}, with {showings} rounds of replies"


def about(seconds: float) -> str:
    """83 -> "1 min 20 s": no more digits than an estimate has."""
    unit = 1 if seconds < 20 else 10 if seconds < 600 else 60
    return duration(float(max(1, round(seconds / unit) * unit))).replace(".0 s", " s").replace("min 0 s", "min")


def training_seconds(probe: Probe, tokens: float, steps: float) -> float:
    """Seconds for so many tokens and optimizer steps, from medians of what was timed."""
    plain = [batch["seconds"] / batch["tokens"] for batch in probe.timed if not batch["stepped"]]
    stepped = [batch for batch in probe.timed if batch["stepped"]]
    if not plain:
        return median(batch["seconds"] / batch["tokens"] for batch in stepped) * tokens
    step = median([batch["seconds"] - median(plain) * batch["tokens"] for batch in stepped] or [0.0])
    return median(plain) * tokens + max(0.0, step) * steps


# ---------------------------------------------------------------------- the run


def confirmed() -> bool:
    """Asks whether to train.

    Raises:
        UserError: there is no terminal to ask at.
    """
    if not sys.stdin.isatty():
        raise UserError("nothing was trained, as there is no terminal to ask at: add --yes to train with this plan")
    try:
        return input("\nTrain with these settings? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def write(folder: Path, settings: dict[str, Any], asked: dict[str, Any]) -> None:
    """Writes the chosen settings, and last what they were chosen for."""
    folder.mkdir(parents=True, exist_ok=True)
    about_it = (
        f"# Written by `start`. To train with it: {program()} fit --config {shlex.quote(str(folder / SETTINGS))}\n"
    )
    texts = {BEGUN: json.dumps(asked, indent=2) + "\n"}
    texts[SETTINGS] = about_it + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    for name, text in texts.items():
        with atomic_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    show(f"settings: {folder / SETTINGS}")


def check_begun(folder: Path, asked: dict[str, Any]) -> None:
    """Raises UserError if a folder was begun with other rows or options than are given now."""
    try:
        begun = json.loads((folder / BEGUN).read_text(encoding="utf-8"))
        names = [name for name, value in asked.items() if begun[name] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{folder}' has a {SETTINGS} that start did not write: choose another with --folder"
        ) from error
    if names == ["rows"]:
        raise UserError(f"the rows have changed since '{folder}' was begun: choose another folder with --folder")
    if names:
        raise UserError(
            f"'{folder}' was begun with another {names[-1]}: give the same command as then, or another --folder"
        )


def trained(folder: Path) -> Path | None:
    """The model of the newest run in a folder, None if it is not finished."""
    runs = [checkpoints.parent / "huggingface" for checkpoints in checkpoint_folders(folder)[:1]]
    return next((model for model in runs if model.is_dir()), None)


def train(folder: Path) -> Path | None:
    """Runs `fit` from its last checkpoint, if there is one; the folder of the model."""
    resumed = ["--ckpt_path", "last"] if checkpoint_folders(folder) else []
    trainer = run_trainer(["fit", "--config", str(folder / SETTINGS), *resumed]).trainer
    run = run_folder(trainer)
    return run / "huggingface" if run and (run / "huggingface").is_dir() else None
