# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import math
import re
from pathlib import Path

import pytest
import torch
from kimi_k3_tiny import released_fields
from transformers import AutoModelForCausalLM, KimiLinearConfig, LlamaConfig

import modeling_attnres.configuration.presets as presets
from modeling_attnres import AttnResConfig, AttnResForCausalLM, KimiK3TextConfig
from modeling_attnres.configuration import VARIANTS, list_presets, list_recipes, load_preset, load_recipe


README = (Path(presets.__file__).parent / "README.md").read_text(encoding="utf-8")

# The paper's table: activated parameters (M), decoder layers, heads, d_model, d_ff, tokens (B), lr, batch, and the
# losses of PreNorm, Block and Full.
PAPER = {
    "scaling-law-194m": (194, 12, 12, 896, 400, 38.7, 2.99e-3, 192, 1.931, 1.909, 1.899),
    "scaling-law-241m": (241, 13, 13, 960, 432, 45.4, 2.80e-3, 256, 1.895, 1.875, 1.874),
    "scaling-law-296m": (296, 14, 14, 1024, 464, 62.1, 2.50e-3, 320, 1.829, 1.809, 1.804),
    "scaling-law-436m": (436, 16, 16, 1168, 528, 87.9, 2.20e-3, 384, 1.766, 1.746, 1.737),
    "scaling-law-528m": (528, 17, 17, 1264, 560, 119.0, 2.02e-3, 432, 1.719, 1.693, 1.692),
}
BIG = "kimi-linear-48b-a3b"
K3 = "kimi-k3"
SMALL = {"llama-800k": (16, 2, 64, 176), "llama-2m": (16, 3, 96, 256)}  # decoder layers, heads, width, d_ff


def build(name, **overrides):
    """The preset's model without storage."""
    config = load_preset(name, **overrides)
    with torch.device("meta"):
        if name.endswith("-prenorm"):
            return AutoModelForCausalLM.from_config(config)
        return AttnResForCausalLM(config)


def count_parameters(model):
    """Total and activated parameters, without the embedding and the output head."""
    config = model.config.get_text_config()
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    total = routed = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel() * (id(parameter) not in outside)
        routed += parameter.numel() * (".mlp.experts." in name)
    unused = routed * (config.num_local_experts - config.num_experts_per_tok) // config.num_local_experts
    return total, total - unused


def readme_row(name):
    """Cells of the first README table row that starts with this name."""
    row = re.search(rf"^\| `{re.escape(name)}` \|(.*)\|$", README, flags=re.MULTILINE)
    return [cell.strip() for cell in row.group(1).split("|")]


