"""Activation checkpointing of STU-Net: the same gradients for less memory, chosen by the free
memory, or when it runs out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from stunet_plugin.errors import PluginError
from stunet_plugin.networks.activation_checkpointing import BLOCK, OFF, SETTINGS, STAGE
from stunet_plugin.networks.from_plan import stunet_architecture
from stunet_plugin.networks.memory import GIGABYTE, STUNetShape
from stunet_plugin.networks.presets import PRESETS
from stunet_plugin.networks.stunet import STUNet
from stunet_plugin.options import CHECKPOINTING, Options
from stunet_plugin.plans.stunet_planners import PLANNERS
from stunet_plugin.trainers import activation_checkpointing
from stunet_plugin.trainers.activation_checkpointing import FIRST_STEPS, leanest
from stunet_plugin.trainers.stunet_trainers import TRAINERS

from conftest import Workspace

STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))
FEATURES, BLOCKS = (4, 8, 16, 16), (2, 1, 3, 2)
PATCH = (8, 16, 32)


def build(setting: str, blocks: tuple[int, ...] = BLOCKS, strides: Any = STRIDES) -> STUNet:
    torch.manual_seed(0)
    network = STUNet(
        1, 3, 4, FEATURES, nn.Conv3d, 3, strides, blocks, blocks[-2::-1], deep_supervision=True
    )
    network.apply(network.initialize)
    network.checkpointing = setting
    return network


def gradients(network: Any, data: torch.Tensor) -> list[torch.Tensor]:
    network.zero_grad(set_to_none=True)
    sum(output.float().square().mean() for output in network(data)).backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("setting", [STAGE, BLOCK])
def test_gradients_are_the_same_to_the_bit_also_under_autocast(setting: str) -> None:
    data = torch.randn(2, 1, *PATCH)
    plain, checkpointed = build(OFF), build(setting)
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            pairs = list(zip(gradients(plain, data), gradients(checkpointed, data), strict=True))
        # torch's bfloat16 gradients of the weights of maps as small as the deepest are not
        # reproducible on the CPU.
        assert all(torch.equal(*pair) for pair in pairs if pair[0].ndim == 1 or not mixed)
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(plain(data), checkpointed(data), strict=True))


@pytest.mark.parametrize("setting", [STAGE, BLOCK])
def test_the_price_is_one_more_forward_pass(setting: str) -> None:
    """No more: the heads and what is behind the last activation that is needed are not computed
    again."""
    data = torch.randn(1, 1, *PATCH)
    counts = []
    for network in (build(OFF), build(setting)):
        with FlopCounterMode(display=False) as forward:
            network(data)
        with FlopCounterMode(display=False) as step:
            gradients(network, data)
        counts.append((forward.get_total_flops(), step.get_total_flops()))
    (forward_plain, plain), (forward_checkpointed, checkpointed) = counts
    assert forward_plain == forward_checkpointed
    assert 0.9 * forward_plain < checkpointed - plain <= forward_plain


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("strides", [STRIDES, ((1, 1, 1), *[(2, 2, 2)] * 3)])
@pytest.mark.parametrize("blocks", [BLOCKS, (1, 1, 1, 1)])
def test_kept_activations_are_what_autograd_keeps(
    setting: str, strides: Any, blocks: tuple[int, ...]
) -> None:
    network = build(setting, blocks, strides)
    weights = {parameter.data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights and tensor.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = network(torch.randn(2, 1, *PATCH))
    shape = STUNetShape(FEATURES, blocks, strides, 1, 3)
    statistics = sum(kept.values()) - 2 * shape.kept_activations(PATCH, setting)
    assert len(outputs) == 3
    # Mean and deviation of each norm and channel, where the norm's own are kept.
    norms = 2 * 2 * 2 * sum(width for _, _, width in shape._block_inputs())
    assert statistics == (norms if setting == OFF else 0)


def test_no_graph_breaks_and_another_setting_is_compiled_anew() -> None:
    network = STUNet(
        1, 3, 2, FEATURES[:2], nn.Conv3d, 3, STRIDES[:2], (1, 2), 2, deep_supervision=True
    )
    data = torch.randn(1, 1, 8, 16, 16)
    expected = gradients(network, data)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter)
    for number, setting in enumerate(SETTINGS):
        network.checkpointing = setting
        for found, given in zip(gradients(compiled, data), expected, strict=True):
            torch.testing.assert_close(found, given, rtol=1e-4, atol=1e-6)
        assert counter.frame_count == number + 1
    for setting in (STAGE, BLOCK):
        network.checkpointing = setting
        explanation = torch._dynamo.explain(network)(data)
        assert explanation.graph_break_count == 0, explanation.break_reasons


def test_estimates_order_the_settings_by_what_dominates() -> None:
    def estimates(size: str, outputs: int, processes: int = 1) -> dict[str, float]:
        shape = STUNetShape.of_preset(PRESETS[size], output_channels=outputs)
        return {
            setting: shape.training_memory(
                (128,) * 3, 2, checkpointing=setting, processes=processes
            ).total
            for setting in SETTINGS
        }

    # One stage computed again is more than one block; with a large loss what is kept at that time
    # decides.
    assert leanest(estimates("huge", 16)) == BLOCK
    assert leanest(estimates("huge", 105)) == STAGE
    assert estimates("base", 16)[STAGE] == estimates("base", 16)[BLOCK] < estimates("base", 16)[OFF]
    saved = estimates("huge", 16)[BLOCK] - estimates("huge", 16, processes=4)[BLOCK]
    assert saved == pytest.approx(
        12 * 0.75 * STUNetShape.of_preset(PRESETS["huge"], output_channels=16).parameters()
    )


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(
        ValueError, match="checkpointing must be one of off, stage, block, not 'blocks'"
    ):
        build("blocks")
    with pytest.raises(
        PluginError, match="STUNET_CHECKPOINTING='blocks' must be one of off, stage, block, auto"
    ):
        Options({"STUNET_CHECKPOINTING": "blocks"})
    options = Options({"STUNET_CHECKPOINTING": "block"})
    assert options.word(CHECKPOINTING) == BLOCK
    assert options.lines()[0].startswith("STUNET_CHECKPOINTING=block: ")
    assert Options({}).word(CHECKPOINTING) is None


def test_plans_fit_the_memory_of_the_setting_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner = object.__new__(PLANNERS["STUNetPlanner_large"])
    found = {}
    for word in (None, "auto", *SETTINGS):
        if word:
            monkeypatch.setenv(CHECKPOINTING.variable, word)
        architecture = stunet_architecture(PRESETS["large"], [[1, 1, 1], *[[2, 2, 2]] * 5])
        found[word] = planner.training_bytes(architecture, (128, 128, 128), 2, 1, 16)
    assert found[None] == found["auto"] == found[OFF] > found[STAGE] > found[BLOCK]


@pytest.fixture
def make(nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make an initialised trainer on the phantoms."""

    def start(
        name: str = "STUNetTrainer_tiny", setting: str | None = None, shard: bool = False
    ) -> Any:
        monkeypatch.setenv("STUNET_SEED", "1")
        monkeypatch.setenv("STUNET_SHARD", str(int(shard)))
        if setting:
            monkeypatch.setenv(CHECKPOINTING.variable, setting)
        plans = copy.deepcopy(nnunet_environment.plans())
        plans["configurations"]["3d_fullres"].update({"patch_size": [16, 32, 32], "batch_size": 2})
        plans["continue_training"] = False
        description = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "a": 1, "b": 2},
            "file_ending": ".nii.gz",
        }
        trainer = TRAINERS[name](plans, "3d_fullres", 0, description, torch.device("cpu"))
        trainer.initialize()
        trainer.set_deep_supervision_enabled(True)
        return trainer

    return start


