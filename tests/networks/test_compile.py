"""torch.compile of every network: one graph, the same outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from stunet_plugin.networks.vision_transformer import TokenPruning

from network_helpers import (
    NO_DROPOUT,
    ONE_OF_EACH,
    WITH_OPTIONS,
    build,
    gradients,
    image,
    largest_difference,
)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compiles_into_one_graph(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile(fullgraph=True) refuses graph breaks."""
    # Tracing is what these could break, and inductor takes minutes.
    backend = "aot_eager" if name in WITH_OPTIONS or "UNETR" in name else "inductor"
    torch._dynamo.reset()
    # Compiled, the noise would be drawn elsewhere.
    monkeypatch.setattr(TokenPruning, "noise", lambda self, scores: torch.zeros_like(scores))
    changes = NO_DROPOUT if name.startswith(("PCT", "FMU")) else {}
    changes = changes | {"drop_path": 0.0} if "PCT" in name else changes
    network, x = build(name, **changes).train(training), image(name)
    expected = gradients(network, x) if training else None
    with torch.set_grad_enabled(training):
        outputs = network(x)
        compiled = torch.compile(network, backend=backend, fullgraph=True)
        assert largest_difference(compiled(x), outputs) <= 1e-4
    if expected is not None:
        found = gradients(compiled, x)
        for key, _ in network.named_parameters():
            # Rounding errors are those of the largest gradients, which are summed up with others.
            atol = 1e-4 + 5e-4 * float(expected[key].abs().max())
            ours = found[f"_orig_mod.{key}"]
            torch.testing.assert_close(ours, expected[key], rtol=1e-2, atol=atol)
