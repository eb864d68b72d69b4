"""Model card of a shared model: README.md with data, labels, plan, trainer, validation, licence,
citation and hashes, and a picture."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.figures import saved_figure
from stunet_plugin.utils.files import read_json, sha256_of
from stunet_plugin.utils.label_systems import BACKGROUND, IGNORE
from stunet_plugin.utils.validation import is_number
from stunet_plugin.weights.locate import HUB_PREFIX, SHARED

if TYPE_CHECKING:
    from stunet_plugin.commands.share import Share
    from stunet_plugin.weights.share_model import TrainedModel

PICTURE, CARD = "picture.png", "README.md"
TEMPLATE = "model_card.md.j2"


def write_card(model: TrainedModel, folder: Path, options: Share, picture: Path | None) -> None:
    """Write card and picture beside the weights that are there."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    dice = validated_dice(model)
    if picture:
        shutil.copyfile(picture, folder / PICTURE)
    else:
        _save_dice(dice, folder / PICTURE)
    loader = PackageLoader("stunet_plugin.weights", ".")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template(TEMPLATE).render(
        model=model,
        options=options,
        dice=dice,
        means={name: sum(values) / len(values) for name, values in dice.items()},
        hashes={x: sha256_of(folder / x / SHARED) for x in model.weights},
        picture=PICTURE,
        place=options.out if options.out.startswith(HUB_PREFIX) else "THIS_FOLDER",
        structures=len(set(model.dataset["labels"]) - {BACKGROUND, IGNORE}),
        weights=SHARED,
        version=__version__,
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def validated_dice(model: TrainedModel) -> dict[str, list[float]]:
    """Return the Dice of every validation case by class, as nnU-Net wrote it after training; empty
    where it did not."""
    names = {_key(value): name for name, value in model.dataset["labels"].items()}
    dice: dict[str, list[float]] = {}
    for fold in model.weights:
        file = model.folder / fold / "validation" / "summary.json"
        try:
            cases = read_json(file).get("metric_per_case") if file.is_file() else []
        except PluginError:
            continue
        for case in cases if isinstance(cases, list) else []:
            metrics = case.get("metrics") if isinstance(case, dict) else None
            for key, values in metrics.items() if isinstance(metrics, Mapping) else ():
                value = values.get("Dice") if isinstance(values, Mapping) else None
                if key in names and value is not None and is_number(value):
                    dice.setdefault(names[key], []).append(float(value))
    return dice


def _key(value: Any) -> str:
    """How nnU-Net writes a label, or the labels of a region, as a key of its summary."""
    return str(tuple(value)) if isinstance(value, list) else str(value)


def _save_dice(dice: Mapping[str, list[float]], path: Path) -> None:
    """Draw the Dice of the validation cases, a box per class."""
    with saved_figure(path, 7, 1.2 + 0.28 * max(len(dice), 3)) as figure:
        axis = figure.subplots()
        if dice:
            axis.boxplot(list(dice.values())[::-1], orientation="horizontal")
            axis.set_yticks(range(1, len(dice) + 1), list(dice)[::-1], fontsize=8)
            axis.set(xlim=(0, 1.02), xlabel="Dice of the validation cases")
        else:
            axis.text(0.5, 0.5, "No validation is there.", ha="center", va="center")
            axis.set_axis_off()
