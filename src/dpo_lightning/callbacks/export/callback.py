"""Writes the policy as a Hugging Face folder: safetensors weights, tokenizer, generation config and model card.

LoRA is written as an adapter or merged. transformers and servers such as vLLM, SGLang and TGI load the folder.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dpo_lightning.callbacks.context import run_folder
from dpo_lightning.callbacks.export.folder import Target
from dpo_lightning.callbacks.export.model_card import model_card
from dpo_lightning.data.prompt_format import PromptFormat, prompt_format_of, write_prompt_format
from dpo_lightning.dpo.half_precision import SIXTEEN_BITS
from dpo_lightning.dpo.reference import trained_weights
from dpo_lightning.errors import UserError
from dpo_lightning.internals.lightning import attached_trainer
from dpo_lightning.models.hub import local_path
from dpo_lightning.models.policy import base_model_name
from dpo_lightning.models.sharding import gathered_state, is_sharded
from dpo_lightning.parsing import Range, check_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_lightning.dpo.module import DPOModule

Dtype = Literal["float32", "bfloat16", "float16"]
SIZE = re.compile(r"\s*[1-9]\d*\s*[KMGT]B\s*", re.IGNORECASE)
ShardSize = Annotated[str, Range("a size such as 500MB or 5GB", SIZE.fullmatch)]


def export_policy(
    module: "DPOModule",
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | Path | Target,
    merge: bool = False,
    dtype: Dtype | None = None,
    max_shard_size: ShardSize = "5GB",
    data: Mapping[str, Any] | None = None,
    prompt_format: PromptFormat | None = None,
) -> None:
    """Writes the policy so that `AutoModelForCausalLM.from_pretrained(folder)` gives the same logits.

    With LoRA the folder gets the adapter, which is loaded together with the base model; `merge=True` adds it to a copy
    of the base model's weights and writes a complete model. The folder appears only once it is complete, and replaces
    an existing one only if a previous export wrote all its content (`atomic_folder`). In a run, call this on all ranks;
    the first one writes.

    Args:
        folder: the folder to write, as an `export_target` with other folders that must not be touched.
        dtype: of the written weights; by default the one in training.
        max_shard_size: largest size of a weights file, such as "5GB"; larger ones are split.
        data: settings of the datamodule, for the model card.
        prompt_format: of the model's prompts; by default that of the module's run.

    Raises:
        UserError: the dtype or size is invalid, or the folder cannot be written or has other content.
    """
    check_settings(ExportCallback.__init__, {"dtype": dtype, "max_shard_size": max_shard_size}, "export.")
    trainer = attached_trainer(module)
    policy = gathered_policy(module, merge)
    if policy is None:
        return
    adapter = hasattr(policy, "get_base_model")
    in_training = getattr(torch, module.hparams.dtype) if module.hparams.quantization else module.policy.dtype
    wanted = getattr(torch, dtype) if dtype else policy.dtype if adapter else in_training
    if policy.dtype != wanted:
        own = policy is module.policy  # it goes on in training: only a copy may change
        policy = (copy.deepcopy(policy) if own else policy).to(wanted)
    model = policy.get_base_model() if adapter else policy
    target = folder if isinstance(folder, Target) else export_target(module, folder)
    with target.writing() as partial:
        with _ending_at_eos(model, tokenizer):
            policy.save_pretrained(partial, **({} if adapter else {"max_shard_size": max_shard_size}))
            model.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_prompt_format(partial, prompt_format := prompt_format or prompt_format_of(trainer))
        has_chat_template = bool(tokenizer.chat_template)
        card = model_card(module, data or {}, adapter, trainer, prompt_format, has_chat_template)
        (partial / "README.md").write_text(card, encoding="utf-8")


def export_target(
    module: "DPOModule", folder: str | Path, checkpoints: Sequence[Path] = (), chosen: bool = True
) -> Target:
    """A folder to export to, protected from replacing the model's own folder or those of checkpoints.

    Args:
        checkpoints: folders with checkpoints.
        chosen: whether the user named the folder.
    """
    name = module.hparams.name_or_path
    models = [path for path in map(local_path, dict.fromkeys((name, base_model_name(name)))) if path.is_dir()]
    kept = [("the model's folder", path) for path in models]
    kept += [("the checkpoints' folder", path) for path in checkpoints]
    return Target(local_path(str(folder)), tuple(kept), chosen)


def gathered_policy(module: "DPOModule", merge: bool) -> Any:
    """The policy (transformers' or peft's) with all weights, its adapter merged on request; None but on the first rank.

    A sharded policy is gathered into a newly loaded one. An adapter over quantized or 16-bit weights is merged into
    these as they were, newly loaded in float32: rounding the sum again would lose much of what was trained.
    """
    policy: Any = module.policy
    merge = merge and hasattr(policy, "get_base_model")
    rounded = merge and (module.hparams.quantization or policy.dtype in SIXTEEN_BITS)
    state, trained = None, trained_weights(policy)
    if is_sharded(policy):
        state = gathered_state(policy)
    elif rounded:
        state = {name: weight.detach().cpu() for name, weight in trained.items()}
    if module.global_rank != 0:
        return None
    if state is not None:
        policy = module.load_policy(quantization=None, **({"dtype": "float32"} if rounded else {})).cpu()
        state = {name: weight for name, weight in state.items() if not rounded or name in trained}
        policy.load_state_dict(state, strict=False)
    elif merge:
        policy = copy.deepcopy(policy)
    return policy.merge_and_unload() if merge else policy


@contextmanager
def _ending_at_eos(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Gives the model a generation config with the EOS that was trained and a pad token, during the block."""
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
    """Writes the final policy as a Hugging Face folder after a complete training.

    Args:
        folder: the folder to write; by default `huggingface` in the run's folder.
        merge: with LoRA, write a complete model instead of the adapter.
        dtype: of the written weights (float32, bfloat16, float16); by default the one in training.
        max_shard_size: largest size of a weights file, such as 5GB; larger ones are split.
        enabled: whether to write the folder.
    """

    def __init__(
        self,
        folder: str | None = None,
        merge: bool = False,
        dtype: Dtype | None = None,
        max_shard_size: ShardSize = "5GB",
        enabled: bool = True,
    ) -> None:
        check_settings(ExportCallback.__init__, locals(), "export.")
        self.folder, self.merge, self.dtype, self.max_shard_size = folder, merge, dtype, max_shard_size
        self.enabled = enabled
        self.written: Path | None = None  # the folder, once it is written

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises UserError before training, on all ranks, if the folder cannot be written or has other content."""
        target = self._target(trainer, pl_module) if stage == "fit" else None
        if target is None:
            return
        reason = None
        if trainer.is_global_zero:
            try:
                target.check()
            except UserError as error:
                reason = str(error)
        if reason := trainer.strategy.broadcast(reason):
            raise UserError(f"{reason} with export.folder, or set export.enabled: false")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the model, unless the run was a trial, was stopped, or has trained nothing."""
        target = self._target(trainer, pl_module)
        if target is None or trainer.interrupted:
            return
        if not trainer.global_step:
            rank_zero_warn(
                "no model is written, because nothing was trained: this run had 0 optimizer steps (see "
                "trainer.max_steps, trainer.max_epochs and trainer.limit_train_batches)"
            )
            return
        data = trainer.datamodule
        export_policy(pl_module, data.tokenizer, target, self.merge, self.dtype, self.max_shard_size, data.hparams)
        self.written = target.folder

    def _target(self, trainer: Trainer, module: "DPOModule") -> Target | None:
        """The folder to export to, None if there is nothing to export. Call it on all ranks."""
        run = run_folder(trainer)
        if not self.enabled or run is None:
            return None
        folders = [Path(best.dirpath) for best in trainer.checkpoint_callbacks if getattr(best, "dirpath", None)]
        if trainer.ckpt_path and "://" not in str(trainer.ckpt_path):
            folders.append(Path(trainer.ckpt_path).parent)
        folder = self.folder or run / "huggingface"
        return export_target(module, folder, [run / "checkpoints", *folders], chosen=self.folder is not None)
