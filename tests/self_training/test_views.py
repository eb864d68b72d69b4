"""Strong views: gray values change, places do not."""

from __future__ import annotations

import pytest
import torch

from stunet_plugin.self_training.views import strong_view


@pytest.mark.parametrize("shape", [(4, 2, 12, 14, 16), (3, 1, 20, 24)])
def test_strong_views_differ_from_sample_to_sample_and_keep_edges_in_place(shape) -> None:
    torch.manual_seed(0)
    images = torch.zeros(shape)
    images[..., shape[-1] // 2 :] = 2.0
    changed = strong_view(images)
    assert changed.shape == images.shape
    assert changed.isfinite().all()
    assert not torch.allclose(changed[0], changed[1])
    bright = images[:, :1] > 1
    for image, mask in zip(changed[:, :1], bright, strict=True):
        assert image[mask].median() > image[~mask].median() + 0.5, "order of gray values"


def test_an_empty_batch_and_a_flat_image() -> None:
    assert strong_view(torch.zeros(0, 1, 4, 4)).shape == (0, 1, 4, 4)
    assert torch.equal(strong_view(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
