"""Import of SAM-Med2D or SAM: a checkpoint becomes a model for ``stunet prompt``, and to fine-tune
with SAMMed2DTrainer."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import CHECKPOINT
from stunet_plugin.utils.files import home
from stunet_plugin.weights import model_folder
from stunet_plugin.weights.file_formats import check_integrity
from stunet_plugin.weights.locate import Source
from stunet_plugin.weights.sam import read_sam
from stunet_plugin.weights.tensors import check_finite

if TYPE_CHECKING:
    from stunet_plugin.commands.import_ import Import

TRAINER = "SAMMed2DTrainer"
"""Prefix of the trainers that fine-tune it."""
NAMES = {True: "sam-med2d", False: "sam"}
"""What `stunet prompt` calls the model with and without adapters."""
_FILE = f"fold_0/{CHECKPOINT}"
_USED = ("source", "out", "name", "force")
"""Options of the import that a SAM has a use for."""


def model_place(name: str) -> Path:
    """Return the folder of an imported SAM; it need not be there."""
    return home() / "models" / name


def import_sam(options: Import, source: Source, checkpoint: Mapping[str, Any]) -> int:
    """Import a checkpoint that holds a SAM; wrong input leaves nothing."""
    _refuse_other_options(options)
    path = source.checkpoint
    weights = read_sam(checkpoint, path)
    assert weights is not None
    print(f"Checkpoint:   {path.name}\nNetwork:      {weights.description}")
    name = options.name or NAMES[weights.adapters]
    folder = Path(options.out).expanduser().absolute() if options.out else model_place(name)
    record = {
        **model_folder.describe_source(options.source, path),
        "format": weights.title,
        "adapters": weights.adapters,
    }
    trainer = TRAINER if weights.preset.name == "vit_b" else f"{TRAINER}_{weights.preset.name}"
    if model_folder.is_there(folder, record, {}, _FILE, options.force):
        print(f"Already there: {folder} holds this very import. Nothing was written.")
    else:
        check_integrity(path)
        check_finite(weights.tensors, path)
        arguments = {"configuration": "2d"}
        save = partial(model_folder.save_checkpoint, weights.tensors, trainer, arguments, None, {})
        model_folder.write_model_folder(folder, record, {_FILE: save}, _FILE)
    print(f"Model folder: {folder}")
    model = shlex.quote(str(folder) if options.out else name)
    file = shlex.quote(str(folder / _FILE))
    print(f"Prompt:       stunet prompt {model} -i IMAGE -o OUT --box X0,Y0,X1,Y1")
    print(f"Fine-tune:    nnUNetv2_train DATASET 2d FOLD -tr {trainer} -pretrained_weights {file}")
    return 0


def _refuse_other_options(options: Import) -> None:
    given = [
        f"--{one.name.replace('_', '-')}"
        for one in fields(options)
        if one.name not in _USED and getattr(options, one.name) != one.default
    ]
    if given:
        raise PluginError(
            f"{', '.join(given)}: a SAM has no plan, labels, folds or channels to choose. Leave it"
            " out; --out or --name say where the model goes."
        )
