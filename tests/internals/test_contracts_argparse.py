"""What `internals/argparse.py` uses is as it was in the version of jsonargparse that is installed."""

from contracts import contract
from lightning.pytorch.cli import LightningArgumentParser

from dpo_lightning.internals.argparse import option_names


def test_option_names():
    with contract("jsonargparse", "the parser's _actions", '"did you mean" for a setting that there is not'):
        fit, parser = LightningArgumentParser(), LightningArgumentParser()
        fit.add_argument("--model.beta", type=float)
        parser.add_subcommands().add_subcommand("fit", fit)
        parser.add_argument("--config2")
        assert {"config2", "model.beta"} <= set(option_names(parser))
