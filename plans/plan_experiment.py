"""Planning with our planners where nnU-Net does not find them (``stunet plan``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CONFIGURATION
from stunet_plugin.utils.files import read_json

if TYPE_CHECKING:
    from stunet_plugin.commands.plan import Plan

FINGERPRINT = "dataset_fingerprint.json"


def plan(options: Plan) -> int:
    """Extract fingerprints where they are missing, plan, and say what to run next."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    from stunet_plugin.plans import PLANNERS

    if options.processes < 1:
        raise PluginError(f"-np must be at least 1, not {options.processes}.")
    planner = PLANNERS.find(options.planner)
    paths = {"nnUNet_raw": nnUNet_raw, "nnUNet_preprocessed": nnUNet_preprocessed}
    for variable, path in paths.items():
        if not path.is_set():
            raise PluginError(f"{variable} is not set. Run: export {variable}=/path/to/{variable}")
    names = {}
    for dataset in options.datasets:
        try:
            names[dataset] = convert_id_to_dataset_name(dataset)
        except RuntimeError as error:
            raise PluginError(
                f"There is no dataset {dataset} (Dataset{dataset:03d}_...) in {nnUNet_raw.get()}."
            ) from error
        _check_raw(Path(nnUNet_raw.get(), names[dataset]))
        _check_fingerprint(Path(nnUNet_preprocessed.get(), names[dataset], FINGERPRINT))
    for dataset, name in names.items():
        api.extract_fingerprint_dataset(dataset, num_processes=options.processes, clean=False)
        plans, identifier = api.plan_experiment_dataset(
            dataset,
            planner,
            gpu_memory_target_in_gb=options.gpu_memory_target,
            overwrite_target_spacing=options.overwrite_target_spacing,
            overwrite_plans_name=options.overwrite_plans_name,
        )
        chosen = CONFIGURATION if CONFIGURATION in plans["configurations"] else "2d"
        data = plans["configurations"][chosen]["data_identifier"]
        shared = data != f"{identifier}_{chosen}"
        if shared and Path(nnUNet_preprocessed.get(), name, data).is_dir():
            # Preprocessing would delete the data first.
            print(f"Next: nnUNetv2_train {dataset} {chosen} 0 -p {identifier} -tr TRAINER")
        else:
            print(f"Next: nnUNetv2_preprocess -d {dataset} -plans_name {identifier} -c {chosen}")
    return 0


def _check_fingerprint(file: Path) -> None:
    """Raise if there is a fingerprint that nnU-Net cannot use."""
    if file.is_file() and not {"spacings", "shapes_after_crop"} <= read_json(file).keys():
        raise PluginError(f"{file} is no fingerprint of nnU-Net. Delete it and run this again.")


def _check_raw(folder: Path) -> None:
    """Raise unless a raw dataset has what nnU-Net's fingerprint reads."""
    file = folder / "dataset.json"
    if not file.is_file():
        raise PluginError(f"{folder} has no dataset.json, which nnU-Net needs.")
    description = read_json(file)
    lacking = [key for key in ("labels", "file_ending") if key not in description]
    if not (description.get("channel_names") or description.get("modality")):
        lacking.append("channel_names")
    if lacking:
        raise PluginError(f"{file} lacks {', '.join(lacking)}, which nnU-Net needs.")
    ending, images = description["file_ending"], folder / "imagesTr"
    if "dataset" not in description and not any(images.glob(f"*{ending}")):
        raise PluginError(f"{images} holds no *{ending} files (file_ending in dataset.json).")
