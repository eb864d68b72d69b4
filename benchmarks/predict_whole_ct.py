"""Time and memory of nnU-Net's prediction of a whole CT: with a model folder, or with an imported
model of published architecture.

The latter's weights are random because published ones are not part of this repository; time and
memory do not depend on them. Writes a JSON with the seconds and the peak memory of the command and
all of its worker processes together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import SimpleITK as sitk
import torch

from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.registration import host_version, trainers_folder
from stunet_plugin.utils.files import write_atomically

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from import_helpers import make_network, published_weights, v1_checkpoint

POLL_SECONDS = 0.5
DATASET, DATASET_NAME = 998, "CT"


def memory_of_group(group: int) -> int:
    """Bytes of all processes of a process group; memory that several share counts once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group:
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += next(
                    int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")
                )
        except (OSError, StopIteration):
            continue  # It has just ended.
    return total


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Run a command and return its seconds and the peak of its memory."""
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


def import_random_weights(
    size: str, outputs: int, pickle: Path, work: Path, environment: dict[str, str]
) -> Path:
    """Import a checkpoint of published format with random weights; return the model folder."""
    source = work / f"{size}_ep4k.model"
    torch.save(v1_checkpoint(published_weights(make_network(size, outputs=outputs))), source)
    shutil.copyfile(pickle, source.with_name(source.name + ".pkl"))
    command = [
        find_command("stunet"),
        "import",
        str(source),
        "--dataset-id",
        str(DATASET),
        "--name",
        DATASET_NAME,
    ]
    subprocess.run(command, env=environment, check=True)
    source.unlink()
    return next((work / "results" / f"Dataset{DATASET}_{DATASET_NAME}").iterdir())


def plan_at(folder: Path, spacing: float) -> None:
    """Change the spacing of an imported model's plan, and with it how many patches a CT takes."""
    file = folder / "plans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [spacing] * 3
    file.write_text(json.dumps(plans))


def prediction_command(model: Path, fold: str, sequential: bool, results: Path) -> list[str]:
    """Return the command but for its folders of images; ``sequential`` is the one that takes the
    least memory.

    nnU-Net has that option where models are found by name, so the model folder must be in
    ``results``, or is linked there.
    """
    common = ["-f", fold, "-device", "cpu", "--disable_tta"]
    if not sequential:
        return [
            "nnUNetv2_predict_from_modelfolder",
            "-m",
            str(model),
            *common,
            "-npp",
            "1",
            "-nps",
            "1",
        ]
    link = results / f"Dataset{DATASET}_{DATASET_NAME}" / model.name
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(model.resolve())
    trainer, plans, configuration = model.name.split("__")
    named = ["-d", str(DATASET), "-tr", trainer, "-p", plans, "-c", configuration]
    return ["nnUNetv2_predict", *named, *common, "-npp", "0", "-nps", "0"]


def describe_model(folder: Path) -> dict[str, Any]:
    """Return the network, outputs and configurations (patch size, spacing in mm) of a model
    folder."""
    plans = json.loads((folder / "plans.json").read_text())
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    full = plans["configurations"]["3d_fullres"]
    return {
        "network": full["architecture"]["network_class_name"].rpartition(".")[2],
        "trainer": folder.name.partition("__")[0],
        "outputs": len(labels),
        "patch_size": full["patch_size"],
        "spacing_mm": full["spacing"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "Example: python benchmarks/predict_whole_ct.py --image example_ct.nii.gz --pickle"
            ' small_ep4k.model.pkl --machine "2 CPU cores" --json'
            " benchmarks/results/predict_whole_ct.json"
        ),
    )
    parser.add_argument("--image", type=Path, required=True, help="a CT")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", type=Path, help="model folder of nnU-Net, with a 3d_fullres configuration"
    )
    source.add_argument(
        "--pickle", type=Path, help="published .model.pkl of --size, to import random weights with"
    )
    parser.add_argument("--fold", default="0", help="of --model")
    parser.add_argument("--size", default="small", help="of STU-Net, with --pickle")
    parser.add_argument(
        "--outputs",
        type=int,
        default=105,
        help="of the network, background included, with --pickle",
    )
    parser.add_argument(
        "--spacing",
        type=float,
        metavar="MM",
        help="of the plan, with --pickle, instead of the published 1.5 mm",
    )
    parser.add_argument(
        "--sequential",
        action="store_true",
        help="nnUNetv2_predict -npp 0 -nps 0: no workers, less memory",
    )
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    parser.add_argument("--json", type=Path, required=True, help="file for the numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "results").mkdir()
        environment = {
            **os.environ,
            "nnUNet_results": str(work / "results"),
            "nnUNet_extTrainer": str(trainers_folder()),
        }
        if options.model is None:
            model = import_random_weights(
                options.size, options.outputs, options.pickle, work, environment
            )
            if options.spacing is not None:
                plan_at(model, options.spacing)
        else:
            model = options.model
        (work / "images").mkdir()
        shutil.copyfile(options.image, work / "images" / "ct_0000.nii.gz")
        command = prediction_command(model, options.fold, options.sequential, work / "results")
        folders = ["-i", str(work / "images"), "-o", str(work / "out")]
        seconds, peak = measure([find_command(command[0]), *command[1:], *folders], environment)
        image, predicted = (
            sitk.ReadImage(str(options.image)),
            sitk.ReadImage(str(work / "out" / "ct.nii.gz")),
        )
        description = describe_model(model)
    if predicted.GetSize() != image.GetSize():
        sys.exit(f"The prediction has the shape {predicted.GetSize()}, the image {image.GetSize()}")
    report = {
        "date": datetime.now(timezone.utc).isoformat(),
        "machine": options.machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nnunetv2": host_version(),
        },
        "model": description,
        "image": {"voxels": image.GetSize(), "spacing_mm": image.GetSpacing()},
        "command": " ".join(word for word in command if word != str(model)),
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak / 1024**3, 2),
    }
    write_atomically(options.json, json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
