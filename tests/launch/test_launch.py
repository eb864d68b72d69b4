"""Several processes through torchrun and the launcher: the same training as one process's, one
killed, and on in four, sharded."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training_entry
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from stunet_plugin.errors import PluginError
from stunet_plugin.launch import __main__ as launch
from stunet_plugin.launch import agreement
from stunet_plugin.trainers.misfm_trainers import TRAINERS as MISFM

from conftest import PHANTOM_ID, Workspace

EPOCHS = 4
KILLED_IN = 2


@pytest.fixture
def launched(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "tests" / "tools"))
    return importlib.import_module("launched")


@pytest.fixture
def fixed_batches(
    launched: ModuleType, nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """The phantoms, with the plan and the trainer of the fixed batches."""
    workspace = nnunet_environment
    launched.write_plans(workspace.dataset_folder(workspace.preprocessed))
    monkeypatch.setenv("nnUNet_extTrainer", str(launched.FIXED_BATCHES))
    monkeypatch.syspath_prepend(str(launched.FIXED_BATCHES))
    monkeypatch.setenv("STUNET_EPOCHS", str(EPOCHS))
    monkeypatch.setenv("STUNET_SEED", "1")
    return workspace


def single_process_training(workspace: Workspace, launched: ModuleType) -> dict[str, Any]:
    """What one process makes of the fixed batches."""
    plans = {**workspace.plans(launched.PLANS), "continue_training": False}
    dataset_json = json.loads(
        (workspace.dataset_folder(workspace.preprocessed) / "dataset.json").read_text()
    )
    trainer = importlib.import_module("fixed_batches_trainer").FixedBatchesTrainer(
        plans, "3d_fullres", 1, dataset_json, torch.device("cpu")
    )
    trainer.run_training()
    checkpoint: dict[str, Any] = launched.read(Path(trainer.output_folder, "checkpoint_final.pth"))
    return checkpoint


def test_killed_on_two_machines_and_resumed_sharded_in_four_processes(
    fixed_batches: Workspace, launched: ModuleType, tmp_path: Path
) -> None:
    """Two pretended machines with a process each, of which one is killed; then four processes that
    share the network out.

    One training throughout, so its losses, weights and momentum must be those of a single process.
    """
    workspace = fixed_batches
    environment = {
        **workspace.environment,
        "nnUNet_extTrainer": str(launched.FIXED_BATCHES),
        "nnUNet_n_proc_DA": "0",
        "STUNET_EPOCHS": str(EPOCHS),
        "STUNET_SEED": "1",
    }
    arguments = [
        PHANTOM_ID,
        "3d_fullres",
        "0",
        "-tr",
        "FixedBatchesTrainer",
        "-p",
        launched.PLANS,
        "-device",
        "cpu",
    ]
    kill = {"FIXED_BATCHES_KILL": f"1:{KILLED_IN}"}
    killed = launched.torchrun(
        [*arguments, "--timeout", "10"],
        {**environment, **kill},
        tmp_path,
        machines=2,
        processes=1,
        limit=420,
    )
    assert [code not in (None, 0) for code in killed.codes] == [True, True], killed.output
    assert "Signal 9 (SIGKILL)" in killed.output
    assert re.search(
        r"Process 0 of 2 on .* stops: .*\nAll processes of this training end.*--c", killed.output
    )
    model = workspace.model("FixedBatchesTrainer", plans=launched.PLANS) / "fold_0"
    assert launched.same_weights_everywhere(model, 2)
    assert len((model / "weights_of_rank_1.txt").read_text().splitlines()) == KILLED_IN
    # One writer: what every process of nnU-Net prints and writes comes from the first alone.
    assert killed.output.count("Please cite") == 1
    assert len(list(model.glob("training_log_*.txt"))) == 1

    resumed = launched.torchrun(
        [*arguments, "--c"], {**environment, "STUNET_SHARD": "1"}, tmp_path, processes=4, limit=420
    )
    assert resumed.codes == [0], resumed.output
    assert "shared out over 4 process(es)" in resumed.output
    checkpoint = launched.read(model / "checkpoint_final.pth")
    alone = single_process_training(workspace, launched)
    assert checkpoint["logging"]["lrs"] == alone["logging"]["lrs"]
    found = launched.differences(alone, checkpoint)
    assert max(found["train_losses"], found["val_losses"]) < 1e-3
    assert found["weights"] < 1e-3

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model.parent), (0,), "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, *launched.PATCH))
    assert logits.shape[1:] == launched.PATCH


def test_wrong_arguments_and_places_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert launch.main(["4", "3d_fullres", *arguments]) == 2
        return capsys.readouterr().err

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert "has to be started by torchrun" in refused("0")
    assert "torchrun's --nproc-per-node says how many" in refused("0", "-num_gpus", "2")
    assert "--c and -pretrained_weights cannot be used together" in refused(
        "0", "--c", "-pretrained_weights", "a.pth"
    )
    assert "fold must be a whole number or all, not 'first'" in refused("first")
    assert "--timeout must be a number of minutes above 0" in refused("0", "--timeout", "0")
    for name, value in {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert re.search("Process 9 of 16 on .* finds no GPU.*-device cpu", refused("0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "has 1 and was asked for 8 processes. Start torchrun with --nproc-per-node 1" in refused(
        "0"
    )


def test_torchruns_last_lines_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit):
        launch.main(["4", "3d_fullres", "0", "--continue"])
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert (
        "unrecognized arguments: --continue"
        in ChildFailedError("launch", {0: failure}).format_msg()
    )
    assert launch.main(["4", "3d_fullres", "first"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert "fold must be a whole number" in ChildFailedError("launch", {0: failure}).format_msg()
    assert failure.timestamp > 0
    # What cannot be told is not in the way of what is printed.
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    assert launch.main(["4", "3d_fullres", "first"]) == 2


def test_an_interrupted_training_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(name, value)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "choose_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(launch, "process_group", interrupted)
    assert launch.main(["4", "3d_fullres", "0", "-device", "cpu"]) == 130
    assert "start the same command with --c" in capsys.readouterr().err

    def disconnected(*_: Any) -> None:
        raise RuntimeError("Connection reset by peer")

    # Told to torchrun it would hide which process was killed.
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(launch, "process_group", disconnected)
    assert launch.main(["4", "3d_fullres", "0", "-device", "cpu"]) == 1
    assert not (tmp_path / "error.json").exists()


def facts_of(*arguments: str) -> dict[str, str]:
    return agreement.facts(
        launch.build_parser().parse_args([PHANTOM_ID, "3d_fullres", "0", *arguments])
    )


def test_processes_that_were_started_differently_are_told_apart(
    nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = facts_of("--c")
    assert first == facts_of("--c")
    assert agreement.first_difference([("a", first), ("b", first)]) is None

    def difference(other: dict[str, str]) -> str | None:
        return agreement.first_difference([("a", first), ("a", first), ("b", other)])

    assert (
        difference(facts_of())
        == "the argument c is True in process 0 on a, False in process 2 on b"
    )
    plans = Path(
        nnunet_environment.dataset_folder(nnunet_environment.preprocessed), "nnUNetPlans.json"
    )
    before = plans.read_text()
    plans.write_text(before + "\n")
    assert re.match(
        r"nnUNetPlans.json is \w{8} in process 0 on a, \w{8} in process 2",
        difference(facts_of("--c")) or "",
    )
    plans.write_text(before)
    monkeypatch.setenv("STUNET_EPOCHS", "7")
    assert (
        difference(facts_of("--c")) == "STUNET_EPOCHS is 1 in process 0 on a, 7 in process 2 on b"
    )
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert {name for name, value in facts_of("--c").items() if value == "missing"} >= {
        "nnUNetPlans.json",
        "dataset.json",
    }


@pytest.mark.parametrize("shared", [True, False])
def test_results_that_are_not_shared_are_refused(
    shared: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seen from the second machine; what the first one would send and receive stands in for it."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / ("second" if shared else "first") / "probe").touch()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "second"))
    monkeypatch.setattr(agreement, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        distributed, "broadcast_object_list", lambda names: names.__setitem__(0, "probe")
    )
    first = (True, "a", str(tmp_path / "first"))
    monkeypatch.setattr(
        distributed,
        "all_gather_object",
        lambda everyone, own: everyone.__setitem__(slice(None), [first, own]),
    )
    if shared:
        agreement.check_results_are_shared()
    else:
        with pytest.raises(
            PluginError,
            match=r"(?s)process 1 on .* does not see in its .*second what process 0 on a .*first",
        ):
            agreement.check_results_are_shared()


def test_nnunets_own_trainers_are_refused_beyond_the_gpus_of_one_machine(
    nnunet_environment: Workspace,
) -> None:
    options = launch.build_parser().parse_args([PHANTOM_ID, "3d_fullres", "0"])
    with pytest.raises(
        PluginError,
        match="nnUNetTrainer is not a trainer of stunet-plugin.*GPUs of one machine alone",
    ):
        launch.train(options, launch.Place(1, 2, 0, 1), torch.device("cpu"))
    assert not list(nnunet_environment.results.rglob("nnUNetTrainer__*"))


def test_the_launcher_knows_nnunets_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "--help"])
    with pytest.raises(SystemExit):
        run_training_entry()
    theirs = set(re.findall(r"^  (--?\w+)", capsys.readouterr().out, re.MULTILINE))
    assert {"-tr", "--c", "-device"} < theirs
    assert (
        theirs
        - {name for action in launch.build_parser()._actions for name in action.option_strings}
        == set()
    )


@pytest.fixture
def make_in_group_of_one(nnunet_environment: Workspace) -> Any:
    """Make a trainer in a process group of one."""

    def build(name: str, **changes: Any) -> Any:
        plans = {**nnunet_environment.plans(), "continue_training": False}
        plans["configurations"]["3d_fullres"].update(changes)
        description = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "a": 1, "b": 2},
            "file_ending": ".nii.gz",
        }
        return MISFM[name](plans, "3d_fullres", 0, description, torch.device("cpu"))

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield build
    distributed.destroy_process_group()


def test_batch_norm_under_ddp(
    make_in_group_of_one: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synchronised on CUDA, where the running statistics are then the same everywhere and need not
    be sent."""
    trainer = make_in_group_of_one("PCTNetTrainer", patch_size=[32, 32, 32], batch_size=2)
    trainer.initialize()
    assert not any(
        isinstance(module, torch.nn.SyncBatchNorm) for module in trainer.network.modules()
    )
    assert not trainer.network._check_sync_bufs_pre_fwd()
    network = trainer._bare_network()
    parameters = dict(network.named_parameters())
    trainer.device = torch.device("cuda", 0)

    def without_gpu(
        network: torch.nn.Module,
        device_ids: list[int],
        gradient_as_bucket_view: bool,
        broadcast_buffers: bool,
    ) -> Any:
        return network

    monkeypatch.setattr(
        "stunet_plugin.trainers.distributed_trainer.DistributedDataParallel", without_gpu
    )
    converted = trainer._replicate(network)
    norms = [
        module
        for module in converted.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]
    assert norms
    assert all(isinstance(module, torch.nn.SyncBatchNorm) for module in norms)
    assert all(parameter is parameters[name] for name, parameter in converted.named_parameters())


def test_only_the_first_process_prints_and_writes(
    make_in_group_of_one: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_in_group_of_one("FMUNetTrainer", patch_size=[32, 32, 32], batch_size=2)
    trainer.initialize()
    trainer.local_rank = 1
    capsys.readouterr()
    trainer.print_to_log_file("once is enough")
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "checkpoint.pth").exists()
