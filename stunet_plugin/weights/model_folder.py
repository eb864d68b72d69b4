"""Writing a complete nnU-Net v2 model folder: all of it or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.names import PREPROCESSED, RAW, RESULTS
from stunet_plugin.weights.identify import COUNTER
from stunet_plugin.weights.safe_loading import load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

PROVENANCE = "provenance.json"
CIRCUMSTANCES = ("source", "file", "date", "versions", "files")
"""Entries of the record in which two imports of the same content may differ."""
TEMPORARY_PREFIX = ".stunet_import_"
_DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

Writer = Callable[[Path], None]
"""Writes one file at the path that it is given."""


def dataset_folder_name(dataset_id: int, name: str) -> str:
    """Return ``DatasetXXX_NAME``.

    Raises:
        PluginError: an ID or a name that nnU-Net does not take.
    """
    if not 1 <= dataset_id <= 999:
        raise PluginError(f"--dataset-id must be from 1 to 999, not {dataset_id}.")
    if not _DATASET_NAME.fullmatch(name):
        raise PluginError(
            "--name may hold letters, digits, '_', '-' and '.', and starts with a letter or digit,"
            f" not {name!r}."
        )
    return f"Dataset{dataset_id:03d}_{name}"


def results_folder(dataset_name: str) -> Path:
    """Return the dataset's folder in nnUNet_results.

    Raises:
        PluginError: nnUNet_results is not set, or another dataset has this ID (nnU-Net would then
            find neither).
    """
    results = os.environ.get(RESULTS)
    if not results:
        raise PluginError(
            f"{RESULTS} is not set. Set it (export {RESULTS}=/path/to/{RESULTS}), or choose a"
            " folder with --out."
        )
    prefix = dataset_name[: len("Dataset000")]
    for variable in (RESULTS, RAW, PREPROCESSED):
        folder = Path(os.environ.get(variable) or results)
        others = [
            path.name
            for path in sorted(folder.glob(f"{prefix}*"))
            if path.is_dir() and path.name != dataset_name
        ]
        if others:
            raise PluginError(
                f"{variable} has {others[0]}, so {dataset_name} would be a second dataset with the"
                " same ID. Choose another --dataset-id, or the same name: --name"
                f" {others[0].partition('_')[2]}."
            )
    return Path(results, dataset_name)


def was_imported(target: Path) -> bool:
    """Return whether an import wrote the folder."""
    return (target / PROVENANCE).is_file()


def holds_import(target: Path, provenance: Mapping[str, Any], contents: Mapping[str, Any]) -> bool:
    """Return whether a folder is that of an import of the same source with the same result, weights
    not looked at.

    Args:
        target: the model folder.
        provenance: the record that would be written.
        contents: path within the folder to the content of each JSON file that would be.
    """
    try:
        record, expected = (
            json.loads((target / PROVENANCE).read_text()),
            json.loads(json.dumps(provenance)),
        )
        same = all(
            record[key] == value for key, value in expected.items() if key not in CIRCUMSTANCES
        )
        whole = all((target / name).is_file() for name in record["files"])
        return (
            same
            and whole
            and all(
                json.loads((target / name).read_text()) == json.loads(json.dumps(content))
                for name, content in contents.items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_target(target: Path, force: bool) -> None:
    """Raise if a model folder may not be written there.

    Without ``force`` nothing that exists is touched; with it only a folder that an import wrote,
    and only if nothing was added to it since.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    provenance = target / PROVENANCE
    if not provenance.is_file():
        raise PluginError(
            f"{target} is there already, and no `stunet import` wrote it. Move it away, or choose"
            " another place: --out."
        )
    try:
        record = json.loads(provenance.read_text())
        written, what = (
            set(record["files"]),
            f"{record['source']} (SHA-256 {record['sha256']}), imported {record['date']}",
        )
    except (ValueError, KeyError, TypeError) as error:
        raise PluginError(
            f"{provenance} is damaged. Move {target} away and import again."
        ) from error
    if not force:
        raise PluginError(
            f"{target} is there already: {what}. Nothing was changed. Replace it: --force; another"
            " place: --out."
        )
    added = sorted(
        {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        - written
        - {PROVENANCE}
    )
    if added:
        raise PluginError(
            f"{target} holds {len(added)} files that no import wrote (for example {added[0]}). Move"
            " them away first."
        )


def write_model_folder(
    target: Path, files: Mapping[str, Writer], provenance: Mapping[str, Any], force: bool
) -> None:
    """Write all files into a new folder beside the target, then give it the target's name.

    A crash leaves the target as it was. Replacing (``force``) takes two renames, as file systems
    cannot swap folders in one: the old folder is set aside first, put back if the second rename
        fails, and deleted last.

    Args:
        target: the model folder.
        files: path within the folder to the function that writes it.
        provenance: content of the provenance record, to which the list of files is added.
        force: replace what is there (see :func:`check_target`).

    Raises:
        PluginError: the place cannot be written to.
    """
    made = _make_parents(target)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=TEMPORARY_PREFIX))
        temporary.chmod(0o755)
        record = {**provenance, "files": sorted(files)}
        for name, write in {**files, PROVENANCE: json_writer(record)}.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            _flush(path)
        _put_in_place(temporary, target, force)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            # Only what this call made, and only if nobody has put anything into it since.
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise PluginError(
                f"Cannot write {target} ({error.strerror or error}). Nothing was left there."
            ) from error
        raise


