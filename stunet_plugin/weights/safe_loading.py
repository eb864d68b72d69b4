"""Safe loading of untrusted checkpoints and plans: nothing in a file can run code.

Tensors come through ``torch.load(weights_only=True)``, plans of nnU-Net v1 through an unpickler of
containers, numbers, text and numeric arrays. numpy's own unpickling functions trust what they are
given, so stand-ins take their place.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np

from stunet_plugin.errors import PluginError
from stunet_plugin.weights.file_formats import DOWNLOAD_AGAIN, FileFormat, recognise
from stunet_plugin.weights.safetensors_file import read_safetensors

MAX_PLANS_BYTES = 16 * 1024**2
"""Published plans take under 2 kB; those of a large dataset, which list every image, some MB."""
_MAX_DEPTH, _MAX_VALUES = 50, 2_000_000


# --- checkpoints


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a torch checkpoint of tensors, numbers, text and containers onto the CPU; tensors of a
    zip-format file stay mapped to the file."""
    file_format = recognise(path)
    if file_format is FileFormat.PICKLE:
        raise PluginError(
            f"{path} is a plain pickle, not a checkpoint with weights; nothing in it was run. If it"
            " is the NAME.model.pkl of an nnU-Net v1 checkpoint, name NAME.model instead."
        )
    if file_format is FileFormat.SAFETENSORS:
        return read_safetensors(path)
    import torch

    if torch.__version__ < "2.6":
        raise PluginError(
            f"Reading checkpoints safely needs torch 2.6 or newer, this is {torch.__version__}."
            " Run: pip install --upgrade 'torch>=2.6'"
        )
    stand_ins = {**_SCALARS, **_OPTIMIZER}
    allowed: list[Any] = [(stand_in, ".".join(name)) for name, stand_in in stand_ins.items()]
    mapped = file_format is FileFormat.TORCH_ZIP
    with _refusing(path), torch.serialization.safe_globals(allowed):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return plain_dict(_as_dict(checkpoint, path, "a checkpoint"))


def load_plans_pickle(path: Path) -> dict[str, Any]:
    """Read the pickled plans of nnU-Net v1 as plain Python; numpy arrays become nested lists."""
    if recognise(path) is not FileFormat.PICKLE:
        raise PluginError(f"{path} is no pickle. Expected the NAME.model.pkl of nnU-Net v1.")
    if (size := path.stat().st_size) > MAX_PLANS_BYTES:
        raise PluginError(f"{path} is refused: plans take a few kB, this file {size} bytes.")
    content = path.read_bytes()
    with _refusing(path):
        _check_opcodes(content)
        value = _plain(_PlansUnpickler(io.BytesIO(content)).load(), _MAX_DEPTH, [0])
    return _as_dict(value, path, "the plans of nnU-Net v1")


def plain_copy(value: Any, where: str) -> Any:
    """Copy what a checkpoint holds beside its tensors as plain Python: containers, numbers and
    text; refuse anything else."""
    with _refusing(where):
        return _plain(value, _MAX_DEPTH, [0])


def plain_dict(mapping: dict[Any, Any]) -> dict[Any, Any]:
    """Copy a dict of a checkpoint without calling methods that the file may have replaced."""
    return dict(dict.items(mapping))


def _as_dict(value: Any, path: Path, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PluginError(f"{path} holds a {type(value).__name__}, not {what} (a dict).")
    return value


@contextlib.contextmanager
def _refusing(what: object) -> Iterator[None]:
    """Turn what a reader raises into a sentence, without torch's advice to trust the file."""
    try:
        yield
    except Exception as error:  # a hostile or damaged file can fail in any way
        text = str(error)
        # torch wraps the reason of its own unpickler into advice, which ends with this.
        inner = re.search(r"WeightsUnpickler error:\s*(.+)", text)
        unsupported = re.search(r"GLOBAL (\S+) (?:was not|whose)", text)
        ends = isinstance(error, (EOFError, MemoryError)) or re.search("EOF|unexpected pos", text)
        if unsupported and not unsupported[1].endswith("."):
            reason = _forbidden(unsupported[1])
        elif unsupported or ends:
            reason = f"it ends too early or is damaged. {DOWNLOAD_AGAIN}"
        elif isinstance(error, UnpicklingError) and not inner:
            reason = text
        else:
            detail = inner[1] if inner else f"{type(error).__name__}: {text}"
            first_line = detail.strip().partition("\n")[0][:200]
            reason = f"it cannot be read as tensors, numbers and containers ({first_line})"
        raise PluginError(f"{what} is refused: {reason.removesuffix('.')}.") from error


def _forbidden(name: str) -> str:
    return f"it asks for {name}, which weights and plans have no use for. Nothing in it was run"


def _plain(value: Any, depth: int, count: list[int]) -> Any:
    """Return a copy in plain Python; ``count`` holds the number of values seen so far."""
    count[0] += 1
    if depth == 0 or count[0] > _MAX_VALUES:
        raise UnpicklingError("it is nested without end")
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, dict):
        items = dict.items(value)
        return {_plain(k, depth - 1, count): _plain(v, depth - 1, count) for k, v in items}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_plain(entry, depth - 1, count) for entry in value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    raise UnpicklingError(f"it holds a {type(value).__name__}")


