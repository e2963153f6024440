"""Direct Preference Optimization for causal language models, as a PyTorch Lightning module."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_lightning.data.datamodule import PreferenceDataModule
    from dpo_lightning.data.pair import PreferencePair
    from dpo_lightning.dpo.module import DPOModule

__all__ = ["DPOModule", "PreferenceDataModule", "PreferencePair"]
WHERE = {"DPOModule": "dpo.module", "PreferenceDataModule": "data.datamodule", "PreferencePair": "data.pair"}


def __getattr__(name: str) -> Any:
    # Imported when asked for: `cli.py --help` should not wait for torch.
    if name == "__version__":
        return importlib.metadata.version("dpo-lightning")  # pyproject.toml's, the only place that has it
    if name not in WHERE:
        raise AttributeError(f"module 'dpo_lightning' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dpo_lightning.{WHERE[name]}"), name)
