"""The command `export`: writes a checkpoint's model as a Hugging Face folder, or as a GGUF file for Ollama."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dpo_lightning.callbacks.checkpoint_files import DATA_SETTINGS, check_checkpoint, read_checkpoint
from dpo_lightning.callbacks.export.callback import Dtype, ShardSize, export_policy, export_target
from dpo_lightning.cli.chat_prompts import assumed_prompt_format
from dpo_lightning.cli.export_gguf import FOLDER, GGUF, OutType
from dpo_lightning.cli.trainer import saved_settings
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.prompt_format import checkpoint_prompt_format
from dpo_lightning.dpo.module import NOT_SAVED, DPOModule
from dpo_lightning.errors import UserError
from dpo_lightning.parsing import OneLineErrorParser, check_settings, run_function
from dpo_lightning.storage.trust import TRUST
from dpo_lightning.visible import one_line

LOSS = ("loss_type", "loss_weights", "loss_options", "label_smoothing")


def run_export(args: Sequence[str]) -> None:
    """Runs `export` with its arguments, the command's name first; `--ollama` may stand without a value."""
    after = [*args[1:], ""]
    bare = [arg == "--ollama" and value not in ("true", "false") for arg, value in zip(args, after, strict=True)]
    run_function(export, [f"{arg}=true" if is_bare else arg for arg, is_bare in zip(args, bare, strict=True)])


def export(
    ckpt_path: str,
    output_dir: str,
    merge: bool = False,
    dtype: Dtype | None = None,
    max_shard_size: ShardSize = "5GB",
    trust_remote_code: bool = False,
    format: Literal["huggingface", "gguf"] = "huggingface",
    outtype: OutType | None = None,
    ollama: bool = False,
    converter: str | None = None,
    pre_tokenizer: str | None = None,
) -> None:
    """Writes the model of a checkpoint as a Hugging Face folder or a GGUF file.

    Args:
        ckpt_path: a checkpoint written by `fit`.
        output_dir: folder to write; an existing one is replaced only if a previous export wrote all its content.
        merge: with LoRA, write a complete model instead of the adapter.
        dtype: of the written weights (float32, bfloat16, float16); by default the one in training.
        max_shard_size: largest size of a weights file; larger ones are split.
        trust_remote_code: run the Python code of the hub model that the checkpoint names.
        format: huggingface, or gguf for llama.cpp, Ollama and LM Studio; LoRA is then always merged.
        outtype: of the GGUF file's weights (f16, q8_0, bf16, f32); by default f16.
        ollama: write a Modelfile beside the GGUF file.
        converter: llama.cpp's convert_hf_to_gguf.py, or its folder; by default that of the extra `gguf`.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text, for vocabularies that it does not know.
    """
    check_settings(export, locals(), "--")
    gguf = GGUF.checked(format == "gguf", outtype, ollama, converter, pre_tokenizer)
    check_checkpoint(ckpt_path)
    checkpoint = read_checkpoint(ckpt_path, mmap=True)
    if "state_dict" not in checkpoint:
        raise UserError(
            f"--ckpt_path '{ckpt_path}' is a sharded checkpoint, but `export` reads a single file: convert it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {ckpt_path}`"
        )
    if not checkpoint["global_step"]:
        raise UserError(f"--ckpt_path '{ckpt_path}' has 0 optimizer steps: nothing was trained, so no model is written")
    module = _module(_model_settings(checkpoint, ckpt_path), trust_remote_code)
    target = export_target(module, output_dir, [Path(ckpt_path).parent])
    target.check()  # before the model is loaded
    data_settings = checkpoint.get(DATA_SETTINGS, {})
    tokenizer = data_settings.get("tokenizer")
    if not isinstance(tokenizer, str):
        raise UserError(f"--ckpt_path '{ckpt_path}' does not name its tokenizer, so no model can be exported from it")
    data = PreferenceDataModule(tokenizer, trust_remote_code=trust_remote_code)
    module.load_state_dict(checkpoint["state_dict"])
    if prompt_format := checkpoint_prompt_format(checkpoint, ckpt_path):
        prompt_format.apply_to(data.tokenizer)
    if gguf is None:
        export_policy(module, data.tokenizer, target, merge, dtype, max_shard_size, data_settings, prompt_format)
        print(one_line(f"model written to {output_dir}"))
        return
    prompt_format = prompt_format or assumed_prompt_format(data.tokenizer)
    with target.writing() as partial:
        export_policy(module, data.tokenizer, partial / FOLDER, True, dtype, "5GB", data_settings, prompt_format)
        gguf.write(partial, module, prompt_format, Path(ckpt_path).parent.parent / "replies.jsonl")
    print(one_line(f"model written to {output_dir}"))


def _module(settings: dict[str, Any], trust_remote_code: bool) -> DPOModule:
    """A module with a checkpoint's settings, before its weights are loaded."""
    loss = {name: settings.pop(name) for name in LOSS}  # not used here, and it can be a function of the user's own
    module = DPOModule(**settings, trust_remote_code=trust_remote_code)
    module.hparams.update(loss)  # for the model card
    return module


def _model_settings(checkpoint: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A checkpoint's settings with types checked as on the command line, without the reference, which is not used."""
    parser = OneLineErrorParser()
    parser.add_class_arguments(DPOModule, "model", skip=set(NOT_SAVED))
    try:
        settings = parser.parse_object({"model": saved_settings(checkpoint, path)}).model.as_dict()
    except UserError as error:
        raise UserError(f"--ckpt_path '{path}' has a setting that does not fit: {error}") from error
    return {name: value for name, value in settings.items() if name not in (TRUST, "reference")}
