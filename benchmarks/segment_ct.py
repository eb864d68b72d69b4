"""Time and memory of ``stunet segment`` against ``nnUNetv2_predict`` on one CT, in one run.

Both take the same model folder, alternating; the labels are compared voxel by voxel. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import predict_whole_ct as whole
import report as reports
import SimpleITK as sitk

from stunet_plugin.nnunet.commands import find_command
from stunet_plugin.nnunet.registration import trainers_folder
from stunet_plugin.utils.files import write_atomically


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time and memory of stunet segment against nnUNetv2_predict.",
        epilog="Example: python benchmarks/segment_ct.py --image ct.nii.gz --json segment_ct.json",
    )
    whole.add_model_options(parser)
    add = parser.add_argument
    add("--rounds", type=int, default=1, help="how often each runs")
    add("--more", default="", metavar="OPTIONS", help="of stunet segment, such as '--fast'")
    add("--json", type=Path, required=True, help="file for the numbers")
    return parser


def main() -> int:
    options = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, results = Path(folder), Path(folder, "results")
        for new in (work / "images", results):
            new.mkdir()
        image = work / "images" / "ct_0000.nii.gz"
        shutil.copyfile(options.image, image)
        environment = {**os.environ, "nnUNet_results": str(results)}
        environment["nnUNet_extTrainer"] = str(trainers_folder())
        environment["STUNET_HOME"] = str(work / "home")
        model = options.model or whole.import_random_weights(options, work, environment)
        stock = whole.prediction_command(model, options.fold, True, results)
        ours = ["stunet", "segment", str(image), "--model", str(model), "-f", options.fold]
        ours += ["--device", "cpu", "--quiet", *options.more.split()]
        commands = {
            "nnUNetv2_predict": [*stock, "-i", str(work / "images")],
            "stunet segment": ours,
        }
        measured: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, (program, *words) in commands.items():
                out = work / name
                shutil.rmtree(out, ignore_errors=True)
                # Stock predictions of our trainers' networks in plain torch, as published.
                own = {"STUNET_CPU": "torch"} if name == "nnUNetv2_predict" else {}
                command = [find_command(program), *words, "-o", str(out)]
                measured[name].append(whole.measure(command, environment | own))
        maps = [sitk.ReadImage(str(work / name / "ct.nii.gz")) for name in commands]
        first, second = map(sitk.GetArrayFromImage, maps)
        run = json.loads((work / "stunet segment" / "run.json").read_text())
        description = whole.describe_model(model)
    report = {
        **reports.about(),
        "model": description,
        "image": {"voxels": maps[0].GetSize(), "spacing_mm": maps[0].GetSpacing()},
        "commands": {
            name: {
                "seconds": [round(seconds, 1) for seconds, _ in runs],
                "peak_memory_gib": [round(peak / reports.GIBIBYTE, 2) for _, peak in runs],
            }
            for name, runs in measured.items()
        },
        "options": options.more,
        "engine": run["engine"],
        "share_of_equal_labels": float((first == second).mean()),
    }
    write_atomically(options.json, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
