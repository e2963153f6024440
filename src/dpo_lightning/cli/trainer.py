"""The commands `fit`, `validate`, `test` and `predict`, which LightningCLI runs."""

import re
import sys
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from dpo_lightning.callbacks.checkpoint_files import (
    DATA_SETTINGS,
    SETTINGS,
    AtomicCheckpointIO,
    check_checkpoint,
    check_resumable,
    checkpoint_folders,
    folders_of_logger,
    newest_resumable,
    newest_undamaged,
    read_checkpoint,
    restoring,
    version,
)
from dpo_lightning.callbacks.checkpoints import LastCheckpoint
from dpo_lightning.callbacks.evaluation import EvaluationCallback
from dpo_lightning.callbacks.export.callback import ExportCallback
from dpo_lightning.callbacks.forgetting import ForgettingCallback
from dpo_lightning.callbacks.guards import GuardsCallback
from dpo_lightning.callbacks.predictions import ReplyWriter
from dpo_lightning.callbacks.progress import RunBar
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.callbacks.report.callback import ReportCallback
from dpo_lightning.callbacks.run_folders import SavedConfig, with_own_folder
from dpo_lightning.callbacks.stopping import StoppingCallback
from dpo_lightning.callbacks.storyboard import StoryboardCallback
from dpo_lightning.callbacks.times import RunTimes
from dpo_lightning.cli import entry
from dpo_lightning.cli.arms import Find
from dpo_lightning.cli.configs import with_shipped
from dpo_lightning.cli.entry import COMMANDS, program
from dpo_lightning.cli.memory import keep_within_memory
from dpo_lightning.cli.optimizers import drop_defaults, with_run_settings
from dpo_lightning.cli.run_settings import check_run_settings, warn_of_other_splits
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.generated import MODEL_SETTINGS
from dpo_lightning.data.prompt_format import (
    PromptFormat,
    checkpoint_prompt_format,
    read_prompt_format,
    resolved_template,
)
from dpo_lightning.dpo.losses import import_loss
from dpo_lightning.dpo.module import NOT_SAVED, DPOModule
from dpo_lightning.dpo.reference import import_reference
from dpo_lightning.errors import UserError
from dpo_lightning.internals.lightning import configured_section, leave_callbacks_out
from dpo_lightning.models.hardware import device_name, fastest_precision
from dpo_lightning.models.hub import first_line
from dpo_lightning.models.policy import load_config, tokenizer_name
from dpo_lightning.models.sharding import check_strategy
from dpo_lightning.parsing import OneLineErrorParser, check_config_files, with_location
from dpo_lightning.storage.trust import TRUST, plain_settings

# The sections of `--help`, what most users set first.
HELP = {
    "ckpt_path": "the checkpoint to start from",
    "model": "the model, its loss and its optimization",
    "data": "the pairs",
    "replies": "replies before, during and after training",
    "last": "last.ckpt, from which a run resumes",
    "checkpoint": "the best checkpoints (Lightning's ModelCheckpoint)",
    "guards": "warnings, and when to stop",
    "forgetting": "what training costs elsewhere",
    "export": "the trained model as a Hugging Face folder",
    "memory": "how much memory training may take",
    "predictions": "the file that `predict` writes",
    "find": "what the command `find` tries",
    "optimizer": "another optimizer than AdamW",
    "lr_scheduler": "another schedule than model.lr_scheduler_type",
    "trainer": "Lightning's Trainer",
}
# Callbacks without settings.
CALLBACKS = (EvaluationCallback, StoryboardCallback, ReportCallback, StoppingCallback)


