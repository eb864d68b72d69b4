"""nnU-Net's own commands as subprocesses: progress on the screen, output in a log."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import find_command

SHOWN = ("predicting ", "Mean Validation Dice", "Preprocessing", "Experiment planning")
"""Lines of the commands that users want to see."""
_DICE = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|nan")


class CommandFailedError(PluginError):
    """A command of nnU-Net ended with an error."""


class Progress:
    """A bar of epochs or cases, read from a command's output; lines where there is no terminal."""

    def __init__(self, total: int, unit: str) -> None:
        # disable=None: no bar where the output is not a terminal.
        self.bar = tqdm(
            total=total, unit=unit, file=sys.stdout, disable=None if total else True, leave=False
        )
        self.total, self.unit, self.done = total, unit, 0
        self.loss = self.dice = ""

    def see(self, line: str) -> None:
        """Take one line of output."""
        # nnU-Net's log lines: "<date> <time>: <text>".
        text = line.strip().partition(": ")[2] if line[:2] == "20" else line.strip()
        if text.startswith("train_loss "):
            self.loss = text.split()[1]
        elif text.startswith("Pseudo dice "):
            values = [float(number) for number in _DICE.findall(text)]
            self.dice = f"{np.nanmean(values):.3f}" if values else "n/a"
        elif text.startswith("Epoch time:"):
            self._step(f"loss {self.loss}, pseudo Dice {self.dice}, {text[12:]}")
        elif text.startswith("done with "):
            self._step(text[len("done with ") :])
        elif text.startswith(SHOWN) and "%|" not in text:
            tqdm.write(f"    {text}", file=sys.stdout)

    def _step(self, text: str) -> None:
        self.done += 1
        tqdm.write(f"    {self.unit} {self.done:>3} of {self.total}: {text}", file=sys.stdout)
        self.bar.update()


def run_stock(
    command: list[str], folder: Path, environment: Mapping[str, str], total: int, unit: str
) -> None:
    """Run a command in a folder and append its output to ``logs/COMMAND.log`` there.

    Args:
        command: name and arguments.
        folder: of the demo.
        environment: all variables.
        total, unit: of the bar: epochs or cases; 0 for none.

    Raises:
        CommandFailedError: it ended with an error.
    """
    print(f"  $ {shlex.join(command)}", flush=True)
    log = folder / "logs" / f"{command[0]}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            [find_command(command[0]), *command[1:]],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        progress = Progress(total, unit)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                progress.see(line)
            code = process.wait()
        except BaseException:
            # The command has workers of its own: stop the whole group.
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            progress.bar.close()
    if code != 0:
        tail = "\n    ".join(log.read_text(errors="replace").splitlines()[-12:])
        raise CommandFailedError(
            f"{command[0]} ended with exit code {code}. Its last lines:\n    {tail}\n"
            f"The whole log: {log}"
        )
