"""Model folder of nnU-Net v2: where it goes, and written whole or not at all."""

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
from stunet_plugin.utils.files import flush, sha256_of
from stunet_plugin.weights.identify import COUNTER

if TYPE_CHECKING:
    from torch import Tensor

PROVENANCE = "provenance.json"
CHECKPOINT_SHA256 = "checkpoint_sha256"
_CIRCUMSTANCES = ("source", "file", "date", "versions", "files", CHECKPOINT_SHA256)
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
        for path in sorted(Path(os.environ.get(variable) or results).glob(f"{prefix}*")):
            if path.is_dir() and path.name != dataset_name:
                raise PluginError(
                    f"{variable} has {path.name}, so {dataset_name} would be a second dataset with"
                    " the same ID. Choose another --dataset-id, or the same name: --name"
                    f" {path.name.partition('_')[2]}."
                )
    return Path(results, dataset_name)


def find_import(target: Path) -> dict[str, Any] | None:
    """Return the record of the import that a folder holds, None where the place is free.

    Raises:
        PluginError: something else is there.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    file = target / PROVENANCE
    if not file.is_file():
        raise PluginError(
            f"{target} is there already, and no `stunet import` wrote it. Move it away, or choose"
            " another place: --out."
        )
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        _ = set(record["files"]), record["source"], record["sha256"], record["date"]
    except (ValueError, KeyError, TypeError) as error:
        raise PluginError(f"{file} is damaged. Move {target} away and import again.") from error
    return record


def is_same_import(
    target: Path, record: Mapping[str, Any], contents: Mapping[str, Any], checkpoint: str
) -> bool:
    """Return whether a model folder is that of the same import, whole and unchanged.

    Args:
        target: the model folder.
        record: what would be recorded now.
        contents: path within the folder to the content of each JSON file that would be written.
        checkpoint: path of the checkpoint within the folder.
    """
    try:
        there = json.loads((target / PROVENANCE).read_text())
        wanted = {key: value for key, value in record.items() if key not in _CIRCUMSTANCES}
        return (
            all(there[key] == value for key, value in json.loads(json.dumps(wanted)).items())
            and all((target / name).is_file() for name in there["files"])
            and all(
                json.loads((target / name).read_text()) == json.loads(json.dumps(content))
                for name, content in contents.items()
            )
            and there[CHECKPOINT_SHA256] == sha256_of(target / checkpoint)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_replaceable(target: Path, record: Mapping[str, Any], force: bool) -> None:
    """Raise unless an import may be replaced: only with ``force``, and only if nothing was added
    since.

    Args:
        target: its folder.
        record: its record.
        force: the user's word.
    """
    if not force:
        raise PluginError(
            f"{target} is there already: {record['source']} (SHA-256 {record['sha256']}), imported"
            f" {record['date']}. Nothing was changed. Replace it: --force; another place: --out."
        )
    there = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    added = sorted(there - {*record["files"], PROVENANCE})
    if added:
        raise PluginError(
            f"{target} holds {len(added)} files that no import wrote (for example {added[0]}). Move"
            " them away first."
        )


def write_model_folder(
    target: Path, files: Mapping[str, Writer], record: Mapping[str, Any], checkpoint: str
) -> None:
    """Write all files into a new folder beside the target, then give it the target's name.

    A crash leaves the target as it was. A folder that is there is set aside first, put back if the
    renaming fails, and deleted last.

    Args:
        target: the model folder.
        files: path within the folder to the function that writes it.
        record: of the import; the list of files and the checkpoint's hash are added.
        checkpoint: path of the checkpoint within the folder.

    Raises:
        PluginError: the place cannot be written to.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in sorted(target.parent.glob(f"{TEMPORARY_PREFIX}*")):
            print(f"Left over from a killed import: {leftover}. Delete it if no import is running.")
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=TEMPORARY_PREFIX))
        temporary.chmod(0o755)
        for name, write in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            flush(path)
        sha256 = sha256_of(temporary / checkpoint)
        content = {**record, "files": sorted(files), CHECKPOINT_SHA256: sha256}
        json_writer(content)(temporary / PROVENANCE)
        flush(temporary / PROVENANCE)
        _put_in_place(temporary, target)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            # Only what this call made, and only if nobody has put anything into it since.
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        # torch's writer turns a full disk into a RuntimeError.
        if isinstance(error, OSError) or "PytorchStreamWriter" in str(error):
            reason = getattr(error, "strerror", None) or "the disk may be full"
            raise PluginError(
                f"Cannot write {target} ({reason}). Nothing was left there. Make room, or choose"
                " another place: --out."
            ) from None
        raise


def json_writer(content: Any) -> Writer:
    def write(path: Path) -> None:
        path.write_text(json.dumps(content, indent=4) + "\n")

    return write


def checkpoint_writer(
    tensors: Mapping[str, Tensor],
    trainer: str,
    init_args: Mapping[str, Any],
    mirroring: tuple[int, ...] | None,
) -> Writer:
    """Return what writes an nnU-Net v2 checkpoint without a training behind it: plain Python and
    tensors, so that it loads with ``weights_only=True``.

    Args:
        tensors: the network's.
        trainer: name of the trainer that builds the network.
        init_args: its arguments.
        mirroring: axes that prediction may mirror.
    """
    content = {
        "network_weights": {name: _compact(name, tensor) for name, tensor in tensors.items()},
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


def _save(content: dict[str, Any], path: Path) -> None:
    import torch

    torch.save(content, path)


def _compact(name: str, tensor: Tensor) -> Tensor:
    """Return float32 values that share no memory with others, which torch would write along."""
    import torch

    tensor = tensor if name.endswith(COUNTER) else tensor.to(torch.float32)
    size = tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != size:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _put_in_place(temporary: Path, target: Path) -> None:
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
