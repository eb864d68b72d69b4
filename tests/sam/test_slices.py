"""Slices as SAM-Med2D sees them, prompts drawn from masks, its loss, and sessions on one slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sam_helpers import TINY, Masks, SAMMed2D, curve, images, loss, prompts, recorded, slice_session

CPU = torch.device("cpu")


@pytest.mark.shared
def test_loss_is_the_published_one(shared: Path) -> None:
    values = recorded(shared, "sammed2d_loss")
    given = values["pred"], values["mask"].long(), values["pred_iou"]
    focal, dice, iou = loss.SAMLoss(per_mask=False).terms(*given)
    weighted = {"focal": focal / 20, "dice": dice, "iou": iou, "total": focal + dice + iou}
    for name, value in weighted.items():
        torch.testing.assert_close(value, values[name], atol=1e-5, rtol=1e-5)
    one = [x[:1] for x in given]
    published, ours = (loss.SAMLoss(per_mask).terms(*one) for per_mask in (False, True))
    torch.testing.assert_close(published, ours)


def test_ignored_pixels_count_for_nothing() -> None:
    torch.manual_seed(0)
    logits, iou = torch.randn(2, 3, 16, 16), torch.rand(2, 3)
    targets = torch.randint(0, 2, (2, 1, 64, 64))
    half = targets.clone()
    half[..., :32] = prompts.IGNORED
    changed = logits.clone()
    changed[..., :7] += 5
    embedding = torch.zeros(1)
    values = [loss.SAMLoss()(Masks(x, iou, embedding), half) for x in (logits, changed)]
    assert torch.equal(*values)
    assert not torch.equal(values[0], loss.SAMLoss()(Masks(logits, iou, embedding), targets))


def test_small_images_are_padded_and_others_resized() -> None:
    small = torch.arange(1.0, 13).reshape(1, 1, 3, 4)
    frame = images.Frame(3, 4, 8)
    square = frame.enter(small)
    assert frame.padded
    # An odd remainder: less before than after.
    assert torch.equal(square[0, 0, 2:5, 2:6], small[0, 0])
    assert square.count_nonzero() == 12
    assert frame.place([(0, 0), (3, 2)]).tolist() == [[2, 2], [5, 4]]
    large = torch.arange(64.0).reshape(1, 1, 4, 16)
    frame = images.Frame(4, 16, 8)
    assert not frame.padded
    assert torch.equal(frame.enter(large)[0, 0], large[0, 0].repeat_interleave(2, 0)[:, ::2])
    assert frame.place([(0.5, 0), (15, 3)]).tolist() == [[0, 0.5], [7.25, 6.5]]
    assert frame.place([(2, 1), (16, 4)], edges=True).tolist() == [[1, 2], [8, 8]]
    for height, width in ((3, 4), (4, 16), (8, 8)):
        left = images.Frame(height, width, 8).leave(torch.zeros(1, 1, 2, 2))
        assert left.shape[2:] == (height, width)


def test_values_are_those_of_published_training() -> None:
    grey = images.normalise(torch.full((1, 1, 2, 2), 123.675))
    assert grey[0, :, 0, 0].tolist() == pytest.approx([0, 7.395 / 57.12, 20.145 / 57.375])
    # Blue first, but with the mean of red.
    colours = torch.tensor([103.53, 116.28, 123.675])[None, :, None, None]
    assert images.normalise(colours).abs().max() < 1e-6
    scaled = images.slices_to_bytes(torch.tensor([[-3.0, 1], [5, -3]]).reshape(1, 1, 2, 2))
    assert scaled.flatten().tolist() == [0, 128, 255, 0]
    assert not images.slices_to_bytes(torch.full((1, 1, 2, 2), 7.0)).any()


def classes() -> torch.Tensor:
    """Two images of two classes; the second image lacks the second class."""
    masks = torch.zeros(2, 2, 64, 64).bool()
    masks[0, 0, 5:25, 8:20] = masks[0, 0, 40:60, 40:50] = True
    masks[0, 1, 30:35, 2:30] = True
    masks[1, 0, 1:30, 1:30] = True
    return masks


def test_targets_are_classes_or_parts_of_them() -> None:
    known, random = torch.ones(2, 1, 64, 64).bool(), np.random.default_rng(0)
    known[0, 0, 50:] = False
    targets = prompts.draw_targets(classes(), known, 40, random)
    assert targets.shape == (80, 1, 64, 64)
    assert (targets[:40, :, 50:] == prompts.IGNORED).all()
    sizes = set((targets[:40] == 1).flatten(1).sum(1).tolist())
    assert sizes == {340, 240, 100, 140}  # both parts of the first class, each part, the second
    assert set((targets[40:] == 1).flatten(1).sum(1).tolist()) == {29 * 29}


def test_prompts_lie_where_they_should() -> None:
    random, torch_seed = np.random.default_rng(1), torch.manual_seed(1)
    assert torch_seed
    targets = prompts.draw_targets(classes(), torch.ones(2, 1, 64, 64).bool(), 3, random)
    exact = prompts.boxes_of(targets)
    for image, box in zip(targets[:, 0], exact.long(), strict=True):
        x0, y0, x1, y1 = box.tolist()
        assert image[y0:y1, x0:x1].sum() == image.sum()
        assert image[y0].any()
        assert image[y1 - 1].any()
        assert image[:, x0].any()
        assert image[:, x1 - 1].any()
    kinds = set()
    for _ in range(20):
        given = prompts.first_prompts(targets, random)
        kinds.add(given.boxes is None)
        if given.boxes is not None:
            assert (given.boxes - exact).abs().max() <= prompts.MOST_JITTER
        else:
            x, y = given.points.long().unbind(2)
            assert (targets[torch.arange(6)[:, None], 0, y, x] == 1).all()
    assert kinds == {True, False}
    empty = prompts.first_prompts(torch.zeros(2, 1, 64, 64).long(), random)
    assert empty.labels.tolist() == [[0], [0]]


def test_corrections_lie_in_errors() -> None:
    targets = torch.zeros(3, 1, 64, 64).long()
    targets[:2, :, 10:20, 10:20] = 1
    targets[1, :, 30:] = prompts.IGNORED
    found = torch.zeros_like(targets).bool()
    found[1, :, 10:20, 10:20] = found[1, :, 40:] = True
    found[2, :, 50:, 50:] = True
    given = prompts.corrections(found, targets, np.random.default_rng(0))
    x, y = given.points.long().unbind(2)
    assert (targets[0, 0, y[0], x[0]] == 1).all()
    assert given.labels[0].unique().tolist() == [1]
    # Only what is ignored is wrong.
    assert given.labels[1].unique().tolist() == [-1]
    assert found[2, 0, y[2], x[2]].all()
    assert given.labels[2].unique().tolist() == [0]


class Copies:
    """A network that is right: it returns the mask prompt, or the box, or a disc at the points."""

    preset = TINY

    def vision_encoder(self, pixels: torch.Tensor) -> Any:
        self.pixels = pixels
        return type("Encoded", (), {"last_hidden_state": pixels[:, :1, :4, :4]})

    def decode(self, embedding: torch.Tensor, given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.given = given
        logits = torch.full((1, 3, 16, 16), -9.0)
        if given.boxes is not None:
            x0, y0, x1, y1 = (given.boxes[0] / 4).round().int().tolist()
            logits[0, 1, y0:y1, x0:x1] = 9
        elif given.masks is not None:
            logits[0, 1] = torch.where(given.masks[0, 0] > 0.5, 9.0, -9.0)
        for (x, y), label in zip(
            [] if given.points is None else given.points[0].tolist(),
            [] if given.labels is None else given.labels[0].tolist(),
            strict=True,
        ):
            logits[0, 1, int(y) // 4, int(x) // 4] = 50 if label else -50
        return logits, torch.tensor([[0.1, 0.9, 0.2]])


def test_session_keeps_points_and_hands_on_the_mask() -> None:
    network = Copies()
    session = slice_session.SliceSession(network, torch.rand(1, 128, 64) * 255, CPU)
    mask = session.box((16, 32), (32, 64))
    assert network.given.masks is None
    assert mask.shape == (128, 64)
    assert mask[34:62, 18:30].all()
    assert 400 < mask.sum() < 600
    assert session.object.iou == pytest.approx(0.9)
    mask = session.point((60, 120))
    assert network.given.boxes is None
    assert network.given.masks[0, 0, 4:8, 4:8].min() > 0.9
    assert mask[120, 60]
    assert mask[40, 20]
    mask = session.point((20, 40), positive=False)
    assert network.given.labels.tolist() == [[1, 0]]
    assert not mask[40, 20]
    session.reset()
    assert not session.object.mask.any()
    there = torch.zeros(128, 64).bool()
    there[10:40, 10:50] = True
    assert torch.equal(session.take(there, refine=False), there)
    assert curve.dice_of(session.take(there), there) > 0.9


def test_evaluation_counts_points_until_they_help() -> None:
    target = torch.zeros(3, 64, 64).bool()
    target[1, 16:48, 16:48] = True
    target[2, :3, :3] = True  # a speck
    found = list(
        curve.measure_case(Copies(), torch.zeros(3, 1, 64, 64), {"a": target}, CPU, "case")
    )
    (one,) = found
    assert (one["slice"], one["class"]) == (1, "a")
    dice = one["dice"]
    assert dice["box"] > 0.99
    assert 0 < dice["1 point"] < dice["3 points"] < dice["5 points"] < 0.7
    summary = curve.summarise(found * 2)
    assert summary["mean"]["masks"] == 2
    assert summary["classes"]["a"]["dice"] == dice


def test_largest_error_says_which_way() -> None:
    target, found = torch.zeros(2, 20, 20).bool()
    target[2:6, 2:6] = found[10:16, 10:16] = True
    error, missed = curve.largest_error(found, target)
    assert not missed
    assert slice_session.middle_of(error) in [(12, 12), (13, 13), (12, 13), (13, 12)]
    assert torch.equal(curve.largest_error(torch.zeros_like(found), target)[0], target)


def test_a_whole_network_answers() -> None:
    network = SAMMed2D(TINY).eval()
    session = slice_session.SliceSession(network, torch.rand(3, 40, 50) * 255, CPU)
    assert session.box((3, 4), (30, 20)).shape == session.point((9, 9)).shape == (40, 50)
