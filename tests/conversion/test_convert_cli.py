# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import re
from importlib.metadata import entry_points

import pytest
from tiny_checkpoints import save_backbone, weights
from tiny_gguf import save_gguf

from modeling_attnres import AttnResConfig
from modeling_attnres.conversion import convert, writer
from modeling_attnres.conversion.cli import main


def test_converts_and_prints_the_proof(tmp_path, llama, capsys):
    assert main([str(llama), str(tmp_path / "out"), "--num-blocks", "4"]) == 0
    captured = capsys.readouterr()
    printed = captured.out
    assert "LOAD REPORT" not in captured.err
    assert "llama (prenorm, llama) -> out (attnres)" in printed
    assert '4 of 2 sublayers (8 in all), depth weights "sum"' in printed
    assert "37,664, of which 512 added" in printed
    assert "fixed token ids: max logit difference 0.0, KL 0, top-1 agreement 100.0% (48 tokens)" in printed
    assert AttnResConfig.from_pretrained(tmp_path / "out").sublayers_per_block == 2


def test_options_reach_the_conversion(tmp_path, capsys):
    source = save_backbone(tmp_path / "source", tie_word_embeddings=True)
    options = ["--sublayers-per-block", "3", "--depth-weights", "mean", "--dtype", "bfloat16", "--no-check"]
    assert main([str(source), str(tmp_path / "out"), *options]) == 0
    assert "Skipped on request" in capsys.readouterr().out
    config = AttnResConfig.from_pretrained(tmp_path / "out")
    assert (config.sublayers_per_block, config.depth_weights, str(config.dtype)) == (3, "mean", "torch.bfloat16")
    assert main([str(source), str(tmp_path / "out"), "--overwrite", "--dry-run"]) == 0
    assert "Dry run: nothing was written." in capsys.readouterr().out
    assert AttnResConfig.from_pretrained(tmp_path / "out").sublayers_per_block == 3
    drop = ["--drop-keys", "^nothing$", "--drop-keys", r"^model\.norm\.weight$"]
    assert main([str(source), str(tmp_path / "out"), "--overwrite", *drop]) == 2
    assert "missing: model.norm.weight" in capsys.readouterr().err


def test_there_and_back(tmp_path, llama, capsys):
    paths = {name: str(tmp_path / name) for name in ("attnres", "back", "mean", "fla", "again")}
    assert main([str(llama), paths["attnres"]]) == 0
    assert main([paths["attnres"], paths["back"], "--to-prenorm"]) == 0
    assert weights(tmp_path / "back").keys() == weights(llama).keys()
    assert main([str(llama), paths["mean"], "--depth-weights", "mean"]) == 0
    capsys.readouterr()
    assert main([paths["mean"], paths["fla"], "--to-dialect", "fla"]) == 0
    assert main([paths["fla"], paths["again"], "--dialect", "fla"]) == 0
    printed = capsys.readouterr().out
    assert "mean (attnres, llama) -> fla (fla)" in printed
    assert "set aside   model.layers.0.attn_res_norm.weight, model.layers.0.attn_res_proj.weight" in printed


def test_errors_are_one_message_and_no_traceback(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("attnres-convert: error: `source` is neither an existing path nor a Hub id")
    assert captured.out == ""


def too_long(folder, monkeypatch):
    return [str(folder / "llama"), "x" * 250], r"`out` must have a name of at most 245 bytes, got 250: x{40}\.\.\."


def into_a_folder_without_files(folder, monkeypatch):
    return [str(folder / "llama"), "/proc/model"], "`out` must lie in a folder that takes files, got /proc/model"


def over_the_working_folder(folder, monkeypatch):
    monkeypatch.chdir(folder / "old")
    return [str(folder / "llama"), ".", "--overwrite"], "`out` must not be or contain the working folder, which would"


def over_a_folder_above(folder, monkeypatch):
    (folder / "old" / "inner").mkdir()
    monkeypatch.chdir(folder / "old" / "inner")
    return [str(folder / "llama"), "..", "--overwrite"], "`out` must not be or contain the working folder"


def an_adapter(folder, monkeypatch):
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    return [str(folder / "lora"), "out"], "lora: a PEFT adapter of 'base', not a model; merge it first with"


def a_cut_gguf_file(folder, monkeypatch):
    save_gguf(folder / "llama", folder / "cut.gguf")
    (folder / "cut.gguf").write_bytes((folder / "cut.gguf").read_bytes()[:700])
    return [str(folder / "cut.gguf"), "out"], r"cut\.gguf: not a sound GGUF file \("


def an_empty_pickle(folder, monkeypatch):
    (folder / "llama" / "model.safetensors").unlink()
    (folder / "llama" / "pytorch_model.bin").touch()
    return [str(folder / "llama"), "out"], r"pytorch_model\.bin: damaged, or not a file of `torch\.save` \(EOFError\)"


def no_source(folder, monkeypatch):
    return ["", "out"], "`source` must be a path, got ''"


def no_out(folder, monkeypatch):
    return [str(folder / "llama"), ""], "`out` must be a path, got ''"


def a_pipe(folder, monkeypatch):
    os.mkfifo(folder / "pipe.gguf")
    return [
        str(folder / "pipe.gguf"),
        "out",
    ], r"must be a folder, a \.gguf file or a Hub id, got the file .*pipe\.gguf"


def out_is_a_link(folder, monkeypatch):
    (folder / "link").symlink_to(folder / "nowhere")
    return [str(folder / "llama"), str(folder / "link")], r"`out` must not be a link, got .*link \(to .*nowhere\)"


def a_failing_disk(folder, monkeypatch):
    def fail(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", "a file")

    monkeypatch.setattr(writer, "_copy_file", fail)
    return [str(folder / "llama"), "out"], r"\[Errno 13\] Permission denied: 'a file'; nothing was written\."


CASES = [
    *(
        too_long,
        into_a_folder_without_files,
        over_the_working_folder,
        over_a_folder_above,
        an_adapter,
        a_cut_gguf_file,
    ),
    *(an_empty_pickle, no_source, no_out, a_pipe, out_is_a_link, a_failing_disk),
]


@pytest.mark.parametrize("prepare", CASES, ids=lambda case: case.__name__)
def test_one_line_with_the_true_reason_and_nothing_left(tmp_path, llama, monkeypatch, capsys, prepare):
    monkeypatch.chdir(tmp_path)
    convert(llama, tmp_path / "old", check=False)
    arguments, message = prepare(tmp_path, monkeypatch)
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = [
        line for line in captured.err.replace("\r", "\n").splitlines() if "Writing weights" not in line and line
    ]
    assert re.match(f"attnres-convert: error: .*{message}", line)
    assert captured.out == ""
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("options", [["--num-blocks", "2", "--sublayers-per-block", "2"], ["--dtype", "int4"], []])
def test_wrong_usage_exits_with_two(options, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(options and ["source", "out", *options])
    assert exit_.value.code == 2
    assert "usage: attnres-convert" in capsys.readouterr().err


def test_console_script_is_declared():
    (script,) = entry_points(group="console_scripts", name="attnres-convert")
    assert script.load() is main


def test_report_is_json_that_the_folder_keeps(tmp_path, llama):
    main([str(llama), str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["source_name"] == "llama"
    assert report["written"] is True
    assert report["seconds"] > 0
