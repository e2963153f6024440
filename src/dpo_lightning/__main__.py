"""`python -m dpo_lightning COMMAND ...`: the same as the script `dpo-lightning`."""

import sys

from dpo_lightning.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
