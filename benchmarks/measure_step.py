"""Measurement of one training step or prediction: seconds and peak memory.

What is measured is what nnU-Net runs (``nnUNetTrainer.train_step``, ``nnUNetPredictor``): autocast,
gradient scaler and ``cudnn.benchmark`` on CUDA, float32 on the CPU. Data lie on the device already.

The peak in bytes is that of tensor memory during a step after warm-up. On CUDA
``torch.cuda.max_memory_allocated``. On the CPU weights, optimizer state and data, plus the peak of
what one further step, under torch's profiler, allocates and has not freed yet; buffers inside of
convolutions are included and depend on the number of threads.
"""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import INPUT_CHANNELS, find_subject
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from stunet_plugin.networks.topology import stage_shapes

OURS, PLAIN = "ours", "plain"
TRAIN, INFERENCE = "train", "inference"
SEED = 0
WARM_UP_STEPS = 2
MOST_WARM_UP_STEPS = 30
"""A gradient scaler that starts too high skips the first optimizer steps, and momentum takes memory
only after the first one that is not skipped."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        network: ``ours`` or ``plain``.
        size: name of a network, see ``networks.py``.
        mode: ``train`` or ``inference``.
        compiled: with ``torch.compile``, as nnU-Net compiles (in training the Dice loss too).
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


def build_pair(size: str, classes: int, patch: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Build ours and plain with deep supervision and the same weights, which they share."""
    torch.manual_seed(SEED)
    subject = find_subject(size)
    plain = subject.plain(classes, True, tuple(patch))
    with torch.no_grad():
        # Biases start as zeros and norms as ones: if two were mixed up, nothing would show.
        for parameter in plain.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for statistics in plain.buffers():
            if statistics.is_floating_point():
                statistics.uniform_(0.5, 1.5)
    with torch.device("meta"):
        ours = subject.ours(classes, True)
    ours.load_state_dict(subject.translate(plain.state_dict()), assign=True)
    return ours, plain


def build_loss(outputs: int, compiled: bool) -> nn.Module:
    """Build Dice and cross-entropy with deep supervision as nnU-Net does for 3d_fullres."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    weights = {"weight_ce": 1, "weight_dice": 1}
    loss = DC_and_CE_loss(dice, {}, **weights, dice_class=MemoryEfficientSoftDiceLoss)
    if compiled:
        loss.dc = torch.compile(loss.dc)
    factors = np.array([1 / 2**output for output in range(outputs)])
    factors[-1] = 0
    return DeepSupervisionWrapper(loss, factors / factors.sum())


class Step:
    """One ``nnUNetTrainer.train_step`` on random data, or the prediction of one patch at full
    resolution."""

    def __init__(self, case: Case) -> None:
        subject = find_subject(case.size)
        self.device, self.training = case.device, case.mode == TRAIN
        outputs = case.classes, self.training
        plain = case.network == PLAIN
        built = subject.plain(*outputs, case.patch) if plain else subject.ours(*outputs)
        self.parameters = built.to(case.device)
        self.network = torch.compile(self.parameters) if case.compiled else self.parameters
        batch = case.batch if self.training else 1
        self.data = torch.randn(batch, INPUT_CHANNELS, *case.patch, device=case.device)
        self.targets: list[Tensor] = []
        self.network.train(self.training)
        if self.training:
            shapes = stage_shapes(case.patch, subject.strides)[:-1]
            self.loss = build_loss(len(shapes), case.compiled)
            self.optimizer = subject.optimizer(self.parameters.parameters())
            # Disabled, it passes everything on as it is.
            self.scaler = torch.amp.GradScaler(enabled=case.device == "cuda")
            kind = {"dtype": torch.int16, "device": case.device}
            sizes = [(batch, 1, *shape) for shape in shapes]
            self.targets = [torch.randint(case.classes, size, **kind) for size in sizes]

    def __call__(self) -> None:
        if not self.training:
            with torch.no_grad(), self.autocast():
                self.network(self.data)
            return
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.loss(self.network(self.data), self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters.parameters(), 12)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return mixed precision where nnU-Net uses it: on CUDA alone."""
        return torch.autocast("cuda") if self.device == "cuda" else nullcontext()

    def warm_up(self) -> None:
        """Run until time and memory are those of any later step.

        Raises:
            RuntimeError: no optimizer step went through.
        """
        for number in range(MOST_WARM_UP_STEPS):
            self()
            if number + 1 >= WARM_UP_STEPS and (not self.training or self.optimizer.state):
                return
        raise RuntimeError(f"infinite gradients in all of {MOST_WARM_UP_STEPS} steps")

    def timed(self) -> float:
        """Return the seconds of one step, with everything that the device had to do for it."""
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        self()
        wait()
        return time.perf_counter() - start

    def resident(self) -> int:
        """Drop the gradients and return the bytes that stay between steps."""
        moments: list[Tensor] = []
        if self.training:
            self.optimizer.zero_grad(set_to_none=True)
            values = (value for state in self.optimizer.state.values() for value in state.values())
            moments = [value for value in values if isinstance(value, Tensor)]
        network = (*self.parameters.parameters(), *self.parameters.buffers())
        tensors = (*network, *moments, self.data, *self.targets)
        storages = (tensor.untyped_storage() for tensor in tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def peak(self) -> int:
        """Return the peak in bytes of a step on the CPU."""
        return self.resident() + allocation_peak(self)


def make_step(case: Case) -> Step:
    """Build a step where it is used: large sizes take long to initialise on the CPU."""
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = case.device == "cuda"
    with torch.device(case.device):
        return Step(case)


def measure(case: Case) -> dict[str, Any]:
    """Run a case; return seconds per step and the peak of memory in bytes."""
    step = make_step(case)
    step.warm_up()
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [step.timed() for _ in range(case.steps)]
    peak = torch.cuda.max_memory_allocated() if case.device == "cuda" else step.peak()
    return {"seconds": seconds, "peak_bytes": peak}


def allocation_peak(step: Callable[[], object]) -> int:
    """Return the peak in bytes of the CPU memory that a call allocates through torch.

    The call must free nothing that was allocated before it: the profiler does not know its size.
    """
    gc.collect()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    memory.sort(key=lambda event: event["ts"])  # of the same moment, in the order they came
    changes = (event["args"]["Bytes"] for event in memory)
    return max(itertools.accumulate(changes, initial=0))


def agreement(case: Case) -> dict[str, Any]:
    """Compare the outputs of all heads of the two networks with the same weights, in float32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with torch.device(case.device), torch.no_grad():
        ours, plain = build_pair(case.size, case.classes, case.patch)
        data = torch.randn(1, INPUT_CHANNELS, *case.patch)
        pairs = list(zip(ours.eval()(data), plain.eval()(data), strict=True))
    return {
        "largest_difference": max((a - b).abs().max().item() for a, b in pairs),
        "largest_output": max(b.abs().max().item() for _, b in pairs),
        "outputs": len(pairs),
    }
