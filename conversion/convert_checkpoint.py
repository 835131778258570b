# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Turning checkpoints into AttnRes checkpoints without loading the model: `convert`.

On disk an AttnRes checkpoint is its backbone's checkpoint plus two small tensors, so a conversion checks that the
backbone can carry depth attention, copies the weights shard by shard, adds the two tensors, config and code, and ends
by comparing source and result.
"""

import json
import re
import time
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.command_line import DTYPES

from .checkpoint import ConversionError, open_checkpoint
from .companions import REPORT, companion_bytes, copy_companions
from .dialects import DIALECT_NAMES, DIALECTS, KIMI_K3, detect_dialect, read_dialect, refuse_foreign
from .fetch import FetchedSource, fetch_source
from .kimi_k3 import num_decoded
from .model_card import write_model_card
from .parity import (
    ParityError,
    check_finite,
    compare_backbones,
    compare_logits,
    compare_sources,
    fixed_tokens,
    logits_of,
    tokenize,
)
from .refusals import refuse_adapter_folder
from .report import ConversionReport
from .source import Source, build_attnres_config, check_backbone_tensors, read_attnres, read_prenorm
from .targets import ATTNRES, PRENORM, TARGETS, check_target, plan_weights, write_config, write_unread
from .tokenizer import NONE, has_tokenizer, keep_tokenizer
from .writer import OutputShard, check_output, check_space, put_in_place, workspace, write_shards


def convert(
    source: str | Path,
    out: str | Path,
    *,
    num_blocks: int | None = None,
    sublayers_per_block: int | None = None,
    depth_weights: str | None = None,
    dtype: str | torch.dtype | None = None,
    to: str = ATTNRES,
    dialect: str | None = None,
    drop_keys: tuple[str, ...] = (),
    overwrite: bool = False,
    check: bool = True,
    check_text: str | None = None,
    dry_run: bool = False,
    revision: str | None = None,
) -> ConversionReport:
    """Converts a checkpoint into an AttnRes checkpoint folder, or an AttnRes checkpoint into another form.

    Args:
        source: a checkpoint folder, a `.gguf` file, or a model id on the Hub.
        out: folder to create; complete when the call returns, untouched when it raises.
        num_blocks, sublayers_per_block: as in [`AttnResConfig`]; at most one of them. Default: 8 blocks for a PreNorm
            model, unchanged for an AttnRes model.
        depth_weights: `"sum"` (default for a PreNorm model: with zero queries the result computes exactly what the
            source does) or `"mean"` (the paper's form; equal up to the norms' epsilons).
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, to cast the weights to; by default they keep theirs.
        to: `"attnres"`, `"prenorm"` (back to dense, for zero queries), or a dialect: `"kimi_k3"`, `"fla"`.
        dialect: what the source is written in, if it should not be found out from its config and names.
        drop_keys: regular expressions of source tensors to leave out, where the backbone has no place for them.
        overwrite: whether to replace a model folder at `out`.
        check: whether to load source and result back and compare them.
        check_text: a text to compare the logits on, besides fixed token ids.
        dry_run: whether to stop before anything is written.
        revision: branch, tag or commit of a source on the Hub.

    Returns:
        The report, also written to `conversion_report.json`.

    Raises:
        ConversionError: if the source is damaged or unknown, an argument does not fit, or the check fails.
        UnsupportedBackboneError: if the source's backbone cannot carry depth attention; it names the reason.
    """
    started = time.monotonic()
    for name, path in (("source", source), ("out", out)):
        if not str(path) or "\0" in str(path):
            raise ConversionError(f"`{name}` must be a path, got {str(path)!r}.")
    out = _output_path(out)
    cast_to = _check_arguments(dtype, to, dialect, drop_keys, num_blocks, sublayers_per_block, depth_weights)
    local = Path(source) if Path(source).exists() else None
    check_output(out, local if local is not None and local.is_dir() else None, overwrite)
    with workspace(out) as work:
        fetched = fetch_source(source, work, cast_to, revision)
        folder = fetched.folder
        origin = read_source(folder, dialect, drop_keys)
        config = build_attnres_config(origin, num_blocks, sublayers_per_block, depth_weights)
        check_target(origin, to, config)
        model = check_backbone_tensors(origin, config)
        tokens = _check_inputs(fetched, config, check_text) if check else {}
        shards, result_dtype = plan_weights(origin, to, model, cast_to)
        config.dtype = result_dtype
        report = _report(origin, to, config, shards, source_name=_name(source), out_name=out.name)
        report.base_model, report.revision = fetched.repo_id, fetched.revision
        check_space(work, report.weight_bytes + companion_bytes(folder))
        if dry_run:
            report.check = "Dry run: nothing was written."
            return report

        result = work / "result"
        result.mkdir()
        write_shards(result, shards)
        if to == ATTNRES:
            write_unread(result, origin, cast_to)
        defaults = origin.text_config if origin.kind in DIALECTS else origin.checkpoint.config
        copy_companions(folder, result, defaults, keep_card=to == ATTNRES and origin.kind != ATTNRES)
        write_config(result, origin, to, config, model, cast_to)
        report.tokenizer = _keep_tokenizer(fetched, result)
        if check:
            _check(fetched, origin, result, to, config, result_dtype, tokens, report)
        else:
            report.check = "Skipped on request (`--no-check`)."
        report.written, report.seconds = True, round(time.monotonic() - started, 2)
        if to == ATTNRES:
            write_model_card(result, report, source_card=folder / "README.md")
        (result / REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        put_in_place(result, out)
    return report


def _output_path(out: str | Path) -> Path:
    """The path with a name at its end, which the folders beside it are named after."""
    path = Path(out)
    return path.resolve() if path.name in ("", "..") else path


def _check_arguments(dtype, to, dialect, drop_keys, num_blocks, sublayers_per_block, depth_weights):
    """Checks what can be checked without the source; returns the dtype as a `torch.dtype`."""
    if to not in TARGETS:
        raise ConversionError(f"`to` must be one of {', '.join(TARGETS)}, got {to!r}.")
    if dialect is not None and dialect not in DIALECT_NAMES:
        raise ConversionError(f"`dialect` must be one of {', '.join(DIALECT_NAMES)}, got {dialect!r}.")
    if num_blocks is not None and sublayers_per_block is not None:
        raise ConversionError(
            "Give `num_blocks` or `sublayers_per_block`, not both: got "
            f"num_blocks={num_blocks} and sublayers_per_block={sublayers_per_block}."
        )
    if to != ATTNRES and (num_blocks, sublayers_per_block, depth_weights) != (None, None, None):
        raise ConversionError(
            f"`to={to!r}` keeps the source's blocks: `num_blocks`, `sublayers_per_block` and `depth_weights` must not "
            "be given."
        )
    for pattern in drop_keys:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConversionError(f"`drop_keys` must be regular expressions, got {pattern!r} ({error}).") from error
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype is not None and dtype not in DTYPES.values():
        raise ConversionError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return dtype


def _name(source: str | Path) -> str:
    return Path(source).resolve().name if Path(source).exists() else str(source)


def read_source(folder: Path, dialect: str | None = None, drop_keys: tuple[str, ...] = ()) -> Source:
    """Reads a checkpoint folder as what its config and tensor names say it is, or as the dialect that is named.

    Raises:
        ConversionError: if it is damaged, or in a convention that has no equal here.
    """
    if dialect is not None:
        refuse_foreign(dialect)
    refuse_adapter_folder(folder)
    checkpoint = open_checkpoint(folder)
    dialect = dialect or detect_dialect(checkpoint)
    if dialect is not None:
        refuse_foreign(dialect)
        return read_dialect(checkpoint, DIALECTS[dialect], drop_keys)
    read = read_attnres if checkpoint.config.get("model_type") == AttnResConfig.model_type else read_prenorm
    return read(checkpoint, drop_keys)


def _report(source: Source, to: str, config: AttnResConfig, shards: list[OutputShard], **names) -> ConversionReport:
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return ConversionReport(
        base_model=None,
        source_kind=source.kind,
        target=to,
        model_type=config.text_config.model_type,
        num_sublayers=config.num_sublayers,
        sublayers_per_block=cast(int, config.sublayers_per_block),  # `None` until the config is made
        num_blocks=config.num_blocks,
        depth_weights=config.depth_weights,
        queries_are_zero=source.queries_are_zero,
        dtype=str(config.dtype).removeprefix("torch."),
        num_parameters=sum(torch.Size(tensor.shape).numel() for tensor in tensors),
        parameters_added=2 * config.num_sublayers * config.text_config.hidden_size if source.attnres is None else 0,
        weight_bytes=sum(shard.num_bytes for shard in shards),
        dropped_keys=list(source.dropped),
        unread_keys=sorted(source.unread) if to == ATTNRES else [],
        decoded_weights=num_decoded(source.tensors),
        **names,
    )


def _keep_tokenizer(fetched: FetchedSource, result: Path) -> str:
    if not has_tokenizer(result):
        return NONE
    return keep_tokenizer(
        fetched.load_tokenizer, lambda: AutoTokenizer.from_pretrained(result, trust_remote_code=False), result
    )


def _check_inputs(fetched: FetchedSource, config: AttnResConfig, check_text: str | None) -> dict[str, torch.Tensor]:
    inputs = {"fixed token ids": fixed_tokens(config.text_config.vocab_size)}
    if check_text is not None:
        inputs["given text"] = tokens = tokenize(fetched.load_tokenizer, check_text)
        longest = getattr(config.text_config, "max_position_embeddings", None)
        if longest is not None and tokens.shape[1] > longest:
            raise ConversionError(
                f"`check_text` must have at most as many tokens as the model's max_position_embeddings, {longest}, got "
                f"{tokens.shape[1]}."
            )
    return inputs


def _check(
    fetched: FetchedSource,
    source: Source,
    result: Path,
    to: str,
    config: AttnResConfig,
    dtype: torch.dtype,
    tokens: dict[str, torch.Tensor],
    report: ConversionReport,
):
    """Compares the result with the source's files, tensors and logits, and fills `check` and `parity` of the report."""
    scratch = result.parent
    written = read_source(result)
    if written.kind != to:
        raise ParityError(f"The result reads back as {written.kind!r} where {to!r} is due.")
    compare_sources(source, written, config, cast_to=dtype)
    if KIMI_K3.name in (source.kind, to):
        compare_backbones(source.text_config, written.text_config)
    tensors = "Every tensor of source and result was read back and compared bit for bit"
    if source.kind in DIALECTS or to in DIALECTS:
        ours = result if to == ATTNRES else source.checkpoint.folder
        if to == ATTNRES or source.kind == ATTNRES:
            check_finite(logits_of(ours, dtype, AttnResForCausalLM, tokens, scratch)[0])
        report.check = (
            f"{tensors}, and the blocks and conventions with them. Logits were not compared: no library runs both."
        )
        return
    source_class, result_class = (
        AttnResForCausalLM if is_attnres else AutoModelForCausalLM
        for is_attnres in (source.attnres is not None, to == ATTNRES)
    )
    place, keywords = fetched.location
    before, how = logits_of(place, dtype, source_class, tokens, scratch, **keywords)
    after, _ = logits_of(result, dtype, result_class, tokens, scratch)
    report.parity = {name: compare_logits(before[name], after[name]).to_dict() for name in tokens}
    report.check = f"{tensors}. Source and result were loaded in {report.dtype}, {how}, and their logits compared."
    if _must_be_exact(source, to, config) and report.max_logit_difference != 0.0:
        raise ParityError(
            f"The result's logits differ from the source's by up to {report.max_logit_difference:.3g}, where 0.0 is "
            "due; nothing was written."
        )


def _must_be_exact(source: Source, to: str, config: AttnResConfig) -> bool:
    """Equal conventions compute the same, and so do all zero-query models in the sum form and PreNorm models."""
    if to == PRENORM:
        return True
    before = source.attnres
    if before is None:
        return config.depth_weights == "sum"
    same = (before.sublayers_per_block, before.depth_weights) == (config.sublayers_per_block, config.depth_weights)
    return same or before.depth_weights == config.depth_weights == "sum"
