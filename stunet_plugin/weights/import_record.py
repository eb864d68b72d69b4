"""What the user asked ``stunet import`` for, and what is recorded of it."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CHECKPOINT, DEFAULT_DATASET_ID, DEFAULT_FOLD
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.utils.files import sha256_of
from stunet_plugin.weights.choose_plan import PlanOptions
from stunet_plugin.weights.file_formats import FileFormat, check_integrity, recognise
from stunet_plugin.weights.identify import FoundWeights, check_finite
from stunet_plugin.weights.input_channels import inflate_stem
from stunet_plugin.weights.locate import Source
from stunet_plugin.weights.model_folder import check_target, holds_import, holds_weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImportOptions:
    """What the user asked for; see ``stunet import --help``."""

    source: str
    out: str | None = None
    dataset_id: int = DEFAULT_DATASET_ID
    name: str | None = None
    fold: str = DEFAULT_FOLD
    plan: PlanOptions = field(default_factory=PlanOptions)
    labels: Sequence[str] | None = None
    in_channels: int | None = None
    stem: str | None = None
    force: bool = False
    mode: int | None = None
    pretext: bool = False

    def __post_init__(self) -> None:
        if self.fold != "all" and not self.fold.isdigit():
            raise PluginError(f"--fold must be a number or 'all', not {self.fold!r}.")

    @classmethod
    def from_arguments(cls, given: Any) -> ImportOptions:
        plan = PlanOptions(
            given.plans,
            given.spacing,
            given.patch_size,
            given.strides,
            given.mask_for_norm,
            given.reader,
        )
        place = (given.out, given.dataset_id, given.name, given.fold)
        return cls(
            given.source,
            *place,
            plan,
            given.labels,
            given.in_channels,
            given.stem,
            given.force,
            given.mode,
            given.pretext,
        )

    def fit_channels(
        self, tensors: Mapping[str, Tensor], weights: FoundWeights
    ) -> Mapping[str, Tensor]:
        """Return tensors with the stem that ``--in-channels`` and ``--stem`` ask for."""
        if self.in_channels is None:
            return tensors
        return inflate_stem(
            tensors, weights.stem_weights, self.in_channels, self.stem or weights.default_stem
        )

    def provenance(
        self, source: Source, weights: FoundWeights, plan: str, labels: str
    ) -> dict[str, Any]:
        """Return the record of an import.

        Args:
            source, weights: what was imported.
            plan, labels: where they came from.
        """
        import numpy
        import torch

        inflated = self.in_channels not in (None, weights.input_channels)
        return {
            "source": self.source,
            "file": source.checkpoint.name,
            "sha256": sha256_of(source.checkpoint),
            "plans_pickle_sha256": sha256_of(source.plans_pickle) if source.plans_pickle else None,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "format": weights.origin.value,
            "network": weights.description,
            "plan": plan,
            "labels": labels,
            "input_channels": self.in_channels or weights.input_channels,
            "stem": (self.stem or weights.default_stem) if inflated else "as in the source",
            "versions": {
                "stunet-plugin": __version__,
                "nnunetv2": host_version(),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "python": platform.python_version(),
            },
        }


def check_content(source: Source, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless the file is whole and every weight a finite number; reads the whole file."""
    if recognise(source.checkpoint) is FileFormat.TORCH_ZIP:
        check_integrity(source.checkpoint)
    check_finite(tensors, source.checkpoint)


def is_there(
    options: ImportOptions,
    target: Path,
    provenance: Mapping[str, Any],
    contents: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> bool:
    """Return whether an earlier import has left exactly what this one would write, and say so: a
    script may run twice.

    Args:
        options: of this import.
        target: the model folder.
        provenance: the record that would be written.
        contents: path within the folder to the content of each JSON file that would be.
        tensors: the weights that would be.

    Raises:
        PluginError: something else is there.
    """
    checkpoint = target / f"fold_{options.fold}" / CHECKPOINT
    if (
        options.force
        or not holds_import(target, provenance, contents)
        or not holds_weights(checkpoint, tensors)
    ):
        check_target(target, options.force)
        return False
    print(f"Already there: {target} holds this very import. Nothing was written.")
    return True


def name_of_file(source: Source) -> str:
    """Return a dataset name made of the file's."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", source.checkpoint.stem).lstrip("_-") or "imported"
