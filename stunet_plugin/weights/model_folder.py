"""Model folder of nnU-Net v2: where it goes, and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin import __version__
from stunet_plugin.errors import PluginError, setting
from stunet_plugin.nnunet.names import RESULTS
from stunet_plugin.nnunet.registration import host_version
from stunet_plugin.utils.files import flush, read_json, sha256_of
from stunet_plugin.weights.tensors import COUNTER

if TYPE_CHECKING:
    from torch import Tensor

    from stunet_plugin.commands.import_ import Import

PROVENANCE = "provenance.json"
_SHA256 = "checkpoint_sha256"
_CIRCUMSTANCES = ("source", "file", "date", "versions")
"""Entries of the record in which two imports of the same content may differ."""
_TEMPORARY = ".stunet_import_"

Files = Mapping[str, "dict[str, Any] | Callable[[Path], None]"]
"""Path within the folder to the content of a JSON file, or to what writes another one."""


def find_place(options: Import, name: str, model_name: str) -> tuple[str, Path]:
    """Return ``DatasetXXX_NAME``, which nnU-Net must be able to take apart again, and the model
    folder: ``--out``, or ``model_name`` in nnUNet_results. ``--name`` comes before ``name``."""
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    name, number, results = options.name or name, options.dataset_id, os.environ.get(RESULTS)
    if not 1 <= number <= 999:
        raise PluginError(f"--dataset-id must be from 1 to 999, not {number}.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise PluginError(
            "--name may hold letters, digits, '_', '-' and '.', and starts with a letter or digit,"
            f" not {name!r}."
        )
    dataset_name = f"Dataset{number:03d}_{name}"
    if options.out:
        return dataset_name, Path(options.out).expanduser().absolute()
    if not results:
        raise PluginError(
            f"{RESULTS} is not set. Set it ({setting(RESULTS, f'/path/to/{RESULTS}')}), or choose"
            " a folder with --out."
        )
    # With two datasets of one ID nnU-Net would find neither.
    if others := [x for x in find_candidate_datasets(number) if x != dataset_name]:
        raise PluginError(
            f"{others[0]} is there, so {dataset_name} would be a second dataset with the same ID."
            f" Choose another --dataset-id, or the same name: --name {others[0].partition('_')[2]}."
        )
    return dataset_name, Path(results, dataset_name, model_name).absolute()


def describe_source(given: str, file: Path) -> dict[str, Any]:
    """Return where weights come from, when and by what they were imported, for the record."""
    import numpy
    import torch

    return {
        "source": given,
        "file": file.name,
        "sha256": sha256_of(file),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "stunet-plugin": __version__,
            "nnunetv2": host_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
    }


def is_there(
    target: Path, record: Mapping[str, Any], files: Files, checkpoint: str, force: bool
) -> bool:
    """Return whether the folder is that of the very same import, whole and unchanged; refuse what
    may not be replaced. The arguments are those of :func:`write_model_folder`."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    file = target / PROVENANCE
    if not file.is_file():
        raise PluginError(
            f"{target} is there already, and no `stunet import` wrote it. Move it away, or choose"
            " another place: --out."
        )
    try:
        there = read_json(file)
        known = {*there["files"], PROVENANCE}
        found = "{source} (SHA-256 {sha256}), imported {date}".format(**there)
    except (PluginError, KeyError, TypeError) as error:
        raise PluginError(f"{file} is damaged. Move {target} away and import again.") from error
    present = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    if force:
        if added := sorted(present - known):
            raise PluginError(
                f"{target} holds {len(added)} files that no import wrote (for example {added[0]})."
                " Move them away first."
            )
        return False
    with contextlib.suppress(OSError, ValueError):
        if (
            all(there.get(x) == value for x, value in record.items() if x not in _CIRCUMSTANCES)
            and known <= present
            and all(
                json.loads((target / name).read_text(encoding="utf-8"))
                == json.loads(json.dumps(content))
                for name, content in files.items()
                if isinstance(content, dict)
            )
            and there.get(_SHA256) == sha256_of(target / checkpoint)
        ):
            return True
    raise PluginError(
        f"{target} is there already: {found}. Nothing was changed. Replace it: --force; another"
        " place: --out."
    )


def write_model_folder(
    target: Path, record: Mapping[str, Any], files: Files, checkpoint: str
) -> None:
    """Write all files into a new folder beside the target, then give it the target's name.

    A crash leaves the target as it was. The list of files and the hash of the ``checkpoint``, which
    is one of them, are added to the record.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in sorted(target.parent.glob(f"{_TEMPORARY}*")):
            print(f"Left over from a killed import: {leftover}. Delete it if no import is running.")
        with _replacement(target) as new:
            for name, content in files.items():
                _write(new / name, content)
            sha256 = sha256_of(new / checkpoint)
            _write(new / PROVENANCE, {**record, "files": sorted(files), _SHA256: sha256})
    except BaseException as error:
        for folder in made:
            # Only if nobody has put anything into it since.
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        # torch's writer turns a full disk into a RuntimeError.
        if isinstance(error, OSError) or "PytorchStreamWriter" in str(error):
            reason = getattr(error, "strerror", None) or "the disk may be full"
            raise PluginError(
                f"Cannot write {target} ({reason}). Make room, or choose another place: --out."
            ) from None
        raise


def _write(path: Path, content: dict[str, Any] | Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    else:
        content(path)
    flush(path)


@contextlib.contextmanager
def _replacement(target: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the target's place in the end. A target that is there is
    set aside for that, put back if the renaming fails, and deleted last."""
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=_TEMPORARY))
    new, old = temporary / "new", temporary / "old"
    try:
        yield new
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            if old.exists():
                os.rename(old, target)
            raise
    finally:
        # Not where the old folder could not be put back.
        if target.exists() or not old.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def save_checkpoint(
    tensors: Mapping[str, Tensor],
    trainer: str,
    init_args: Mapping[str, Any],
    mirroring: tuple[int, ...] | None,
    entries: Mapping[str, Any],
    path: Path,
) -> None:
    """Write an nnU-Net v2 checkpoint that loads with ``weights_only=True``. ``mirroring``: axes for
    prediction; ``entries``: more that it holds."""
    import torch

    content = {
        "network_weights": {name: _compact(name, x) for name, x in tensors.items()},
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": init_args,
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": mirroring,
        **entries,
    }
    torch.save(content, path)


def _compact(name: str, tensor: Tensor) -> Tensor:
    """Return float32 values that share no memory with others, which torch would write along."""
    import torch

    tensor = tensor if name.endswith(COUNTER) else tensor.to(torch.float32)
    size = tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != size:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor
