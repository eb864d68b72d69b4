"""Running a stock command: its progress on the screen, its output in a log, its workers stopped
with it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from stunet_plugin.demo.progress import Progress
from stunet_plugin.errors import PluginError
from stunet_plugin.nnunet.commands import find_command


class StockCommandError(PluginError):
    """A stock nnU-Net command ended with an error."""


def run_stock(
    command: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    lock: int,
    epochs: int,
) -> None:
    """Run a stock command in a folder, show its progress, and append its output to
    ``logs/COMMAND.log`` there.

    Args:
        command, arguments: what to run.
        folder: of the demo.
        environment: all variables.
        lock: file descriptor that the command keeps open, so that the lock lives as long as
            anything that writes into the folder.
        epochs: of the training.

    Raises:
        StockCommandError: it ended with an error.
    """
    print(f"  $ {shlex.join([command, *arguments])}", flush=True)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{command}.log"
    with log.open("a") as file:
        process = subprocess.Popen(
            [find_command(command), *arguments],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=(lock,),
        )
        progress = Progress(epochs)
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
    if code != 0:
        tail = "".join(
            f"    {line}"
            for line in log.read_text(errors="replace").splitlines(keepends=True)[-12:]
        )
        raise StockCommandError(
            f"{command} ended with exit code {code}. Its last lines:\n{tail}\nThe whole log: {log}"
        )
