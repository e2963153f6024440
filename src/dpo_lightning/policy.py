"""Name of a model -> the policy to train: dropout off, LoRA on request, gradient checkpointing that takes effect."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_lightning.errors import UserError
from dpo_lightning.hub import first_line, from_hub_or_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


def load_policy(
    name_or_path: str,
    lora: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> "PreTrainedModel | PeftModel":
    """Loads a causal LM to train.

    Args:
        lora: arguments of `peft.LoraConfig`; the base model is then frozen and only the adapter trains.
        attn_implementation: "eager" or "sdpa"; left out, eager on a CPU (its backward is faster for short masked
            rows) and what transformers prefers elsewhere (sdpa where the model has it).
        dtype: of the weights. Mixed precision wants float32 ("master") weights, whatever they are stored in.

    Raises:
        UserError: the model cannot be found, reached or loaded, lacks weights, or `lora` is not a valid LoraConfig.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def load(name: str) -> "PreTrainedModel":
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        switch_dropout_off(config)
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation or (None if torch.cuda.is_available() else "eager"),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}")
        return model

    model = from_hub_or_folder("model", name_or_path, load)
    if gradient_checkpointing:
        # Non-reentrant: the reentrant kind drops gradients when, as with LoRA, a block's input needs none.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model if lora is None else add_lora(model, lora)


def switch_dropout_off(config: "PretrainedConfig") -> None:
    """Sets every dropout probability of a config to 0 and merges the kernels of GPT-2's GELU.

    With dropout the policy would differ from its reference by noise alone. `gelu_pytorch_tanh` is the same function
    as `gelu_new`, in one kernel instead of five.
    """
    for key, value in config.to_dict().items():
        if ("drop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
        if value == "gelu_new":
            setattr(config, key, "gelu_pytorch_tanh")


def add_lora(model: "PreTrainedModel", options: dict[str, Any]) -> "PeftModel":
    """Wraps a model with a LoRA adapter; `options` are `peft.LoraConfig`'s, on all linear layers by default.

    Raises:
        UserError: an option that LoraConfig does not have or refuses, or dropout in the adapter.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if options.get("lora_dropout"):
        raise UserError(
            "model.lora.lora_dropout must be 0: with dropout the policy differs from its reference by noise"
        )
    # GPT-2's linear layers are Conv1D, which store their weight transposed.
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    defaults = {"task_type": TaskType.CAUSAL_LM, "target_modules": "all-linear", "fan_in_fan_out": transposed}
    try:
        return get_peft_model(model, LoraConfig(**defaults | options))
    except (TypeError, ValueError) as error:
        raise UserError(f"model.lora: {first_line(error)}") from error


def assert_no_dropout(model: nn.Module) -> None:
    """Raises UserError where a module still drops something (a model whose dropout is not in its config)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise UserError(
                f"the model's {name} has dropout {module.p} that its config does not name; set it to 0 there"
            )
