"""``stunet crosseval``: predict what is missing, score it, and write tables, pictures and a report.

Everything is checked before anything is written, and whatever is finished when a run is interrupted
is not done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stunet_plugin import __version__
from stunet_plugin.crosseval.compared import describe_dataset, describe_model
from stunet_plugin.crosseval.comparison import Pair, Rules, describe, dropped, pair_up
from stunet_plugin.crosseval.inputs import (
    Dataset,
    Model,
    folder_name,
    read_dataset,
    read_model,
    read_setup,
)
from stunet_plugin.crosseval.predictions import Place, fingerprint, predict_missing, read_record
from stunet_plugin.crosseval.report import write_report
from stunet_plugin.crosseval.results import (
    PairScores,
    Results,
    without_nan,
    write_csv,
    write_matrix,
    write_summary,
)
from stunet_plugin.crosseval.scoring import CaseTask, read_known_labels, score_all
from stunet_plugin.errors import PluginError
from stunet_plugin.utils.files import sha256_of, write_atomically
from stunet_plugin.utils.geometry import can_be_turned
from stunet_plugin.utils.images import check_image, read_geometry

SCORES = "scores"
CSV, SUMMARY, MATRIX, REPORT = "scores.csv", "summary.json", "matrix.md", "report.html"
HEAT_MAP, BOXES, WORST = "matrix.png", "boxes.png", "worst_cases.png"
SHOWN_PROBLEMS = 5
SCORING_VERSION = 1
"""Goes up when the same files would be scored otherwise, so that kept scores are not used any
more."""


@dataclass(frozen=True)
class Run:
    """A comparison and how it is carried out."""

    models: tuple[Model, ...]
    datasets: tuple[Dataset, ...]
    rules: Rules
    out: Path
    device: str
    processes: int
    check: bool

    @classmethod
    def from_arguments(cls, options: Any) -> Run:
        """Read the file and the options; options win.

        Raises:
            PluginError: anything in them is wrong.
        """
        setup = read_setup(
            Path(options.file) if options.file else None, options.models, options.datasets
        )
        given: dict[str, Any] = {
            "output": options.out,
            "classes": options.classes,
            "default_tolerance": options.tolerance,
        }
        given |= {name: True for name in ("sliced", "resample") if getattr(options, name)}
        setup |= {name: value for name, value in given.items() if value is not None}
        if not setup.get("output"):
            raise PluginError("Say where the results go: -o FOLDER (or output in the file).")
        rules = Rules.from_table(setup)
        models, datasets = (
            tuple(map(read_model, setup["models"])),
            tuple(map(read_dataset, setup["datasets"])),
        )
        processes = (
            options.processes
            if options.processes is not None
            else max((os.cpu_count() or 1) // 2, 1)
        )
        if processes < 1:
            raise PluginError(f"-np must be at least 1, not {processes}.")
        return cls(
            models,
            datasets,
            rules,
            Path(setup["output"]).expanduser(),
            options.device,
            processes,
            options.check,
        )


def run_crosseval(run: Run) -> int:
    """Carry out a comparison; return the exit code."""
    pairs = pair_up(run.models, run.datasets, run.rules)
    _check_inputs(run)
    lines = describe(pairs)
    print("\n".join(lines), flush=True)
    if run.check:
        _check_files(run)
        return 0
    device = _device(run.device)
    run.out.mkdir(parents=True, exist_ok=True)
    try:
        predict_missing(pairs, run.out, device, run.processes)
        results = Results.of(_score(pairs, run))
        _write(results, run, lines)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"What is finished is in {run.out}.") from error
    print("\n".join(filter(None, (dropped(pairs), f"Report: {run.out / REPORT}"))))
    return 0


def _check_inputs(run: Run) -> None:
    """Refuse what would fail later: other numbers of channels, references that do not lie on their
    images."""
    for model in run.models:
        for dataset in run.datasets:
            channels = len(dataset.cases[0].images)
            if model.channels and channels != len(model.channels):
                wanted = f"{len(model.channels)} channels ({', '.join(model.channels)})"
                raise PluginError(
                    f"Model {model.name} takes {wanted}, and images of dataset {dataset.name} have"
                    f" {channels}."
                )
    for dataset in run.datasets:
        differing = [
            case
            for case in dataset.cases
            if not can_be_turned(read_geometry(case.reference), read_geometry(case.images[0]))
        ]
        if differing and not run.rules.resample:
            first = differing[0]
            raise PluginError(
                f"Dataset {dataset.name}: {len(differing)} of {len(dataset.cases)} references do"
                f" not lie on the voxels of their image. {first.name}: reference"
                f" {read_geometry(first.reference)}; image {read_geometry(first.images[0])}. Fix"
                " the files, or have predictions resampled to the references with --resample."
            )


def _check_files(run: Run) -> None:
    """Read all images and references through; a run comes to the references only when its
    predictions are made.

    Raises:
        PluginError: one is damaged, or a reference is no label map or holds label values that its
            system does not have.
    """
    problems = []
    for dataset in run.datasets:
        for case in dataset.cases:
            try:
                for image in case.images:
                    check_image(image)
                read_known_labels(case.reference, dataset.labels)
            except PluginError as error:
                problems.append(f"Dataset {dataset.name}, {case.name}: {error}")
    if problems:
        raise PluginError(f"{len(problems)} cases cannot be used.\n{_first(problems)}")


def _first(problems: Sequence[str]) -> str:
    more = (
        f"\n... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    )
    return "\n".join(problems[:SHOWN_PROBLEMS]) + more


def _device(wanted: str) -> str:
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise PluginError(
            "--device cuda: torch finds no GPU here. Use --device cpu, or install the build of"
            " torch for your GPU."
        )
    return wanted


def _score(pairs: Sequence[Pair], run: Run) -> list[PairScores]:
    """Score what has not been scored; raise PluginError if a case cannot be."""
    scores = {(pair.model.name, pair.dataset.name): PairScores(pair) for pair in pairs}
    tasks: list[CaseTask] = []
    fingerprints = _fingerprints(pairs, run)
    for pair in pairs:
        place, rest = (
            Place.of(run.out, pair),
            (pair.classes, pair.dataset.labels, pair.model.labels, run.rules.resample),
        )
        for case in pair.dataset.cases if pair.classes else ():
            key = (pair.model.name, pair.dataset.name, case.name)
            kept = read_record(_kept(run.out, key))
            if kept.get("made_from") == fingerprints[key]:
                scores[key[:2]].add(case.name, kept["values"], kept["warnings"])
            else:
                tasks.append(CaseTask(key, case.reference, place.file(case), *rest))
    print(f"Scores: {len(fingerprints) - len(tasks)} of {len(fingerprints)} are there.", flush=True)
    problems = []
    for task, found in score_all(tasks, min(run.processes, len(tasks))):
        model, dataset, name = task.key
        if found.problem:
            problems.append(f"{model} on {dataset}, {name}: {found.problem}")
            continue
        for warning in found.warnings:
            print(f"  {model} on {dataset}, {name}: {warning}", flush=True)
        record = {
            "made_from": fingerprints[task.key],
            "values": without_nan(found.values),
            "warnings": list(found.warnings),
        }
        scores[model, dataset].add(name, record["values"], record["warnings"])
        file = _kept(run.out, task.key)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(record))
    if problems:
        raise PluginError(
            f"{len(problems)} cases cannot be scored; all others are, and kept.\n{_first(problems)}"
        )
    return list(scores.values())


def _kept(out: Path, key: tuple[str, str, str]) -> Path:
    return out / SCORES / folder_name(key[0]) / folder_name(key[1]) / f"{key[2]}.json"


def _fingerprints(pairs: Sequence[Pair], run: Run) -> dict[tuple[str, str, str], str]:
    """Return by model, dataset and case what the scores of the case depend on, as a hash."""
    references = {
        case.reference: sha256_of(case.reference)
        for dataset in run.datasets
        for case in dataset.cases
    }
    found = {}
    for pair in pairs:
        rules = [SCORING_VERSION, pair.classes, pair.dataset.labels.ignore, run.rules.resample]
        for case in pair.dataset.cases if pair.classes else ():
            prediction = read_record(Place.of(run.out, pair).record(case)).get("prediction")
            key = (pair.model.name, pair.dataset.name, case.name)
            found[key] = fingerprint([*rules, prediction, references[case.reference]])
    return found


def _write(results: Results, run: Run, lines: Sequence[str]) -> None:
    """Write all files that people look at."""
    from stunet_plugin.crosseval.pictures import save_box_plots, save_heat_map, save_worst_cases

    out = run.out
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about: dict[str, Any] = {
        "date": date,
        "stunet_plugin": __version__,
        "models": {model.name: describe_model(model) for model in run.models},
        "datasets": {dataset.name: describe_dataset(dataset) for dataset in run.datasets},
        "tolerances_mm": {
            scored.name: scored.tolerance for one in results.scores for scored in one.pair.classes
        },
        "sliced": sorted(
            {scored.name for one in results.scores for scored in one.pair.classes if scored.sliced}
        ),
    }
    write_csv(results, out / CSV)
    write_summary(results, about, out / SUMMARY)
    write_matrix(results, out / MATRIX)
    save_heat_map(results, out / HEAT_MAP)
    save_box_plots(results, out / BOXES)
    save_worst_cases(results, out, out / WORST)
    pictures = (
        (HEAT_MAP, "Mean scores of every model (rows) on every dataset (columns)."),
        (BOXES, "Mean scores of the cases: median and quartiles, and every case as a point."),
        (
            WORST,
            (
                "Cases with the lowest DSC, as many of each model, where reference (solid) and"
                " prediction (dashed) differ most."
            ),
        ),
    )
    cases = sum(len(dataset.cases) for dataset in run.datasets)
    counts = f"Models: {len(run.models)}. Datasets: {len(run.datasets)}. Cases: {cases}."
    heading = f"{counts} {date}, stunet-plugin {__version__}."
    captions = [(out / name, caption) for name, caption in pictures]
    write_report(
        results, [heading, *lines], about["models"], about["datasets"], captions, out / REPORT
    )
    print((out / MATRIX).read_text())
