"""What training costs elsewhere: perplexity on a text that is no training data, and the KL from the reference on it."""

from functools import partial
from importlib.resources import files
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.callbacks.context import preference_data
from dpo_lightning.data.encoding import encode_prompts
from dpo_lightning.errors import UserError
from dpo_lightning.models.generate import evaluating
from dpo_lightning.models.hub import local_path, reason_of
from dpo_lightning.models.perplexity import compare, predictions, windows
from dpo_lightning.parsing import check_settings
from dpo_lightning.storage.states import check_amount, check_state

LONGEST = 50_000  # characters
STATE = {"before": int | float | None, "step": int | None}


class ForgettingCallback(Callback):
    """Measures `forgetting/perplexity`, `forgetting/reference_perplexity` and `forgetting/kl`, each by `compare`.

    The policy is measured before and after training, the reference after it and in `test`. All processes read the same
    text, which a sharded model needs. The reference is the run's own: with LoRA, the model without the new adapter. If
    none is in memory, the policy's perplexity before training stands for it, and there is no KL.

    Args:
        enabled: whether to measure.
        text: a text file in UTF-8; by default a page of English prose that ships with the package.
    """

    def __init__(self, enabled: bool = True, text: str | None = None) -> None:
        check_settings(ForgettingCallback.__init__, locals(), "forgetting.")
        self.enabled = enabled
        self.text = read_text(text) if text is not None else shipped_text()
        self._before: float | None = None  # the policy's perplexity before training
        self._step: int | None = None  # of the last measurement

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts without an earlier run's results."""
        self._before = self._step = None
        if self.enabled:
            preference_data(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the policy before the first step; a resumed run has that in its checkpoint."""
        if self.enabled and not trainer.fast_dev_run and trainer.global_step == 0:
            self._before = self._measure(trainer, pl_module, with_reference=False)["perplexity"]
            self._log(trainer, {"perplexity": self._before})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures policy and reference after the last step."""
        if not self.enabled or trainer.fast_dev_run or trainer.global_step == self._step:
            return
        found = self._measure(trainer, pl_module)
        if self._before is not None:
            found.setdefault("reference_perplexity", self._before)
        self._log(trainer, found)
        before = f"{self._before:.4g} → " if self._before is not None else ""
        kl = f"KL {found['kl']:.2g} nats" if "kl" in found else no_kl(pl_module)
        rank_zero_info(f"forgetting: perplexity on other text {before}{found['perplexity']:.4g} (a rise is bad), {kl}")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the tested policy, and the reference if the loss has one."""
        if self.enabled and not trainer.fast_dev_run:
            found = self._measure(trainer, pl_module)
            logged = {f"test/forgetting/{name}": value for name, value in found.items()}
            pl_module.log_dict(logged, sync_dist=True)  # they are the same on all processes

    def _measure(self, trainer: Trainer, module: LightningModule, with_reference: bool = True) -> dict[str, float]:
        tokenizer, policy = trainer.datamodule.tokenizer, module.causal_lm
        texts = windows(encode_prompts(tokenizer, [self.text])[0], policy)
        if not texts:
            raise UserError("forgetting.text has less than two tokens: give a longer text")
        as_model = getattr(module.reference, "as_model", None) if with_reference else None
        reference = None
        if as_model is not None:

            def reference(ids):
                with as_model() as model:
                    return predictions(model, ids)

        with trainer.precision_plugin.forward_context(), evaluating(policy):
            return compare(partial(predictions, policy), reference, texts)

    def _log(self, trainer: Trainer, found: dict[str, float]) -> None:
        self._step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({f"forgetting/{name}": value for name, value in found.items()}, self._step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot measure again."""
        return {"before": self._before, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            ValueError: the state has another structure.
        """
        check_state(state_dict, STATE, "the forgetting")
        for name in STATE:
            if state_dict[name] is not None:
                check_amount(state_dict[name], f"the forgetting's {name}")
        self._before, self._step = state_dict["before"], state_dict["step"]


def no_kl(module: LightningModule) -> str:
    """Why the KL from the reference is not known."""
    if not module.loss.needs_reference:
        return "no KL, since the loss has no reference"
    if module.reference is None:
        return "no KL, since cached log-probs replace the reference here (`test` has it)"
    return "no KL, since this model.reference gives no predictions on other text"


def shipped_text() -> str:
    """The text that ships with the package, written for it."""
    return (files("dpo_lightning.models") / "data" / "english.txt").read_text(encoding="utf-8")


def read_text(name: str) -> str:
    """The first `LONGEST` characters of a text file.

    Raises:
        UserError: it is no file that can be read, or no text in UTF-8.
    """
    path = local_path(name)
    if not path.is_file():
        raise UserError(f"forgetting.text '{name}' is not a file: give a text file, or leave it out for a shipped text")
    try:
        with path.open(encoding="utf-8") as file:
            text, more = file.read(LONGEST), file.read(1)
    except (OSError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UserError(f"forgetting.text '{name}' cannot be read: {reason}") from error
    if more:
        rank_zero_info(f"forgetting.text: only the first {LONGEST:,} characters of '{name}' are used")
    return text
