"""One contender of `vs_trl.py`, in a process of its own: trains for real, but only when told to.

Each line on stdin is a number of optimizer steps to take; each is answered by one JSON line on stdout with the
seconds they took, their losses and the peak memory so far. Between two lines the process rests, so that contenders
can take turns on one machine.
"""

import functools
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dpo_lightning.models.hardware import peak_memory

if TYPE_CHECKING:
    from dpo_lightning import DPOModule

LEARNING_RATE, BETA, WARMUP_STEPS, MAX_GRAD_NORM, LOG_EVERY = 1e-5, 0.1, 5, 1.0, 10
# Of ours, TRL's is always AdamW. Adafactor keeps one moment's sums over rows and columns instead of two moments.
OPTIMIZERS = {"AdamW": None, "Adafactor": functools.partial(torch.optim.Adafactor, lr=LEARNING_RATE)}


class Gate:
    """Stops training before a step until the next command, and answers when its steps are taken."""

    def __init__(self, answers: Any, device: torch.device) -> None:
        self.answers, self.device, self.left = answers, device, 0
        self.losses: list[torch.Tensor] = []

    def before_step(self) -> None:
        """Waits for a command if none is under way; the end of stdin ends the process."""
        if self.left:
            return
        command = sys.stdin.readline()
        if not command:
            sys.stdout.flush()
            os._exit(0)
        self.left = int(command)
        self.losses = []
        self._synchronize()
        self.began = time.perf_counter()

    def after_step(self) -> None:
        """Answers after the command's last step."""
        self.left -= 1
        if self.left:
            return
        self._synchronize()
        seconds = time.perf_counter() - self.began
        answer = {
            "seconds": seconds,
            "losses": [loss.item() for loss in self.losses],
            "peak_bytes": peak_memory(self.device),
        }
        print(json.dumps(answer), file=self.answers, flush=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def fit_ours(spec: dict[str, Any], device: torch.device, callbacks: list[Any], **trainer_options: Any) -> "DPOModule":
    """Trains with dpo-lightning, its defaults but for what the comparison fixes; gives the module."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from dpo_lightning import DPOModule, PreferenceDataModule

    module = DPOModule(
        spec["model"],
        beta=BETA,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP_STEPS,
        lr_scheduler_type="constant",
        reference=spec["reference"],
        optimizer=OPTIMIZERS[spec.get("optimizer", "AdamW")],
    )
    data = PreferenceDataModule(
        spec["model"], spec["pairs"], val_size=0, test_size=0, batch_size=spec["batch_size"], shuffle=False
    )
    trainer = Trainer(
        accelerator=device.type,
        devices=1,
        precision="bf16-mixed" if spec["precision"] == "bf16" else "32-true",
        max_epochs=1,
        gradient_clip_val=MAX_GRAD_NORM,
        log_every_n_steps=LOG_EVERY,
        logger=TensorBoardLogger(spec["folder"], default_hp_metric=False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **trainer_options,
    )
    trainer.fit(module, data)
    return module


def run_ours(spec: dict[str, Any], gate: Gate) -> None:
    """dpo-lightning, step by step as the gate lets it."""
    from lightning.pytorch import Callback

    class Gated(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            gate.before_step()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            gate.losses.append(outputs["loss"].detach())
            gate.after_step()

    fit_ours(spec, gate.device, [Gated()])


def run_trl(spec: dict[str, Any], gate: Gate) -> None:
    """TRL's DPOTrainer on the same pairs in the same order."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Gated(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            gate.before_step()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            gate.after_step()

    class Recorded(DPOTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            gate.losses.append(loss.detach())
            return loss

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = DPOConfig(
        output_dir=spec["folder"],
        per_device_train_batch_size=spec["batch_size"],
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP_STEPS,
        max_grad_norm=MAX_GRAD_NORM,
        beta=BETA,
        bf16=spec["precision"] == "bf16",
        use_cpu=gate.device.type == "cpu",
        gradient_checkpointing=False,
        precompute_ref_log_probs=spec["reference"] == "cached",
        precompute_ref_batch_size=spec["batch_size"],
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        max_length=1024,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to="tensorboard",
        disable_tqdm=True,
    )
    trainer = Recorded(
        model=AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype=torch.float32, attn_implementation=spec["attn"]
        ),
        args=options,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=spec["pairs"], split="train"),
        callbacks=[Gated()],
    )
    trainer.train()


def main() -> None:
    """`contenders.py ours|trl SPEC.json`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    warnings.simplefilter("ignore")
    contender, spec_file = sys.argv[1:]
    spec = json.loads(Path(spec_file).read_text())
    run = {"ours": run_ours, "trl": run_trl}[contender]
    run(spec, Gate(answers, torch.device("cuda" if torch.cuda.is_available() else "cpu")))


if __name__ == "__main__":
    main()
