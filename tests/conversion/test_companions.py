# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from fresh_process import run_python
from hub_server import File, HubServer, Repository
from tiny_checkpoints import edit_json, save_backbone, save_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from modeling_attnres.conversion import CheckpointError, ConversionError, convert
from modeling_attnres.conversion.companions import companion_files, is_weight_file


COMPANIONS = (
    *("License.md", "license.txt", "COPYING", "USE_POLICY.md", "Notice.txt", "LICENSE"),
    *(
        "helper.py",
        "modeling_theirs.py",
        "their_attnres.py",
        "tekken.json",
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "params.json",
    ),
    *(
        "preprocessor_config.json",
        "chat_template.json",
        "special_tokens_map.json",
        "figures/curve.png",
        ".gitattributes",
    ),
    *("custom_generate/generate.py", "original/tokenizer.model", "assets/deep/er/note.txt"),
)
LEFT = (
    *(
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "consolidated.safetensors",
        "model.fp32-00001.safetensors",
    ),
    *("flax_model.msgpack", "tf_model.h5", "flax_model.msgpack.index.json", "model.safetensors.index.fp32.json"),
    *("onnx/model.onnx", "onnx/model.onnx_data", "original/consolidated.00.pth", "model-Q4_0.GGUF", ".git/config"),
    *("__pycache__/helper.cpython-311.pyc", ".cache/huggingface/x.json", "conversion_report.json"),
)


def write_all(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the content of {name}")


def files_below(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_everything_but_weights_comes_along(tmp_path, llama):
    written = files_below(convert_to(tmp_path / "plain", llama))
    write_all(llama, (*COMPANIONS, *LEFT))
    (llama / "README.md").write_text("---\nlicense: mit\n---\nthe source's own words")
    (llama / "linked.txt").symlink_to("COPYING")
    out = convert_to(tmp_path / "out", llama)
    assert files_below(out) - written == {*COMPANIONS, "SOURCE_README.md", "linked.txt"}
    for name in COMPANIONS:
        assert (out / name).read_text() == f"the content of {name}"
    assert (out / "SOURCE_README.md").read_text().endswith("the source's own words")
    assert not (out / "linked.txt").is_symlink()


def convert_to(out, source, **options):
    convert(source, out, check=False, **options)
    return out


def test_companions_survive_every_further_conversion(tmp_path, llama):
    write_all(llama, COMPANIONS)
    (llama / "README.md").write_text("the source's own words")
    out = convert_to(tmp_path / "out", llama)
    again = convert_to(tmp_path / "again", out, num_blocks=2)
    back = convert_to(tmp_path / "back", again, to="prenorm")
    for folder in (again, back):
        assert {*COMPANIONS, "SOURCE_README.md"} <= files_below(folder)
        assert (folder / "SOURCE_README.md").read_text() == "the source's own words"
    # The code and the card of an AttnRes model mean nothing beside a PreNorm one.
    assert not {path.name for path in back.glob("*_attnres.py")} - {"their_attnres.py"}
    assert not (back / "README.md").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", True),
        ("Model.SafeTensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin.index.fp16.json", True),
        ("tokenizer.model", False),
        ("index.json", False),
        ("binary.txt", False),
        ("safetensors", False),
    ],
)
def test_weight_files_are_known_by_their_ending(name, expected):
    assert is_weight_file(name) is expected


def test_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("A")
    source = tmp_path / "source"
    source.mkdir()
    (source / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(source)
    assert [file.as_posix() for file in companion_files(source)] == ["additional_chat_templates/a.jinja"]
    (source / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"gone\.txt: a link to a file that does not exist"):
        companion_files(source)


# --- Generation defaults ---------------------------------------------------------------------------------------------


def generation_defaults(folder) -> dict:
    return AutoModelForCausalLM.from_pretrained(folder).generation_config.to_diff_dict()


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.3, "max_length": 77}, {"do_sample": True, "top_k": 7, "eos_token_id": [2, 5]}]
)
def test_generation_defaults_of_the_config_become_a_file(tmp_path, llama, fields):
    (llama / "generation_config.json").unlink()
    edit_json(llama / "config.json", **fields)
    expected = generation_defaults(llama)
    assert fields.items() <= expected.items()
    convert(llama, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert fields.items() <= stored.items()
    assert generation_defaults(tmp_path / "out") == expected
    convert(tmp_path / "out", tmp_path / "back", to="prenorm")
    assert generation_defaults(tmp_path / "back") == expected


def test_a_generation_config_of_its_own_comes_along_as_it_is(tmp_path, llama):
    GenerationConfig(max_length=11, repetition_penalty=1.5).save_pretrained(llama)
    convert(llama, tmp_path / "out")
    name = "generation_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (llama / name).read_bytes()


# --- From the Hub ----------------------------------------------------------------------------------------------------


def repository_of(folder) -> dict[str, File]:
    return {name: File((folder / name).read_bytes(), is_weight_file(name)) for name in files_below(folder)}


def test_companions_and_revision_of_a_source_on_the_hub(tmp_path):
    """The branch has moved on to other weights; the commit asked for is converted, with all that it has."""
    old = save_backbone(tmp_path / "old", max_shard_size="30KB")
    new = save_backbone(tmp_path / "new", vocab_size=100)
    save_tokenizer(old)
    write_all(old, (*COMPANIONS, "additional_chat_templates/rag.jinja"))
    for name in ("vocab.json", "merges.txt", "tekken.json", "chat_template.json", "special_tokens_map.json"):
        (old / name).unlink()  # not what the tokenizer's class expects of such files
    write_all(old, ("consolidated.safetensors", "onnx/model.onnx", "tf_model.h5", "pytorch_model.bin"))
    with HubServer() as server:
        repository = server.repositories["user/llama"] = Repository()
        commit = repository.commit(repository_of(old))
        repository.commit(repository_of(new))
        run_python(
            "-c",
            f"from modeling_attnres.conversion.cli import main; "
            f"assert main(['user/llama', 'out', '--revision', '{commit}', '--check-text', 'depth attends']) == 0",
            folder=tmp_path,
            HF_ENDPOINT=server.url,
            HF_HUB_DISABLE_XET="1",
        )
        fetched = {request.rpartition(f"/resolve/{commit}/")[2] for request in server.requests}
        assert not fetched & {"consolidated.safetensors", "onnx/model.onnx", "tf_model.h5", "pytorch_model.bin"}
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert (report["base_model"], report["revision"]) == ("user/llama", commit)
    assert report["parity"]["given text"]["max_logit_difference"] == 0.0
    expected = {path.as_posix() for path in companion_files(old)}
    assert (
        {"additional_chat_templates/rag.jinja", "License.md", "helper.py"} < expected <= files_below(tmp_path / "out")
    )


def test_revision_goes_with_the_hub(tmp_path, llama):
    with pytest.raises(ConversionError, match=r"`revision` goes with a Hub id, got 'v1' with the local source"):
        convert(llama, tmp_path / "out", revision="v1")


def test_revision_that_does_not_exist(tmp_path):
    with HubServer() as server:
        server.repositories["user/llama"] = Repository()
        server.repositories["user/llama"].commit({})
        process = run_python(
            "-c",
            "from modeling_attnres.conversion.cli import main; assert main(['user/llama', 'o', '--revision', 'v9']) == 2",
            folder=tmp_path,
            HF_ENDPOINT=server.url,
            HF_HUB_DISABLE_XET="1",
        )
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "attnres-convert: error: `source` 'user/llama' at revision 'v9' is no existing path, and could"
    )
    assert not (tmp_path / "o").exists()
