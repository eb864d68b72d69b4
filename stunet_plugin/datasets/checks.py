"""Checks of a dataset for ``stunet doctor -d``: what training would stumble over, or learn from
without a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from stunet_plugin.datasets.case_facts import Facts
from stunet_plugin.datasets.raw_dataset import RawDataset
from stunet_plugin.errors import few
from stunet_plugin.nnunet.names import TO_RAS
from stunet_plugin.utils.findings import OK, WARNING, WRONG, Finding
from stunet_plugin.utils.geometry import Grid, can_be_turned
from stunet_plugin.utils.label_systems import LabelSystem

SPACING_FACTOR = 2.5
"""From the median of an axis; further than that, and than five deviations, is an outlier."""
SMALL = 0.5
"""Part of the patch below which most of it is padding."""
AIR, LEAST_RANGE = -150.0, 150.0
"""In a CT something is below the first (air, or fat), and its values are further apart than the
second: in Hounsfield units."""
HOUNSFIELD_LIMITS = (-10_000.0, 35_000.0)


def check_dataset(dataset: RawDataset, facts: Facts, patch: Sequence[int]) -> Iterator[Finding]:
    """Yield what is found in a dataset; ``patch`` is in voxels of the median spacing (z, y, x)."""
    yield _files(dataset, facts)
    yield _declared_values(dataset)
    yield _grids(facts)
    yield _orientations(dataset, facts)
    yield _spacings(facts)
    yield _sizes(facts, patch)
    yield from _labels(dataset, facts)
    yield from _intensities(dataset, facts)
    yield _duplicates(facts)


def _files(dataset: RawDataset, facts: Facts) -> Finding:
    wrong = partial(Finding, WRONG, "files")
    if facts.problems:
        listed = "; ".join(list(facts.problems.values())[:3])
        state = f"{len(facts.problems)} cannot be used: {listed}"
        return wrong(state, "Fix the files or leave their cases out.")
    number, said = len(facts.cases), dataset.description.get("numTraining")
    if said != number:
        advice = "nnU-Net refuses that. Set numTraining in dataset.json."
        return wrong(f"{number} cases, and numTraining is {said!r}", advice)
    wanted = {x for case in facts.cases for x in (*case.images, case.label)}
    read = len(wanted & facts.voxels.keys())
    seen = "all" if read == len(wanted) else f"{read} of {len(wanted)}, for want of time (--all)"
    return Finding(OK, "files", f"{number} cases; voxels read of {seen}")


def _declared_values(dataset: RawDataset) -> Finding:
    """nnU-Net needs 0, 1, 2, ... without a gap, the ignore label last."""
    what = "label values"
    values = sorted(LabelSystem.from_table(dataset.description, dataset.name).values)
    gaps = sorted(set(range(values[-1])) - set(values))
    if gaps:
        state = f"dataset.json does not declare {few(list(map(str, gaps)))}, but {values[-1]}"
        advice = "nnU-Net wants 0, 1, 2, ... without a gap: number the labels anew, maps included."
        return Finding(WRONG, what, state, advice)
    return Finding(OK, what, f"0 to {values[-1]}")


def _grids(facts: Facts) -> Finding:
    """Images and label maps of a case must have the same voxels in the same order."""
    turned: list[str] = []
    other: list[str] = []
    example = ""
    for case in facts.sound:
        label = facts.grids[case.label]
        for file in case.images:
            image = facts.grids[file]
            if not image.agrees(label):
                (turned if can_be_turned(image, label) else other).append(case.name)
                example = example or f"{case.name}: image {image}; labels {label}"
                break
    if not turned and not other:
        return Finding(OK, "grids", "images and label maps have the same voxels")
    kinds = {"are stored in another order": turned, "have other voxels": other}
    told = [f"{len(x)} label maps {kind} than their images" for kind, x in kinds.items() if x]
    advice = (
        "nnU-Net reads arrays, so every label would be in a wrong place: turn or resample them."
    )
    return Finding(WRONG, "grids", f"{' and '.join(told)} ({example})", advice)


def _orientations(dataset: RawDataset, facts: Facts) -> Finding:
    what = "orientation"
    found: dict[str, list[str]] = {}
    for case in facts.sound:
        found.setdefault(facts.grids[case.images[0]].orientation, []).append(case.name)
    counts = sorted(found.items(), key=lambda pair: -len(pair[1]))
    state = ", ".join(f"{name} in {len(cases)} ({cases[0]})" for name, cases in counts)
    if len(found) < 2 or dataset.description.get("overwrite_image_reader_writer") == TO_RAS:
        return Finding(OK, what, ", ".join(found))
    advice = (
        "nnU-Net does not turn images. Turn them all to one, or put"
        f' "overwrite_image_reader_writer": "{TO_RAS}" into dataset.json before planning.'
    )
    return Finding(WARNING, what, f"mixed: {state}", advice)


def _along_patient(grid: Grid) -> np.ndarray:
    """The spacing along each axis of the patient, so that orientations do not matter."""
    axes = len(grid.size)
    nearest = np.abs(np.reshape(grid.direction, (axes, axes))).argmax(axis=1)
    return np.array(grid.spacing)[nearest]


def _spacings(facts: Facts) -> Finding:
    cases = facts.sound
    spacings = np.array([_along_patient(facts.grids[case.images[0]]) for case in cases])
    if not len(cases):
        return Finding(OK, "spacing", "no case can be read")
    median = np.median(spacings, axis=0)
    distance = np.abs(np.log(spacings / median))
    usual = 5 * 1.4826 * np.median(distance, axis=0)
    odd = (distance > np.maximum(np.log(SPACING_FACTOR), usual)).any(axis=1)
    text = " x ".join(f"{x:.3g}" for x in median)
    if not odd.any():
        return Finding(OK, "spacing", f"median {text} mm")
    listed = [
        f"{case.name} ({' x '.join(f'{x:.3g}' for x in spacings[number])} mm)"
        for number, case in enumerate(cases)
        if odd[number]
    ]
    state = f"{len(listed)} cases are far from the median, {text} mm: {few(listed, 3)}"
    return Finding(WARNING, "spacing", state, "Look at their headers: a wrong one is often 1 mm.")


def median_shape(facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Return the median spacing in mm, and the median size in voxels of it, both (z, y, x)."""
    grids = [facts.grids[case.images[0]] for case in facts.sound]
    spacing = np.median([grid.spacing[::-1] for grid in grids], axis=0)
    sizes = [np.array(grid.size[::-1]) * grid.spacing[::-1] / spacing for grid in grids]
    return spacing, np.median(sizes, axis=0)


