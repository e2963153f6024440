"""A training step on a GPU never waits for it, and puts nothing on another device: shown with fake tensors."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_lightning import DPOModule
from dpo_lightning.data.batching import EncodedPair, collate
from dpo_lightning.dpo.logps import Scoring, pair_logps
from dpo_lightning.dpo.metrics import PairMetrics


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(shared=False)], ids=["shared", "separate"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", ["dpop", "sft"], "kto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()  # autograd needs a real GPU
def test_a_step_on_a_gpu_waits_for_nothing(model_folder, dtype, loss_type, scoring):
    module = DPOModule(str(model_folder), loss_type=loss_type)
    rows = [EncodedPair([5, 6], [7, 8, 2], [9, 2]), EncodedPair([5], [7, 2], [2])]
    pairs = collate(rows, [0, 1], mismatch_length=9)
    config = AutoConfig.from_pretrained(model_folder)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        fields = (fake.from_tensor(value) if torch.is_tensor(value) else value for value in pairs)
        batch = pairs._make(fields).to("cuda")
        assert batch.targets.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            batch.targets[0].item()  # what would wait
        with torch.device("cuda"):
            module.policy = AutoModelForCausalLM.from_config(config)
            module.train_metrics = PairMetrics()
        module.reference = SimpleNamespace(logps=functools.partial(pair_logps, module.policy))
        strategy = SimpleNamespace(reduce=lambda value, reduce_op: value)
        module.scoring, module.trainer = scoring, SimpleNamespace(world_size=1, strategy=strategy)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = module.training_step(batch, 0)
        assert loss.device.type == "cuda"
