"""`--optimizer` of LightningCLI, a class and its arguments, completed with the run's learning rate and weight decay."""

import importlib

from jsonargparse import Namespace

from dpo_lightning.dpo.optimization import missing_arguments

SET_BY_THE_RUN = ("lr", "weight_decay", "relative_step")  # an optimizer's own defaults of these suit other tasks


def drop_defaults(optimizer: Namespace, given: Namespace) -> None:
    """Removes the class's defaults of `SET_BY_THE_RUN`, so that they neither apply nor end up in a saved config.

    Args:
        optimizer: as parsed, with all defaults of the class.
        given: the arguments that the user gives.
    """
    for name in SET_BY_THE_RUN:
        if name not in given:
            optimizer.init_args.pop(name, None)


def with_run_settings(optimizer: Namespace, model: Namespace) -> Namespace:
    """A copy of the optimizer in which `model.learning_rate` and the like fill in what the user does not give."""
    module, _, name = optimizer.class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    given = {name: value for name, value in optimizer.init_args.items() if value is not None}
    result = optimizer.clone()
    for name, value in missing_arguments(kind, given, model.learning_rate, model.weight_decay).items():
        result.init_args[name] = value
    return result
