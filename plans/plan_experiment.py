"""``stunet plan``: our planners where ``nnunetv2`` cannot be written to and nnU-Net therefore does
not find them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from stunet_plugin.errors import PluginError


def plan(
    datasets: Sequence[int],
    planner_name: str,
    gpu_memory_target: float | None,
    target_spacing: Sequence[float] | None,
    plans_name: str | None,
    processes: int,
) -> int:
    """Extract fingerprints where they are missing, plan, and say what to run next.

    Raises:
        PluginError: unknown planner, unknown dataset, nnU-Net's variables not set.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        plan_experiment_dataset,
    )
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    from stunet_plugin.plans import PLANNERS

    if processes < 1:
        raise PluginError(f"-np must be at least 1, not {processes}.")
    planner = PLANNERS.find(planner_name)
    for variable, path in (
        ("nnUNet_raw", nnUNet_raw),
        ("nnUNet_preprocessed", nnUNet_preprocessed),
    ):
        if not path.is_set():
            raise PluginError(
                f"{variable} is not set. Set it to a folder: export {variable}=/path/to/{variable}"
            )
    for dataset in datasets:
        try:
            name = convert_id_to_dataset_name(dataset)
        except RuntimeError as error:
            raise PluginError(
                f"There is no dataset {dataset} (Dataset{dataset:03d}_...) in {nnUNet_raw.get()}."
            ) from error
        _check_raw(Path(nnUNet_raw.get(), name))
    for dataset in datasets:
        extract_fingerprint_dataset(dataset, num_processes=processes, clean=False)
        _, identifier = plan_experiment_dataset(
            dataset,
            planner,
            gpu_memory_target_in_gb=gpu_memory_target,
            overwrite_target_spacing=tuple(target_spacing) if target_spacing else None,
            overwrite_plans_name=plans_name,
        )
        print(f"Next: nnUNetv2_preprocess -d {dataset} -plans_name {identifier} -c 3d_fullres")
    return 0


def _check_raw(folder: Path) -> None:
    """Raise unless a raw dataset has what nnU-Net's fingerprint reads."""
    file = folder / "dataset.json"
    try:
        description = json.loads(file.read_text())
        lacking = [key for key in ("labels", "file_ending") if key not in description]
    except FileNotFoundError as error:
        raise PluginError(
            f"{folder} has no dataset.json. nnU-Net's raw format needs one beside imagesTr and"
            " labelsTr."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise PluginError(f"{file} cannot be read ({error}). Mend it.") from error
    if lacking or not (description.get("channel_names") or description.get("modality")):
        raise PluginError(
            f"{file} lacks {', '.join(lacking) or 'channel_names'}, which nnU-Net needs."
        )
    if "dataset" not in description and not any(
        (folder / "imagesTr").glob(f"*{description['file_ending']}")
    ):
        raise PluginError(
            f"{folder / 'imagesTr'} holds no *{description['file_ending']} files (file_ending in"
            " dataset.json)."
        )
