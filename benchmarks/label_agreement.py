"""Label agreement of predictions of one case, and what the disagreements come from.

The case is predicted as ``nnUNetv2_predict`` does it (plain torch, outputs added up in half
precision), with the CPU engine, slab by slab, and with the last layer applied after averaging
(``features``); and once exactly, with outputs added up in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report as reports
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape as convert,
)

from stunet_plugin.inference.output_head import OutputHead
from stunet_plugin.inference.predictor import Model
from stunet_plugin.inference.slabs import SlabPredictor
from stunet_plugin.inference.window_sums import WindowSums
from stunet_plugin.options import CPU, CPU_PRECISION
from stunet_plugin.utils.files import write_atomically


class OutputsPredictor(SlabPredictor):
    """Outputs are added up, in half precision as nnU-Net does."""

    def _output_head(self, channels: int) -> OutputHead | None:
        return None


class ExactPredictor(OutputsPredictor):
    """Outputs are added up in float32, and not rounded after resampling."""

    def _new_slab(
        self, shape: Sequence[int], axis: int, depth: int, head: OutputHead | None
    ) -> WindowSums:
        slab = super()._new_slab(shape, axis, depth, head)
        slab.values, slab.weights = slab.values.float(), slab.weights.float()
        return slab

    def _slabs(self, data: Any, resampling: Any, *others: Any) -> Any:
        resampling.rounded = False
        return super()._slabs(data, resampling, *others)


WAYS: dict[str, tuple[type[SlabPredictor] | None, str, str]] = {
    "nnU-Net, plain torch": (None, "torch", "auto"),
    "nnU-Net, CPU engine": (None, "auto", "float32"),
    "nnU-Net, CPU engine, bfloat16": (None, "auto", "bfloat16"),
    "slabs of outputs": (OutputsPredictor, "auto", "float32"),
    "slabs of features": (SlabPredictor, "auto", "float32"),
    "exact": (ExactPredictor, "auto", "float32"),
}
"""The predictor (None: nnU-Net's own way), what runs the network, and in which precision there."""


def predict(model: Model, way: str, data: torch.Tensor, properties: dict[str, Any]) -> np.ndarray:
    """Return the labels of a preprocessed case."""
    kind, os.environ[CPU.variable], os.environ[CPU_PRECISION.variable] = WAYS[way]
    predictor = model.predictor
    if kind is not None:
        predictor.__class__ = kind
        return predictor.segment(data, properties).labels
    logits = predictor.predict_logits_from_preprocessed_data(data).cpu()
    managers = (predictor.plans_manager, predictor.configuration_manager, predictor.label_manager)
    return np.asarray(convert(logits, *managers, properties))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Label agreement of predictions of one case.",
        epilog="Example: python benchmarks/label_agreement.py MODEL ct.nii.gz --json out.json",
    )
    add = parser.add_argument
    add("model", type=Path, help="model folder of nnU-Net")
    add("image", type=Path, help="an image that the model's reader takes")
    add("--json", type=Path, required=True, help="file for the numbers")
    return parser


def main() -> int:
    options = build_parser().parse_args()
    model = Model(options.model, mirroring=False, progress=True)
    data, properties = model.preprocess(*model.read([options.image]))
    maps = {way: predict(model, way, data, properties) for way in WAYS}
    first, *_, exact = maps.values()
    report = {
        **reports.about(),
        "voxels": int(exact.size),
        "share_of_equal_labels": {
            way: {
                "to nnU-Net, plain torch": float((labels == first).mean()),
                "to exact": float((labels == exact).mean()),
            }
            for way, labels in maps.items()
        },
    }
    write_atomically(options.json, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
