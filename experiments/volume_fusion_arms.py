"""What the hippocampus experiment on Volume Fusion compares: networks, pretrainings, and arms, as
data.

Every arm differs from its network's ``scratch`` or ``pretrained`` in one thing.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Network:
    """A network of the experiment.

    Attributes:
        pretext_trainer, segmentation_trainer: of nnU-Net; the latter also takes the pretrained
            weights.
        planner: one of ours, or None for nnU-Net's own.
        plans: what the planner's plans are called.
    """

    pretext_trainer: str
    segmentation_trainer: str
    planner: str | None
    plans: str


def networks(stunet_size: str) -> dict[str, Network]:
    """Return the networks by name, STU-Net in one size."""
    return {
        "stunet": Network(
            f"VolumeFusionTrainer_STUNet_{stunet_size}",
            f"STUNetTrainer_{stunet_size}",
            None,
            "nnUNetPlans",
        ),
        "pctnet": Network(
            "VolumeFusionTrainer_PCTNet", "PCTNetTrainer", "PCTNetPlanner", "PCTNetPlans"
        ),
        "fmunet": Network(
            "VolumeFusionTrainer_FMUNet", "FMUNetTrainer", "FMUNetPlanner", "FMUNetPlans"
        ),
    }


@dataclass(frozen=True)
class Pretraining:
    """One pretraining.

    Attributes:
        name: of its folder.
        network: that it pretrains.
        options: environment variables, beside those of the budget.
        share: of the pretraining budget.
    """

    name: str
    network: str
    options: dict[str, str] = field(default_factory=dict)
    share: float = 1.0


PRETRAININGS = {
    pretraining.name: pretraining
    for pretraining in (
        Pretraining("stunet", "stunet"),
        Pretraining("stunet_2023", "stunet", {"STUNET_VF_SCHEME": "2023"}),
        Pretraining("stunet_k1", "stunet", {"STUNET_VF_CLASSES": "1"}),
        Pretraining("stunet_k8", "stunet", {"STUNET_VF_CLASSES": "8"}),
        Pretraining("stunet_standardised", "stunet", {"STUNET_VF_STANDARDISE": "1"}),
        Pretraining(
            "stunet_large_blocks",
            "stunet",
            {"STUNET_VF_SMALLEST": "0.15", "STUNET_VF_LARGEST": "0.6"},
        ),
        Pretraining("stunet_slow", "stunet", {"STUNET_VF_RATE": "1e-4"}),
        Pretraining("stunet_long", "stunet", share=10.0),
        Pretraining("pctnet", "pctnet"),
        Pretraining("fmunet", "fmunet"),
    )
}


@dataclass(frozen=True)
class Arm:
    """One way to train on the labelled cases.

    Attributes:
        name: in tables.
        network: that is trained.
        pretraining: that it starts from; None starts from scratch.
        suffix: of the segmentation trainer's name; ``_ft`` of STU-Net has a tenth of the learning
            rate.
        warmup: share of the epochs over which the learning rate rises.
        rescaled: the features before the heads are brought to the spread that random weights give
            (``rescale_features.py``).
        options: environment variables, beside those of the budget.
    """

    name: str
    network: str
    pretraining: str | None = None
    suffix: str = ""
    warmup: float = 0.0
    rescaled: bool = False
    options: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() else "_" for letter in self.name)


def _pair(network: str) -> tuple[Arm, Arm]:
    return Arm(f"{network} scratch", network), Arm(f"{network} pretrained", network, network)


GROUPS: dict[str, tuple[Arm, ...]] = {
    "stunet": _pair("stunet"),
    "pctnet": _pair("pctnet"),
    "fmunet": _pair("fmunet"),
    "scheme": (Arm("scheme of 2023", "stunet", "stunet_2023"),),
    "classes": (Arm("K = 1", "stunet", "stunet_k1"), Arm("K = 8", "stunet", "stunet_k8")),
    "rate": (
        Arm("scratch, rate 1e-3", "stunet", suffix="_ft"),
        Arm("pretrained, rate 1e-3", "stunet", "stunet", suffix="_ft"),
    ),
    "warmup": (Arm("pretrained, warm-up", "stunet", "stunet", warmup=0.2),),
    "encoder": (
        Arm(
            "pretrained, encoder at a tenth",
            "stunet",
            "stunet",
            options={"STUNET_ENCODER_RATE": "0.1"},
        ),
    ),
    "intensity": (Arm("pretrained on standardised images", "stunet", "stunet_standardised"),),
    "blocks": (Arm("pretrained with large blocks", "stunet", "stunet_large_blocks"),),
    "pretraining_rate": (Arm("pretrained at a rate of 1e-4", "stunet", "stunet_slow"),),
    "spread": (
        Arm("pretrained, features rescaled", "stunet", "stunet", rescaled=True),
        Arm("ten times the pretraining, features rescaled", "stunet", "stunet_long", rescaled=True),
    ),
    "length": (Arm("ten times the pretraining", "stunet", "stunet_long"),),
}
"""What can be asked for; ``stunet`` is what all but the other networks are compared with."""