class DPOCLI(LightningCLI):
    """LightningCLI with the DPO callbacks, a precision that suits the hardware, and checked settings."""

    command = ""  # of the command line, unless it is one of Lightning's
    config: Namespace
    _logger_options: Mapping[str, Any] = MappingProxyType({})
    _checkpoint_prompt_format: PromptFormat | None = None
    _resumed_data: Mapping[str, Any] | None = None  # settings of the data of the run that is resumed
    _why = ""  # this precision, if it was chosen here

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser whose help begins with one line of usage instead of all settings."""
        usage = "%(prog)s --config NAME_OR_FILE [--config OVERLAY ...] [--KEY VALUE ...]"
        description = {"description": f"{COMMANDS[self.command].help}."} if self.command else {}
        own = {"prog": f"{program()} {self.command}".strip(), "usage": usage} | description
        parser = super().init_parser(**own | kwargs)
        parser.sections = HELP
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks as sections of the configuration, and our defaults."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "step{step}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": False,  # LastCheckpoint does
                "checkpoint.save_weights_only": True,  # a third of the bytes; last.ckpt is there to resume from
                "checkpoint.enable_version_counter": False,  # a resumed run replaces its files
            }
        )
        sections = {"last": LastCheckpoint, "replies": RepliesCallback, "forgetting": ForgettingCallback}
        sections |= {"guards": GuardsCallback, "export": ExportCallback, "predictions": ReplyWriter}  # after replies
        for section, callback in sections.items():
            parser.add_lightning_class_args(callback, section)
        parser.add_class_arguments(Find, "find")
        memory = parser.add_argument_group("memory")
        memory.add_argument("--memory", type=str | None, default=None, help="such as 8GiB; smaller batches if need be")
        parser.add_optimizer_args((Optimizer,), link_to="model.optimizer")
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple, link_to="model.lr_scheduler")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses as LightningCLI does, and checks settings that Lightning would fail on later."""
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        settings = self.config[command] if command else self.config
        check_run_settings(settings)
        if settings.optimizer:
            given = parser.parse_args(args, defaults=False)
            self._optimizer_given = (given[command] if command else given).optimizer.get("init_args") or Namespace()
        # Now, as nothing is imported that a checkpoint names.
        if ":" in (settings.model.reference or ""):
            import_reference(settings.model.reference)
        losses = settings.model.loss_type
        for name in [losses] if isinstance(losses, str) else losses or ():
            if ":" in name:
                import_loss(name)

    @property
    def settings(self) -> Namespace:
        """The parsed configuration, the command's own where there is one."""
        return self.config[self.subcommand] if self.subcommand else self.config

    def before_instantiate_classes(self) -> None:
        """Fills in what follows from the rest of the config: tokenizer, template, generating model, precision."""
        config = self.settings
        check_strategy(config.trainer.strategy)
        prompt_format, where = self._checkpoint_prompt_format, config.get("ckpt_path")
        if prompt_format is None:
            prompt_format, where = read_prompt_format(config.model.name_or_path), config.model.name_or_path
        config.data.prompt_template = resolved_template(config.data.prompt_template, prompt_format, where)
        if config.data.tokenizer is None:
            config.data.tokenizer = tokenizer_name(config.model.name_or_path)
        if config.data.rejected == "generated":
            model = {name: config.model[name] for name in MODEL_SETTINGS}
            if model["attn_implementation"] == "packed":  # which is for pairs, not for replies
                model["attn_implementation"] = None
            config.data.generation = model | (config.data.generation or {})
        if config.trainer.precision is None:
            config.trainer.precision, self._why = fastest_precision(config.trainer.accelerator)
        if config.optimizer:
            drop_defaults(config.optimizer, self._optimizer_given)
            config.model.optimizer = with_run_settings(config.optimizer, config.model)
        if self.subcommand == "fit" and not config.data.val_dataset and not config.data.val_size:
            config.checkpoint.monitor = None  # nothing to rank checkpoints by: keep the last
        if config.checkpoint.save_last:  # it would take the place of LastCheckpoint's, without the optimizer's state
            config.checkpoint.save_weights_only = False

    def instantiate_classes(self) -> None:
        """Checks that the model exists, before data are read, makes the run fit, then does as LightningCLI."""
        settings = self.settings
        load_config(settings.model.name_or_path, settings.model.trust_remote_code)
        if self.subcommand == "fit" and settings.memory:
            everything = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            keep_within_memory(settings, everything["fit"], self._resumed_data)
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except ValueError as error:
            missing = re.search(r"Requirement '([^']+)' not met", str(error))  # the words of Lightning's loggers
            if missing:
                raise UserError(f"trainer.logger needs a missing package: pip install '{missing[1]}'") from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds our logger, checkpoint files, clock and progress bar, unless the user gives others.

        Raises:
            UserError: Lightning refuses the settings.
        """
        trainer = configured_section(self, "trainer")
        if trainer.logger in (None, True):
            folder = trainer.default_root_dir or "."
            kwargs["logger"] = TensorBoardLogger(
                folder, name="lightning_logs", default_hp_metric=False, **self._logger_options
            )
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins] if trainer.plugins else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        if trainer.enable_checkpointing is False:  # with them, Lightning would refuse the run
            leave_callbacks_out(self, {"checkpoint", "last"})
        if trainer.enable_model_summary is None and not entry.verbose:
            kwargs["enable_model_summary"] = False  # the module has a line on its model
        if trainer.profiler is None:
            kwargs["profiler"] = RunTimes(entry.began)
        own = trainer.callbacks if isinstance(trainer.callbacks, list) else list(filter(None, [trainer.callbacks]))
        if trainer.enable_progress_bar is not False and not any(isinstance(callback, ProgressBar) for callback in own):
            kwargs["callbacks"] = [*own, RunBar()]  # first, so that its line is complete when others print
        try:
            instance = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise error if isinstance(error, UserError) else UserError(f"trainer: {first_line(error)}") from error
        instance.loggers = [with_own_folder(logger) for logger in instance.loggers]
        devices = f"{instance.world_size} × " * (instance.world_size > 1) + device_name(instance.strategy.root_device)
        rank_zero_info(f"precision: {instance.precision} on {devices}" + f" ({self._why})" * bool(self._why))
        return instance

    def _parse_ckpt_path(self) -> None:
        """Finds the checkpoint that `--ckpt_path` means, and uses its model settings, as Lightning does.

        Only plain values are used, nothing that runs code (`storage.trust`).

        Raises:
            UserError: it is missing, damaged, of another model, or edited.
        """
        settings = self.config.get("subcommand") and self.config[self.config.subcommand]
        if not settings or not settings.get("ckpt_path"):
            return
        if settings.ckpt_path == "last":
            settings.ckpt_path = self._find_last(settings)
        path = settings.ckpt_path
        if path in (None, "best", "hpc") or "://" in path:
            return
        check_checkpoint(path)
        checkpoint = read_checkpoint(path, mmap=True)
        if self.config.subcommand == "fit":
            check_resumable(checkpoint, path)
            self._resumed_data = checkpoint.get(DATA_SETTINGS) or {}
        saved = saved_settings(checkpoint, path)
        self._check_trust(settings, saved.get("name_or_path"), path)
        self._checkpoint_prompt_format = checkpoint_prompt_format(checkpoint, path)
        warn_of_other_splits(self.config.subcommand, settings.data, checkpoint.get(DATA_SETTINGS) or {}, path)
        self._resume_in_its_folder(settings, Path(path), checkpoint["global_step"])
        given = settings.model.as_dict()
        try:
            self.config = self.parser.parse_object({self.config.subcommand: {"model": saved}}, self.config)
        except UserError as error:
            raise UserError(f"--ckpt_path '{path}' has a setting that does not fit: {error}") from error
        taken = self.config[self.config.subcommand].model.as_dict()
        if changed := [f"{key} = {value!r}" for key, value in taken.items() if value != given.get(key)]:
            rank_zero_info(f"model settings taken from {path}: {', '.join(changed)}")

    @staticmethod
    def _check_trust(settings: Namespace, name: Any, path: str) -> None:
        """Raises UserError if the user trusts one model's code, but the checkpoint names another model."""
        trusting = settings.model[TRUST] or settings.data[TRUST] or (settings.data.generation or {}).get(TRUST)
        if trusting and name not in (None, settings.model.name_or_path):
            raise UserError(
                f"--ckpt_path '{path}' is of the model {name!r}, but {TRUST} is true for "
                f"{settings.model.name_or_path!r}: to run the code of {name!r}, give it as model.name_or_path"
            )

    def _find_last(self, settings: Namespace) -> str | None:
        """The newest usable checkpoint of the newest run."""
        logger, root = settings.trainer.logger, Path(settings.trainer.default_root_dir or ".")
        if settings.checkpoint.dirpath:
            folders = [Path(settings.checkpoint.dirpath)]
        else:
            folders = checkpoint_folders(root) if logger in (None, True) else folders_of_logger(logger, root)
        path = newest_undamaged(folders, to_resume=self.config.subcommand == "fit")
        if path is None and self.config.subcommand != "fit":
            raise UserError("--ckpt_path last: there is no checkpoint yet")
        # Not an error for `fit`, so that a job which is started repeatedly can use the same command each time.
        paths = " or ".join(f"'{folder.parent if folder.name == 'checkpoints' else folder}'" for folder in folders)
        there = f" in {paths}" if paths else ""
        none = f"there is no checkpoint yet to resume from{there}, so the run starts from the beginning"
        rank_zero_info(f"--ckpt_path last: {path or none}")
        return str(path) if path else None

    def _resume_in_its_folder(self, settings: Namespace, path: Path, step: int) -> None:
        """Keeps a run's folder if it resumes from its newest checkpoint; from an older one it gets a new folder."""
        run, logs = path.absolute().parent.parent, Path(settings.trainer.default_root_dir or ".") / "lightning_logs"
        if self.config.subcommand != "fit" or run.parent != logs.absolute() or version(run) < 0:
            return
        if not path.samefile(newest_resumable(path.parent) or path):
            rank_zero_info(f"{path} is not the newest checkpoint of its run: the resumed run gets a new folder")
            return
        # TensorBoard hides what a killed run had logged after its checkpoint, as it is logged again.
        self._logger_options = {"version": version(run), "purge_step": step + 1}


