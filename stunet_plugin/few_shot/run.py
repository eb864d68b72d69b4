"""Run of a few-shot comparison: prepares the cases, trains what is missing, scores, reports.

Everything is in one folder, with nnU-Net's three folders of its own: the user's are read alone. A
training counts as done when its scores are written; what was interrupted is trained again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stunet_plugin.datasets.draws import Draw
from stunet_plugin.datasets.raw_dataset import read_raw
from stunet_plugin.errors import PluginError
from stunet_plugin.few_shot.agreement import agreement, rank_arguments, scores_of
from stunet_plugin.few_shot.candidates import Candidate, Start, find_candidates, read_starts
from stunet_plugin.few_shot.estimate import duration, seconds_of_training
from stunet_plugin.few_shot.inputs import EPOCHS, Cases, Inputs, choose_cases
from stunet_plugin.few_shot.report import REPORT, mean_dice_of, write_report
from stunet_plugin.few_shot.scores import collect, mean_dice, score_cases, write_scores
from stunet_plugin.nnunet.commands import CommandFailedError, run_command
from stunet_plugin.nnunet.names import CONFIGURATION, PREPROCESSED, RAW, RESULTS, SPLITS
from stunet_plugin.nnunet.registration import missing_variables
from stunet_plugin.preparation.fitting_plans import Preparation
from stunet_plugin.utils.device import choose_device
from stunet_plugin.utils.files import lock, read_json, sha256_of, write_atomically
from stunet_plugin.utils.image_files import LINK, place_image

if TYPE_CHECKING:
    from stunet_plugin.commands.few_shot import FewShot

SETTINGS, SCORES = "settings.json", "scores.json"
MAY_DIFFER = ("STUNET_HOME", "STUNET_CPU", "STUNET_CPU_PRECISION")
"""Variables that do not change what a training learns."""


def run_few_shot(options: FewShot, inputs: Inputs) -> int:
    """Run what is left to do; return 1 if a command fails. A PluginError is for wrong input."""
    starts = read_starts(options, inputs.candidates, inputs.raw)
    known = frozenset[str]().union(*(start.trained_on for start in starts))
    cases = choose_cases(options, inputs.raw, known)
    run = _Comparison(options, inputs, starts, cases)
    run.out.mkdir(parents=True, exist_ok=True)
    try:
        with lock(run.out / ".lock", f"stunet few-shot is running in {run.out}"):
            run.keep_settings()
            run.all()
    except CommandFailedError as error:
        told = f"{error} Finished trainings are kept; the same command goes on from there."
        print(f"\nstunet few-shot: {told}", file=sys.stderr)
        return 1
    return 0


class _Comparison:
    """One comparison in its folder."""

    def __init__(self, options: FewShot, inputs: Inputs, starts: list[Start], cases: Cases) -> None:
        self.options, self.inputs, self.starts, self.cases = options, inputs, starts, cases
        self.device = choose_device(options.device)
        self.out = Path(options.out).absolute()
        self.raw = self.out / RAW / inputs.raw.name
        self.preprocessed = self.out / PREPROCESSED / inputs.raw.name
        self.runs, self.log = self.out / "runs", self.out / "log.txt"
        self.preparation = Preparation(
            inputs.raw, self.preprocessed, self._stock, options.processes
        )
        self.variables = {
            **missing_variables(),
            **{name: str(self.out / name) for name in (RAW, PREPROCESSED, RESULTS)},
        }

    def keep_settings(self) -> None:
        """Write what was asked for, or refuse to mix it with something else. Weights, draws and
        numbers of labelled cases may be added."""
        options, file = self.options, self.out / SETTINGS
        variables = {x: y for x, y in sorted(os.environ.items()) if x.startswith("STUNET_")}
        settings: dict[str, Any] = {
            "dataset": str(self.inputs.raw.folder),
            "test cases": self.cases.test,
            "--train-names": sorted(options.train_names or ()),
            "--iterations": options.iterations,
            "--seed": options.seed,
            "-p": options.plans,
            "variables": {x: y for x, y in variables.items() if x not in MAY_DIFFER},
        }
        weights = {start.name: sha256_of(start.source.checkpoint) for start in self.starts}
        was = read_json(file) if file.is_file() else {}
        before = was.get("weights", {})
        changed = [name for name in settings if was and was.get(name) != settings[name]]
        changed += [name for name in weights if before.get(name, weights[name]) != weights[name]]
        if changed:
            raise PluginError(
                f"{self.out} was begun with something else ({', '.join(changed)}). Use the same, or"
                " another -o."
            )
        content = {**settings, "weights": {**before, **weights}}
        write_atomically(file, json.dumps(content, indent=1) + "\n")

    def all(self) -> None:
        candidates = self.prepare()
        left = [x for x in self._trainings(candidates) if not self._scores(*x).is_file()]
        total = len(candidates) * len(self.cases.draws)
        print(
            f"\n{total} trainings of {self.options.iterations} iterations, each tested on"
            f" {len(self.cases.test)} cases; {total - len(left)} are done.",
            flush=True,
        )
        seconds = self._estimate(left)
        print(f"Time left: about {duration(sum(seconds.values()))} on {self.device}.", flush=True)
        if self.options.check:
            return
        files = self.rank(candidates) if self.options.rank else []
        started, estimated = time.monotonic(), 0.0
        for number, (candidate, draw) in enumerate(left, 1):
            self.train(candidate, draw)
            estimated += seconds[candidate, draw]
            took = time.monotonic() - started
            rest = (sum(seconds.values()) - estimated) * took / estimated
            dice = mean_dice(self._scores(candidate, draw))
            more = f"; about {duration(rest)} left" if number < len(left) else ""
            told = f"{candidate.name}, {draw[0]} labelled case(s), draw {draw[1]}: Dice {dice:.3f}"
            print(f"  [{number}/{len(left)}] {told}{more}", flush=True)
        self.report(candidates, files)

    def prepare(self) -> list[Candidate]:
        """Return the candidates, when the dataset is planned and preprocessed for them. Plans are
        made before the test cases are there."""
        print(
            f"{self.inputs.raw.name}: {len(self.cases.test)} cases to test on,"
            f" {len(self.cases.labelled)} to train on. Log: {self.log}",
            flush=True,
        )
        self._link(self.cases.labelled)
        self.preprocessed.mkdir(parents=True, exist_ok=True)
        for file in [self.raw / "dataset.json", *filter(None, [self.inputs.plans_file])]:
            shutil.copyfile(file, self.preprocessed / file.name)
        self.preparation.extract_fingerprint()
        given, plans = self.inputs.candidates, self.options.plans
        candidates = find_candidates(given, self.starts, self.preparation, plans)
        self._link(self.cases.test)
        for plans in dict.fromkeys(candidate.plans for candidate in candidates):
            self.preparation.preprocess(plans, {*self.cases.labelled, *self.cases.test})
        splits = [{"train": x, "val": self.cases.test} for x in self.cases.draws.values()]
        write_atomically(self.preprocessed / SPLITS, json.dumps(splits, indent=1))
        return candidates

    def _link(self, names: Any) -> None:
        """Add cases to the raw dataset of this comparison."""
        raw, ending = self.inputs.raw, self.inputs.raw.file_ending
        for folder in ("imagesTr", "labelsTr"):
            (self.raw / folder).mkdir(parents=True, exist_ok=True)
        for case in raw.cases:
            if case.name in names:
                for channel, image in enumerate(case.images):
                    target = self.raw / "imagesTr" / f"{case.name}_{channel:04d}{ending}"
                    place_image(image, target, LINK)
                place_image(case.label, self.raw / "labelsTr" / f"{case.name}{ending}", LINK)
        count = len(list((self.raw / "labelsTr").glob(f"*{ending}")))
        description = {x: y for x, y in raw.description.items() if x != "dataset"}
        text = json.dumps({**description, "numTraining": count}, indent=1)
        write_atomically(self.raw / "dataset.json", text)

    def _trainings(self, candidates: list[Candidate]) -> list[tuple[Candidate, Draw]]:
        """Return all trainings, draw by draw, so that what is there can be compared."""
        draws = sorted(self.cases.draws, key=lambda draw: (draw[1], draw[0]))
        return [(candidate, draw) for draw in draws for candidate in candidates]

    def _folder(self, candidate: Candidate, draw: Draw) -> Path:
        return self.runs / candidate.folder / f"{draw[0]}_cases_draw_{draw[1]}"

    def _scores(self, candidate: Candidate, draw: Draw) -> Path:
        return self._folder(candidate, draw) / SCORES

    def _estimate(self, left: list[tuple[Candidate, Draw]]) -> dict[tuple[Candidate, Draw], float]:
        """Return the seconds of each training that is left."""
        known: dict[tuple[str, str], float] = {}
        for candidate, _ in left:
            network = candidate.trainer.removesuffix("_ft"), candidate.plans
            if network not in known:
                budget = self.options.iterations, len(self.cases.test), self.device
                known[network] = seconds_of_training(candidate, self.preparation, *budget)
        return {x: known[x[0].trainer.removesuffix("_ft"), x[0].plans] for x in left}

    def train(self, candidate: Candidate, draw: Draw) -> None:
        """Train and score from the start; keep the predictions, not the checkpoints."""
        folder = self._folder(candidate, draw)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fold = list(self.cases.draws).index(draw)
        number, start = self.preparation.number, tuple[str, ...]()
        words = f"nnUNetv2_train {number} {CONFIGURATION} {fold} -p {candidate.plans}"
        if candidate.file is not None:
            start = ("-pretrained_weights", str(candidate.file))
        budget = {
            RESULTS: str(folder),
            "STUNET_EPOCHS": str(EPOCHS),
            "STUNET_ITERATIONS": str(self.options.iterations // EPOCHS),
            "STUNET_VAL_ITERATIONS": "1",
            "STUNET_SEED": str(self.options.seed + draw[1]),
        }
        began = time.monotonic()
        words += f" -tr {candidate.trainer} -device {self.device}"
        self._stock(words, *start, log=folder / "log.txt", **budget)
        model = f"{candidate.trainer}__{candidate.plans}__{CONFIGURATION}"
        trained = folder / self.inputs.raw.name / model / f"fold_{fold}"
        cases = score_cases(read_raw(self.raw), trained / "validation", self.cases.test)
        facts = {"candidate": candidate.name, "labelled": self.cases.draws[draw]}
        facts |= {"trainer": candidate.trainer, "plans": candidate.plans}
        seconds = round(time.monotonic() - began, 1)
        for checkpoint in trained.glob("checkpoint_*.pth"):
            checkpoint.unlink()
        write_scores(folder / SCORES, cases, **facts, seconds=seconds)

    def rank(self, candidates: list[Candidate]) -> list[Path]:
        """Score the candidates on the labelled cases of each draw of the largest number; return the
        JSON files of the rankings."""
        files, shots = [], max(self.options.shots)
        for plans in dict.fromkeys(candidate.plans for candidate in candidates):
            alike = [candidate for candidate in candidates if candidate.plans == plans]
            if len(alike) < 2:
                continue
            for draw in range(1, self.options.draws + 1):
                file = self.out / f"rank_{plans}_{shots}_cases_draw_{draw}.json"
                ranked = read_json(file)["candidates"] if file.is_file() else []
                names = {one["name"] for one in ranked}
                if names != {candidate.name for candidate in alike}:
                    cases = self.cases.draws[shots, draw]
                    number = self.preparation.number
                    given = rank_arguments(alike, number, cases, self.options.seed + draw, file)
                    self._stock(*given, "--device", self.device)
                files.append(file)
        return files

    def report(self, candidates: list[Candidate], files: list[Path]) -> None:
        scores = {(x.name, *draw): self._scores(x, draw) for x, draw in self._trainings(candidates)}
        table, ranked, shots = collect(scores), None, max(self.options.shots)
        if files:
            found = scores_of(files)
            ranked = found, agreement(found, mean_dice_of(table, shots)), shots
        facts = (
            f"{self.inputs.raw.name}, {self.options.iterations} iterations each,"
            f" {len(self.cases.test)} test cases. ± is the standard deviation over"
            f" {self.options.draws} draws of labelled cases (and seeds).",
        )
        print("\n" + write_report(table, self.out, facts, ranked))
        print(f"Report: {self.out / REPORT}")

    def _stock(self, words: str, *more: str, log: Path | None = None, **variables: str) -> None:
        """Run a command; it and its output go into a log."""
        command = [*words.split(), *more]
        log = log or self.log
        kept: Mapping[str, str] = {**self.variables, **variables}
        with log.open("a", encoding="utf-8") as file:
            settings = " ".join(f"{x}={shlex.quote(y)}" for x, y in kept.items())
            file.write(f"$ {settings} {shlex.join(command)}\n")
        run_command(command, {**os.environ, **kept}, log)
