"""Direct Preference Optimization for causal language models, as a PyTorch Lightning module."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_lightning.callbacks.checkpoints import LastCheckpoint
    from dpo_lightning.callbacks.export.callback import ExportCallback
    from dpo_lightning.callbacks.guards import GuardsCallback
    from dpo_lightning.callbacks.replies import RepliesCallback
    from dpo_lightning.callbacks.report.callback import ReportCallback
    from dpo_lightning.data.datamodule import PreferenceDataModule
    from dpo_lightning.data.pair import PreferencePair
    from dpo_lightning.dpo.losses import Pairs
    from dpo_lightning.dpo.module import DPOModule

__all__ = [
    "DPOModule",
    "ExportCallback",
    "GuardsCallback",
    "LastCheckpoint",
    "Pairs",
    "PreferenceDataModule",
    "PreferencePair",
    "RepliesCallback",
    "ReportCallback",
]
WHERE = {
    "DPOModule": "dpo.module",
    "ExportCallback": "callbacks.export.callback",
    "GuardsCallback": "callbacks.guards",
    "LastCheckpoint": "callbacks.checkpoints",
    "Pairs": "dpo.losses",
    "PreferenceDataModule": "data.datamodule",
    "PreferencePair": "data.pair",
    "RepliesCallback": "callbacks.replies",
    "ReportCallback": "callbacks.report.callback",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: `cli.py --help` should not wait for torch.
    if name == "__version__":
        return importlib.metadata.version("dpo-lightning")  # pyproject.toml's, the only place that has it
    if name not in WHERE:
        raise AttributeError(f"module 'dpo_lightning' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dpo_lightning.{WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
