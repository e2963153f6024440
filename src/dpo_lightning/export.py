"""Policy -> Hugging Face folder: safetensors weights, tokenizer, generation config; LoRA as adapter or merged."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.errors import UserError
from dpo_lightning.run_context import run_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_lightning.module import DPOModule


def export_policy(
    module: "DPOModule", tokenizer: "PreTrainedTokenizerBase", folder: str | Path, merge: bool = False
) -> None:
    """Writes the policy so that `AutoModelForCausalLM.from_pretrained(folder)` gives the same logits.

    With LoRA the folder holds the adapter (loading it needs the base model too); `merge=True` folds the adapter into
    a copy of the base model's weights and writes a complete model. The folder is written beside and then renamed, so
    that what stands there is always whole.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    policy = module.policy
    if module.hparams.lora is not None and merge:
        policy = copy.deepcopy(policy).merge_and_unload()
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with _ending_at_eos(module.causal_lm, tokenizer):
            policy.save_pretrained(partial)
            module.causal_lm.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"the model cannot be written to '{folder}': {error.strerror or error}") from error


@contextmanager
def _ending_at_eos(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """For the time of writing: a generation config with the EOS that was trained, and a pad token."""
    from transformers import GenerationConfig

    saved, pad = model.generation_config, tokenizer.pad_token_id
    eos = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos if pad is None else pad
    )
    try:
        yield
    finally:
        model.generation_config = saved


class ExportCallback(Callback):
    """Writes the final policy as a Hugging Face folder when training has ended well.

    Args:
        folder: where to; left out, `huggingface` in the run's folder.
        merge: with LoRA, write a complete model instead of the adapter.
        enabled: whether to write at all.
    """

    def __init__(self, folder: str | None = None, merge: bool = False, enabled: bool = True) -> None:
        self.folder, self.merge, self.enabled = folder, merge, enabled

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports, unless the run was a trial or was stopped."""
        run = run_folder(trainer)
        if not self.enabled or run is None or trainer.interrupted or not trainer.is_global_zero:
            return
        folder = self.folder or run / "huggingface"
        export_policy(pl_module, trainer.datamodule.tokenizer, folder, self.merge)
        rank_zero_info(f"model written to {folder}")
