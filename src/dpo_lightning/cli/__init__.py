"""The command line. `main` is the entry point; nothing heavy is imported before a command is known."""

from dpo_lightning.cli.entry import main

__all__ = ["main"]
