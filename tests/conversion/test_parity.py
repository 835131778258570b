# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_backbones import randomize_depth_attention, tiny_model
from tiny_checkpoints import save_backbone

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.conversion import ParityError, convert, convert_checkpoint
from modeling_attnres.conversion import parity as parity_module
from modeling_attnres.conversion.parity import fixed_tokens


@pytest.fixture
def wrong_by_a_little(monkeypatch):
    """Lets the result's logits differ from the source's by 1e-3 everywhere."""
    compare = parity_module.compare_logits
    monkeypatch.setattr(convert_checkpoint, "compare_logits", lambda source, result: compare(source, result + 1e-3))


def save_attnres(folder, depth_weights: str, trained: bool):
    model = tiny_model("llama", 2, depth_weights)
    if not trained:
        torch.nn.init.zeros_(model.model.depth_attention.query)
    model.save_pretrained(folder)
    return folder


# Source, options: conversions after which both must compute the same, bit for bit.
EXACT = {
    "prenorm to sum": ("prenorm", {}),
    "sum to sum": ("sum", {}),
    "trained sum to sum": ("trained sum", {}),
    "sum to other blocks": ("sum", {"num_blocks": 2}),
    "sum to prenorm": ("sum", {"to": "prenorm"}),
    "mean to mean": ("mean", {}),
    "trained mean to mean": ("trained mean", {}),
    "trained mean cast": ("trained mean", {"dtype": "bfloat16"}),
    "trained mean, blocks named": ("trained mean", {"sublayers_per_block": 2, "depth_weights": "mean"}),
}


@pytest.fixture
def make_source(tmp_path):
    def make(kind):
        if kind == "prenorm":
            return save_backbone(tmp_path / "source")
        return save_attnres(tmp_path / "source", kind.split()[-1], trained=kind.startswith("trained"))

    return make


@pytest.mark.parametrize("case", EXACT)
def test_any_difference_is_an_error_where_both_compute_the_same(tmp_path, make_source, wrong_by_a_little, case):
    kind, options = EXACT[case]
    with pytest.raises(ParityError, match=r"differ from the source's by up to 0\.00\d+, where 0\.0 is due"):
        convert(make_source(kind), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prenorm", {"depth_weights": "mean"}),
        ("sum", {"depth_weights": "mean"}),
        ("mean", {"depth_weights": "sum"}),
        ("mean", {"num_blocks": 2}),
    ],
)
def test_differences_are_reported_where_the_forms_differ(tmp_path, make_source, wrong_by_a_little, kind, options):
    report = convert(make_source(kind), tmp_path / "out", **options)
    assert 5e-4 < report.max_logit_difference < 0.1


# --- Tensors ---------------------------------------------------------------------------------------------------------


def damage_after_writing(monkeypatch, change):
    """Changes the tensors of the first weight file after it was written."""
    write = convert_checkpoint.write_shards

    def write_and_damage(folder, shards):
        write(folder, shards)
        file = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(convert_checkpoint, "write_shards", write_and_damage)


@pytest.mark.parametrize("kind", ["prenorm", "sum", "trained mean"])
def test_what_no_logit_shows_is_compared_too(tmp_path, make_source, monkeypatch, kind):
    source = make_source(kind)
    vocab_size = 96
    unused = next(index for index in range(vocab_size) if index not in fixed_tokens(vocab_size).flatten().tolist())

    def damage(tensors):
        tensors["model.embed_tokens.weight"][unused, 3] += 1.0

    damage_after_writing(monkeypatch, damage)
    with pytest.raises(ParityError, match=r"'model\.embed_tokens\.weight' of the result is not the source's"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("options", [{}, {"to": "prenorm"}, {"dtype": "float16"}], ids=str)
def test_tensors_that_got_lost_or_were_cast_otherwise(tmp_path, make_source, monkeypatch, options):
    source = make_source("sum")
    name = "model.layers.0.mlp.up_proj.weight"
    with monkeypatch.context() as patch:
        damage_after_writing(patch, lambda tensors: tensors.pop(name))
        with pytest.raises(ValueError, match="up_proj"):
            convert(source, tmp_path / "out", **options)
    damage_after_writing(monkeypatch, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    with pytest.raises(ParityError, match=rf"'{name}' of the result is not the source's"):
        convert(source, tmp_path / "out", **options)


def test_depth_tensors_and_conventions_are_compared(tmp_path, make_source, monkeypatch):
    source = make_source("trained mean")
    query = "model.depth_attention.query"
    write = convert_checkpoint.write_shards

    def write_zeros(folder, shards):
        write(folder, shards)
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if query in tensors:
                tensors[query] = torch.zeros_like(tensors[query])
                save_file(tensors, file, metadata={"format": "pt"})

    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, "write_shards", write_zeros)
        with pytest.raises(ParityError, match=f"'{query}' of the result is not the source's"):
            convert(source, tmp_path / "out")

    def write_other_config(result, origin, to, config, *args):
        config.depth_norm_eps = 0.1
        convert_checkpoint_write_config(result, origin, to, config, *args)
        config.depth_norm_eps = origin.attnres.depth_norm_eps

    convert_checkpoint_write_config = convert_checkpoint.write_config
    monkeypatch.setattr(convert_checkpoint, "write_config", write_other_config)
    with pytest.raises(ParityError, match=r"reads back with depth_norm_eps=0\.1 where"):
        convert(source, tmp_path / "out")


def test_random_queries_survive(tmp_path, make_source):
    source = make_source("sum")
    model = AttnResForCausalLM.from_pretrained(source)
    randomize_depth_attention(model)
    model.save_pretrained(tmp_path / "trained")
    report = convert(tmp_path / "trained", tmp_path / "out")
    assert report.check.startswith("Every tensor of source and result was read back and compared bit for bit. Source")
    assert report.max_logit_difference == 0.0
