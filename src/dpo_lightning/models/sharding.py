"""Sharding a model's weights over ranks (FSDP2), and gathering them."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo_lightning.errors import UserError
from dpo_lightning.internals.transformers import block_classes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def check_strategy(strategy: object) -> None:
    """Refuses a `trainer.strategy` that shards weights in an unsupported way.

    Args:
        strategy: a Strategy, the name of a registered one, or a configuration's namespace with class_path.

    Raises:
        UserError: it is FSDP1 or DeepSpeed.
    """
    named = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", None)
    names = [named] if named else [kind.__name__ for kind in type(strategy).__mro__]
    if any(re.search("(^|\\.)(fsdp|deepspeed)", name, re.IGNORECASE) for name in names):
        raise UserError(
            f"trainer.strategy {names[0]} is not supported: weights are sharded with FSDP2, which is Lightning's "
            "ModelParallelStrategy; add --config configs/fsdp.yaml after your configuration"
        )


def data_parallel_mesh(mesh: "DeviceMesh") -> "DeviceMesh":
    """The part of Lightning's device mesh over which weights are sharded.

    Raises:
        UserError: the strategy splits single layers (tensor parallelism), as ModelParallelStrategy does by default.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise UserError(
            "trainer.strategy splits single layers over processes, which is not supported: set its data_parallel_size "
            "to the number of processes and its tensor_parallel_size to 1 (configs/fsdp.yaml)"
        )
    return mesh["data_parallel"]


def shard(
    model: "PreTrainedModel", mesh: "DeviceMesh", forward: Callable, product_dtype: torch.dtype | None = None
) -> None:
    """Shards a causal LM in place with `fully_shard`: each block is a unit, and the rest is another one.

    A unit's weights are gathered only while it computes.

    Args:
        forward: a function of the model that calls its parts instead of the model itself. It becomes the model's method
            `sharded_pair_logps` and is registered as a forward pass.
        product_dtype: of matrix products under autocast. The parts of a block that do nothing else are then units of
            their own, whose weights are gathered in it: the same products, with half the bytes to send, and without a
            converted copy of each weight that the backward pass would keep on every rank.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(product_dtype, torch.float32, cast_forward_inputs=False)
    blocks = block_classes(model)
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            for part in _product_parts(module) if product_dtype else ():
                fully_shard(part, mesh=mesh, mp_policy=policy)
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.sharded_pair_logps = forward.__get__(model)
    register_fsdp_forward_method(model, "sharded_pair_logps")


def _product_parts(block: nn.Module) -> list[nn.Module]:
    """The parts of a block, such as attention and MLP, whose weights are all those of linear layers.

    None smaller: an expert of a mixture may be used on one rank and not on another, which would wait for it forever.
    """
    from transformers.pytorch_utils import Conv1D

    def multiplies(part: nn.Module) -> bool:
        owners = {type(layer) for layer in part.modules() if next(layer.parameters(recurse=False), None) is not None}
        return bool(owners) and owners <= {nn.Linear, Conv1D}

    containers = (nn.Linear, Conv1D, nn.ModuleList, nn.ModuleDict)  # a layer alone is too little to send
    return [part for part in block.children() if not isinstance(part, containers) and multiplies(part)]


def is_sharded(model: nn.Module) -> bool:
    """Whether any of a model's weights are sharded."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every rank; any other unchanged. Call it on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A gathered tensor, moved to the device of another one and sharded like it."""
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


@torch.no_grad()
def gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's gathered weights by name, on the CPU; empty on all ranks but the first. Call on all ranks."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state
