"""What `internals/argparse.py` uses is as it was in the version of jsonargparse that is installed."""

from typing import Annotated

from contracts import contract
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from dpo_lightning.internals.argparse import PlainTypes, arrange_help, option_names
from dpo_lightning.parsing import Range

ABOVE_0 = Annotated[float, Range("in [0, 1]", lambda value: 0 <= value <= 1)]


def test_option_names():
    with contract("jsonargparse", "the parser's _actions", '"did you mean" for a setting that there is not'):
        fit, parser = LightningArgumentParser(), LightningArgumentParser()
        fit.add_argument("--model.beta", type=float)
        parser.add_subcommands().add_subcommand("fit", fit)
        parser.add_argument("--config2")
        assert {"config2", "model.beta"} <= set(option_names(parser))


def test_arrange_help():
    with contract("jsonargparse", "the parser's groups", "the order of the sections in `fit --help`"):
        parser = ArgumentParser()
        for section in ("trainer", "model"):
            group = parser.add_argument_group(f"Class {section}")
            group.add_argument(f"--{section}.one", type=int)
            group.add_argument(f"--{section}.two", type=int)
        parser.link_arguments("trainer.one", "model.one")
        arrange_help(parser, {"model": "ours", "trainer": "Lightning's"})
        shown = parser.format_help()
        assert shown.index("options:") < shown.index("ours:") < shown.index("Lightning's:")
        assert "-->" not in shown and "Class" not in shown


def test_plain_types():
    with contract("jsonargparse", "the formatter's _get_type_str", "types in `--help` that can be read"):
        parser = ArgumentParser(formatter_class=PlainTypes)
        parser.add_argument("--share", type=ABOVE_0 | None)
        shown = " ".join(parser.format_help().split())
        assert "float, in [0, 1]" in shown and "Annotated" not in shown
