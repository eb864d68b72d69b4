"""Interactions with a network that does as it is told: windows, zoom, undo, slices; the curve."""

from __future__ import annotations

import torch
from torch import Tensor

from stunet_plugin.prompts import channels as drawing
from stunet_plugin.prompts.curve import middle_of_largest_error, spread
from stunet_plugin.prompts.interaction import Interaction

from prompt_helpers import Obedient

CPU = torch.device("cpu")


def bar(shape: tuple[int, int, int], length: int) -> Tensor:
    image = torch.zeros(shape)
    image[shape[0] // 2 - 4 : shape[0] // 2 + 4, shape[1] // 2 - 4 : shape[1] // 2 + 4] = 1
    image[:, :, length:] = 0
    return image


def test_an_object_larger_than_the_patch_is_found_whole_and_taken_back() -> None:
    image, network = bar((24, 24, 90), 80), Obedient()
    session = Interaction(network, image[None], (16, 16, 16), CPU)
    click = drawing.point((12, 12, 30), True, (2, 2, 2))
    session.add(click)
    # What is farther than the widest view is not, until it is clicked at.
    reached = (session.mask & (image > 0)).sum(0).any(0).sum()
    assert 50 <= reached <= 80
    assert not (session.mask & (image == 0)).any()
    session.add(drawing.box((8, 8, 0), (16, 16, 85), True))
    assert torch.equal(session.mask, image > 0)
    before, windows = session.mask.clone(), network.windows
    session.add(drawing.point((12, 12, 70), False, (2, 2, 2)))
    assert 0 < int((session.mask != before).sum()) < 100
    assert network.windows == windows + 1, "a small change is looked at once"
    assert session.undo()
    assert torch.equal(session.mask, before)
    assert session.undo()
    assert session.undo()
    assert not session.undo()
    assert not session.mask.any()
    assert session.prompts == []


def test_images_smaller_than_the_patch_and_masks_to_refine() -> None:
    image = bar((10, 12, 14), 9)
    session = Interaction(Obedient(), image[None], (16, 16, 16), CPU)
    session.segment_without_prompts()
    assert not session.mask.any()
    rough = torch.roll(image > 0, 1, 2)
    session.set_mask(rough, refine=False)
    assert torch.equal(session.mask, rough)
    session.set_mask(rough)
    assert torch.equal(session.mask, image > 0)


def test_a_2d_network_segments_the_slices_of_a_prompt() -> None:
    image = torch.zeros(6, 30, 30)
    image[:, 10:20, 10:20] = 1
    session = Interaction(Obedient(), image[None], (16, 16), CPU)
    session.add(drawing.point((2, 15, 15), True, (0, 2, 2)))
    assert session.mask.flatten(1).any(1).nonzero().flatten().tolist() == [2]
    assert torch.equal(session.mask[2], image[2] > 0)
    session.add(drawing.box((3, 8, 8), (5, 22, 22), True))
    assert session.mask.flatten(1).any(1).nonzero().flatten().tolist() == [2, 3, 4]
    assert int(session.mask.sum()) == 300


def test_the_next_click_of_the_curve_is_in_the_middle_of_the_largest_error() -> None:
    target, found = torch.zeros(2, 20, 20, 20, dtype=torch.bool)
    target[2:11, 2:11, 2:11] = True
    found[14:19, 14:19, 14:19] = True
    assert middle_of_largest_error(target, found, (1, 1, 1)) == ([6, 6, 6], True)
    found[3:10, 3:10, 3:10] = True
    assert middle_of_largest_error(target, found, (1, 1, 1)) == ([16, 16, 16], False)
    assert middle_of_largest_error(target, target, (1, 1, 1)) == (None, True)
    assert spread([str(x) for x in range(200)])[::49] == ["0", "199"]