def test_every_backbone_comes_in_every_variant():
    backbones = [*PAPER, *SMALL, BIG, K3, "tiny"]
    assert sorted(list_presets()) == sorted(f"{name}-{variant}" for name in backbones for variant in VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", PAPER)
def test_scaling_law_models_have_the_papers_shape_and_activated_parameters(backbone, variant):
    activated_millions, layers, heads, width, expert_width, *_ = PAPER[backbone]
    model = build(f"{backbone}-{variant}")
    config = model.config.get_text_config()
    assert (config.num_hidden_layers, config.num_attention_heads, config.linear_num_heads) == (layers, heads, heads)
    assert (config.hidden_size, config.moe_intermediate_size) == (width, expert_width)
    total, activated = count_parameters(model)
    assert round(activated / 1e6) == activated_millions
    if variant == "block":
        assert readme_row(backbone)[:5] == [str(cell) for cell in (layers, heads, width, expert_width, 512)]
        assert readme_row(backbone)[5:7] == [f"{activated / 1e6:.1f}M", f"{total / 1e9:.2f}B"]


@pytest.mark.parametrize("backbone", SMALL)
def test_small_models_are_as_the_readme_says(backbone):
    model = build(f"{backbone}-block")
    config = model.config.get_text_config()
    shape = (config.num_hidden_layers, config.num_attention_heads, config.hidden_size, config.intermediate_size)
    assert shape == SMALL[backbone]
    assert model.config.block_boundaries == list(range(0, 32, 4))
    prenorm = build(f"{backbone}-prenorm")
    total = sum(parameter.numel() for parameter in prenorm.model.layers.parameters()) + config.hidden_size
    assert readme_row(backbone)[:6] == [*(str(cell) for cell in shape), "dense", f"{total / 1e6:.2f}M"]
    assert readme_row(backbone)[6] == f"{total / 1e6:.2f}M"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_large_model_is_48b_a3b(variant):
    model = build(f"{BIG}-{variant}")
    total, activated = count_parameters(model)
    assert (round(total / 1e9), round(activated / 1e9)) == (48, 3)
    assert readme_row(BIG)[5:7] == [f"{activated / 1e9:.2f}B", f"{total / 1e9:.2f}B"]
    config = model.config.get_text_config()
    full = [index + 1 for index, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == [4, 8, 12, 16, 20, 24, 27]


def test_the_large_model_has_the_librarys_kimi_linear_shape():
    config, library = load_preset(f"{BIG}-prenorm").to_dict(), KimiLinearConfig().to_dict()
    different = {key for key in config.keys() | library.keys() if config.get(key) != library.get(key)}
    assert different == {"layer_types"}  # the library's default puts MLA one layer later than the released model


def test_kimi_k3():
    model = build(f"{K3}-block")
    total, activated = count_parameters(model)
    assert readme_row(K3)[5:7] == [f"{activated / 1e9:.2f}B", f"{total / 1e12:.2f}T"]
    config = model.config
    assert readme_row(K3)[:5] == [str(size) for size in (93, 96, 7168, 3072, 896)]
    full = [index + 1 for index, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == [*range(4, 93, 4), 93]
    assert config.mlp_layer_types == ["dense"] + 92 * ["sparse"]


def test_kimi_k3_is_the_published_config():
    published = KimiK3TextConfig(**released_fields()).to_dict()
    assert load_preset(f"{K3}-prenorm").to_dict() == published


@pytest.mark.parametrize(
    "name", [f"{backbone}-{variant}" for backbone in [*PAPER, BIG, K3] for variant in ("full", "block")]
)
def test_depth_attention_adds_two_vectors_a_mix(name):
    plain, depth = build(name.rsplit("-", 1)[0] + "-prenorm"), build(name)
    config = depth.config
    assert count_parameters(depth)[0] - count_parameters(plain)[0] == 2 * config.num_sublayers * config.hidden_size


@pytest.mark.parametrize("backbone", [*PAPER, BIG, K3])
def test_block_sizes(backbone):
    full, block = load_preset(f"{backbone}-full"), load_preset(f"{backbone}-block")
    assert full.sublayers_per_block == 1
    if backbone == BIG:
        assert (block.num_sublayers, block.sublayers_per_block, block.num_blocks) == (54, 6, 9)
    elif backbone == K3:
        assert (block.num_sublayers, block.sublayers_per_block, block.num_blocks) == (186, 24, 8)
    else:
        assert block.sublayers_per_block == math.ceil(block.num_sublayers / 8)
    assert readme_row(backbone)[7] == f"S = {block.sublayers_per_block}, {block.num_blocks} blocks"
    assert {full.depth_weights, block.depth_weights} == {"mean"}


def test_tiny_runs():
    model = AttnResForCausalLM(load_preset("tiny-block")).eval()
    output = model(torch.arange(12).view(2, 6), output_depth_weights=True)
    assert output.logits.shape == (2, 6, 256)
    assert torch.isfinite(output.logits).all()
    assert [weights.shape[-1] for weights in output.depth_weights] == [1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert isinstance(load_preset("tiny-prenorm"), LlamaConfig)


def test_overrides_replace_the_presets_choice():
    config = load_preset("tiny-block", num_blocks=2, depth_weights="sum", text_config={"vocab_size": 99})
    assert (config.num_blocks, config.depth_weights, config.vocab_size, config.hidden_size) == (2, "sum", 99, 32)
    assert load_preset("tiny-full", sublayers_per_block=3).sublayers_per_block == 3
    assert load_preset("tiny-prenorm", text_config={"vocab_size": 99}).vocab_size == 99
    assert isinstance(load_preset("tiny-block"), AttnResConfig)
    assert load_preset("tiny-block").vocab_size == 256  # the override left nothing behind


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("tiny", {}, "must be one of .*tiny-block.*; got 'tiny'"),
        ("tiny-attnres", {}, "must be one of"),
        ("../tiny-block", {}, "must be one of"),
        ("tiny-block", {"sublayers_per_blok": 2}, "AttnResConfig has no field `sublayers_per_blok`"),
        ("tiny-block", {"vocab_size": 2}, "AttnResConfig has no field `vocab_size`"),
        ("tiny-block", {"text_config": {"vocab_sise": 2}}, "LlamaConfig has no field `vocab_sise`"),
        ("tiny-block", {"text_config": LlamaConfig()}, "`text_config` must be a dict .* got LlamaConfig"),
        ("tiny-prenorm", {"num_blocks": 2}, "plain backbone.*'num_blocks': 2"),
        ("tiny-block", {"num_blocks": 9}, "from 1 to the 8 sublayers"),
        ("tiny-block", {"num_blocks": 2, "sublayers_per_block": 2}, "not both"),
    ],
)
def test_bad_presets_are_refused(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_preset(name, **overrides)


@pytest.mark.parametrize("name", PAPER)
def test_scaling_law_recipes_are_the_papers(name):
    *_, tokens, learning_rate, batch, prenorm, block, full = PAPER[name]
    recipe = load_recipe(name)
    assert recipe == {
        "model": name,
        "tokens": round(tokens * 1e9),
        "context_length": 8192,
        "batch_size": batch,
        "learning_rate": learning_rate,
        "schedule": "cosine",
        "published_loss": {"prenorm": prenorm, "block": block, "full": full},
        "not_published": recipe["not_published"],
    }
    assert (
        f"| `{name}` | {tokens}B | 8192 | {batch} | {learning_rate * 1e3:.2f}e-3 | cosine | {prenorm:.3f} |" in README
    )


def test_the_large_models_recipe():
    recipe = load_recipe(BIG)
    assert (recipe["optimizer"], recipe["schedule"], recipe["batch_tokens"]) == ("muon", "wsd", 8_000_000)
    stages = [(stage["name"], stage.get("tokens"), stage["context_length"]) for stage in recipe["stages"]]
    assert stages == [("pretraining", 10**12, 4096), ("annealing", 4 * 10**11, 4096), ("long_context", None, 32768)]


def test_every_recipe_trains_a_preset_and_repeats_nothing_it_calls_unpublished():
    assert sorted(list_recipes()) == sorted([*PAPER, BIG])
    for name in list_recipes():
        recipe = load_recipe(name)
        assert recipe["model"] == name
        assert f"{name}-block" in list_presets()
        assert not set(recipe["not_published"]) & set(recipe)


def test_unknown_recipes_are_refused():
    with pytest.raises(ValueError, match=r"must be one of .*; got 'scaling-law-1b'"):
        load_recipe("scaling-law-1b")


def test_the_readmes_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope = {}
    exec(example, scope)
    assert isinstance(scope["model"], AttnResForCausalLM)
    assert (scope["config"].depth_weights, scope["config"].num_blocks) == ("sum", 4)
    assert eval(example.splitlines()[-1], scope) == float(example.rsplit("# ", 1)[1])
