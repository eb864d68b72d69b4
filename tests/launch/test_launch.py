"""Several processes through torchrun and the launcher: the same training as one process's, one
killed, and resumed in four, sharded; arguments, consistency, what is printed."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training_entry
from torch import distributed, nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from stunet_plugin import trainers
from stunet_plugin.errors import PluginError
from stunet_plugin.launch import __main__ as launch

from conftest import PHANTOM_ID, Stunet, Workspace
from trainer_helpers import DATASET

CPU = torch.device("cpu")
TRAINING = (PHANTOM_ID, "3d_fullres", "0")
EPOCHS, KILLED_IN = 4, 2


@pytest.mark.slow
def test_killed_on_two_machines_and_resumed_sharded_in_four_processes(
    nnunet_environment: Workspace, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pretended machines with a process each, of which one is killed; then four processes with
    the network sharded. Losses, weights and momentum must be those of a single process."""
    monkeypatch.syspath_prepend(str(repository / "tests" / "tools"))
    launched = importlib.import_module("two_processes")
    folder = nnunet_environment.dataset_folder(nnunet_environment.preprocessed)
    launched.write_plans(folder)
    changes = {"STUNET_EPOCHS": str(EPOCHS), "STUNET_SEED": "1"}
    changes["nnUNet_extTrainer"] = str(launched.FIXED_BATCHES)
    environment = {**nnunet_environment.environment, **changes, "nnUNet_n_proc_DA": "0"}
    words = [*TRAINING, "-tr", "FixedBatchesTrainer", "-p", launched.PLANS, "-device", "cpu"]
    kill, patience = {"FIXED_BATCHES_KILL": f"1:{KILLED_IN}"}, ("--timeout", "10")
    how: dict[str, int] = {"machines": 2, "processes": 1, "limit": 420}
    killed = launched.torchrun([*words, *patience], environment | kill, tmp_path, **how)
    assert all(code not in (None, 0) for code in killed.codes), killed.output
    assert "Signal 9 (SIGKILL)" in killed.output
    assert re.search("Process 0 of 2 on .* stops: .*\nAll processes .* end.*--c", killed.output)
    model = nnunet_environment.model("FixedBatchesTrainer", plans=launched.PLANS) / "fold_0"
    assert launched.same_weights_everywhere(model, 2)
    assert len((model / "weights_of_rank_1.txt").read_text().splitlines()) == KILLED_IN
    # One writer: what every process of nnU-Net prints and writes comes from the first alone.
    assert killed.output.count("Please cite") == 1
    assert len(list(model.glob("training_log_*.txt"))) == 1

    sharded = {**environment, "STUNET_SHARD": "1"}
    resumed = launched.torchrun([*words, "--c"], sharded, tmp_path, processes=4, limit=420)
    assert resumed.codes == [0], resumed.output
    assert "over 4 process(es)" in resumed.output
    checkpoint = launched.read(model / "checkpoint_final.pth")

    monkeypatch.syspath_prepend(str(launched.FIXED_BATCHES))
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    plans = {**nnunet_environment.plans(launched.PLANS), "continue_training": False}
    description = json.loads((folder / "dataset.json").read_text())
    trainer_class = importlib.import_module("fixed_batches_trainer").FixedBatchesTrainer
    trainer = trainer_class(plans, "3d_fullres", 1, description, CPU)
    trainer.run_training()
    alone = launched.read(Path(trainer.output_folder, "checkpoint_final.pth"))
    assert checkpoint["logging"]["lrs"] == alone["logging"]["lrs"]
    found = launched.differences(alone, checkpoint)
    assert max(found[name] for name in ("train_losses", "val_losses", "weights")) < 1e-3

    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model.parent), (0,), "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])


def set_ranks(patch: pytest.MonkeyPatch, **ranks: int) -> None:
    for name, number in ranks.items():
        patch.setenv(name, str(number))


