"""Models for segmentation, found by path or by name; what is missing is downloaded and imported.

What is imported stays in ``STUNET_HOME``; finding it again takes neither a network nor torch.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stunet_plugin.errors import PluginError, did_you_mean, few, setting
from stunet_plugin.segmentation.published import (
    PublishedModel,
    get_model,
    models_folder,
    published_models,
)
from stunet_plugin.utils.files import HOME, lock, sha256_of
from stunet_plugin.weights.locate import CHECKPOINTS, HUB_PREFIX, SHARED, find_source, web_address

PUBLISHED = "Published models: stunet models."
V1_CHECKPOINT = "*.model"
"""What nnU-Net v1 calls its checkpoints."""


def find_model(given: str) -> Path:
    """Return a model folder of nnU-Net, ``TRAINER__PLANS__CONFIGURATION`` with ``plans.json``,
    ``dataset.json`` and trained folds.

    Args:
        given: path of one, or of a dataset's folder that holds exactly one; the name of a published
            model; or the ``hf://`` address of a checkpoint. The last two are downloaded and
            imported, once.

    Raises:
        PluginError: there is no such model, or it cannot be had without the user.
    """
    if given.lower() in published_models():
        return _published(get_model(given))
    if given.startswith(HUB_PREFIX):
        for model in published_models().values():
            if model.source == given and model.structures:
                return _published(model)
        name = re.sub(r"[^\w.-]+", "_", given.removeprefix(HUB_PREFIX))
        return _from_hub(given, models_folder() / name)
    path = Path(given).expanduser().absolute()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        raise PluginError(f"{path} is a file, not a model folder. {_import_first(path)}")
    hint = did_you_mean(given, published_models())
    raise PluginError(
        f"{given} is neither a folder nor a published model.{hint} Give the path of a folder"
        f" TRAINER__PLANS__CONFIGURATION, a published name, or {HUB_PREFIX}owner/repository/file."
        f" {PUBLISHED}"
    )


def is_model(folder: Path) -> bool:
    """Return whether a folder is a model folder of nnU-Net with a trained fold."""
    return all((folder / name).is_file() for name in ("plans.json", "dataset.json")) and any(
        next(folder.glob(f"fold_*/{name}"), None) for name in CHECKPOINTS
    )


def _in_folder(path: Path) -> Path:
    if is_model(path):
        return path
    if shared := next(iter(sorted(path.glob(f"fold_*/{SHARED}"))), None):
        folder = models_folder() / f"{path.name}_{sha256_of(shared)[:12]}"
        with _being_made(folder):
            if not is_model(folder):
                print(f"Import:       {path}, once", flush=True)
                _run_import([str(path), "--out", str(folder)])
        return folder
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir() and is_model(folder))
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = few([folder.name for folder in inside])
        raise PluginError(f"{path} holds {len(inside)} models. Give the path of one: {names}.")
    if is_model(path.parent):
        raise PluginError(f"{path} is a fold. Give the model's folder: {path.parent}")
    for old in (*path.glob(V1_CHECKPOINT), *path.glob(f"fold_*/{V1_CHECKPOINT}")):
        raise PluginError(f"{path} is a model of nnU-Net v1. {_import_first(old)}")
    raise PluginError(
        f"{path} is no model folder of nnU-Net: it needs plans.json, dataset.json and"
        f" fold_X/{CHECKPOINTS[0]}. Give the path of TRAINER__PLANS__CONFIGURATION, or a published"
        f" name. {PUBLISHED}"
    )


def _import_first(checkpoint: Path) -> str:
    file = shlex.quote(str(checkpoint))
    return f"Run: stunet import {file} --out FOLDER    # then give FOLDER"


def _published(model: PublishedModel) -> Path:
    if is_model(model.folder):
        return model.folder
    if not model.structures:
        names = ["background", *(f"NAME_{number}" for number in range(1, model.outputs))]
        words = ["stunet", "import", model.source or "", "--out", str(model.folder)]
        raise PluginError(
            f"{model.name} cannot be had by its name: {model.note} If you know both, write the"
            f" names of the outputs into this command, and give scans with their {model.channels}"
            f" channels in that order:\n{shlex.join([*words, '--labels', *names])}"
        )
    if model.source is None:
        file = model.file or ""
        raise PluginError(
            f"{model.name} is not here yet, and it is offered for download by a browser only."
            f" Download {file} and the .pkl beside it from {model.page}, then run:\n"
            f"{_command(Path(file).name, model.folder, model.import_options())}"
        )
    return _from_hub(model.source, model.folder, model)


def _from_hub(address: str, folder: Path, model: PublishedModel | None = None) -> Path:
    """Download and import a checkpoint, published or not, unless that is done or another process is
    doing it."""
    if is_model(folder):
        return folder
    web, options, plans = web_address(address), list[str](), None
    told = f"Download:     {address}"
    if model:
        options, plans = model.import_options(), model.plans
        size = f"{model.megabytes:,.0f} MB" if model.megabytes else "size not known"
        told += f", {size}, licence: {model.licence}"
    with _being_made(folder):
        if is_model(folder):
            return folder
        print(told, flush=True)
        try:
            find_source(address)
            _run_import([address, "--out", str(folder), *options])
        except PluginError as error:
            also = f" and {plans} beside it" if plans else ""
            options = [*(["--plans", plans] if plans else []), *options]
            command = _command(Path(web).name, folder, options)
            raise PluginError(
                f"{folder.name} is not here yet. {error}\nBy hand: download {web}{also}, and run:"
                f"\n{command}"
            ) from error
    print(f"Model folder: {folder}")
    return folder


@contextmanager
def _being_made(folder: Path) -> Iterator[None]:
    """Hold the lock of a model folder that is to be made, in a place that is there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PluginError(
            f"{folder.parent} cannot be made ({error.strerror}). Choose a folder for models that"
            f" can be written: {setting(HOME, '/path/to/a/folder')}"
        ) from error
    with lock(folder.parent / f".{folder.name}.lock", f"process imports {folder.name}", wait=True):
        yield


def _command(file: str, folder: Path, options: Sequence[str]) -> str:
    return shlex.join(["stunet", "import", file, "--out", str(folder), *options])


def _run_import(words: Sequence[str]) -> None:
    """Run ``stunet import`` in a process of its own, whose memory is free again at its end; it
    writes a folder whole or not at all."""
    command = [sys.executable, "-m", "stunet_plugin", "import", *words]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        message = process.communicate()[1]
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        said = message.strip().rpartition("stunet import: ")[2]
        raise PluginError(said or f"{shlex.join(command)} ended with {process.returncode}.")
