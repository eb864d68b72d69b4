"""One measurement of ``stunet_step.py`` or ``misfm_step.py``, in a process of its own: prints its
result as one line of JSON.

What is measured is what nnU-Net runs (``nnUNetTrainer.train_step``, ``nnUNetPredictor``): autocast,
gradient scaler and ``cudnn.benchmark`` on CUDA, float32 on the CPU. Data lie on the device already;
loading and augmentation are no part of it.

Memory, all in bytes:

* ``peak_bytes``: the peak of tensor memory during a step after warm-up. On CUDA
  ``torch.cuda.max_memory_allocated``. On the CPU the weights, the optimizer's state and data that
  stay, plus the peak of what one further step, run under torch's profiler, allocates through
  torch's allocator and has not freed yet, buffers inside of convolutions included. (Which code a
  CPU convolution runs, and so its buffers, depends on the number of threads, which the report
  names.)
* ``reserved_bytes``: ``torch.cuda.max_memory_reserved``, what the caching allocator has taken from
  the driver since the process started; also holds what cuDNN tried out during warm-up. None on the
  CPU.
* ``max_rss_bytes``: ``ru_maxrss``, the largest resident memory of the process, with Python,
  libraries and what the heap keeps of freed memory; noisy, for orientation. Taken before the
  profiler runs.
"""

from __future__ import annotations

import gc
import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from subjects import INPUT_CHANNELS, find_subject
from torch import Tensor, nn

from stunet_plugin.networks.topology import stage_shapes

OURS, PLAIN = "ours", "plain"
TRAIN, INFERENCE, AGREEMENT = "train", "inference", "agreement"
SEED = 0

WARM_UP_STEPS = 2
# A gradient scaler that starts too high skips the first optimizer steps, and momentum takes memory
# only after the first that is not skipped.
MOST_WARM_UP_STEPS = 30


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        network: ``ours`` or ``plain``; of no meaning for ``agreement``.
        size: name of a subject, see ``subjects.py``.
        mode: ``train``, ``inference`` or ``agreement``.
        compiled: with ``torch.compile``, as nnU-Net compiles (the network, and in training the Dice
            loss).
        device: ``cpu`` or ``cuda``.
        patch: voxels per axis.
        batch: samples of a training step; inference takes one.
        classes: outputs, background included.
        steps: timed steps after warm-up.
    """

    network: str
    size: str
    mode: str
    compiled: bool
    device: str
    patch: tuple[int, ...]
    batch: int
    classes: int
    steps: int


def build_network(case: Case, deep_supervision: bool) -> nn.Module:
    """Build one of the two networks, ours in the way a trainer does, both with the same kind of
    initialisation."""
    subject = find_subject(case.size)
    if case.network == PLAIN:
        return subject.plain(case.classes, deep_supervision, tuple(case.patch))
    return subject.ours(case.classes, deep_supervision)


def build_pair(size: str, classes: int, patch: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Build ours and plain with deep supervision and the same weights, which they share."""
    torch.manual_seed(SEED)
    subject = find_subject(size)
    plain = subject.plain(classes, True, tuple(patch))
    with torch.no_grad():
        for parameter in plain.parameters():
            # Biases start as zeros and norms as ones and zeros: if two were mixed up, nothing would
            # show.
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for statistics in plain.buffers():
            if statistics.is_floating_point():
                statistics.uniform_(0.5, 1.5)
    # Two times the weights of a large size would be more memory than measuring it takes.
    with torch.device("meta"):
        ours = subject.ours(classes, True)
    ours.load_state_dict(subject.translate(plain.state_dict()), assign=True)
    return ours, plain


