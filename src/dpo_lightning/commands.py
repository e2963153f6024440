"""The commands themselves: `fit`, `validate`, `test`, `predict` through LightningCLI, and `download` and `export`."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dpo_lightning.checkpoints import (
    AtomicCheckpointIO,
    LastCheckpoint,
    check_checkpoint,
    checkpoint_folders,
    damage,
    newest_first,
    newest_whole,
    read_checkpoint,
    version,
)
from dpo_lightning.datamodule import PreferenceDataModule
from dpo_lightning.download import download
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation import EvaluationCallback
from dpo_lightning.export import ExportCallback, export_policy
from dpo_lightning.generated import MODEL_SETTINGS
from dpo_lightning.guards import GuardsCallback
from dpo_lightning.hardware import fastest_precision
from dpo_lightning.hub import first_line, from_hub_or_folder
from dpo_lightning.module import DPOModule
from dpo_lightning.parsing import OneLineErrorParser, check_config_files, with_place
from dpo_lightning.policy import base_model_name, tokenizer_name
from dpo_lightning.predictions import ReplyWriter
from dpo_lightning.replies import RepliesCallback
from dpo_lightning.reporting import ReportCallback
from dpo_lightning.run_settings import check_settings, refused_folder
from dpo_lightning.stopping import StoppingCallback
from dpo_lightning.storyboard import StoryboardCallback

# Those without settings.
CALLBACKS = (EvaluationCallback, GuardsCallback, StoryboardCallback, ReportCallback, StoppingCallback)


class DPOCLI(LightningCLI):
    """LightningCLI with the DPO callbacks, a precision that suits the hardware, and checked paths."""

    _logger_options: Mapping[str, Any] = MappingProxyType({})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks as sections of their own, and defaults that a DPO run wants."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "step{step}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": False,  # the next one's task
                "checkpoint.enable_version_counter": False,  # a resumed run writes the same files again
            }
        )
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(RepliesCallback, "replies")
        parser.add_lightning_class_args(ExportCallback, "export")
        parser.add_lightning_class_args(ReplyWriter, "predictions")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As LightningCLI's, and checks what Lightning itself would fall over later."""
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        check_settings(self.config[command] if command else self.config)

    @property
    def settings(self) -> Namespace:
        """The parsed configuration, the command's own where there is one."""
        return self.config[self.subcommand] if self.subcommand else self.config

    def before_instantiate_classes(self) -> None:
        """Fills in what follows from the rest of the config: tokenizer, generating model, precision."""
        config = self.settings
        if config.data.tokenizer is None:
            config.data.tokenizer = tokenizer_name(config.model.name_or_path)
        if config.data.rejected == "generated":
            model = {name: config.model[name] for name in MODEL_SETTINGS}
            config.data.generation = model | (config.data.generation or {})
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
            "model",
            base_model_name(model.name_or_path),
            AutoConfig.from_pretrained,
            trust_remote_code=model.trust_remote_code,
        )
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except ValueError as error:
            missing = re.search(r"Requirement '([^']+)' not met", str(error))  # as Lightning's loggers say it
            if missing:
                raise UserError(f"trainer.logger needs a missing package: pip install '{missing[1]}'") from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As LightningCLI's, with TensorBoard's hparams free for real metrics and refusals as UserError."""
        trainer = self._get(self.config_init, "trainer")
        if trainer.logger in (None, True):
            folder = trainer.default_root_dir or "."
            kwargs["logger"] = TensorBoardLogger(
                folder, name="lightning_logs", default_hp_metric=False, **self._logger_options
            )
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins] if trainer.plugins else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        if trainer.enable_checkpointing is False:  # Lightning would refuse the run instead of leaving them out
            keys = self._parser(self.subcommand).callback_keys
            keys[:] = [key for key in keys if key not in ("checkpoint", "last")]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise error if isinstance(error, UserError) else UserError(f"trainer: {first_line(error)}") from error

    def _parse_ckpt_path(self) -> None:
        """Finds the checkpoint that `--ckpt_path` means, and takes over its model's settings, as Lightning's does.

        Raises:
            UserError: it is not there, damaged, or of another model.
        """
        settings = self.config.get("subcommand") and self.config[self.config.subcommand]
        if not settings or not settings.get("ckpt_path"):
            return
        if settings.ckpt_path == "last":
            settings.ckpt_path = self._find_last(settings)
        path = settings.ckpt_path
        if path in (None, "last", "best", "hpc") or "://" in path:
            return
        check_checkpoint(path)
        checkpoint = read_checkpoint(path, mmap=True)
        self._resume_in_its_folder(settings, Path(path), checkpoint["global_step"])
        saved = {key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")}
        given = settings.model.as_dict()
        self.config = self.parser.parse_object({self.config.subcommand: {"model": saved}}, self.config)
        taken = self.config[self.config.subcommand].model.as_dict()
        if changed := [f"{key} = {value!r}" for key, value in taken.items() if value != given.get(key)]:
            rank_zero_info(f"model settings taken from {path}: {', '.join(changed)}")

    def _find_last(self, settings: Namespace) -> str | None:
        """The newest whole checkpoint of the newest run; "last" where only its own logger knows its folder."""
        if settings.checkpoint.dirpath:
            folders = [Path(settings.checkpoint.dirpath)]
        elif settings.trainer.logger in (None, True):
            folders = checkpoint_folders(Path(settings.trainer.default_root_dir or "."))
        else:
            return "last"
        path = newest_whole(folders)
        if path is None and self.config.subcommand != "fit":
            raise UserError("--ckpt_path last: there is no checkpoint yet")
        # No error for `fit`: so a job that is started again and again can be the same command each time.
        place = " or ".join(f"'{folder.parent if folder.name == 'checkpoints' else folder}'" for folder in folders)
        nothing = f"there is no checkpoint yet{f' in {place}' if place else ''}, so the run starts at its beginning"
        rank_zero_info(f"--ckpt_path last: {path or nothing}")
        return path and str(path)

    def _resume_in_its_folder(self, settings: Namespace, path: Path, step: int) -> None:
        """Lets the run that goes on from its newest checkpoint keep its folder; from an older one it gets a new one."""
        run, logs = path.absolute().parent.parent, Path(settings.trainer.default_root_dir or ".") / "lightning_logs"
        if self.config.subcommand != "fit" or run.parent != logs.absolute() or version(run) < 0:
            return
        if not path.samefile(next(other for other in newest_first(path.parent) if not damage(other))):
            rank_zero_info(f"{path} is not the newest checkpoint of its run: what follows from it gets its own folder")
            return
        # TensorBoard hides what a run that was killed had logged after its checkpoint: it comes again.
        self._logger_options = {"version": version(run), "purge_step": step + 1}


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
    check_config_files(args)
    try:
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
    except UserError as error:
        raise with_place(error, args) from error


def run_trainer(args: Sequence[str]) -> None:
    """`fit`, `validate`, `test`, `predict`.

    Raises:
        UserError: Lightning refuses what is asked of it, or what the package's own code raises.
    """
    try:
        configured(DPOCLI, args, run=True)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise refused_folder(error, args) or error from error


def run_download(args: Sequence[str]) -> None:
    """`download`: the tokenizer, model and data sets that a configuration names, for use without a network."""
    config = configured(DownloadCLI, args[1:], run=False).config
    for kind, name in download(config.model.name_or_path, config.data, config.output_dir):
        print(f"{kind} written to {name}")


def run_export(args: Sequence[str]) -> None:
    """`export`: a checkpoint as a Hugging Face folder."""
    from jsonargparse import auto_cli

    auto_cli(export, args=list(args[1:]), parser_class=OneLineErrorParser, as_positional=False)


def export(
    ckpt_path: str, output_dir: str, merge: bool = False, dtype: str | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes the model of a checkpoint as a Hugging Face folder.

    Args:
        ckpt_path: a checkpoint written by `fit`.
        output_dir: folder to write.
        merge: with LoRA, write a complete model instead of the adapter.
        dtype: of the written weights (float32, bfloat16, float16); left out, as they were trained.
        max_shard_size: largest size of a weights file; more is split into several.
    """
    check_checkpoint(ckpt_path)
    checkpoint = read_checkpoint(ckpt_path)
    model_settings = checkpoint[LightningModule.CHECKPOINT_HYPER_PARAMS_KEY]
    data_settings = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    model_settings = {key: value for key, value in model_settings.items() if not key.startswith("_")}
    module = DPOModule(**model_settings)
    module.load_state_dict(checkpoint["state_dict"])
    data = PreferenceDataModule(data_settings.get("tokenizer"), trust_remote_code=module.hparams.trust_remote_code)
    export_policy(module, data.tokenizer, output_dir, merge, dtype, max_shard_size, data_settings)
    print(f"model written to {output_dir}")