# --- pickled plans

# Opcodes that name classes in older ways, or objects and buffers outside of the file.
_FORBIDDEN = re.compile("INST|OBJ|NEWOBJ(_EX)?|EXT[124]|(BIN)?PERSID|NEXT_BUFFER")
_MEMO = re.compile("((LONG_)?BIN)?(PUT|GET)")


class _PlansUnpickler(pickle.Unpickler):
    """Knows the stand-ins and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise UnpicklingError(_forbidden(f"{module}.{name}")) from None


def _check_opcodes(content: bytes) -> None:
    """Look through a pickle without running it, for what the unpickler itself lets through."""
    for opcode, argument, position in pickletools.genops(content):
        if _FORBIDDEN.fullmatch(opcode.name):
            raise UnpicklingError(f"its {opcode.name} at byte {position} makes objects")
        if _MEMO.fullmatch(opcode.name) and int(argument or 0) > len(content):
            raise UnpicklingError("it is built to take all memory")


class _Dtype:
    """Stands for ``numpy.dtype(code)``; the byte order comes afterwards, as a state."""

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        # Booleans, integers and floats; nothing with objects, fields, text or dates.
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise UnpicklingError(f"numpy type {code!r} is not allowed, only numbers are")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        # numpy: (version, byte order, subarray, names, fields, element size, alignment, flags).
        known = isinstance(state, tuple) and len(state) == 8
        if not known or any(part is not None for part in state[2:5]):
            raise UnpicklingError("numpy types with fields are not allowed")
        if state[1] not in ("<", ">", "=", "|"):
            raise UnpicklingError(f"unknown byte order {state[1]!r}")
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array:
    """Stands for a numpy array; ``values`` are nested lists once the state has come."""

    def __init__(self, array: np.ndarray | None = None) -> None:
        self.values: Any = [] if array is None else array.tolist()

    def __setstate__(self, state: Any) -> None:
        # numpy: (version, shape, dtype, whether Fortran order, bytes).
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnpicklingError("unknown content of a numpy array")
        _, shape, dtype, fortran, data = state
        self.values = _array(data, dtype, shape, "F" if fortran else "C").tolist()


class _StandIn(NamedTuple):
    """A function that a pickle may call; a tuple, so that nothing can be set on it."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _encode(text: object, encoding: object = "latin1") -> bytes:
    # How protocol 2 writes bytes; other encodings would import modules by name.
    if not isinstance(text, str) or encoding != "latin1":
        raise UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


def _array(data: object, dtype: object, shape: object, order: object) -> np.ndarray:
    data = bytes(data) if isinstance(data, bytearray) else data
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise UnpicklingError("numpy arrays of objects or without a type are not allowed")
    sizes = shape if isinstance(shape, tuple) else ()
    possible = shape == sizes and all(isinstance(size, int) and size >= 0 for size in sizes)
    if not possible or len(data) != prod(sizes) * dtype.numpy.itemsize:
        raise UnpicklingError(f"a numpy array of shape {shape!r} that holds {len(data)} bytes")
    return np.frombuffer(data, dtype.numpy).reshape(sizes, order="F" if order == "F" else "C")


_CORES = ("numpy.core", "numpy._core")  # numpy 2 renamed it; files of both exist
_SCALARS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    **{(f"{x}.multiarray", "scalar"): lambda t, v: _array(v, t, (), "C").item() for x in _CORES},
}
"""Enough for the numpy scalars in checkpoints."""


class _Ignored:
    """Stands for an optimizer that was pickled whole; nothing of it is kept."""

    def __setstate__(self, state: object) -> None:
        pass


_OPTIMIZER: dict[tuple[str, str], Any] = {
    ("torch.optim.adam", "Adam"): _Ignored,
    ("collections", "defaultdict"): lambda *_: OrderedDict(),
    ("builtins", "dict"): dict,
    ("__builtin__", "dict"): dict,
}
"""What the Adam in a checkpoint of SAM-Med2D is made of."""

_CALLABLE: dict[tuple[str, str], Any] = {
    **_SCALARS,
    ("collections", "OrderedDict"): dict,
    **{(x, kind.__name__): kind for x in ("builtins", "__builtin__") for kind in (set, frozenset)},
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): lambda *_: _Array(),
    **{(f"{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): lambda *x: _Array(_array(*x)) for core in _CORES},
}
_STAND_INS = {name: _StandIn(function) for name, function in _CALLABLE.items()}
"""All that the plans of nnU-Net v1 may call."""
