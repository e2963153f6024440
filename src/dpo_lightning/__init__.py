"""Direct Preference Optimization for causal language models, as a PyTorch Lightning module."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_lightning.data.datamodule import PreferenceDataModule
    from dpo_lightning.dpo.module import DPOModule

__all__ = ["DPOModule", "PreferenceDataModule"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `cli.py --help` should not wait for torch.
    if name == "PreferenceDataModule":
        from dpo_lightning.data.datamodule import PreferenceDataModule

        return PreferenceDataModule
    if name == "DPOModule":
        from dpo_lightning.dpo.module import DPOModule

        return DPOModule
    raise AttributeError(f"module 'dpo_lightning' has no attribute '{name}'")
