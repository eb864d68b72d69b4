"""The ranking as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stunet_plugin.utils.figures import plain_style, save_atomically


def save_ranking(scores: Sequence[tuple[str, float | None]], dataset: str, path: Path) -> None:
    """Write a PNG with a bar per candidate, the best on top.

    Args:
        scores: name and score (None where there is none), in the order of the ranking.
        dataset: its name, for the title.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with plain_style():
        figure = Figure(figsize=(8, 1.2 + 0.4 * len(scores)), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        known = [score for _, score in scores if score is not None]
        # Differences matter, the zero does not: bars begin below the lowest.
        reach = (max(known) - min(known) if known else 0) or 1.0
        floor = (min(known) if known else 0) - 0.15 * reach
        places = range(len(scores))[::-1]
        for place, (_, score) in zip(places, scores, strict=True):
            value = floor if score is None else score
            axis.barh(place, value - floor, left=floor, color="tab:blue")
            axis.text(
                value + 0.01 * reach,
                place,
                "n/a" if score is None else f"{score:.2f}",
                va="center",
                fontsize=8,
            )
        axis.set_yticks(list(places), [name for name, _ in scores], fontsize=8)
        axis.set_xlim(floor, floor + 1.25 * reach)
        axis.set(xlabel="CCFV (higher ranks better)", title=f"Pretrained weights for {dataset}")
        axis.spines[["top", "right"]].set_visible(False)
        save_atomically(figure, path)
