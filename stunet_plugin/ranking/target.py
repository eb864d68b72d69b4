"""The labelled dataset that weights are ranked for: a few of its cases, prepared as a plan says,
one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from stunet_plugin.datasets.raw_dataset import RawDataset
from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.ranking.candidates import Plan


@dataclass(frozen=True)
class Target:
    """A dataset, and the cases of it that are looked at.

    Attributes:
        raw: with all cases.
        chosen: names of the cases to use, in their order.
        preprocessed: its folder in nnUNet_preprocessed, None if it has none.
    """

    raw: RawDataset
    chosen: tuple[str, ...]
    preprocessed: Path | None = field(default=None)

    @property
    def labels(self) -> dict[int, str]:
        """Label values to names, background included and the ignore label left out; regions count
        by their labels."""
        entries: dict[str, Any] = self.raw.description["labels"]
        manager = LabelManager(entries, self.raw.description.get("regions_class_order"))
        names = {
            int(value): name
            for name, value in entries.items()
            if not isinstance(value, (list, tuple))
        }
        return {int(value): names.get(int(value), f"label {value}") for value in manager.all_labels}

    def cases(self, plan: Plan) -> Iterator[tuple[str, Tensor, np.ndarray]]:
        """Yield name, image (channel, z, y, x) and labels (z, y, x), prepared as the plan says.

        Where nnU-Net has preprocessed the dataset with this very plan, its files are read.
        """
        ready = self._preprocessed_cases(plan)
        if ready is not None:
            for name in self.chosen:
                data, segmentation, _, _ = ready.load_case(name)
                yield (
                    name,
                    torch.from_numpy(np.asarray(data[:], dtype=np.float32)),
                    np.asarray(segmentation[0]),
                )
            return
        preprocessor = plan.chosen.preprocessor_class(verbose=False)
        by_name = {case.name: case for case in self.raw.cases}
        for name in self.chosen:
            images = [str(image) for image in by_name[name].images]
            label = str(by_name[name].label)
            try:
                data, segmentation, _ = preprocessor.run_case(
                    images, label, plan.manager, plan.chosen, self.raw.description
                )
            except Exception as error:  # each reader has its own
                raise PluginError(
                    f"Case {name} of {self.raw.name} cannot be prepared ({last_line(error)}). Mend"
                    " it, or take others: --names"
                ) from error
            yield (
                name,
                torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)),
                segmentation[0],
            )

    def _preprocessed_cases(self, plan: Plan) -> Any:
        """nnU-Net's dataset of preprocessed cases, None where it is not there or lacks one of
        ours."""
        # Of another dataset's plan the identifier may be the same, the data are not.
        if self.preprocessed is None or plan.plans.get("dataset_name") != self.raw.name:
            return None
        folder = self.preprocessed / plan.chosen.data_identifier
        if not folder.is_dir() or not any(folder.iterdir()):
            return None
        kind = infer_dataset_class(str(folder))
        complete = set(self.chosen) <= set(kind.get_identifiers(str(folder)))
        return kind(str(folder)) if complete else None


def check_channels(raw: RawDataset, plans: Sequence[Plan]) -> None:
    """Raise a PluginError if the dataset's channels are not as many as a plan normalises."""
    for plan in plans:
        schemes = plan.chosen.normalization_schemes
        if len(schemes) != len(raw.channels):
            raise PluginError(
                f"{raw.name} has {len(raw.channels)} channel(s) ({', '.join(raw.channels)}), the"
                f" plan {plan.name} is for {len(schemes)}. Give the dataset's own plans: -p PLANS"
            )
