"""What a demonstration runs: its settings, and the user's dataset if it takes one. All of it is
checked before anything runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.device import choose_device

DEFAULT_EPOCHS = 10
ITERATIONS_PER_EPOCH = 15
MINIMUM_CASES = 5
"""For nnU-Net's five folds."""


@dataclass(frozen=True)
class DemoSettings:
    """What a demo runs; a resumed demo must have the same.

    Attributes:
        dataset: ID in the user's nnUNet_raw, or None for the embedded data set.
        size: of STU-Net.
        epochs: of ITERATIONS_PER_EPOCH iterations.
        device: ``cpu`` or ``cuda``.
    """

    dataset: int | None
    size: str
    epochs: int
    device: str

    @classmethod
    def from_options(
        cls, dataset: int | None, size: str, epochs: int | None, device: str
    ) -> DemoSettings:
        if epochs is not None and epochs < 1:
            raise PluginError(f"--epochs must be at least 1, not {epochs}.")
        if dataset is not None and not 0 < dataset < 1000:
            raise PluginError(
                f"--dataset takes the number of a dataset in nnUNet_raw, 1 to 999, not {dataset}."
            )
        return cls(dataset, size, epochs or DEFAULT_EPOCHS, choose_device(device))

    @property
    def trainer(self) -> str:
        return f"STUNetTrainer_{self.size}"


def user_dataset(dataset_id: int) -> Path:
    """Return the folder of a dataset in the user's nnUNet_raw."""
    raw = os.environ.get("nnUNet_raw")
    if not raw:
        raise PluginError(
            "--dataset needs nnUNet_raw. Set it: export nnUNet_raw=/path/to/nnUNet_raw"
        )
    found = sorted(Path(raw).glob(f"Dataset{dataset_id:03d}_*"))
    if len(found) != 1:
        there = ", ".join(path.name for path in sorted(Path(raw).glob("Dataset*"))) or "none"
        raise PluginError(
            f"--dataset {dataset_id}: expected one Dataset{dataset_id:03d}_* in {raw}, found"
            f" {len(found)}. Datasets there: {there}."
        )
    folder = found[0].resolve()
    try:
        ending = str(json.loads((folder / "dataset.json").read_text())["file_ending"])
        cases = len(
            [path for path in (folder / "labelsTr").iterdir() if path.name.endswith(ending)]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PluginError(
            f"--dataset {dataset_id}: {folder} is no dataset of nnU-Net v2 (it needs dataset.json"
            f" with file_ending, imagesTr and labelsTr): {error}"
        ) from error
    if cases < MINIMUM_CASES:
        raise PluginError(
            f"--dataset {dataset_id}: nnU-Net splits into {MINIMUM_CASES} folds, {folder} has only"
            f" {cases} labelled cases."
        )
    return folder
