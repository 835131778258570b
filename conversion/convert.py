# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Turning checkpoints into AttnRes checkpoints without loading the model: `convert`.

On disk an AttnRes checkpoint is its backbone's checkpoint plus two small tensors, so a conversion checks that the
backbone can carry depth attention, copies the weights shard by shard, adds the two tensors, config and code, and ends
by comparing the logits of source and result.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

import modeling_attnres
from modeling_attnres import AttnResConfig, AttnResForCausalLM

from .checkpoint import ConversionError, PickledTensor, StoredTensor, open_checkpoint
from .fetch import fetch_source
from .model_card import write_model_card
from .parity import ParityError, compare_logits, fixed_tokens, logits_of, tokenize
from .source import (
    DEPTH_KEY_NORM,
    DEPTH_QUERY,
    Source,
    build_attnres_config,
    check_backbone_tensors,
    read_attnres,
    read_prenorm,
)
from .writer import OutputShard, OutputTensor, check_output, check_space, put_in_place, workspace, write_shards


# Files that come along: tokenizer, chat template, generation defaults, licence texts.
COMPANIONS = (
    "tokenizer*",
    "tokenization_*.py",
    "*.model",
    "*.tiktoken",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ConversionReport:
    """What a conversion did, or with `dry_run` would do.

    Attributes:
        source_name, out_name: for the model card; the last part of a path.
        base_model: Hub id of the source, if it came from there.
        source_kind: `"prenorm"`, `"attnres"`, or the name of a dialect.
        target: `"attnres"`, `"prenorm"`, or the name of a dialect.
        model_type: of the backbone.
        num_parameters: of the result, `parameters_added` of them depth attention.
        weight_bytes: size of the result's tensors.
        dropped_keys: tensors of the source that the result leaves out.
        check: how the result was checked, in a sentence.
        parity: per input the fields of [`Parity`]; empty if logits were not compared.
        written: whether `out` exists now.
    """

    source_name: str
    out_name: str
    base_model: str | None
    source_kind: str
    target: str
    model_type: str
    num_sublayers: int
    sublayers_per_block: int
    num_blocks: int
    depth_weights: str
    queries_are_zero: bool
    dtype: str
    num_parameters: int
    parameters_added: int
    weight_bytes: int
    dropped_keys: list[str]
    version: str = modeling_attnres.__version__
    check: str = "Not run."
    parity: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    written: bool = False

    @property
    def max_logit_difference(self) -> float | None:
        """Largest difference over all inputs that were compared, `None` if none was."""
        return max((row["max_logit_difference"] for row in self.parity.values()), default=None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    num_blocks: int | None = None,
    sublayers_per_block: int | None = None,
    depth_weights: str | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    check: bool = True,
    check_text: str | None = None,
    dry_run: bool = False,
    drop_keys: tuple[str, ...] = (),
) -> ConversionReport:
    """Converts a checkpoint into an AttnRes checkpoint folder.

    Args:
        source: a checkpoint folder, a `.gguf` file, or a model id on the Hub.
        out: folder to create; complete when the call returns, untouched when it raises.
        num_blocks, sublayers_per_block: as in [`AttnResConfig`]; at most one of them. Default: 8 blocks.
        depth_weights: `"sum"` (default: with zero queries the result computes exactly what the source does) or
            `"mean"` (the paper's form; equal up to the norms' epsilons).
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, to cast the weights to; by default they keep theirs.
        overwrite: whether to replace a model folder at `out`.
        check: whether to load both models back and compare their logits.
        check_text: a text to compare them on, besides fixed token ids.
        dry_run: whether to stop before anything is written.
        drop_keys: regular expressions of source tensors to leave out, where the backbone has no place for them.

    Returns:
        The report, also written to `conversion_report.json`.

    Raises:
        ConversionError: if the source is damaged or unknown, an argument does not fit, or the check fails.
        UnsupportedBackboneError: if the source's backbone cannot carry depth attention; it names the reason.
    """
    started = time.monotonic()
    out = Path(out)
    dtype = _as_dtype(dtype)
    local = Path(source) if Path(source).exists() else None
    check_output(out, local if local is not None and local.is_dir() else None, overwrite)
    with workspace(out) as work:
        folder, base_model = fetch_source(source, work, dtype)
        origin = read_source(folder, drop_keys)
        config = build_attnres_config(origin, num_blocks, sublayers_per_block, depth_weights)
        model = check_backbone_tensors(origin, config)
        tokens = _check_inputs(folder, config, check_text) if check else {}
        shards, config.dtype = plan_shards(origin, config, model, dtype)
        report = _report(origin, config, shards, source_name=_name(source), out_name=out.name, base_model=base_model)
        check_space(work, report.weight_bytes)
        if dry_run:
            report.check = "Dry run: nothing was written."
            return report

        result = work / "result"
        result.mkdir()
        write_shards(result, shards)
        _write_companions(folder, result, origin.text_config)
        _write_config_and_code(result, config, model)
        if check:
            _compare(origin, result, config, tokens, report)
        else:
            report.check = "Skipped on request (`--no-check`)."
        report.written, report.seconds = True, round(time.monotonic() - started, 2)
        write_model_card(result, report, source_card=folder / "README.md")
        (result / "conversion_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        put_in_place(result, out)
    return report


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConversionError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        return DTYPES[dtype]
    if dtype is not None and dtype not in DTYPES.values():
        raise ConversionError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype}.")
    return dtype


def _name(source: str | Path) -> str:
    return Path(source).resolve().name if Path(source).exists() else str(source)


def read_source(folder: Path, drop_keys: tuple[str, ...]) -> Source:
    """Reads a checkpoint folder as what its config says it is."""
    checkpoint = open_checkpoint(folder)
    read = read_attnres if checkpoint.config.get("model_type") == AttnResConfig.model_type else read_prenorm
    return read(checkpoint, drop_keys)


def plan_shards(
    source: Source, config: AttnResConfig, model: AttnResForCausalLM, dtype: torch.dtype | None
) -> tuple[list[OutputShard], torch.dtype]:
    """The weight files of the result: the source's, and one more with the depth tensors.

    Returns:
        The files and the dtype of the model.
    """
    sizes = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.dtype] += tensor.num_bytes
    stored = source.text_config.dtype if source.text_config.dtype in sizes else sizes.most_common(1)[0][0]
    model_dtype = dtype or stored
    kept_in_fp32 = _kept_in_fp32(model)

    shards = []
    for (file, before), after in zip(source.checkpoint.shards.items(), source.shards, strict=True):
        tensors = [_output_tensor(name, tensor, dtype, kept_in_fp32) for name, tensor in after]
        unchanged = len(before) == len(after) and all(
            isinstance(tensor, StoredTensor) and (tensor.name, tensor.dtype) == (output.name, output.dtype)
            for (_, tensor), output in zip(after, tensors)
        )
        if tensors:
            shards.append(OutputShard(tensors, copy_of=file if unchanged else None))
    shape = (config.num_sublayers, config.text_config.hidden_size)
    query = torch.zeros(shape) if source.query is None else source.query
    key_norm = torch.ones(shape) if source.key_norm is None else source.key_norm
    depth = [(DEPTH_QUERY, query.to(model_dtype)), (DEPTH_KEY_NORM, key_norm.to(model_dtype))]
    shards.append(OutputShard([OutputTensor(name, model_dtype, shape, _constant(value)) for name, value in depth]))
    return shards, model_dtype