def batch_for(trainer: Any) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    patch = trainer.configuration_manager.patch_size
    shapes = [
        [round(size * scale) for size, scale in zip(patch, scales, strict=True)]
        for scales in trainer._get_deep_supervision_scales()
    ]
    targets = [torch.randint(0, 3, (2, 1, *shape), generator=random) for shape in shapes]
    return {"data": torch.randn(2, 1, *patch, generator=random), "target": targets}


def test_auto_takes_the_least_that_is_needed_and_says_why(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trainer = make()
    # As it is for all small sizes, and everywhere but on CUDA.
    assert trainer.network.checkpointing == OFF
    estimates = trainer.estimates()
    for available, setting, reason in (
        (estimates[OFF] + 1, OFF, "everything fits"),
        (estimates[OFF] - 1, leanest(estimates), "it fits, for the time of one more forward pass"),
        (1.0, leanest(estimates), "by the estimate it does not fit either"),
    ):
        monkeypatch.setattr(
            activation_checkpointing, "available_bytes", lambda _, available=available: available
        )
        capsys.readouterr()
        assert make(setting="auto").network.checkpointing == setting
        log = capsys.readouterr().out
        assert f"Activation checkpointing: {setting} (" in log
        assert reason in log
        assert f"off {estimates[OFF] / GIGABYTE:.1f}, stage" in log
    assert make(setting="stage").network.checkpointing == STAGE


def run_out_of_memory(trainer: Any, where: Callable[[], bool]) -> None:
    """Let backward passes run out of memory where a condition holds, in the middle, when some
    gradients are there already."""

    def fail(_: torch.Tensor) -> None:
        if where():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    next(iter(trainer.network.encoder.stages[1].parameters())).register_hook(fail)


def weights_and_momentum(trainer: Any) -> list[torch.Tensor]:
    momentum = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    return [value.detach().clone() for value in (*trainer.network.parameters(), *momentum)]


def test_gradients_are_not_kept_while_validating_and_training_stays_the_same(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = make(), make()
    for validates, trainer in enumerate(trainers):
        trainer.train_step(batch_for(trainer))
        assert all(parameter.grad is not None for parameter in trainer.network.parameters())
        if validates:
            trainer.on_validation_epoch_start()
            assert all(parameter.grad is None for parameter in trainer.network.parameters())
            with torch.no_grad():
                trainer.validation_step(batch_for(trainer))
            trainer.network.train()
        trainer.train_step(batch_for(trainer))
    assert all(
        torch.equal(*pair) for pair in zip(*map(weights_and_momentum, trainers), strict=True)
    )
    # Nor in the final validation, where the logits of whole images need the room.
    seen: list[Any] = []
    monkeypatch.setattr(
        nnUNetTrainer,
        "perform_actual_validation",
        lambda self, _: seen.extend(p.grad for p in self.network.parameters()),
    )
    trainers[0].perform_actual_validation()
    assert seen
    assert not any(gradient is not None for gradient in seen)


@pytest.mark.parametrize("scaled", [False, True])
def test_out_of_memory_steps_down_once_and_nothing_is_lost(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: Any, scaled: bool
) -> None:
    trainers = make(), make()
    for trainer in trainers:
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        trainer.train_step(batch_for(trainer))
    plain, tried = trainers
    if scaled:
        # Behind the scaler's division of the gradients, which it does once in a step.
        clip = nn.utils.clip_grad_norm_
        errors = iter([torch.OutOfMemoryError()])

        def fail_once(*given: Any) -> Any:
            for error in errors:
                raise error
            return clip(*given)

        plain.train_step(batch_for(plain))
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", fail_once)
    else:
        plain.train_step(batch_for(plain))
        run_out_of_memory(tried, lambda: tried.network.checkpointing == OFF)
    capsys.readouterr()
    tried.train_step(batch_for(tried))
    log = capsys.readouterr().out
    assert "Out of memory in step 2: " in log
    assert f"Activation checkpointing: {tried.network.checkpointing} from now on" in log
    assert tried.network.checkpointing == leanest(tried.estimates()) != OFF
    pairs = zip(weights_and_momentum(plain), weights_and_momentum(tried), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("setting", "steps_made", "advice"),
    [
        ("off", 0, "STUNET_CHECKPOINTING=stage needs less; the same command with --c resumes"),
        (None, FIRST_STEPS, "STUNET_CHECKPOINTING=stage needs less"),
        ("stage", 0, "No setting needs less. Plan for less memory"),
        (None, 0, "No setting needs less. Plan for less memory"),
    ],
)
def test_out_of_memory_ends_the_training_where_stepping_down_is_not_asked_for_or_does_not_help(
    make: Callable[..., Any], capsys: Any, setting: str | None, steps_made: int, advice: str
) -> None:
    trainer = make(setting=setting)
    trainer._steps_made = steps_made
    run_out_of_memory(trainer, lambda: True)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        trainer.train_step(batch_for(trainer))
    assert advice in capsys.readouterr().out


def test_an_optimizer_that_runs_out_of_memory_is_not_tried_again(
    make: Callable[..., Any], capsys: Any
) -> None:
    trainer = make()

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    trainer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train_step(batch_for(trainer))
    assert "It was the optimizer's step" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["stage", "block"])
def test_works_together_with_sharding(make: Callable[..., Any], setting: str) -> None:
    plain = make()
    plain.train_step(batch_for(plain))
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        sharded = make(setting=setting, shard=True)
        for _ in range(2):
            loss = sharded.train_step(batch_for(sharded))["loss"]
        weights = sharded.whole_weights()
    finally:
        distributed.destroy_process_group()
    assert plain.train_step(batch_for(plain))["loss"] == pytest.approx(loss, rel=1e-5)
    for name, value in plain.network.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
