"""What the losses are called in the literature, and the papers that define them: for the report and the model card."""

from collections.abc import Sequence
from typing import NamedTuple


class Method(NamedTuple):
    """A loss as people call it."""

    name: str
    authors: str = ""
    arxiv: str = ""


METHODS = {
    "sigmoid": Method("DPO", "Rafailov et al. 2023", "2305.18290"),
    "hinge": Method("SLiC-HF", "Zhao et al. 2023", "2305.10425"),
    "ipo": Method("IPO", "Azar et al. 2023", "2310.12036"),
    "robust": Method("robust DPO", "Chowdhury et al. 2024", "2403.00409"),
    "exo_pair": Method("EXO", "Ji et al. 2024", "2402.00856"),
    "discopop": Method("DiscoPOP", "Lu et al. 2024", "2406.08414"),
    "sigmoid_norm": Method("length-normalized DPO", "Lambert et al. 2024", "2411.15124"),
    "dpop": Method("DPO-Positive", "Pal et al. 2024", "2402.13228"),
    "nca_pair": Method("NCA", "Chen et al. 2024", "2402.05369"),
    "bco_pair": Method("BCO", "Jung et al. 2024", "2404.04656"),
    "sppo_hard": Method("SPPO", "Wu et al. 2024", "2405.00675"),
    "apo_zero": Method("APO-zero", "D'Oosterlinck et al. 2024", "2408.06266"),
    "apo_down": Method("APO-down", "D'Oosterlinck et al. 2024", "2408.06266"),
    "kto": Method("KTO", "Ethayarajh et al. 2024", "2402.01306"),
    "aot": Method("AOT", "Melnyk et al. 2024", "2406.05882"),
    "aot_unpaired": Method("unpaired AOT", "Melnyk et al. 2024", "2406.05882"),
    "sft": Method("SFT", "as in RPO, Pang et al. 2024", "2404.19733"),
    "simpo": Method("SimPO", "Meng et al. 2024", "2405.14734"),
    "orpo": Method("ORPO", "Hong et al. 2024", "2403.07691"),
    "cpo": Method("CPO", "Xu et al. 2024", "2401.08417"),
}


def methods(loss_type: str | Sequence[str]) -> list[Method]:
    """The methods of `model.loss_type`; a loss of the user's own has its function's name."""
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    return [METHODS.get(name) or Method(name.rpartition(":")[2]) for name in names]


def method_name(loss_type: str | Sequence[str]) -> str:
    """The same in words: "DPO + SFT"."""
    return " + ".join(method.name for method in methods(loss_type))
