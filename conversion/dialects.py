# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Other projects' AttnRes checkpoints: one table per dialect, one loop in each direction.

A dialect that states the paper's rule in other names is read and written; one that computes something else is refused
with the convention that differs. Tensors without a place in the table raise. Both dialects store an attention-side pair
for layer 0 that no model reads (sublayer 0 has one source, no mix): it is kept beside the result, for writing it back.

Letters: L sublayers (two per decoder layer), D hidden size, S sublayers per block. Rows of the depth tensors `[L, D]`:
`l - 1` for sublayer l, the last for the output mix.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from modeling_attnres import AttnResConfig

from .backbone_configs import (
    Shapes,
    fla_to_library,
    is_kimi_k3,
    kimi_k3_text_fields,
    kimi_k3_to_library,
    library_to_fla,
    library_to_kimi_k3,
)
from .checkpoint import Checkpoint, CheckpointError, ConversionError, shorten
from .kimi_k3 import KIMI_K3_TEXT, KIMI_LINEAR, OUTER_TYPE, PREFIX, backbone_shapes, fit, unfold
from .source import DEPTH_KEY_NORM, DEPTH_QUERY, Source, build_config, without_dropped


class DialectError(ConversionError):
    """A checkpoint follows a convention that has no equal here, or cannot be written in the dialect asked for."""


@dataclass(frozen=True)
class Dialect:
    """A naming of AttnRes checkpoints whose mixes follow the paper's rule: weights that sum to 1, over raw values.

    Attributes:
        name: as given to `--dialect` and `--to-dialect`.
        mixer, feed_forward, output: names of a mix's two tensors; `{part}` is `proj` (the query, `[1, D]`) or `norm`
            (the key norm, `[D]`), `{layer}` the decoder layer.
        block_field: of the config; counts blocks in units of `sublayers_per_unit`.
        read_config: the fields of the text model and the tensors' shapes, to the library's fields of the backbone.
        write_config: the reverse, or an error for a backbone that the dialect has no words for.
        backbone: the library's name -> the dialect's, by template; empty where the dialect uses the library's names.
    """

    name: str
    mixer: str
    feed_forward: str
    output: str
    block_field: str
    sublayers_per_unit: int
    read_config: Callable[[dict[str, Any], Shapes], dict[str, Any]]
    write_config: Callable[[PreTrainedConfig], dict[str, Any]]
    backbone: dict[str, str] = field(default_factory=dict)


