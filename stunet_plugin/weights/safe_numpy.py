"""Numbers that numpy pickled, rebuilt without numpy's own unpickling functions.

Checkpoints of nnU-Net v1 hold numpy scalars and their plans numpy arrays. numpy's functions that
rebuild them trust what they are given (an object dtype, for one, unpickles anything), so a file
that nobody vouches for must not reach them. The stand-ins here take plain numeric types only, check
every size against the bytes that are there, and end in Python numbers.

:data:`STAND_INS` maps (module, name), as a pickle writes it, to what is called instead. numpy 2
renamed ``numpy.core`` to ``numpy._core``; files of both exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from pickle import UnpicklingError
from typing import Any

import numpy as np

NUMBER_CODE = re.compile(r"b1|[iu][1248]|f[248]")
"""numpy's codes of booleans, integers and floats; nothing with objects, fields, text or dates."""

_CORES = ("numpy.core", "numpy._core")


class Dtype:
    """Stands for ``numpy.dtype(code)``; the pickle hands the byte order over afterwards."""

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str) or not NUMBER_CODE.fullmatch(code):
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


class Array:
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


class StandIn:
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


def scalar(dtype: object, data: object) -> Any:
    """Return the Python number of a pickled numpy scalar."""
    return _array(data, dtype, (), "C").item()


def _reconstruct(*_: object) -> Array:
    return Array()


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> Array:
    array = Array()
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
    if not isinstance(dtype, Dtype):
        raise UnpicklingError("a numpy value without a type")
    if not isinstance(data, bytes):
        raise UnpicklingError("numpy arrays of objects are not allowed")
    if not isinstance(shape, tuple) or any(not isinstance(size, int) or size < 0 for size in shape):
        raise UnpicklingError(f"impossible shape {shape!r} of a numpy array")
    if len(data) != prod(shape) * dtype.numpy.itemsize:
        raise UnpicklingError(f"a numpy array of shape {shape} that holds {len(data)} bytes")
    return np.frombuffer(data, dtype.numpy).reshape(shape, order="F" if order == "F" else "C")


SCALARS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): Dtype,
    **{(f"{core}.multiarray", "scalar"): scalar for core in _CORES},
}
"""Enough for the numpy scalars in checkpoints."""

STAND_INS: dict[tuple[str, str], Any] = {
    **{name: StandIn(stand_in) for name, stand_in in SCALARS.items()},
    ("collections", "OrderedDict"): StandIn(dict),
    **{
        (builtins, kind.__name__): StandIn(kind)
        for builtins in ("builtins", "__builtin__")
        for kind in (set, frozenset)
    },
    ("_codecs", "encode"): StandIn(_encode),
    ("numpy", "ndarray"): StandIn(_reconstruct),
    **{(f"{core}.multiarray", "_reconstruct"): StandIn(_reconstruct) for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): StandIn(_from_buffer) for core in _CORES},
}
"""All that the plans of nnU-Net v1 may call."""
