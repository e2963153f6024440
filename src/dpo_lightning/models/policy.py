"""Name of a model -> the policy to train: dropout off, LoRA on request, gradient checkpointing that takes effect."""

import importlib.util
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.models.hub import first_line, from_hub_or_folder, local_path
from dpo_lightning.models.routing import set_router_loss

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"  # what makes a folder a PEFT adapter
SIZES = {  # names that all configs of transformers have, and the most that any model might
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "hidden_size": 10_000_000,
    "vocab_size": 100_000_000,
}
QUANTIZATIONS = ("4bit", "8bit")


def load_policy(
    name_or_path: str,
    lora: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    quantization: str | None = None,
    router_aux_loss_coef: float | None = None,
) -> "PreTrainedModel | PeftModel":
    """Loads a causal LM to train, or a PEFT adapter of one, which then goes on training.

    Args:
        name_or_path: hub id or folder of a model, or folder of an adapter; its base model is found from its config.
        lora: arguments of `peft.LoraConfig`; the base model is then frozen and only the adapter trains.
        attn_implementation: "eager" or "sdpa"; left out, what transformers prefers (sdpa where the model has it).
        dtype: of the weights. Mixed precision wants float32 ("master") weights, whatever they are stored in.
        quantization: "4bit" or "8bit" (`quantized`) for the frozen weights under an adapter.
        router_aux_loss_coef: weight of a mixture of experts' load-balancing loss; None leaves it to the config.

    Raises:
        UserError: the model cannot be found, reached or loaded, lacks weights, or `lora` is not a valid LoraConfig.
    """
    base = base_model_name(name_or_path)
    check_trainable(name_or_path, base, lora, quantization)
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
    }
    if quantization:
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        options |= {"quantization_config": quantized(quantization), "device_map": {"": device}}
    model = from_hub_or_folder("model", base, lambda name: load_causal_lm(name, router_aux_loss_coef, **options))
    if gradient_checkpointing:
        # Non-reentrant: the reentrant kind drops gradients when, as with LoRA, a block's input needs none.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if base != name_or_path:
        return load_adapter(model, name_or_path)
    return model if lora is None else add_lora(model, lora)


def check_trainable(name_or_path: str, base: str, lora: dict[str, Any] | None, quantization: str | None) -> None:
    """Raises UserError where an adapter would lie on another one, or quantized weights would be trained themselves."""
    if quantization:
        check_quantization(quantization)
    if base != name_or_path and lora is not None:
        raise UserError(f"model.name_or_path '{name_or_path}' is an adapter that trains on: leave model.lora out")
    if quantization and base == name_or_path and lora is None:
        raise UserError(f"model.quantization: {quantization} weights cannot be trained themselves: set model.lora too")


def load_causal_lm(
    name: str, router_aux_loss_coef: float | None, trust_remote_code: bool, **options: Any
) -> "PreTrainedModel":
    """Loads a model without dropout; `options` are those of `from_pretrained`.

    Raises:
        ValueError: its weights are not all there, or not of the sizes that its config says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    check_sizes(config)
    switch_dropout_off(config)
    set_router_loss(config, router_aux_loss_coef)
    options |= {"config": config, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(name, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # an option that our user does not have
            raise
        raise ValueError("its weights are not of the sizes that its config says") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}")
    return model


def base_model_name(name_or_path: str) -> str:
    """The base model of an adapter folder; any other name as it is.

    Raises:
        UserError: the adapter's config does not say which model it belongs to.
    """
    path = local_path(name_or_path) / ADAPTER_CONFIG
    if not path.is_file():
        return name_or_path
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"'{path}' is not a PEFT config: {first_line(error)}") from error
    if not name or not isinstance(name, str):
        raise UserError(f"'{path}' does not name its model: write it there as base_model_name_or_path")
    return name


def position_count(config: "PretrainedConfig") -> int | None:
    """How many positions a model has; None where its config does not number them."""
    count = getattr(config.get_text_config(), "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 0 else None


def load_config(name_or_path: str, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The config of a model, of an adapter that of its base model; no weights are loaded.

    Raises:
        UserError: it cannot be found, reached or read.
    """
    from transformers import AutoConfig

    def load(name: str) -> "PretrainedConfig":
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        check_sizes(config)
        return config

    return from_hub_or_folder("model", base_model_name(name_or_path), load)