def configured(cli: type[DPOCLI], args: Sequence[str], run: bool) -> DPOCLI:
    """Parses a configuration and, with `run`, runs its Trainer command."""
    # Not as an argument: Lightning starts the processes of further devices with this process's command line.
    args = sys.argv[1:] = with_shipped(args)
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
            parser_kwargs={name: {"description": f"{COMMANDS[name].help}."} for name in cli.subcommands()},
            save_config_callback=SavedConfig,
            save_config_kwargs={"overwrite": True},
        )
    except UserError as error:
        raise with_location(error, args) from error


def run_trainer(args: Sequence[str]) -> DPOCLI:
    """Runs `fit`, `validate`, `test` or `predict`; what Lightning refuses becomes a UserError."""
    try:
        with restoring():
            return configured(DPOCLI, args, run=True)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        if "(ckpt_path=" not in str(error) or isinstance(error, UserError):
            raise
        raise UserError(f"--ckpt_path: {first_line(error)}") from error  # there is no "best" or "hpc" checkpoint


def saved_settings(checkpoint: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A checkpoint's settings of DPOModule, if they are plain values (`storage.trust`)."""
    known = {name: value for name, value in signature(DPOModule).parameters.items() if name not in NOT_SAVED}
    return plain_settings(checkpoint[SETTINGS], known, f"--ckpt_path '{path}'")