KIMI_K3 = Dialect(
    name="kimi_k3",
    mixer="model.layers.{layer}.self_attention_res_{part}.weight",
    feed_forward="model.layers.{layer}.mlp_res_{part}.weight",
    output="model.output_attn_res_{part}.weight",
    block_field="attn_res_block_size",
    sublayers_per_unit=2,  # counts decoder layers
    read_config=kimi_k3_to_library,
    write_config=library_to_kimi_k3,
)
FLA = Dialect(
    name="fla",
    mixer="model.layers.{layer}.attn_res_{part}.weight",
    feed_forward="model.layers.{layer}.mlp_res_{part}.weight",
    output="model.res_{part}.weight",
    block_field="attnres_block_size",
    sublayers_per_unit=1,
    read_config=fla_to_library,
    write_config=library_to_fla,
    backbone={
        "model.embed_tokens.weight": "model.embeddings.weight",
        "model.layers.{layer}.input_layernorm.weight": "model.layers.{layer}.attn_norm.weight",
        **{
            f"model.layers.{{layer}}.self_attn.{part}": f"model.layers.{{layer}}.attn.{part}"
            for part in (
                *("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
                *("q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight"),
            )
        },
        "model.layers.{layer}.post_attention_layernorm.weight": "model.layers.{layer}.mlp_norm.weight",
        **{
            name: name
            for part in ("gate_proj", "up_proj", "down_proj")
            for name in [f"model.layers.{{layer}}.mlp.{part}.weight"]
        },
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
)
DIALECTS = {dialect.name: dialect for dialect in (KIMI_K3, FLA)}


@dataclass(frozen=True)
class ForeignConvention:
    """AttnRes checkpoints that compute something else than the paper's rule, and what.

    Attributes:
        model_types: what their `config.json` says.
        key: a pattern that a tensor name of theirs, and of nobody else, matches.
    """

    name: str
    differs: str
    model_types: tuple[str, ...] = ()
    key: str | None = None


FOREIGN = (
    ForeignConvention(
        "inkling2",
        "it mixes normalised values, where the paper mixes the raw ones, scales scores by 1/sqrt(D), and has three "
        "queries (for q, k and v) on full-attention layers",
        ("inkling2", "inkling2_text"),
        r"(attn_res\.(attn_queries|mlp_queries)\.\d+|(attention_input|mlp_input)\.query)",
    ),
    ForeignConvention(
        "open-attention-residuals",
        "its sources are cumulative snapshots of the stream (the partial sum is never reset), the last score has a "
        "learned recency bias, and there is no output mix",
        ("qwen3_attnres",),
        r"\.(attn|mlp)_res_bias$",
    ),
    ForeignConvention(
        "attnres-phase1",
        "its embedding is inside block 1, where the paper has it as a source of its own, and there is no output mix: "
        "the last block alone is its final hidden state",
        (),
        r"layers\.\d+\.(attn|mlp)_res\.(proj|norm)",
    ),
    ForeignConvention(
        "tokenbender",
        "its key norm is un-weighted with an epsilon of 1e-8, where checkpoints here have a weight and the backbone's "
        "epsilon, and its backbone is nanoGPT's, which has no PreNorm RMSNorm decoder in Transformers",
        (),
        r"attnres_mixer\.mixer\.queries",
    ),
    ForeignConvention(
        "nanoattnres",
        "it has one query for both sublayers of a layer and mixes in further residual scalars",
        (),
        r"(^|\.)attn_res_proj$",
    ),
)
DIALECT_NAMES = (*DIALECTS, *(foreign.name for foreign in FOREIGN))


def detect_dialect(checkpoint: Checkpoint) -> str | None:
    """Which dialect a checkpoint is in by its config and tensor names: a name of `DIALECT_NAMES`, or `None`."""
    config = checkpoint.config
    text_config = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    model_types = [config.get("model_type"), text_config.get("model_type")]
    for foreign in FOREIGN:
        if any(model_type in foreign.model_types for model_type in model_types):
            return foreign.name
        if foreign.key and any(re.search(foreign.key, name) for name in checkpoint.tensors):
            return foreign.name
    for dialect in DIALECTS.values():
        if any(fields.get(dialect.block_field) is not None for fields in (config, text_config)):
            return dialect.name
    # Files without depth attention are Kimi K3's too: the library would load them as a kimi_linear.
    is_linear = config.get("model_type") == KIMI_LINEAR and is_kimi_k3(config, checkpoint.tensors)
    return KIMI_K3.name if is_linear or config.get("model_type") == OUTER_TYPE else None


def refuse_foreign(name: str):
    """Raises `DialectError` if the dialect is one that computes something else."""
    for foreign in FOREIGN:
        if foreign.name == name:
            raise DialectError(
                f"'{name}' checkpoints do not follow the paper's rule, so converting one would change what it "
                f"computes: {foreign.differs}."
            )


# --- Names -----------------------------------------------------------------------------------------------------------


def depth_names(dialect: Dialect, num_layers: int) -> Iterator[tuple[str, str, int | None]]:
    """`(query name, key norm name, row)` of every mix; the row is `None` for the pair that nothing reads."""
    templates = []
    for layer in range(num_layers):
        templates.append((dialect.mixer.replace("{layer}", str(layer)), 2 * layer - 1 if layer else None))
        templates.append((dialect.feed_forward.replace("{layer}", str(layer)), 2 * layer))
    templates.append((dialect.output, 2 * num_layers - 1))
    for template, row in templates:
        yield template.replace("{part}", "proj"), template.replace("{part}", "norm"), row


def backbone_names(table: dict[str, str], num_layers: int) -> dict[str, str]:
    """The table with `{layer}` filled in for every layer."""
    return {
        source.replace("{layer}", str(layer)): target.replace("{layer}", str(layer))
        for source, target in table.items()
        for layer in (range(num_layers) if "{layer}" in source else [0])
    }


def to_dialect_names(dialect: Dialect, names: Iterable[str], config: PreTrainedConfig) -> dict[str, str]:
    """The library's name -> the dialect's.

    Raises:
        DialectError: for names that the dialect has no word for.
    """
    problem = f"have no name in '{dialect.name}'"
    if dialect is not KIMI_K3:
        return _rename(backbone_names(dialect.backbone, config.num_hidden_layers), names, problem)
    if config.model_type == KIMI_LINEAR:
        return {name: name for name in names}
    prefix = written_prefix(dialect, config)
    return _rename({name: prefix + name for name in backbone_shapes(config)}, names, problem)


def written_prefix(dialect: Dialect, config: PreTrainedConfig) -> str:
    """What the names of all tensors begin with: Kimi K3's text model is a part of a multimodal one."""
    return PREFIX if dialect is KIMI_K3 and config.model_type == KIMI_K3_TEXT else ""


def _rename(table: dict[str, str], names: Iterable[str], problem: str) -> dict[str, str]:
    unknown = sorted(name for name in names if name not in table)
    if unknown:
        raise DialectError(f"{len(unknown)} tensors {problem}: {shorten(unknown)}.")
    return {name: table[name] for name in names}


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_dialect(checkpoint: Checkpoint, dialect: Dialect, drop_keys: tuple[str, ...] = ()) -> Source:
    """Reads a checkpoint in a dialect. In Kimi K3's it may also be a PreNorm model.

    Raises:
        DialectError: if its backbone has parts that the library's does not, or tensors are unknown.
        CheckpointError: if tensors are missing or misshapen.
    """
    where = str(checkpoint.folder / "config.json")
    plain, fields, left_out, prefix = checkpoint, checkpoint.config, (), ""
    if dialect is KIMI_K3:
        plain, left_out = unfold(checkpoint)
        fields = kimi_k3_text_fields(plain.config)
        prefix = PREFIX if any(name.startswith(PREFIX) for name in plain.tensors) else ""
    units = fields.get(dialect.block_field)
    is_prenorm = dialect is KIMI_K3 and units is None
    if not is_prenorm and (isinstance(units, bool) or not isinstance(units, int) or units < 1):
        raise DialectError(f"{where}: dialect '{dialect.name}' needs `{dialect.block_field}` >= 1, got {units!r}.")
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.tensors.items()}
    text_config = build_config(dialect.read_config(fields, shapes), where)
    shards, dropped = without_dropped(plain, drop_keys)
    stored = {name.removeprefix(prefix): tensor for shard in shards for name, tensor in shard}
    if len(stored) < sum(map(len, shards)):
        raise CheckpointError(f"{checkpoint.folder}: tensors are stored twice, with and without '{prefix}'.")
    attnres, depth, unread, taken = None, {}, {}, set()
    if not is_prenorm:
        # A dialect may name a block longer than the model; one block is what that means.
        block = min(units * dialect.sublayers_per_unit, 2 * text_config.num_hidden_layers)
        attnres = AttnResConfig(text_config=text_config, sublayers_per_block=block, depth_weights="mean")
        depth, unread, taken = _read_depth(stored, dialect, text_config, prefix, where)
    rest = {name: tensor for name, tensor in stored.items() if name not in taken}
    tensors = _to_library(rest, dialect, text_config, prefix, str(checkpoint.folder))
    return Source(
        kind=dialect.name,
        checkpoint=checkpoint,
        text_config=text_config,
        shards=[
            [tensors[short] for name, _ in shard if (short := name.removeprefix(prefix)) in rest] for shard in shards
        ],
        attnres=attnres,
        depth=depth,
        unread=unread,
        dropped=tuple(sorted([*dropped, *left_out])),
    )


def _to_library(
    stored: dict[str, Any], dialect: Dialect, config: PreTrainedConfig, prefix: str, where: str
) -> dict[str, tuple[str, Any]]:
    """The backbone's tensors by their names in the files, as `(name in the library's layout, tensor)`."""
    if dialect is KIMI_K3:
        return {name: (name, tensor) for name, tensor in fit(stored, config, prefix, where).items()}
    reverse = {theirs: ours for ours, theirs in backbone_names(dialect.backbone, config.num_hidden_layers).items()}
    names = _rename(reverse, stored, f"of {where} are unknown to '{dialect.name}'")
    return {name: (names[name], tensor) for name, tensor in stored.items()}


def _read_depth(stored: dict[str, Any], dialect: Dialect, config: PreTrainedConfig, prefix: str, where: str):
    """Gathers the mixes' tensors: the matrices `[L, D]` by name, the pair that nothing reads, and all names taken."""
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    unread, taken, missing = {}, set(), []
    ordered = sorted(
        depth_names(dialect, config.num_hidden_layers), key=lambda item: -1 if item[2] is None else item[2]
    )
    shapes = (1, config.hidden_size), (config.hidden_size,)
    for *names, row in ordered:
        present = [name for name in names if name in stored]
        taken.update(present)
        if row is not None or present:
            missing += [f"{prefix}{name}" for name in names if name not in stored]
        if len(present) < 2:
            continue
        found = tuple(stored[name].shape for name in names)
        if found != shapes:
            query_name, norm_name = (f"{prefix}{name}" for name in names)
            raise CheckpointError(
                f"{where}: '{query_name}' and '{norm_name}' must be {list(shapes[0])} and {list(shapes[1])}, got "
                f"{list(found[0])} and {list(found[1])}."
            )
        query, norm = (stored[name].read() for name in names)
        if row is None:
            unread = dict(zip(names, (query, norm)))
        else:
            rows.append((query.view(-1), norm))
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} depth tensors are missing: {shorten(missing)}.")
    query, key_norm = (_stack(part) for part in zip(*rows))
    return {DEPTH_QUERY: query, DEPTH_KEY_NORM: key_norm}, unread, taken


