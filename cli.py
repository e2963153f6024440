"""Runs dpo_lightning.cli from a checkout: `python cli.py fit --config configs/gpt2.yaml`."""

import sys

from dpo_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
