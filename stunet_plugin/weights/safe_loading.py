"""Reading checkpoints and plans that nobody vouches for: nothing in them can run code.

Tensors come through ``torch.load(weights_only=True)`` with numpy's scalars as the one addition,
plans of nnU-Net v1 through an unpickler that knows containers, numbers, text and numeric arrays.
Zip-format files are mapped into memory, so that only what is used is read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.file_formats import DOWNLOAD_AGAIN, FileFormat, recognise
from stunet_plugin.weights.safe_numpy import SCALARS, STAND_INS, Array

MAX_PLANS_BYTES = 16 * 1024**2
"""Published plans take under 2 kB; those of a large dataset, which list every image, some MB."""

MINIMUM_TORCH = (2, 6)

_MAX_DEPTH = 50
_MAX_VALUES = 2_000_000
_CONTAINERS = (dict, list, tuple, set, frozenset)
# What may stand in a pickle of plans: no opcode that names classes in older ways, persistent
# objects or buffers elsewhere.
_FORBIDDEN_OPCODES = {
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "EXT1",
    "EXT2",
    "EXT4",
    "PERSID",
    "BINPERSID",
    "NEXT_BUFFER",
}
_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a torch checkpoint of either format onto the CPU; the tensors of a zip-format file stay
    mapped to the file.

    Raises:
        PluginError: the file is no torch checkpoint, is damaged, or asks for anything beside
            tensors, numbers, text and containers.
    """
    file_format = recognise(path)
    if file_format is FileFormat.PICKLE:
        raise PluginError(
            f"{path} is a plain pickle, not a checkpoint with weights; nothing in it was run. If it"
            " is the NAME.model.pkl that belongs to an nnU-Net v1 checkpoint, name NAME.model"
            " instead: the .pkl beside it is found."
        )
    import torch

    if tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2]) < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        raise PluginError(
            f"Reading checkpoints safely needs torch {needed} or newer (numpy's scalars cannot be"
            f" allowed by name before), this is {torch.__version__}. Run: pip install --upgrade"
            f" 'torch>={needed}'"
        )
    allowed: list[Any] = [
        (stand_in, f"{module}.{name}") for (module, name), stand_in in SCALARS.items()
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=file_format is FileFormat.TORCH_ZIP,
            )
    except Exception as error:  # a hostile or damaged file can fail in any way
        raise PluginError(f"{path} is refused: {_why(error)}") from error
    if not isinstance(checkpoint, dict):
        raise PluginError(
            f"{path} holds a {type(checkpoint).__name__}, not a checkpoint (a dict with weights and"
            " their origin)."
        )
    return plain_dict(checkpoint)


def load_plans_pickle(path: Path) -> dict[str, Any]:
    """Read the pickled plans of nnU-Net v1 as plain Python: dicts, lists, tuples, numbers, text.

    Numpy arrays arrive as nested lists, numpy scalars as numbers, OrderedDicts as dicts.

    Raises:
        PluginError: not a pickle, damaged, too large, or it asks for anything else; nothing in it
            is run.
    """
    if recognise(path) is not FileFormat.PICKLE:
        raise PluginError(
            f"{path} is a torch file, not the pickled plans of nnU-Net v1 (NAME.model.pkl)."
        )
    if path.stat().st_size > MAX_PLANS_BYTES:
        raise PluginError(
            f"{path} is refused: plans take a few kB, this file {path.stat().st_size} bytes."
        )
    content = path.read_bytes()
    try:
        _check_opcodes(content)
        value = _plain(_PlansUnpickler(io.BytesIO(content)).load(), _MAX_DEPTH, [0])
    except Exception as error:  # a hostile or damaged file can fail in any way
        raise PluginError(f"{path} is refused: {_why(error)}") from error
    if not isinstance(value, dict):
        raise PluginError(
            f"{path} holds a {type(value).__name__}, not the plans of nnU-Net v1 (a dict)."
        )
    return value


def plain_copy(value: Any, where: str) -> Any:
    """Copy what a checkpoint holds beside its tensors as plain Python.

    Raises:
        PluginError: it holds anything but containers, numbers and text, or is nested without end.
    """
    try:
        return _plain(value, _MAX_DEPTH, [0])
    except (pickle.UnpicklingError, TypeError) as error:
        raise PluginError(f"{where} is refused: {_why(error)}") from error


def plain_dict(mapping: dict[Any, Any]) -> dict[Any, Any]:
    """Copy a dict from a checkpoint without calling methods that the file may have replaced on
    it."""
    return dict(dict.items(mapping))


class _PlansUnpickler(pickle.Unpickler):
    """Knows the stand-ins and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(_forbidden(f"{module}.{name}")) from None

    def persistent_load(self, identifier: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of the file")


def _check_opcodes(content: bytes) -> None:
    """Look through a pickle without running it: its names, and numbers that would make the
    unpickler take gigabytes."""
    for opcode, argument, position in pickletools.genops(content):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            if (module, name) not in STAND_INS:
                raise pickle.UnpicklingError(_forbidden(f"{module}.{name}"))
        if opcode.name in _FORBIDDEN_OPCODES:
            raise pickle.UnpicklingError(
                f"its instruction {opcode.name} at byte {position} makes objects, which plans never"
                " need"
            )
        if opcode.name in _MEMO_OPCODES and int(argument or 0) > len(content):
            raise pickle.UnpicklingError("it is built to take all memory")


def _plain(value: Any, depth: int, count: list[int]) -> Any:
    """Return a copy in plain Python; ``count`` is the number of values seen so far (one list for
    the whole walk)."""
    count[0] += 1
    if depth == 0 or count[0] > _MAX_VALUES:
        raise pickle.UnpicklingError("it is nested without end")
    if isinstance(value, Array):
        return value.values
    if isinstance(value, dict):
        return {
            _plain(key, depth - 1, count): _plain(entry, depth - 1, count)
            for key, entry in dict.items(value)
        }
    if isinstance(value, _CONTAINERS):
        return type(value)(_plain(entry, depth - 1, count) for entry in value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")


def _forbidden(name: str) -> str:
    return (
        f"it asks for {name}, which a file with weights or plans has no use for. Nothing in it"
        " was run"
    )


def _why(error: Exception) -> str:
    """Turn what a reader raised into a sentence; torch's own advice to trust the file must not be
    passed on."""
    text = str(error)
    # torch wraps the reason of its own unpickler into advice, which ends with this.
    inner = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    unsupported = re.search(r"GLOBAL (\S+) (?:was not|whose)", text)
    if unsupported and not unsupported.group(1).endswith("."):
        reason = _forbidden(unsupported.group(1))
    elif (
        unsupported
        or isinstance(error, (EOFError, MemoryError))
        or "EOF" in text
        or "unexpected pos" in text
    ):
        reason = f"it ends too early or is damaged. {DOWNLOAD_AGAIN.removesuffix('.')}"
    elif isinstance(error, pickle.UnpicklingError) and not inner:
        reason = text
    else:
        detail = inner.group(1) if inner else f"{type(error).__name__}: {text}"
        first_line = detail.strip().partition("\n")[0]
        reason = f"it cannot be read as tensors, numbers and containers ({first_line[:200]})"
    return f"{reason.removesuffix('.')}."
