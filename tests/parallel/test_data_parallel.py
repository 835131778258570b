# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""DDP, FSDP2 and distributed checkpoints, as the shipped accelerate configurations ask for them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from modeling_attnres.configuration import list_recipes, presets


HERE = Path(__file__).parent
ACCELERATE = presets.TRAINING / "accelerate"
# fp32, three steps of SGD: the rows of a batch are summed rank by rank, in another order than in one process.
TOLERANCE = 1e-5


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_every_configuration_is_run_here():
    assert sorted(path.stem for path in ACCELERATE.glob("*.yaml")) == ["ddp", "fsdp2"]
    assert not {"ddp", "fsdp2"} & set(list_recipes())  # they are no recipes


def test_data_parallel_trains_as_one_process(ranks):
    (alone,), replicas = ranks["one_process"], ranks["data_parallel"]
    assert [rank["type"] for rank in replicas] == ["MULTI_CPU"] * 2
    for rank in replicas:
        assert rank["losses"] == pytest.approx(alone["losses"], abs=TOLERANCE)
        assert largest_difference(rank["weights"], alone["weights"]) < TOLERANCE
    assert len({round(loss, 3) for loss in alone["losses"]}) == 3  # something was learnt


def test_fully_sharded_trains_as_data_parallel(ranks):
    shards, replica = ranks["fully_sharded"], ranks["data_parallel"][0]
    assert [rank["type"] for rank in shards] == ["FSDP"] * 2
    assert shards[0]["losses"] == pytest.approx(replica["losses"], abs=TOLERANCE)
    assert largest_difference(shards[0]["weights"], replica["weights"]) < TOLERANCE
    # Every parameter is sharded, the depth queries too.
    assert sum(rank["local_parameters"] for rank in shards) == replica["local_parameters"]
    assert shards[0]["local_parameters"] == replica["local_parameters"] / 2


def test_recomputing_changes_nothing(ranks):
    recomputing = ranks["fully_sharded_recomputing"][0]
    assert recomputing["losses"] == pytest.approx(ranks["fully_sharded"][0]["losses"], abs=TOLERANCE)
    assert largest_difference(recomputing["weights"], ranks["fully_sharded"][0]["weights"]) < 2 * TOLERANCE


@pytest.mark.parametrize("number", ["one", "four"])
def test_a_checkpoint_of_two_ranks_resumes_on(ranks, number):
    resumed, saved = ranks[f"resumed_by_{number}"], ranks["fully_sharded"]
    assert len(resumed) == {"one": 1, "four": 4}[number]
    assert largest_difference(resumed[0]["weights"], saved[0]["weights"]) == 0
    # The second loss depends on the momentum, which was loaded too.
    for rank in resumed:
        assert rank["next_losses"] == pytest.approx(saved[0]["next_losses"], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_launches_it(tmp_path, ranks, name):
    command = ["accelerate.commands.launch", "--config_file", ACCELERATE / f"{name}.yaml", "--main_process_port", "0"]
    command += [HERE / "train_with_accelerate.py", tmp_path]
    process = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    trained = torch.load(tmp_path / "trained.pt")
    assert trained["type"] == ("FSDP" if name == "fsdp2" else "MULTI_CPU")
    assert trained["losses"] == pytest.approx(ranks["data_parallel"][0]["losses"], abs=TOLERANCE)
    assert largest_difference(trained["weights"], ranks["data_parallel"][0]["weights"]) < TOLERANCE


def test_fsdp2_saves_shards_and_wraps_decoder_layers():
    configuration = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text())
    fsdp = configuration["fsdp_config"]
    assert (fsdp["fsdp_version"], fsdp["fsdp_state_dict_type"]) == (2, "SHARDED_STATE_DICT")
    assert fsdp["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