def _output_tensor(
    name: str, tensor: StoredTensor | PickledTensor, dtype: torch.dtype | None, kept_in_fp32: set[str]
) -> OutputTensor:
    if dtype is None or tensor.dtype == dtype or kept_in_fp32 & set(name.split(".")):
        return OutputTensor(name, tensor.dtype, tensor.shape, tensor.read)
    return OutputTensor(name, dtype, tensor.shape, lambda: tensor.read().to(dtype))


def _constant(value: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: value


def _kept_in_fp32(model: AttnResForCausalLM) -> set[str]:
    """Parts of parameter names that the backbone keeps in fp32 whatever the model's dtype."""
    backbone = model.model.backbone
    names = [backbone._keep_in_fp32_modules, backbone._keep_in_fp32_modules_strict]
    return {name for group in names if group for name in group}


def _report(source: Source, config: AttnResConfig, shards: list[OutputShard], **names) -> ConversionReport:
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return ConversionReport(
        source_kind=source.kind,
        target="attnres",
        model_type=config.text_config.model_type,
        num_sublayers=config.num_sublayers,
        sublayers_per_block=config.sublayers_per_block,
        num_blocks=config.num_blocks,
        depth_weights=config.depth_weights,
        queries_are_zero=source.queries_are_zero,
        dtype=str(config.dtype).removeprefix("torch."),
        num_parameters=sum(torch.Size(tensor.shape).numel() for tensor in tensors),
        parameters_added=2 * config.num_sublayers * config.text_config.hidden_size if source.query is None else 0,
        weight_bytes=sum(shard.num_bytes for shard in shards),
        dropped_keys=list(source.dropped),
        **names,
    )


def _write_companions(folder: Path, result: Path, config: PreTrainedConfig):
    for pattern in COMPANIONS:
        for file in folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, result / file.name)
    if not (result / "generation_config.json").exists():
        GenerationConfig.from_model_config(config).save_pretrained(result)


def _write_config_and_code(result: Path, config: AttnResConfig, model: AttnResForCausalLM):
    """Config, and the model's code beside it, so that the folder also loads where this package is not installed."""
    config.architectures = [type(model).__name__]
    config.text_config.dtype = config.dtype
    custom_object_save(model, result, config=config)
    base_model = type(model.model)
    config.auto_map["AutoModel"] = f"{base_model.__module__.rsplit('.', 1)[-1]}.{base_model.__name__}"
    config.save_pretrained(result)


def _check_inputs(folder: Path, config: AttnResConfig, check_text: str | None) -> dict[str, torch.Tensor]:
    inputs = {"fixed token ids": fixed_tokens(config.text_config.vocab_size)}
    if check_text is not None:
        inputs["given text"] = tokenize(folder, check_text)
    return inputs


def _compare(
    source: Source, result: Path, config: AttnResConfig, tokens: dict[str, torch.Tensor], report: ConversionReport
):
    """Loads source and result back, one after the other, and fills `check` and `parity` of the report."""
    source_class = AutoModelForCausalLM if source.attnres is None else AttnResForCausalLM
    before = logits_of(source.checkpoint.folder, config.dtype, source_class, tokens)
    after = logits_of(result, config.dtype, AttnResForCausalLM, tokens)
    report.parity = {name: compare_logits(before[name], after[name]).to_dict() for name in tokens}
    report.check = f"Source and result were loaded in {report.dtype} and their logits compared."
    difference = report.max_logit_difference
    if config.depth_weights == "sum" and difference != 0.0:
        raise ParityError(
            f"The result's logits differ from the source's by up to {difference:.3g}, where 0.0 is due; nothing was "
            "written."
        )
