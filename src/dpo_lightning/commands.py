"""The commands themselves: `fit`, `validate`, `test`, `predict` through LightningCLI, and `download` and `export`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dpo_lightning.datamodule import PreferenceDataModule
from dpo_lightning.download import download
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation import EvaluationCallback
from dpo_lightning.export import ExportCallback, export_policy
from dpo_lightning.guards import GuardsCallback
from dpo_lightning.hub import first_line, from_hub_or_folder
from dpo_lightning.module import DPOModule
from dpo_lightning.precision import fastest_precision
from dpo_lightning.predictions import ReplyWriter
from dpo_lightning.replies import RepliesCallback
from dpo_lightning.reporting import ReportCallback
from dpo_lightning.storyboard import StoryboardCallback

CALLBACKS = (EvaluationCallback, GuardsCallback, StoryboardCallback, ReportCallback)  # those without settings


class OneLineErrorParser(LightningArgumentParser):
    """A parser whose errors are one line instead of the error and all usage."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raises UserError with the message on one line."""
        raise UserError(" ".join(message.split())) from ex


class DPOCLI(LightningCLI):
    """LightningCLI with the DPO callbacks, a precision that suits the hardware, and checked paths."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks as sections of their own, and defaults that a DPO run wants."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "step{step}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
            }
        )
        parser.add_lightning_class_args(RepliesCallback, "replies")
        parser.add_lightning_class_args(ExportCallback, "export")
        parser.add_lightning_class_args(ReplyWriter, "predictions")

    @property
    def settings(self) -> Namespace:
        """The parsed configuration, the command's own where there is one."""
        return self.config[self.subcommand] if self.subcommand else self.config

    def before_instantiate_classes(self) -> None:
        """Fills in what follows from the rest of the config: tokenizer and precision."""
        config = self.settings
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.name_or_path
        if config.trainer.precision is None:
            config.trainer.precision, why = fastest_precision(config.trainer.accelerator)
            rank_zero_info(f"precision: {config.trainer.precision} ({why}); trainer.precision chooses another")
        if self.subcommand == "fit" and not config.data.val_dataset and not config.data.val_size:
            config.checkpoint.monitor = None  # nothing to rank checkpoints by: keep the last

    def instantiate_classes(self) -> None:
        """As LightningCLI's, once the model is known to be there: a wrong name is said before data are read."""
        from transformers import AutoConfig

        model = self.settings.model
        from_hub_or_folder(
            "model", model.name_or_path, AutoConfig.from_pretrained, trust_remote_code=model.trust_remote_code
        )
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As LightningCLI's, with TensorBoard's hparams free for real metrics and refusals as UserError."""
        trainer = self._get(self.config_init, "trainer")
        if trainer.logger in (None, True):
            folder = trainer.default_root_dir or "."
            kwargs["logger"] = TensorBoardLogger(folder, name="lightning_logs", default_hp_metric=False)
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise error if isinstance(error, UserError) else UserError(f"trainer: {first_line(error)}") from error

    def _parse_ckpt_path(self) -> None:
        """As Lightning's (a checkpoint brings its model's settings along), but says so and checks that it is there."""
        command = self.config.get("subcommand")
        ckpt_path = command and self.config[command].get("ckpt_path")
        if not ckpt_path or ckpt_path in ("last", "best", "hpc"):
            return
        if not Path(ckpt_path).exists():
            raise UserError(f"--ckpt_path '{ckpt_path}': there is no such file")
        given = self.config[command].model.as_dict()
        try:
            super()._parse_ckpt_path()
        except UserError:
            raise
        except Exception as error:  # a damaged file fails anywhere in torch.load
            raise UserError(f"--ckpt_path '{ckpt_path}' is not a readable checkpoint: {first_line(error)}") from error
        loaded = self.config[command].model.as_dict()
        if changed := [f"{key} = {loaded[key]!r}" for key in loaded if loaded[key] != given.get(key)]:
            rank_zero_info(f"model settings taken from {ckpt_path}: {', '.join(changed)}")


class DownloadCLI(DPOCLI):
    """The same configuration without a Trainer command, and where to download to."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `output_dir`."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output_dir", type=str, default=".", help="folder to write into")


def configured(cli: type[DPOCLI], args: Sequence[str], run: bool) -> DPOCLI:
    """Parses a configuration and, with `run`, runs the Trainer command in it."""
    # Not as an argument: Lightning starts the processes of further devices with this process's own command line.
    sys.argv[1:] = args
    return cli(
        DPOModule,
        PreferenceDataModule,
        run=run,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        trainer_defaults={"callbacks": [callback() for callback in CALLBACKS]},
        parser_class=OneLineErrorParser,
        save_config_kwargs={"overwrite": True},
    )


def run_trainer(args: Sequence[str]) -> None:
    """`fit`, `validate`, `test`, `predict`.

    Raises:
        UserError: Lightning refuses what is asked of it, or what the package's own code raises.
    """
    try:
        configured(DPOCLI, args, run=True)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


def run_download(args: Sequence[str]) -> None:
    """`download`: the tokenizer, model and data sets that a configuration names, for use without a network."""
    config = configured(DownloadCLI, args[1:], run=False).config
    for kind, name in download(config.model.name_or_path, config.data, config.output_dir):
        print(f"{kind} written to {name}")


def run_export(args: Sequence[str]) -> None:
    """`export`: a checkpoint as a Hugging Face folder."""
    from jsonargparse import auto_cli

    auto_cli(export, args=list(args[1:]), parser_class=OneLineErrorParser, as_positional=False)


def export(ckpt_path: str, output_dir: str, merge: bool = False) -> None:
    """Writes the model of a checkpoint as a Hugging Face folder.

    Args:
        ckpt_path: a checkpoint written by `fit`.
        output_dir: folder to write.
        merge: with LoRA, write a complete model instead of the adapter.
    """
    if not Path(ckpt_path).is_file():
        raise UserError(f"--ckpt_path '{ckpt_path}': there is no such file")
    try:
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        model_settings = checkpoint[LightningModule.CHECKPOINT_HYPER_PARAMS_KEY]
        tokenizer = checkpoint[LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY]["tokenizer"]
    except Exception as error:  # a damaged or foreign file fails anywhere in torch.load
        raise UserError(
            f"--ckpt_path '{ckpt_path}' is not a checkpoint of dpo-lightning: {first_line(error)}"
        ) from error
    model_settings = {key: value for key, value in model_settings.items() if not key.startswith("_")}
    module = DPOModule(**model_settings)
    module.load_state_dict(checkpoint["state_dict"])
    data = PreferenceDataModule(tokenizer, trust_remote_code=module.hparams.trust_remote_code)
    export_policy(module, data.tokenizer, output_dir, merge)
    print(f"model written to {output_dir}")
