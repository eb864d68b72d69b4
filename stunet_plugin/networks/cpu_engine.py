"""OpenVINO engine for predictions on the CPU: any network, compiled once per patch and weights.

A compiled network is kept in memory, and on disk for the next process. Its first output is compared
with the network's own before it is trusted; where it differs, or where OpenVINO is missing or does
not take the network, plain torch goes on, which is said once. Measurements: docs/segment.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, count
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stunet_plugin.errors import PluginError, last_line
from stunet_plugin.options import CPU, CPU_PRECISION, Options
from stunet_plugin.utils.files import home

OPENVINO, TORCH, AUTO = "openvino", "torch", "auto"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
SMALLEST_IMAGE = 48**3
"""Voxels; compiling does not pay for less."""
KEPT_BYTES = 2 << 30
"""Of weights, compiled and kept in memory; the one in use is kept whatever its size."""
DISK_BYTES = 4 << 30
"""Of compiled networks on disk; the oldest go first, larger ones are not kept there."""
MODEL, CHECKED = "network.xml", "checked.json"
"""Files of a compiled network on disk; the first is missing where it differs too much."""
LARGEST_ERROR = 1e-3
"""Of float32, relative to the largest logit."""
LEAST_AGREEMENT = 0.995
"""Voxels with the same label in bfloat16."""
Labels = Callable[[Tensor], Tensor]


class _Compiled:
    """A compiled network: its precision, its request, and the bytes of its weights."""

    def __init__(self, model: Any, precision: str, size: int) -> None:
        import openvino

        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == BFLOAT16 else "f32"}
        core = openvino.Core()
        self.request = core.compile_model(model, "CPU", threads | hint).create_infer_request()
        self.precision, self.size = precision, size

    def run(self, x: Tensor) -> Tensor:
        """Return the output for an input of the compiled shape, valid until the next run."""
        output = self.request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)[0]
        return torch.from_numpy(output)


@dataclass
class _State:
    """A network's number in this process, and the hash of its weights of these versions."""

    number: int
    versions: list[tuple[int, int]]
    digest: str


_compiled: OrderedDict[str, _Compiled | None] = OrderedDict()
"""By what is compiled; None: tried in vain."""
_states: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
_serial = count()
_busy = False


def predict(
    network: nn.Module, x: Tensor, shared: bool = False, labels: Labels | None = None
) -> Tensor | None:
    """Return ``network(x)``, or None where the network itself is to be called.

    Args:
        network: in evaluation mode, of one output.
        x: (batch, channel, *spatial).
        shared: the output may be overwritten by the next call.
        labels: from an output, where they are not its greatest channel.
    """
    if not applies(network, x):
        return None
    wanted = Options().word(CPU_PRECISION) or AUTO
    state = _state_of(network)
    key = f"{state.number} {state.digest} {tuple(x.shape)} {wanted}"
    if key not in _compiled:
        _compiled[key] = _compile(network, x, wanted, labels or _greatest)
        _forget(key)
    _compiled.move_to_end(key)
    compiled = _compiled[key]
    if compiled is None:
        return None
    output = compiled.run(x.contiguous())
    return output if shared else output.clone()


def _greatest(output: Tensor) -> Tensor:
    return output.argmax(1)


def applies(network: nn.Module, x: Tensor) -> bool:
    """Return whether this is a prediction of a large image on the CPU in full precision.

    Hooks expect every module to be called, and a trace must hold at other sizes.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or network.training or _busy:
        return False
    if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    if prod(x.shape[2:]) < SMALLEST_IMAGE or torch.is_autocast_enabled("cpu"):
        return False
    if getattr(getattr(network, "decoder", None), "deep_supervision", False):
        return False
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
    return not hooked and engine() == OPENVINO


def engine() -> str:
    """Return what predicts on the CPU by ``STUNET_CPU``.

    Raises:
        PluginError: OpenVINO is asked for and is not there.
    """
    wanted = Options().word(CPU) or AUTO
    if wanted == TORCH:
        return TORCH
    missing = _why_missing()
    if missing and wanted == OPENVINO:
        advice = "Run: pip install openvino, or unset STUNET_CPU."
        raise PluginError(
            f"STUNET_CPU=openvino, but OpenVINO cannot be loaded ({missing}). {advice}"
        )
    return TORCH if missing else OPENVINO


def precision_in_use() -> str:
    """Return the precision of the last prediction, or "" where torch made it."""
    last = next(reversed(_compiled.values()), None)
    return last.precision if last else ""


@cache
def _why_missing() -> str:
    """Return why OpenVINO cannot be loaded, or ""."""
    # Without it OpenVINO's converter, which has a stand-in, neither sends statistics
    # nor writes an ID into the home directory.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except Exception as error:  # a library of the system may be too old
        reason = last_line(error)
        _say(f"OpenVINO, which predicts faster on the CPU, cannot be loaded ({reason}).")
        return reason
    return "" if "CPU" in openvino.Core().available_devices else "it finds no CPU device"


def has_bfloat16() -> bool:
    """Return whether the processor computes in bfloat16 natively."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _compile(network: nn.Module, x: Tensor, wanted: str, labels: Labels) -> _Compiled | None:
    """Return the network compiled and compared with itself, or None."""
    global _busy
    precisions = [wanted]
    if wanted == AUTO:
        precisions = [BFLOAT16, FLOAT32] if has_bfloat16() else [FLOAT32]
    _busy = True
    try:
        # Not in inference mode, whose tensors cannot be exported.
        with torch.inference_mode(False), torch.no_grad():
            compiler = _Compiler(network, x.clone(), labels)
            for precision in precisions:
                compiled = compiler.compile(precision)
                if compiled is not None:
                    return compiled
    except MemoryError:
        raise
    except Exception as error:  # torch.export and OpenVINO raise whatever an odd operation breaks
        _say(
            f"OpenVINO does not take {type(network).__name__} ({type(error).__name__}:"
            f" {last_line(error)}); torch predicts."
        )
    finally:
        _busy = False
    return None