def build_loss(outputs: int, compiled: bool) -> nn.Module:
    """Dice and cross-entropy with deep supervision as ``nnUNetTrainer._build_loss`` builds them for
    3d_fullres."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(
        dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss
    )
    if compiled:
        loss.dc = torch.compile(loss.dc)
    weights = np.array([1 / 2**output for output in range(outputs)])
    weights[-1] = 0
    return DeepSupervisionWrapper(loss, weights / weights.sum())


class TrainingStep:
    """One step of ``nnUNetTrainer.train_step`` on random data."""

    def __init__(self, case: Case) -> None:
        self.device = case.device
        self.parameters = build_network(case, deep_supervision=True).to(case.device)
        self.network = torch.compile(self.parameters) if case.compiled else self.parameters
        subject = find_subject(case.size)
        shapes = stage_shapes(case.patch, subject.strides)[:-1]
        self.loss = build_loss(len(shapes), case.compiled)
        self.optimizer = subject.optimizer(self.parameters.parameters())
        self.scaler = torch.amp.GradScaler("cuda") if case.device == "cuda" else None
        self.data = torch.randn(case.batch, INPUT_CHANNELS, *case.patch, device=case.device)
        self.targets = [
            torch.randint(
                case.classes, (case.batch, 1, *shape), dtype=torch.int16, device=case.device
            )
            for shape in shapes
        ]

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            loss = self.loss(self.network(self.data), self.targets)
        if self.scaler is not None:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
        else:
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.parameters(), 12)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def is_warm(self) -> bool:
        return len(self.optimizer.state) > 0

    def resident(self) -> list[Tensor]:
        """Drop the gradients, which a step allocates anew, and return the tensors that stay between
        steps."""
        self.optimizer.zero_grad(set_to_none=True)
        moments = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return [
            *self.parameters.parameters(),
            *self.parameters.buffers(),
            *moments,
            self.data,
            *self.targets,
        ]


class InferenceStep:
    """The prediction of one patch, full resolution only."""

    def __init__(self, case: Case) -> None:
        self.device = case.device
        self.parameters = build_network(case, deep_supervision=False).to(case.device).eval()
        self.network = torch.compile(self.parameters) if case.compiled else self.parameters
        self.data = torch.randn(1, INPUT_CHANNELS, *case.patch, device=case.device)

    def __call__(self) -> None:
        with torch.no_grad(), autocast(self.device):
            self.network(self.data)

    def is_warm(self) -> bool:
        return True

    def resident(self) -> list[Tensor]:
        """Return the tensors that stay between steps."""
        return [*self.parameters.parameters(), *self.parameters.buffers(), self.data]


def autocast(device: str) -> AbstractContextManager[Any]:
    """Mixed precision where nnU-Net uses it: on CUDA alone."""
    return torch.autocast("cuda") if device == "cuda" else nullcontext()


def measure(case: Case) -> dict[str, Any]:
    """Run a case; return seconds per step and the peaks of memory.

    Raises:
        RuntimeError: no optimizer step of the warm-up went through, so there is nothing to measure.
    """
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = case.device == "cuda"
    # Built where it is used: the large sizes would take long to initialise on the CPU.
    with torch.device(case.device):
        step = TrainingStep(case) if case.mode == TRAIN else InferenceStep(case)
    for warm_up in range(MOST_WARM_UP_STEPS):
        step()
        if warm_up + 1 >= WARM_UP_STEPS and step.is_warm():
            break
    else:
        raise RuntimeError(
            f"the gradient scaler skipped all of {MOST_WARM_UP_STEPS} steps (infinite gradients)"
        )
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(step, case.device) for _ in range(case.steps)]
    # Kilobytes on Linux, bytes on macOS.
    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    if case.device == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        peak, reserved = storage_bytes(step.resident()) + allocation_peak(step), None
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "max_rss_bytes": max_rss,
    }


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of one step, with everything that the device had to do for it."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each storage counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


def allocation_peak(step: Callable[[], object]) -> int:
    """Return the peak in bytes of the CPU memory that a call allocates through torch, above what
    was there before.

    The call must free nothing that was allocated before it: the profiler does not know how large
        that was.
    """
    return max(itertools.accumulate((change for _, change in _trace(step)[0]), initial=0))


def allocation_peaks(step: Callable[[], object], stages: Sequence[str]) -> dict[str, int]:
    """Return the same peak within each part of a call, what earlier parts left included.

    Args:
        step: marks each part with ``torch.profiler.record_function``.
        stages: the names of the marks, each used once.
    """
    changes, spans = _trace(step)
    held = list(itertools.accumulate((change for _, change in changes), initial=0))
    peaks = {}
    for stage in stages:
        start, end = spans[stage]
        before = sum(time < start for time, _ in changes)
        peaks[stage] = max(held[before : sum(time <= end for time, _ in changes) + 1])
    return peaks


def _trace(
    step: Callable[[], object],
) -> tuple[list[tuple[float, int]], dict[str, tuple[float, float]]]:
    """Run a call; return its allocations (positive) and releases in order, as (time, bytes), and
    start and end of marked parts."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    changes = sorted(
        ((event["ts"], event["args"]["Bytes"]) for event in memory), key=lambda change: change[0]
    )
    marks = (event for event in events if event.get("cat") == "user_annotation")
    return changes, {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in marks}


def agreement(case: Case) -> dict[str, Any]:
    """Compare the outputs of all heads of the two networks with the same weights, in full float32
    precision."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.device(case.device), torch.no_grad():
        ours, plain = (
            network.eval() for network in build_pair(case.size, case.classes, case.patch)
        )
        data = torch.randn(1, INPUT_CHANNELS, *case.patch)
        pairs = list(zip(ours(data), plain(data), strict=True))
    return {
        "largest_difference": max((a - b).abs().max().item() for a, b in pairs),
        "largest_output": max(b.abs().max().item() for _, b in pairs),
        "outputs": len(pairs),
        "gpu": torch.cuda.get_device_name() if case.device == "cuda" else None,
    }


if __name__ == "__main__":
    requested = Case(**json.loads(sys.argv[1]))
    print(json.dumps(agreement(requested) if requested.mode == AGREEMENT else measure(requested)))