def _stack(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    rows = list(rows)
    dtype = rows[0].dtype
    for row in rows:
        dtype = torch.promote_types(dtype, row.dtype)
    return torch.stack([row.to(dtype) for row in rows])


# --- Writing ---------------------------------------------------------------------------------------------------------


def dialect_config(source: Source, dialect: Dialect) -> dict[str, Any]:
    """The `config.json` of an AttnRes model in a dialect.

    Raises:
        DialectError: if the dialect has no words for the model's conventions or backbone.
    """
    config = source.attnres
    if source.is_variant:
        raise DialectError(
            f"'{dialect.name}' has softmax mixes; this model's `depth_attention_type` is "
            f"{config.depth_attention_type!r}, which it cannot express."
        )
    if config.depth_weights != "mean":
        raise DialectError(
            f"'{dialect.name}' has weights that sum to 1 (\"mean\"); this model's `depth_weights` is "
            f"{config.depth_weights!r}, which it cannot express."
        )
    if config.sublayers_per_block % dialect.sublayers_per_unit:
        raise DialectError(
            f"'{dialect.name}' counts blocks in {dialect.sublayers_per_unit} sublayers (`{dialect.block_field}`), this "
            f"model has sublayers_per_block={config.sublayers_per_block}."
        )
    if dialect is FLA and config.sublayers_per_block > 1 and config.sublayers_per_block % 2:
        raise DialectError(f"'fla' allows blocks of 1 or an even number, got {config.sublayers_per_block} sublayers.")
    fields = dialect.write_config(source.text_config)
    fields[dialect.block_field] = config.sublayers_per_block // dialect.sublayers_per_unit
    eps = fields.get("rms_norm_eps", fields.get("norm_eps"))
    if eps != config.depth_norm_eps:
        raise DialectError(
            f"'{dialect.name}' has one epsilon for all norms, {eps}; this model's `depth_norm_eps` is "
            f"{config.depth_norm_eps}."
        )
    if not written_prefix(dialect, source.text_config):
        return fields
    outer = {name: fields[name] for name in ("dtype", "bos_token_id", "eos_token_id", "pad_token_id")}
    outer["tie_word_embeddings"] = fields["tie_word_embeddings"]
    return {
        "model_type": OUTER_TYPE,
        "architectures": ["KimiK3ForConditionalGeneration"],
        "text_config": fields,
        **outer,
    }


def dialect_depth_tensors(source: Source, dialect: Dialect) -> list[tuple[str, torch.Tensor]]:
    """The two matrices as the dialect's tensors.

    The pair that nothing reads is what it was where the model came from; a model that has none gets it as at
    initialisation.
    """
    queries, key_norms = source.depth[DEPTH_QUERY], source.depth[DEPTH_KEY_NORM]
    prefix = written_prefix(dialect, source.text_config)
    tensors = []
    for query_name, norm_name, row in depth_names(dialect, source.text_config.num_hidden_layers):
        if row is not None:
            query, norm = queries[row].unsqueeze(0), key_norms[row]
        elif {query_name, norm_name} <= source.unread.keys():
            query, norm = source.unread[query_name], source.unread[norm_name]
        else:
            query, norm = torch.zeros_like(queries[:1]), torch.ones_like(key_norms[0])
        tensors += [(prefix + query_name, query), (prefix + norm_name, norm)]
    return tensors