class _Compiler:
    """A network and its first input, exported and run once for all precisions."""

    def __init__(self, network: nn.Module, x: Tensor, labels: Labels) -> None:
        self.network, self.x, self.labels = network, x, labels
        self.size = sum(p.numel() * p.element_size() for p in network.parameters())
        self.program = torch.export.export(network, (x,), strict=False)

    def compile(self, precision: str) -> _Compiled | None:
        """Return the network in a precision, or None where it differs too much from its own."""
        import openvino

        text = f"{self.program.graph} {tuple(self.x.shape)} {_state_of(self.network).digest}"
        versions = f"{precision} {torch.__version__} {openvino.__version__}"
        place = home() / "engine" / hashlib.sha256(f"{text} {versions}".encode()).hexdigest()[:32]
        if (place / CHECKED).is_file():
            os.utime(place)
            found = json.loads((place / CHECKED).read_text("utf-8"))
            if _fits(precision, found):
                model = openvino.Core().read_model(place / MODEL)
                return _Compiled(model, precision, self.size)
        else:
            compiled, found = self._compare(precision, place)
            if _fits(precision, found):
                return compiled
        _say(
            f"OpenVINO in {precision} gives other labels for {1 - found['agreement']:.2%} of the"
            f" voxels of the first window (largest error {found['error']:.2g}), so it is not used."
        )
        return None

    def _compare(self, precision: str, place: Path) -> tuple[_Compiled, dict[str, float]]:
        """Return the compiled network, its largest error, relative to the largest logit, and the
        share of voxels with the same label."""
        model = self._converted
        if precision == FLOAT32:
            _split_means(model)
        compiled = _Compiled(model, precision, self.size)
        output = compiled.run(self.x)
        # Channel by channel: an output can be a gigabyte.
        pairs = list(zip(output.flatten(0, 1), self._expected.flatten(0, 1), strict=True))
        differences = [(ours - theirs).abs().max() for ours, theirs in pairs]
        largest = torch.stack([theirs.abs().max() for _, theirs in pairs]).max().clamp(min=1e-6)
        same = self.labels(output) == self.labels(self._expected)
        error = float(torch.stack(differences).max() / largest)
        found = {"error": error, "agreement": float(same.float().mean())}
        if self.size <= DISK_BYTES // 2:
            _keep_on_disk(model if _fits(precision, found) else None, place, found)
        return compiled, found

    @cached_property
    def _converted(self) -> Any:
        import openvino

        model = openvino.convert_model(self.program)
        model.reshape(list(self.x.shape))
        return model

    @cached_property
    def _expected(self) -> Tensor:
        output: Tensor = self.network(self.x)
        return output


def _fits(precision: str, found: dict[str, float]) -> bool:
    """Return whether a compiled network may be used; NaN never fits."""
    if precision == BFLOAT16:
        return found["agreement"] >= LEAST_AGREEMENT
    return found["error"] < LARGEST_ERROR


def _split_means(model: Any) -> None:
    """Replace means of whole maps, those of norms, by means of means: OpenVINO adds up two million
    voxels one by one, which costs three digits."""
    from openvino import opset13 as ops

    for node in [node for node in model.get_ops() if node.get_type_name() == "ReduceMean"]:
        x, axes = node.input_value(0), getattr(node.input_value(1).get_node(), "data", ())
        rank = len(x.get_shape())
        if rank < 4 or not {axis % rank for axis in axes} >= set(range(2, rank)):
            continue
        pooled: Any = x
        for _ in range(2):
            sizes = pooled.get_shape()[2:]
            steps = [next(n for n in range(8, 0, -1) if size % n == 0) for size in sizes]
            none = [0] * len(steps)
            pooled = ops.avg_pool(pooled, steps, none, none, steps, True).output(0)
        mean = ops.reduce_mean(pooled, list(axes), keep_dims=node.get_attributes()["keep_dims"])
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(mean.output(0))


def _keep_on_disk(model: Any | None, place: Path, found: dict[str, float]) -> None:
    """Keep what was found, and the model unless it is None: one that differs too much."""
    import openvino

    # A full or read-only disk, or another process at the same: the next one compiles again.
    with suppress(OSError, RuntimeError):
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial", dir=place.parent))
        try:
            if model is not None:
                openvino.save_model(model, partial / MODEL, compress_to_fp16=False)
            (partial / CHECKED).write_text(json.dumps(found), encoding="utf-8")
            partial.replace(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        old = sorted(place.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in old}
        for path in old[:-1]:
            if sum(sizes.values()) <= DISK_BYTES:
                break
            shutil.rmtree(path, ignore_errors=True)
            sizes.pop(path)


def _forget(newest: str) -> None:
    """Drop the compiled networks that were not used for longest, beyond KEPT_BYTES."""
    for key in list(_compiled):
        kept = sum(compiled.size for compiled in _compiled.values() if compiled)
        if kept > KEPT_BYTES and key != newest and _compiled[key]:
            del _compiled[key]


def _state_of(network: nn.Module) -> _State:
    """Return what is known of a network; the weights are hashed again only after a change."""
    tensors = list(chain(network.parameters(), network.buffers()))
    versions = [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]
    known = _states.get(network)
    if known and known.versions == versions and all(version >= 0 for _, version in versions):
        return known
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    number = known.number if known else next(_serial)
    _states[network] = state = _State(number, versions, total.hexdigest())
    return state


@cache
def _say(text: str) -> None:
    tqdm.write(f"Note: {text}")
