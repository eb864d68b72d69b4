"""Search for a SAM-Med2D model: an imported one by name, or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.import_sam import NAMES, model_place
from stunet_plugin.weights.locate import find_model
from stunet_plugin.weights.safe_loading import load_checkpoint
from stunet_plugin.weights.sam import SAMWeights, read_sam


def find_sam(model: Path | str, fold: str | None) -> tuple[Path, dict[str, Any], SAMWeights] | None:
    """Return checkpoint file, content and weights of a SAM model: an imported one by its name, or a
    folder of one or of a SAMMed2DTrainer; None if it is another model.

    Raises:
        PluginError: it is not imported yet, has several folds, or is damaged.
    """
    folder = Path(model).expanduser()
    if str(model) in NAMES.values() and not folder.exists():
        folder = model_place(str(model))
        if not folder.is_dir():
            raise PluginError(
                f"{model} is not here yet. Its weights are offered for download by a browser: get"
                " sam-med2d_b.pth (github.com/OpenGVLab/SAM-Med2D) or SAM's sam_vit_b_01ec64.pth,"
                " then run: stunet import FILE"
            )
    if not folder.is_dir():
        return None
    folds = sorted(path.name for path in folder.glob("fold_*") if path.is_dir())
    chosen = f"fold_{fold}" if fold else folds[0] if folds else ""
    try:
        file = find_model(str(folder / chosen)).checkpoint
    except PluginError:
        return None
    checkpoint = load_checkpoint(file)
    found = read_sam(checkpoint, file)
    if found and len(folds) > 1 and not fold:
        names = ", ".join(name.removeprefix("fold_") for name in folds)
        raise PluginError(f"{folder} has folds {names}. Choose one with -f.")
    return (file, checkpoint, found) if found else None
