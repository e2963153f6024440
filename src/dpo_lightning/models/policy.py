"""Loading the policy: without dropout, optionally with LoRA, quantized weights or gradient checkpointing."""

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

ADAPTER_CONFIG = "adapter_config.json"  # in the folder of a PEFT adapter
SIZES = {  # names in the configs of transformers, with more than any model has
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
    """Loads a causal LM to train, or a PEFT adapter of one to train further.

    Args:
        name_or_path: hub id or folder of a model, or folder of an adapter; its base model is found from its config.
        lora: arguments of `peft.LoraConfig`; the base model is then frozen and only the adapter trains.
        attn_implementation: "eager" or "sdpa"; by default what transformers chooses (sdpa if the model supports it).
        dtype: of the weights. Mixed precision needs float32 ("master") weights, whatever dtype they are stored in.
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
    """Raises UserError for an adapter on top of another one, and for training of quantized weights themselves."""
    if quantization and quantization not in QUANTIZATIONS:
        near = did_you_mean(quantization, QUANTIZATIONS)
        raise UserError(f"model.quantization '{quantization}' is unknown: one of {', '.join(QUANTIZATIONS)}{near}")
    if base != name_or_path and lora is not None:
        raise UserError(f"model.name_or_path '{name_or_path}' is itself an adapter to train: leave model.lora out")
    if quantization and base == name_or_path and lora is None:
        raise UserError(f"model.quantization: {quantization} weights cannot be trained themselves: set model.lora too")


def load_causal_lm(
    name: str, router_aux_loss_coef: float | None, trust_remote_code: bool, **options: Any
) -> "PreTrainedModel":
    """Loads a model without dropout; `options` are those of `from_pretrained`.

    Raises:
        ValueError: weights are missing, or have other sizes than in the config.
    """
    from transformers import AutoModelForCausalLM

    config = _checked_config(name, trust_remote_code)
    switch_dropout_off(config)
    set_router_loss(config, router_aux_loss_coef)
    options |= {"config": config, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(name, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # an option that our users do not have
            raise
        raise ValueError("its weights have other sizes than its config says") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}")
    return model


def base_model_name(name_or_path: str) -> str:
    """The base model of an adapter folder; any other name unchanged.

    Raises:
        UserError: the adapter's config does not name its base model.
    """
    path = local_path(name_or_path) / ADAPTER_CONFIG
    if not path.is_file():
        return name_or_path
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"'{path}' is not a PEFT config: {first_line(error)}") from error
    if not name or not isinstance(name, str):
        raise UserError(f"'{path}' does not name its base model: add it as base_model_name_or_path")
    return name


def position_count(config: "PretrainedConfig") -> int | None:
    """The number of a model's positions; None if its config does not limit them."""
    count = getattr(config.get_text_config(), "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 0 else None


def load_config(name_or_path: str, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The config of a model, or of an adapter's base model; no weights are loaded.

    Raises:
        UserError: it cannot be found, reached or read.
    """
    return from_hub_or_folder("model", base_model_name(name_or_path), lambda n: _checked_config(n, trust_remote_code))


def parameter_count(config: "PretrainedConfig") -> int:
    """The number of parameters of a model with this config, without their memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def _checked_config(name: str, trust_remote_code: bool) -> "PretrainedConfig":
    """A model's config; ValueError for impossible sizes, with which a model would be empty or exceed all memory."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    for key, most in SIZES.items():
        size = getattr(text, key, None)
        if isinstance(size, int) and not 1 <= size <= most:
            raise ValueError(f"its config has {key} {size}, which must be from 1 to {most:,}")
    return config


def tokenizer_name(name_or_path: str) -> str:
    """The name of a model's tokenizer: an adapter's folder if it has one, else the base model."""
    beside = (local_path(name_or_path) / "tokenizer_config.json").is_file()
    return name_or_path if beside else base_model_name(name_or_path)


def load_adapter(model: "PreTrainedModel", folder: str) -> "PeftModel":
    """Wraps a model with the adapter in a folder, to be trained further.

    Raises:
        UserError: the adapter does not fit the model, is damaged, or is a prompt.
    """
    from peft import PeftConfig, PeftModel

    def load(folder: str) -> PeftModel:
        config = PeftConfig.from_pretrained(folder)
        _check_no_imports(vars(config))
        if config.is_prompt_learning:  # its config could also run a tokenizer's own code
            raise UserError("it is a learned prompt, but only weights within the model can be trained here")
        config.lora_dropout = 0.0  # as in all preference training
        return PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)

    return from_hub_or_folder("adapter", folder, load)


def quantized(quantization: str) -> "BitsAndBytesConfig":
    """The settings of bitsandbytes: 8 bits (LLM.int8, Dettmers et al. 2022), or 4 bits as in QLoRA.

    QLoRA (Dettmers et al. 2023) is NormalFloat4 with quantized scales and computation in bfloat16.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization: {quantization} needs the package bitsandbytes, which is not installed: "
            "`pip install bitsandbytes`, or leave the setting out"
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def switch_dropout_off(config: "PretrainedConfig") -> None:
    """Sets every dropout probability of a config to 0, and GPT-2's GELU to a faster version.

    With dropout the policy would differ from its reference by noise alone. `gelu_pytorch_tanh` computes the same as
    `gelu_new`, in one kernel instead of five.
    """
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        if value == "gelu_new":
            setattr(config, key, "gelu_pytorch_tanh")


def add_lora(model: "PreTrainedModel", options: dict[str, Any]) -> "PeftModel":
    """Wraps a model with a LoRA adapter, on all linear layers by default; `options` are those of `peft.LoraConfig`.

    Raises:
        UserError: LoraConfig does not know or accept an option, or the adapter has dropout.
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
    except Exception as error:  # wrong options fail anywhere in peft
        raise UserError(f"model.lora: {first_line(error)}") from error


def _check_no_imports(options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that makes peft import code: options may come from a stranger's file."""
    if options.get("megatron_config"):
        raise UserError("model.lora.megatron_config makes peft import another project's code: leave it out")


def check_lora(options: dict[str, Any]) -> None:
    """Raises UserError for LoRA options with wrong names or types, which peft itself does not check."""
    from peft import LoraConfig

    from dpo_lightning.parsing import OneLineErrorParser

    parser = OneLineErrorParser()
    parser.add_class_arguments(LoraConfig, "model.lora", fail_untyped=False)
    # peft declares alpha an int, but a float works as well: it is only a factor
    scale = isinstance(options.get("lora_alpha"), float)
    typed = {name: value for name, value in options.items() if not (scale and name == "lora_alpha")}
    parser.parse_object({"model": {"lora": typed}})


def assert_no_dropout(model: nn.Module) -> None:
    """Raises UserError if a module still has dropout, as in models whose config does not name it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise UserError(
                f"the model's {name} has dropout {module.p}, which its config does not name: set it to 0 in its code"
            )


def without_adapter(policy: "PreTrainedModel | PeftModel") -> "PreTrainedModel":
    """The plain causal LM of a policy; adapters stay injected in its layers."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy
