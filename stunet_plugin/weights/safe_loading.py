"""Safe loading of untrusted checkpoints and plans: nothing in a file can run code.

Tensors come through ``torch.load(weights_only=True)`` with numpy's scalars as the one addition,
plans of nnU-Net v1 through an unpickler that knows containers, numbers, text and numeric arrays.
numpy's own unpickling functions trust what they are given (an object dtype unpickles anything), so
stand-ins take their place: numeric types only, sizes checked, Python numbers out.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.file_formats import DOWNLOAD_AGAIN, FileFormat, recognise

MAX_PLANS_BYTES = 16 * 1024**2
"""Published plans take under 2 kB; those of a large dataset, which list every image, some MB."""

MINIMUM_TORCH = (2, 6)

_NUMBER_CODE = re.compile(r"b1|[iu][1248]|f[248]")
"""numpy's codes of booleans, integers and floats; nothing with objects, fields, text or dates."""
_CORES = ("numpy.core", "numpy._core")
"""numpy 2 renamed the module; files of both exist."""
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


def load_checkpoint(path: Path, file_format: FileFormat | None = None) -> dict[str, Any]:
    """Read a torch checkpoint of either format onto the CPU; the tensors of a zip-format file stay
    mapped to the file.

    Raises:
        PluginError: the file is no torch checkpoint, is damaged, or asks for anything beside
            tensors, numbers, text and containers.
    """
    file_format = file_format or recognise(path)
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
        (stand_in, f"{module}.{name}") for (module, name), stand_in in _SCALARS.items()
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
    except (UnpicklingError, TypeError) as error:
        raise PluginError(f"{where} is refused: {_why(error)}") from error


def plain_dict(mapping: dict[Any, Any]) -> dict[Any, Any]:
    """Copy a dict from a checkpoint without calling methods that the file may have replaced on
    it."""
    return dict(dict.items(mapping))


class _PlansUnpickler(pickle.Unpickler):
    """Knows the stand-ins and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise UnpicklingError(_forbidden(f"{module}.{name}")) from None

    def persistent_load(self, identifier: Any) -> Any:
        raise UnpicklingError("it refers to objects outside of the file")


def _check_opcodes(content: bytes) -> None:
    """Look through a pickle without running it: its names, and numbers that would make the
    unpickler take gigabytes."""
    for opcode, argument, position in pickletools.genops(content):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            if (module, name) not in _STAND_INS:
                raise UnpicklingError(_forbidden(f"{module}.{name}"))
        if opcode.name in _FORBIDDEN_OPCODES:
            raise UnpicklingError(
                f"its instruction {opcode.name} at byte {position} makes objects, which plans never"
                " need"
            )
        if opcode.name in _MEMO_OPCODES and int(argument or 0) > len(content):
            raise UnpicklingError("it is built to take all memory")


def _plain(value: Any, depth: int, count: list[int]) -> Any:
    """Return a copy in plain Python; ``count`` is the number of values seen so far (one list for
    the whole walk)."""
    count[0] += 1
    if depth == 0 or count[0] > _MAX_VALUES:
        raise UnpicklingError("it is nested without end")
    if isinstance(value, _Array):
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
    raise UnpicklingError(f"it holds a {type(value).__name__}")


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
    elif isinstance(error, UnpicklingError) and not inner:
        reason = text
    else:
        detail = inner.group(1) if inner else f"{type(error).__name__}: {text}"
        first_line = detail.strip().partition("\n")[0]
        reason = f"it cannot be read as tensors, numbers and containers ({first_line[:200]})"
    return f"{reason.removesuffix('.')}."


class _Dtype:
    """Stands for ``numpy.dtype(code)``; the pickle hands the byte order over afterwards."""

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str) or not _NUMBER_CODE.fullmatch(code):
            raise UnpicklingError(f"numpy type {code!r} is not allowed, only numbers are")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        # numpy: (version, byte order, subarray, names, fields, element size, alignment, flags).
        if (
            not isinstance(state, tuple)
            or len(state) != 8
            or any(part is not None for part in state[2:5])
        ):
            raise UnpicklingError("numpy types with fields are not allowed")
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise UnpicklingError(f"unknown byte order {order!r}")
        self.numpy = self.numpy.newbyteorder(order)


class _Array:
    """Stands for a numpy array; ``values`` are nested lists once the pickle has handed the content
    over."""

    def __init__(self) -> None:
        self.values: Any = []

    def __setstate__(self, state: Any) -> None:
        # numpy: (version, shape, dtype, whether Fortran order, bytes).
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnpicklingError("unknown content of a numpy array")
        _, shape, dtype, fortran, data = state
        self.values = _array(data, dtype, shape, "F" if fortran else "C").tolist()


class _StandIn:
    """A function that a pickle may call. The pickle cannot alter it: there is nothing to set on
    it."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        raise UnpicklingError("a pickle may not change functions")


def _scalar(dtype: object, data: object) -> Any:
    """Return the Python number of a pickled numpy scalar."""
    return _array(data, dtype, (), "C").item()


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.values = _array(
        bytes(data) if isinstance(data, bytearray) else data, dtype, shape, order
    ).tolist()
    return array


def _encode(text: object, encoding: object = "latin1") -> bytes:
    # How protocol 2 writes bytes; other encodings would import modules by name.
    if not isinstance(text, str) or encoding != "latin1":
        raise UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


def _array(data: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise UnpicklingError("a numpy value without a type")
    if not isinstance(data, bytes):
        raise UnpicklingError("numpy arrays of objects are not allowed")
    if not isinstance(shape, tuple) or any(not isinstance(size, int) or size < 0 for size in shape):
        raise UnpicklingError(f"impossible shape {shape!r} of a numpy array")
    if len(data) != prod(shape) * dtype.numpy.itemsize:
        raise UnpicklingError(f"a numpy array of shape {shape} that holds {len(data)} bytes")
    return np.frombuffer(data, dtype.numpy).reshape(shape, order="F" if order == "F" else "C")


_SCALARS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _CORES},
}
"""Enough for the numpy scalars in checkpoints."""

_STAND_INS: dict[tuple[str, str], Any] = {
    **{name: _StandIn(stand_in) for name, stand_in in _SCALARS.items()},
    ("collections", "OrderedDict"): _StandIn(dict),
    **{
        (builtins, kind.__name__): _StandIn(kind)
        for builtins in ("builtins", "__builtin__")
        for kind in (set, frozenset)
    },
    ("_codecs", "encode"): _StandIn(_encode),
    ("numpy", "ndarray"): _StandIn(_reconstruct),
    **{(f"{core}.multiarray", "_reconstruct"): _StandIn(_reconstruct) for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _StandIn(_from_buffer) for core in _CORES},
}
"""All that the plans of nnU-Net v1 may call."""
