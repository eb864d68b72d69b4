"""``stunet models``: published models that can be had by name."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from stunet_plugin.commands.command import Command, flag, option

if TYPE_CHECKING:
    from stunet_plugin.segmentation.published import PublishedModel

SHOWN = 3
"""Structures of each model in the table."""


@dataclass(frozen=True)
class Models(Command):
    """List the published models that can be had by name, with structures, size, licence, and
    whether they are here; or everything about one."""

    command = "models"
    example = "stunet models totalsegmentator-base"

    name: str | None = option(nargs="?", metavar="NAME", help="of one model; if not given, all")
    json: bool = flag("--json", "print JSON")

    def run(self) -> int:
        from stunet_plugin.segmentation.published import get_model, published_models

        chosen = get_model(self.name) if self.name else None
        models = [chosen] if chosen else list(published_models().values())
        if self.json:
            import json

            facts = [_facts(model) for model in models]
            print(json.dumps(facts[0] if chosen else facts, indent=2))
        else:
            print(_details(chosen) if chosen else _table(models))
        return 0


def _facts(model: "PublishedModel") -> dict[str, Any]:
    from stunet_plugin.segmentation.models import is_model

    facts = asdict(model)
    del facts["known_to_import"], facts["plans"], facts["fold"]
    here = is_model(model.folder)
    return {**facts, "parameters": model.parameters, "folder": str(model.folder), "here": here}


def _table(models: "list[PublishedModel]") -> str:
    from stunet_plugin.segmentation.models import is_model
    from stunet_plugin.segmentation.published import models_folder

    titles = ("name", "modality", "parameters", "download", "from", "licence", "here", "structures")
    rows = [titles]
    for model in models:
        few = ", ".join([*model.structures[:SHOWN], "..."])
        structures = f"{len(model.structures)}: {few}" if model.structures else "not published"
        rows.append(
            (
                model.name,
                model.modality,
                f"{model.parameters / 1e6:,.1f} M",
                _megabytes(model),
                "hub" if model.source else "browser",
                model.licence,
                "yes" if is_model(model.folder) else "no",
                structures,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(
        [*lines, f"\nAll structures of one: stunet models NAME. Here: {models_folder()}"]
    )


def _details(model: "PublishedModel") -> str:
    here = _facts(model)["here"]
    where = model.source or f"{model.page} (by a browser): {model.file}"
    facts = {
        "Model": model.name,
        "Modality": f"{model.modality}, {model.channels} channel(s)",
        "Trained on": model.trained_on,
        "Network": f"STU-Net {model.size}, {model.parameters / 1e6:,.1f} M parameters",
        "From": where,
        "Download": _megabytes(model),
        "Licence": model.licence,
        "Note": model.note,
        "Cite": " ".join(model.citation),
        "Folder": f"{model.folder} ({'here' if here else 'not here yet'})",
        "Structures": f"{len(model.structures)}, by label value" if model.structures else None,
    }
    lines = [f"{title + ':':<12}{text}" for title, text in facts.items() if text]
    numbered = [f"{value:>5}  {name}" for value, name in enumerate(model.structures, 1)]
    return "\n".join([*lines, *numbered])


def _megabytes(model: "PublishedModel") -> str:
    return f"{model.megabytes:,.0f} MB" if model.megabytes else "not known"
