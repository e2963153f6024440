"""`optimizer` as LightningCLI has it, a class and its arguments, with the run's own learning rate and weight decay."""

import importlib

from jsonargparse import Namespace

from dpo_lightning.dpo.optimization import missing_arguments

OF_THE_RUN = ("lr", "weight_decay", "relative_step")  # a class's own defaults of these suit other tasks


def keep_given(optimizer: Namespace, given: Namespace) -> None:
    """Takes the class's defaults out that stand for the run's own settings, so that no written config fixes them.

    Args:
        optimizer: as parsed, with all defaults of the class.
        given: the arguments that the user gives.
    """
    for name in OF_THE_RUN:
        if name not in given:
            optimizer.init_args.pop(name, None)


def completed(optimizer: Namespace, model: Namespace) -> Namespace:
    """The optimizer with all that it trains with: `model.learning_rate` and so on, where it does not say otherwise."""
    module, _, name = optimizer.class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    known = {name: value for name, value in optimizer.init_args.items() if value is not None}
    made = optimizer.clone()
    for name, value in missing_arguments(kind, known, model.learning_rate, model.weight_decay).items():
        made.init_args[name] = value
    return made
