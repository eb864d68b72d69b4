"""Sharing of a trained model: a folder with safetensors, plan, labels and a model card, which
``stunet import`` and ``stunet segment`` take, or the same on the Hugging Face hub."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import read_json
from stunet_plugin.weights.choose_plan import find_plan
from stunet_plugin.weights.identify import NetworkWeights, read_weights
from stunet_plugin.weights.locate import HUB, HUB_PREFIX, SHARED, Source, hub_client
from stunet_plugin.weights.model_card import write_card
from stunet_plugin.weights.output_labels import check_labels, choose_labels
from stunet_plugin.weights.safetensors_file import KNOWN, write_safetensors
from stunet_plugin.weights.source_plan import SourcePlan
from stunet_plugin.weights.tensors import check_finite
from stunet_plugin.weights.trained_options import refuse_options

if TYPE_CHECKING:
    from stunet_plugin.commands.share import Share

PRIVATE_ENTRIES = ("dataset", "name", "description")
"""Of dataset.json: files of the training cases, and what its owner may not want to be read."""
FINGERPRINT = "dataset_fingerprint.json"


@dataclass(frozen=True)
class TrainedModel:
    """A model folder, read as strictly as somebody's who imports it: its weights by fold."""

    folder: Path
    weights: Mapping[str, NetworkWeights]
    plan: SourcePlan
    plans: dict[str, Any]
    dataset: dict[str, Any]

    @property
    def first(self) -> NetworkWeights:
        return next(iter(self.weights.values()))

    @property
    def trainer(self) -> str:
        """The trainer that the checkpoint names."""
        return str(self.first.checkpoint.get("trainer_name"))


def share_model(options: Share) -> int:
    """Write or upload a model; wrong input leaves nothing."""
    repository = _repository(options.out) if options.out.startswith(HUB_PREFIX) else None
    target = Path(options.out).expanduser().absolute()
    if not repository and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PluginError(f"{target} is there already. Give --out a new folder.")
    # SPDX writes CC-BY-4.0, the hub cc-by-4.0.
    options = replace(options, licence=options.licence.lower())
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.licence):
        raise PluginError(
            f"--licence {options.licence!r} names no licence as the hub does. Give one such as"
            " cc-by-4.0, cc-by-nc-sa-4.0, apache-2.0 or other."
        )
    picture = Path(options.picture).expanduser() if options.picture else None
    if picture and not (picture.is_file() and picture.read_bytes()[:4] == b"\x89PNG"):
        raise PluginError(f"--picture {picture} is no PNG file.")
    client = hub_client() if repository else None
    model = _read(options)
    parent = Path(tempfile.gettempdir()) if repository else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".stunet_share_") as temporary:
        folder = Path(temporary, "model")
        _write(model, folder, options, picture)
        size = sum(path.stat().st_size for path in folder.rglob("*"))
        if client:
            _upload(client, str(repository), folder, options.public)
        else:
            if target.is_dir():
                target.rmdir()
            shutil.move(folder, target)
    place = options.out if repository else str(target)
    print(f"Shared:       {place}, {size / 1e6:,.1f} MB, {len(model.weights)} fold(s)")
    print(f"Use it:       stunet segment SCAN -o OUT -m {place}")
    return 0


def _repository(out: str) -> str:
    name = out.removeprefix(HUB_PREFIX).rstrip("/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise PluginError(f"--out {out} names no repository. Expected hf://owner/name.")
    return name


def _read(options: Share) -> TrainedModel:
    """Read all folds, and refuse what an import would refuse."""
    folder = Path(options.model).expanduser()
    lacking = [x for x in ("plans.json", "dataset.json") if not (folder / x).is_file()]
    found = sorted(x.parent.name for x in folder.glob(f"fold_*/{options.checkpoint}"))
    # As nnU-Net does: the model of all cases only where there are no others.
    trained = [x for x in found if x != "fold_all"] or found
    folds = [f"fold_{x}" for x in options.folds] if options.folds else trained
    lacking += [f"{x}/{options.checkpoint}" for x in folds if x not in found]
    if lacking or not folds:
        wanted = lacking[0] if lacking else f"fold_X/{options.checkpoint}"
        raise PluginError(
            f"{folder} is no trained model of nnU-Net: {wanted} is not there. Name the folder"
            " TRAINER__PLANS__CONFIGURATION in nnUNet_results."
        )
    dataset, plans = read_json(folder / "dataset.json"), read_json(folder / "plans.json")
    dataset = {key: value for key, value in dataset.items() if key not in PRIVATE_ENTRIES}
    weights = {}
    for fold in folds:
        file = folder / fold / options.checkpoint
        one = read_weights(file)
        refuse_options(one.checkpoint, file, "Pass the model folder on as it is.")
        check_finite(one.tensors, file)
        weights[fold] = one
    first = weights[folds[0]]
    source = Source(folder / folds[0] / options.checkpoint)
    plan = find_plan(source, first)
    if plan is None or not first.outputs:
        raise PluginError(
            f"{source.checkpoint} segments nothing by itself: it has no plan or heads."
        )
    labels, origin = choose_labels(source, first, plan)
    plan.check_network(first)
    check_labels(labels, origin, first.outputs)
    return TrainedModel(folder, weights, plan, plans, {**dataset, **labels})


def _write(model: TrainedModel, folder: Path, options: Share, picture: Path | None) -> None:
    for fold, weights in model.weights.items():
        entries = {name: weights.checkpoint.get(name) for name in KNOWN}
        entries["init_args"] = {
            "plans": weights.training_argument("plans", dict),
            "configuration": weights.training_argument("configuration", str),
            "dataset_json": model.dataset,
        }
        (folder / fold).mkdir(parents=True)
        write_safetensors(folder / fold / SHARED, weights.tensors, entries)
    for name, content in (("plans.json", model.plans), ("dataset.json", model.dataset)):
        (folder / name).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    if (model.folder / FINGERPRINT).is_file():
        content = read_json(model.folder / FINGERPRINT)
        (folder / FINGERPRINT).write_text(json.dumps(content) + "\n", encoding="utf-8")
    write_card(model, folder, options, picture)


def _upload(client: Any, repository: str, folder: Path, public: bool) -> None:
    try:
        api = client.HfApi()
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message="Model of stunet share"
        )
    except Exception as error:  # the client has dozens of its own, and those of the network
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        raise PluginError(
            f"{repository} could not be uploaded to {HUB} ({reason}). Log in (hf auth login) with a"
            " token that may write, and run the command again; or share a folder: --out FOLDER."
        ) from error
