"""What a person wants to know of the output of the stock commands."""

from __future__ import annotations

import re

import numpy as np

# Lines of the stock commands that people want to see; all lines are in the log files.
MILESTONES = (
    "predicting ",
    "Predicting ",
    "Mean Validation Dice",
    "Preprocessing",
    "Experiment planning",
    "Fingerprint",
)


class Progress:
    """Turns the output of nnUNetv2_train into a line per epoch, and that of the others into a line
    per case."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.epoch = ""
        self.loss = ""
        self.dice = ""

    def see(self, line: str) -> None:
        """Take one line of output, print what a person wants to know of it."""
        # nnU-Net's log lines: "<date> <time>: <text>".
        text = line.strip().partition(": ")[2] if line[:2] == "20" else line.strip()
        if text.startswith("Epoch time:"):
            print(
                f"    epoch {self.epoch:>3} of {self.epochs}: loss {self.loss}, pseudo Dice"
                f" {self.dice}, {text[12:]}",
                flush=True,
            )
        elif text.startswith("Epoch "):
            self.epoch = (
                str(int(text.split()[1]) + 1) if text.split()[1].isdigit() else text.split()[1]
            )
        elif text.startswith("train_loss "):
            self.loss = text.split()[1]
        elif text.startswith("Pseudo dice "):
            # A list of numbers, with or without numpy's own notation around each.
            values = [
                float(number) for number in re.findall(r"(?:-?\d+\.\d+(?:e-?\d+)?|nan)", text)
            ]
            self.dice = f"{np.nanmean(values):.3f}" if values else "n/a"
        elif text.startswith(MILESTONES) and "%|" not in text:
            print(f"    {text}", flush=True)
