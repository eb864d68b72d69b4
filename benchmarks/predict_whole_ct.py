"""Time and memory of nnU-Net's prediction of a whole CT.

With a model folder (``--model``), or with a published architecture and random weights (``--size``),
on which time and memory do not depend. Writes a JSON with the seconds and the peak memory of the
command and all of its worker processes together. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report as reports
import SimpleITK as sitk
import torch

from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.memory import PUBLISHED_STRIDES
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.registration import trainers_folder
from stunet_plugin.utils.files import write_atomically

POLL_SECONDS = 0.5
DATASET, DATASET_NAME = 998, "CT"
PUBLISHED_SPACING, PUBLISHED_PATCH = 1.5, ["128"] * 3


def memory_of_group(group: int) -> int:
    """Return the bytes of all processes of a process group; shared memory counts once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group:
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue  # It has just ended.
    return total * 1024


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Run a command and return its seconds and the peak of its memory in bytes."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None:
        peak = max(peak, memory_of_group(process.pid))
        time.sleep(POLL_SECONDS)
    if process.returncode != 0:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    return time.monotonic() - start, peak


def import_random_weights(options: argparse.Namespace, work: Path, environment: Any) -> Path:
    """Import a checkpoint of STU-Net with random weights; return the model folder."""
    source = work / "random.pth"
    arguments = stunet_architecture(PRESETS[options.size], PUBLISHED_STRIDES)["arch_kwargs"]
    network = STUNet(1, options.outputs, **{**arguments, "conv_op": torch.nn.Conv3d})
    network.apply(network.initialize)
    torch.save({"network_weights": network.state_dict()}, source)
    names = ["background", *(f"class_{number}" for number in range(1, options.outputs))]
    plan = ["--spacing", *[str(options.spacing)] * 3, "--patch-size", *PUBLISHED_PATCH]
    strides = [",".join(map(str, stride)) for stride in PUBLISHED_STRIDES[1:]]
    target = ["--dataset-id", str(DATASET), "--name", DATASET_NAME]
    command = [find_command("stunet"), "import", str(source), *target, *plan, "--labels", *names]
    subprocess.run([*command, "--strides", *strides], env=environment, check=True)
    source.unlink()
    return next((work / "results" / f"Dataset{DATASET}_{DATASET_NAME}").iterdir())


def prediction_command(model: Path, fold: str, sequential: bool, results: Path) -> list[str]:
    """Return the command without its folders of images; ``sequential`` takes the least memory.

    nnU-Net has that option where models are found by name, so the model is linked into ``results``.
    """
    common = ["-f", fold, "-device", "cpu", "--disable_tta"]
    if not sequential:
        workers = ["-npp", "1", "-nps", "1"]
        return ["nnUNetv2_predict_from_modelfolder", "-m", str(model), *common, *workers]
    link = results / f"Dataset{DATASET}_{DATASET_NAME}" / model.name
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(model.resolve())
    trainer, plans, configuration = model.name.split("__")
    named = ["-d", str(DATASET), "-tr", trainer, "-p", plans, "-c", configuration]
    return ["nnUNetv2_predict", *named, *common, "-npp", "0", "-nps", "0"]


def describe_model(folder: Path) -> dict[str, Any]:
    """Return network, outputs, patch size and spacing (mm) of a model folder."""
    plans = json.loads((folder / "plans.json").read_text())
    full = plans["configurations"]["3d_fullres"]
    return {
        "network": full["architecture"]["network_class_name"].rpartition(".")[2],
        "trainer": folder.name.partition("__")[0],
        "outputs": len(json.loads((folder / "dataset.json").read_text())["labels"]),
        "patch_size": full["patch_size"],
        "spacing_mm": full["spacing"],
    }


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which CT is predicted by which model."""
    add = parser.add_argument
    add("--image", type=Path, required=True, help="a CT")
    add("--model", type=Path, help="model folder of nnU-Net with a 3d_fullres configuration")
    add("--fold", default="0", help="of --model")
    add("--size", default="small", choices=PRESETS, help="of STU-Net, without --model")
    add("--outputs", type=int, default=105, help="background included, without --model")
    add("--spacing", type=float, default=PUBLISHED_SPACING, metavar="MM", help="without --model")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time and memory of nnU-Net's prediction of a whole CT.",
        epilog="Example: python benchmarks/predict_whole_ct.py --image ct.nii.gz --json ct.json",
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--sequential", action="store_true", help="no worker processes, less memory")
    add("--json", type=Path, required=True, help="file for the numbers")
    return parser


def main() -> int:
    options = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, results = Path(folder), Path(folder, "results")
        (work / "images").mkdir()
        results.mkdir()
        shutil.copyfile(options.image, work / "images" / "ct_0000.nii.gz")
        environment = {**os.environ, "nnUNet_results": str(results)}
        environment["nnUNet_extTrainer"] = str(trainers_folder())
        model = options.model or import_random_weights(options, work, environment)
        command = prediction_command(model, options.fold, options.sequential, results)
        folders = ["-i", str(work / "images"), "-o", str(work / "out")]
        seconds, peak = measure([find_command(command[0]), *command[1:], *folders], environment)
        image = sitk.ReadImage(str(options.image))
        predicted = sitk.ReadImage(str(work / "out" / "ct.nii.gz"))
        description = describe_model(model)
    if predicted.GetSize() != image.GetSize():
        sys.exit(f"The prediction has the shape {predicted.GetSize()}, the image {image.GetSize()}")
    report = {
        **reports.about(),
        "model": description,
        "image": {"voxels": image.GetSize(), "spacing_mm": image.GetSpacing()},
        "command": " ".join(word for word in command if word != str(model)),
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak / reports.GIBIBYTE, 2),
    }
    write_atomically(options.json, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