def check_sizes(config: "PretrainedConfig") -> None:
    """Raises ValueError where a config has sizes that no model has; some would be built, without end or of nothing."""
    text = config.get_text_config()
    for name, most in SIZES.items():
        size = getattr(text, name, None)
        if isinstance(size, int) and not 1 <= size <= most:
            raise ValueError(f"its config has {name} {size}, which must be from 1 to {most:,}")


def tokenizer_name(name_or_path: str) -> str:
    """Where a model's tokenizer is: beside an adapter only where it was saved there, else with the base model."""
    beside = (local_path(name_or_path) / "tokenizer_config.json").is_file()
    return name_or_path if beside else base_model_name(name_or_path)


def load_adapter(model: "PreTrainedModel", folder: str) -> "PeftModel":
    """Wraps a model with the adapter in a folder, which goes on training.

    Raises:
        UserError: the adapter does not fit the model, is damaged, or has dropout.
    """
    from peft import PeftConfig, PeftModel

    def load(folder: str) -> PeftModel:
        config = PeftConfig.from_pretrained(folder)
        _check_no_imports(vars(config))
        if config.is_prompt_learning:  # whose config could also have a tokenizer's own code run
            raise UserError("it is a prompt, not weights within the model, which is all that is trained here")
        config.lora_dropout = 0.0  # what it was trained with says nothing about preference training
        return PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)

    return from_hub_or_folder("adapter", folder, load)


def quantized(quantization: str) -> "BitsAndBytesConfig":
    """How bitsandbytes keeps the base model's weights: 8 bits (LLM.int8, Dettmers et al. 2022), or 4 as in QLoRA.

    QLoRA (Dettmers et al. 2023): NormalFloat4 with its scales quantized again, computed with in bfloat16.

    Raises:
        UserError: an unknown name, or bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    check_quantization(quantization)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization: {quantization} needs the package bitsandbytes, which is not installed: "
            "`pip install bitsandbytes`, or leave it out"
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_quantization(quantization: str) -> None:
    """Raises UserError where there is no quantization of that name."""
    if quantization not in QUANTIZATIONS:
        near = did_you_mean(quantization, QUANTIZATIONS)
        raise UserError(f"model.quantization '{quantization}' is unknown: one of {', '.join(QUANTIZATIONS)}{near}")


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
    _check_no_imports(options)
    check_lora(options)
    try:
        return get_peft_model(model, LoraConfig(**defaults | options))
    except Exception as error:  # options of the wrong kind fail anywhere in peft
        raise UserError(f"model.lora: {first_line(error)}") from error


def _check_no_imports(options: Mapping[str, Any]) -> None:
    """Raises UserError for what makes peft import a module that these options, which may be a stranger's, name."""
    if options.get("megatron_config"):
        raise UserError("model.lora.megatron_config makes peft import code of another project: leave it out")


def check_lora(options: dict[str, Any]) -> None:
    """Checks the names and types of LoRA options, which peft itself takes as they come.

    Raises:
        UserError: the option, what it is, and what it may be.
    """
    from peft import LoraConfig

    from dpo_lightning.parsing import OneLineErrorParser

    parser = OneLineErrorParser()
    parser.add_class_arguments(LoraConfig, "model.lora", fail_untyped=False)
    # peft says that alpha is whole, but only multiplies with it
    scale = isinstance(options.get("lora_alpha"), float)
    typed = {name: value for name, value in options.items() if not (scale and name == "lora_alpha")}
    parser.parse_object({"model": {"lora": typed}})


def assert_no_dropout(model: nn.Module) -> None:
    """Raises UserError where a module still drops something (a model whose dropout is not in its config)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise UserError(
                f"the model's {name} has dropout {module.p} that its config does not name; set it to 0 there"
            )