def _sizes(facts: Facts, patch: Sequence[int]) -> Finding:
    if not facts.sound:
        return Finding(OK, "size", "no case can be read")
    spacing, median = median_shape(facts)
    text = " x ".join(str(round(x)) for x in median)
    small = []
    for case in facts.sound:
        grid = facts.grids[case.images[0]]
        size = np.array(grid.size[::-1]) * grid.spacing[::-1] / spacing
        if (size[-len(patch) :] < SMALL * np.array(patch)).any():
            small.append(f"{case.name} ({' x '.join(str(round(x)) for x in size)})")
    wanted = " x ".join(map(str, patch))
    if not small:
        return Finding(OK, "size", f"median {text} voxels, patch {wanted}")
    state = f"{len(small)} cases are below half of the patch, {wanted}: {few(small, 3)}"
    advice = "Their patches are mostly padding. Leave them out if they are cut by mistake."
    return Finding(WARNING, "size", state, advice)


def _labels(dataset: RawDataset, facts: Facts) -> Iterator[Finding]:
    """Values in the label maps: those nobody declared, maps of background, classes without any."""
    system = LabelSystem.from_table(dataset.description, dataset.name)
    seen = {
        case: facts.voxels[case.label].counts for case in facts.cases if case.label in facts.voxels
    }
    others = {case.name: sorted(set(x) - system.values) for case, x in seen.items()}
    others = {name: values for name, values in others.items() if values}
    if others:
        name, values = next(iter(others.items()))
        state = f"{len(others)} label maps hold values that nobody declared ({name}: {values})"
        yield Finding(WRONG, "labels", state, "Declare them in dataset.json, or fix the maps.")
    empty = [case.name for case, counts in seen.items() if not set(counts) - {0, system.ignore}]
    if empty:
        state = f"{len(empty)} of {len(seen)} label maps hold background alone: {few(empty, 3)}"
        advice = "Right where nothing is to be found; else the labels of these cases are lost."
        yield Finding(WARNING, "empty labels", state, advice)
    present = {value for counts in seen.values() for value in counts}
    absent = [name for name, values in system.classes.items() if not present & set(values)]
    if absent and len(seen) == len(facts.cases):
        state = f"no case has {few(absent)}"
        yield Finding(WARNING, "classes", state, "The network cannot learn what it is never shown.")
    elif not others and not empty:
        yield Finding(OK, "labels", f"{len(seen)} label maps hold declared values alone")


def _intensities(dataset: RawDataset, facts: Facts) -> Iterator[Finding]:
    flat, no_hu = [], []
    for case in facts.cases:
        for number, file in enumerate(case.images):
            found = facts.voxels.get(file)
            if found is None:
                continue
            values = f"{case.name} ({found.low:g} to {found.high:g})"
            if found.low == found.high:
                flat.append(values)
            elif len(case.images) == len(dataset.channels) and is_ct(dataset.channels[number]):
                low, high = HOUNSFIELD_LIMITS
                fits = low <= found.low <= AIR and found.high <= high
                if not fits or found.high - found.low < LEAST_RANGE:
                    no_hu.append(values)
    if flat:
        state = f"{len(flat)} images have one value in all voxels: {few(flat, 3)}"
        yield Finding(WARNING, "intensities", state, "Leave these cases out.")
    if no_hu:
        state = f"{len(no_hu)} CT images are not in Hounsfield units: {few(no_hu, 3)}"
        advice = (
            "Air is -1000, water 0. Convert them, or give the channel another name in dataset.json,"
            " which normalises each image by itself."
        )
        yield Finding(WARNING, "intensities", state, advice)
    if not flat and not no_hu:
        number = sum(file in facts.voxels for case in facts.cases for file in case.images)
        yield Finding(OK, "intensities", f"{number} images, channels {', '.join(dataset.channels)}")


def is_ct(channel: str) -> bool:
    """Whether nnU-Net normalises a channel as CT."""
    return channel.casefold() == "ct"


def _duplicates(facts: Facts) -> Finding:
    """The same voxels in two cases, or in a training and a test case."""
    images = {case.name: case.images for case in facts.cases}
    images |= {f"{files[0].name} of imagesTs": files for files in facts.tests}
    by_hash: dict[tuple[str, ...], list[str]] = {}
    for name, files in images.items():
        if all(file in facts.voxels for file in files):
            by_hash.setdefault(tuple(facts.voxels[x].hash for x in files), []).append(name)
    same = [" = ".join(names) for names in by_hash.values() if len(names) > 1]
    if not same:
        return Finding(OK, "duplicates", f"none among {len(by_hash)} cases")
    state = f"{len(same)} images are there more than once: {few(same, 3)}"
    advice = "Keep one: a copy in another fold, or in the test set, makes scores too good."
    return Finding(WARNING, "duplicates", state, advice)