def leftovers(target: Path) -> list[Path]:
    """Return the folders beside a target that imports left which were killed."""
    return sorted(target.parent.glob(f"{TEMPORARY_PREFIX}*")) if target.parent.is_dir() else []


def json_writer(content: Any) -> Writer:
    return lambda path: _write_text(path, json.dumps(content, indent=4) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _make_parents(target: Path) -> list[Path]:
    """Make the folders above the target; return the new ones, deepest first."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PluginError(
            f"Cannot make {target.parent} ({error.strerror}). Choose another place with --out."
        ) from error
    return missing


def _flush(path: Path) -> None:
    """Let the disk have the file before the folder gets its name, so that a power cut leaves no
    empty file in it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _put_in_place(temporary: Path, target: Path, force: bool) -> None:
    check_target(target, force)
    if not target.exists() or not any(target.iterdir()):
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=TEMPORARY_PREFIX)) / target.name
    try:
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(aside, target)
            raise
    finally:
        if target.exists():
            shutil.rmtree(aside.parent, ignore_errors=True)


def checkpoint_writer(
    tensors: Mapping[str, Tensor],
    trainer: str,
    init_args: Mapping[str, Any],
    mirroring: tuple[int, ...] | None,
) -> Writer:
    """Return what writes an nnU-Net v2 checkpoint without a training behind it.

    Args:
        tensors: the network's.
        trainer: name of the trainer that builds the network.
        init_args: its arguments.
        mirroring: axes that prediction may mirror.
    """
    content = {
        "network_weights": {
            name: _standing_alone(name, tensor) for name, tensor in tensors.items()
        },
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": dict(init_args),
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": mirroring,
    }
    return lambda path: _save(content, path)


def holds_weights(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a checkpoint that an import wrote holds these very weights; it is only mapped
    into memory."""
    import torch

    try:
        there = load_checkpoint(path).get("network_weights")
    except (PluginError, OSError):
        return False
    if not isinstance(there, dict) or there.keys() != tensors.keys():
        return False
    return all(
        torch.equal(there[name], _standing_alone(name, tensor)) for name, tensor in tensors.items()
    )


def _save(content: dict[str, Any], path: Path) -> None:
    import torch

    torch.save(content, path)


def _standing_alone(name: str, tensor: Tensor) -> Tensor:
    """Return float32 values that share no memory with others (torch would write that memory along);
    mostly the tensor itself."""
    import torch

    tensor = tensor if name.endswith(COUNTER) else tensor.to(torch.float32)
    if (
        not tensor.is_contiguous()
        or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    ):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor
