# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import same_files, weights
from tqdm import tqdm

from modeling_attnres.conversion import ConversionError, convert
from modeling_attnres.conversion import writer as writer_module
from modeling_attnres.conversion.cli import main
from modeling_attnres.conversion.writer import OutputShard, OutputTensor, write_shards


# Kills its own process when the second shard is being written, as a crash or the kernel would.
KILLED = """
import os, signal, sys
from modeling_attnres.conversion import writer
from modeling_attnres.conversion.cli import main

copy_file, calls = writer._copy_file, []

def copy_and_die(*arguments):
    calls.append(arguments)
    copy_file(*arguments)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

writer._copy_file = copy_and_die
main(sys.argv[1:])
"""


def interrupted_copy(monkeypatch, interrupt):
    """Calls `interrupt` after the second shard was copied."""
    copy_file, calls = writer_module._copy_file, []

    def copy_and_interrupt(*arguments):
        calls.append(arguments)
        copy_file(*arguments)
        if len(calls) == 2:
            interrupt()

    monkeypatch.setattr(writer_module, "_copy_file", copy_and_interrupt)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_interrupted_by_the_user(tmp_path, sharded_llama, monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with monkeypatch.context() as patch:
        interrupted_copy(patch, lambda: signal.raise_signal(signal.SIGINT))
        assert main([str(sharded_llama), str(tmp_path / "out")]) == 130
    signal.signal(signal.SIGINT, before)
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert names(tmp_path) == {"sharded"}
    convert(sharded_llama, tmp_path / "out")
    assert names(tmp_path) == {"sharded", "out"}


def test_killed(tmp_path, sharded_llama):
    command = [sys.executable, "-c", KILLED, str(sharded_llama), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert names(tmp_path) == {"sharded", ".out.partial", ".out.lock"}
    assert len(list((tmp_path / ".out.partial" / "result").glob("*.safetensors"))) == 2
    convert(sharded_llama, tmp_path / "out")  # a rerun clears up
    assert names(tmp_path) == {"sharded", "out"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_disk_full_on_the_way(tmp_path, sharded_llama, monkeypatch, code):
    def fail():
        raise OSError(code, os.strerror(code))

    interrupted_copy(monkeypatch, fail)
    with pytest.raises(ConversionError, match="No space left while writing"):
        convert(sharded_llama, tmp_path / "out")
    assert names(tmp_path) == {"sharded"}


def test_disk_too_small_from_the_start(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ConversionError, match=r"No space for the result: 15\d,\d{3} bytes needed .* 1,000 free"):
        convert(llama, tmp_path / "out")
    assert names(tmp_path) == {"llama"}


def test_other_errors_clean_up_too(tmp_path, sharded_llama, monkeypatch):
    def fail():
        raise PermissionError(errno.EACCES, "no")

    interrupted_copy(monkeypatch, fail)
    with pytest.raises(PermissionError):
        convert(sharded_llama, tmp_path / "out")
    assert names(tmp_path) == {"sharded"}


def test_failed_replacement_leaves_the_old_model(tmp_path, llama, monkeypatch):
    convert(llama, tmp_path / "out", num_blocks=4, check=False)
    rename = Path.rename

    def fail_for_the_new(self, target):
        if self.name == "result":
            raise OSError(errno.EIO, "disk error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="disk error"):
        convert(llama, tmp_path / "out", num_blocks=2, overwrite=True, check=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sublayers_per_block"] == 2
    assert names(tmp_path) == {"llama", "out"}


def test_replacement_cut_off_in_the_middle_is_undone(tmp_path, llama):
    convert(llama, tmp_path / "out", num_blocks=4, check=False)
    (tmp_path / "out").rename(tmp_path / ".out.replaced")  # as a kill between the two renames leaves it
    with pytest.raises(ConversionError, match="`num_blocks`"):
        convert(llama, tmp_path / "out", num_blocks=99)
    assert names(tmp_path) == {"llama", "out"}
    assert (tmp_path / "out" / "config.json").is_file()


def test_two_conversions_into_one_folder(tmp_path, llama):
    with (
        filelock.FileLock(tmp_path / ".out.lock"),
        pytest.raises(ConversionError, match="being written by another conversion"),
    ):
        convert(llama, tmp_path / "out")


def test_folder_of_the_output_must_exist(tmp_path, llama):
    with pytest.raises(ConversionError, match="must lie in a folder that exists"):
        convert(llama, tmp_path / "nowhere" / "out")


def test_shards_without_a_change_are_copied_byte_for_byte(tmp_path, sharded_llama):
    convert(sharded_llama, tmp_path / "out")
    sources, results = sorted(sharded_llama.glob("*.safetensors")), sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(results) == len(sources) + 1 > 3
    for source, result in zip(sources, results):
        assert source.read_bytes() == result.read_bytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * tensor.element_size() for tensor in weights(tmp_path / "out").values()
    )
    assert index["weight_map"].keys() == weights(tmp_path / "out").keys()


def test_same_input_gives_the_same_files(tmp_path, sharded_llama):
    for out in ("a", "b"):
        convert(sharded_llama, tmp_path / out, dtype="bfloat16", check=False)
    assert same_files(tmp_path / "a", tmp_path / "b", ("*.safetensors", "*.index.json", "config.json"))


def test_written_files_read_back_by_the_safetensors_library(tmp_path):
    tensors = {
        "narrow": torch.arange(7, dtype=torch.bfloat16),
        "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
        "turned": torch.arange(6.0).view(2, 3).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    outputs = [
        OutputTensor(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    write_shards(tmp_path, [OutputShard(outputs)])
    assert names(tmp_path) == {"model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype


def test_a_tensor_that_is_not_what_was_announced_is_a_bug_that_shows(tmp_path):
    output = OutputTensor("x", torch.float32, (2,), lambda: torch.zeros(3))
    with pytest.raises(RuntimeError, match="'x' was announced as"):
        write_shards(tmp_path, [OutputShard([output])])


def test_progress_counts_every_byte(tmp_path, sharded_llama, monkeypatch):
    bars = []

    class Recorded(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(writer_module, "tqdm", Recorded)
    convert(sharded_llama, tmp_path / "out", check=False)
    (bar,) = bars
    assert bar.n == bar.total == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
