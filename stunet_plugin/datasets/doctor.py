"""Doctor for a dataset: what is wrong with it, and what a training on it will need."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import inf, prod
from pathlib import Path
from typing import TYPE_CHECKING

from stunet_plugin.datasets.case_facts import Facts, gather
from stunet_plugin.datasets.checks import check_dataset, median_shape
from stunet_plugin.datasets.needs import check_machine
from stunet_plugin.datasets.raw_dataset import RawDataset, find_raw, list_images, read_raw
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import PREPROCESSED
from stunet_plugin.utils.files import read_json
from stunet_plugin.utils.findings import OK, WRONG, Finding, report
from stunet_plugin.utils.label_systems import LabelSystem
from stunet_plugin.utils.validation import Fields

if TYPE_CHECKING:
    from stunet_plugin.commands.doctor import Doctor

SECONDS = 45.0
"""For voxels; what is not read by then is left out, and said."""
LARGEST_PATCH, BATCH = 128, 2
"""What is assumed before planning: at most the median size on any axis, as planners do."""


def examine_dataset(options: Doctor) -> int:
    """Print what is found; return 0 if nothing is wrong, else 1."""
    if options.processes is not None and options.processes < 1:
        raise PluginError(f"-np must be at least 1, not {options.processes}.")
    folder = find_raw(str(options.dataset))
    fine = "The dataset is fine. `stunet doctor` alone checks the installation."
    return report(findings(options, folder), options.json, fine)


def findings(options: Doctor, folder: Path) -> Iterator[Finding]:
    """Examine a dataset in nnUNet_raw, then what the machine has for it."""
    try:
        dataset = read_raw(folder)
        system = LabelSystem.from_table(dataset.description, dataset.name)
    except PluginError as error:
        yield Finding(WRONG, "dataset", str(error))
        return
    yield Finding(OK, "dataset", f"{dataset.name}, {len(dataset.cases)} cases")
    processes = options.processes or max((os.cpu_count() or 1) // 2, 1)
    facts = gather(dataset.cases, _tests(dataset), processes, inf if options.all else SECONDS)
    patch, batch, origin = _patch(dataset, facts, options)
    yield Finding(OK, "patch", f"{' x '.join(map(str, patch))}, batch {batch} ({origin})")
    yield from check_dataset(dataset, facts, patch)
    largest = max((prod(grid.size) for grid in facts.grids.values()), default=0)
    outputs = len(system.classes) + ("regions_class_order" not in dataset.description)
    yield from check_machine(largest, len(dataset.channels), outputs, patch, batch)


def _tests(dataset: RawDataset) -> list[tuple[Path, ...]]:
    """The images of imagesTs, if there are any that can be listed."""
    try:
        folder = dataset.folder / "imagesTs"
        return list(list_images(folder, dataset.file_ending, len(dataset.channels)).values())
    except PluginError:
        return []


def _patch(dataset: RawDataset, facts: Facts, options: Doctor) -> tuple[Sequence[int], int, str]:
    """Return patch and batch of the plans, or what planners may choose; and whose they are."""
    file = Path(os.environ.get(PREPROCESSED, ""), dataset.name, f"{options.plans}.json")
    if os.environ.get(PREPROCESSED) and file.is_file():
        found = Fields(read_json(file), str(file)).fields("configurations")
        configuration = found.fields(options.configuration)
        if "patch_size" in configuration:
            axes = len(configuration.get("patch_size"))
            patch = configuration.positives("patch_size", axes, whole=True)
            return patch, configuration.integer("batch_size", 1), f"of {options.plans}"
    if not facts.sound:
        return (LARGEST_PATCH,) * 3, BATCH, "assumed"
    _, median = median_shape(facts)
    return [min(round(x), LARGEST_PATCH) for x in median], BATCH, "assumed: not planned yet"