@pytest.mark.parametrize(
    ("arguments", "gpus", "fact"),
    [
        ("0", None, "has to be started by torchrun"),
        ("0 -num_gpus 2", None, "torchrun's --nproc-per-node"),
        ("0 --c -pretrained_weights a.pth", None, "c and pretrained_weights cannot"),
        ("0 --continue", None, "unrecognized arguments: --continue"),
        ("first", None, "fold must be an integer or all, not 'first'"),
        ("0 --timeout 0", None, "--timeout must be"),
        ("0", 0, "has 0. Add -device cpu"),
        ("0", 1, "has 1. Start torchrun with --nproc-per-node 1"),
    ],
)
def test_wrong_arguments_and_machines_are_refused_and_torchruns_last_lines_say_why(
    arguments: str, gpus: int | None, fact: str, stunet: Stunet
) -> None:
    stunet.patch.delenv("RANK", raising=False)
    if gpus is not None:
        set_ranks(stunet.patch, RANK=9, WORLD_SIZE=16, LOCAL_RANK=1, LOCAL_WORLD_SIZE=8)
        stunet.patch.setattr(torch.cuda, "device_count", lambda: gpus)
    # What cannot be told to torchrun is printed all the same.
    for file in (stunet.folder / "gone" / "error.json", stunet.folder / "error.json"):
        stunet.patch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        try:
            code = launch.main(["4", "3d_fullres", *arguments.split()])
        except SystemExit as error:
            code = error.code
        assert code == 2
        assert fact in stunet.capsys.readouterr().err
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert fact in ChildFailedError("launch", {0: failure}).format_msg()
    assert failure.timestamp > 0


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("Connection reset by peer"), 1)]
)
def test_a_training_that_was_stopped_says_how_to_resume(
    error: BaseException, code: int, stunet: Stunet
) -> None:
    set_ranks(stunet.patch, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
    stunet.patch.setenv("TORCHELASTIC_ERROR_FILE", str(stunet.folder / "error.json"))
    stunet.patch.setattr(distributed, "init_process_group", Mock(side_effect=error))
    stunet.patch.setattr(torch, "set_num_threads", lambda _: None)
    assert launch.main(["4", "3d_fullres", "0", "-device", "cpu"]) == code
    assert "start the same command with --c" in stunet.capsys.readouterr().err
    # Told to torchrun it would hide which process was killed.
    assert not (stunet.folder / "error.json").exists()


def test_processes_that_were_started_differently_are_told_apart(
    nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(*more: str) -> dict[str, str]:
        return launch.settings_of(launch.build_parser().parse_args([*TRAINING, *more]))

    first = settings("--c")

    def difference(*more: str) -> str | None:
        return launch.first_difference([("a", first), ("a", first), ("b", settings(*more))])

    assert difference("--c") is None
    assert difference() == "the argument c is True in process 0 on a, False in process 2 on b"
    with monkeypatch.context() as patch:
        patch.setattr(launch, "sha256_of", lambda _: "of other plans")
        said = difference("--c") or ""
    assert re.match(r"nnUNetPlans.json is \w{8} in process 0 on a, of other in", said)
    monkeypatch.setenv("STUNET_EPOCHS", "7")
    assert difference("--c") == "STUNET_EPOCHS is 1 in process 0 on a, 7 in process 2 on b"


def test_results_that_are_not_shared_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seen from the second machine; what the first one would send and receive is replaced."""

    def gather(everyone: list[Any], own: Any) -> None:
        everyone[:] = [(True, "a", "/first"), own]

    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setattr(launch, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    send = monkeypatch.setattr
    send(distributed, "broadcast_object_list", lambda names: names.__setitem__(0, "probe"))
    send(distributed, "all_gather_object", gather)
    message = "process 1 on .* does not see in its .* what process 0 on a writes to its /first"
    with pytest.raises(PluginError, match=message):
        launch.check_results_are_shared()
    (tmp_path / "probe").touch()
    launch.check_results_are_shared()


def test_nnunets_own_trainers_are_refused_beyond_the_gpus_of_one_machine(
    nnunet_environment: Workspace,
) -> None:
    message = "nnUNetTrainer is not a trainer of stunet-plugin.*GPUs of one machine alone"
    with pytest.raises(PluginError, match=message):
        launch.train(launch.build_parser().parse_args(TRAINING), launch.Process(1, 2, 0, 1), CPU)
    assert not list(nnunet_environment.results.rglob("nnUNetTrainer__*"))


def test_the_launcher_knows_nnunets_arguments(stunet: Stunet) -> None:
    stunet.patch.setattr(sys, "argv", ["nnUNetv2_train", "--help"])
    with pytest.raises(SystemExit):
        run_training_entry()
    theirs = set(re.findall(r"^  (--?\w+)", stunet.capsys.readouterr().out, re.MULTILINE))
    assert {"-tr", "--c", "-device"} < theirs
    assert theirs <= set(launch.build_parser()._option_string_actions)


def test_batch_norm_under_ddp(
    nnunet_environment: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synchronised on CUDA, where the running statistics are then the same everywhere and need not
    be sent; in a process group of one."""
    plans = {**nnunet_environment.plans(), "continue_training": False}
    plans["configurations"]["3d_fullres"].update(patch_size=[32, 32, 32], batch_size=2)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        trainer = trainers.PCTNetTrainer(plans, "3d_fullres", 0, DATASET, CPU)
        trainer.initialize()
        assert not trainer.network._check_sync_bufs_pre_fwd()
        network = trainer._bare_network()
        trainer.device = torch.device("cuda", 0)
        replaced = "stunet_plugin.trainers.distributed_trainer.DistributedDataParallel"
        monkeypatch.setattr(replaced, lambda network, **_: network)
        parameters = dict(network.named_parameters())
        converted = trainer._replicate(network)
    finally:
        distributed.destroy_process_group()
    norms = [x for x in converted.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    assert all(parameter is parameters[name] for name, parameter in converted.named_parameters())
