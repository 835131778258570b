# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Proof of a conversion: every tensor of the result against the source's files, and logits on the same tokens.

Letters: B batch, T tokens, V vocabulary.
"""

import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_attnres import AttnResConfig

from .checkpoint import ConversionError, first_line, shorten
from .source import Source


NUM_FIXED_TOKENS = 48
ALIGNMENT_BYTES = 64
# Loading a model whole takes twice this. It is what writing a shard needs anyway.
WHOLE_MODEL_BYTES = 400_000_000
# Fields that describe the file, not the model.
_OF_A_FILE = ("architectures", "auto_map", "transformers_version", "_name_or_path", "dtype")


class ParityError(ConversionError):
    """The result does not compute what the source computes, though it must."""


@dataclass(frozen=True)
class Parity:
    """How far apart the logits of source and result are on one input.

    Attributes:
        tokens: how many positions were compared.
        max_logit_difference: largest absolute difference over positions and vocabulary.
        max_logit: largest absolute logit of the source, as a scale for it.
        kl_divergence: mean over positions of KL(source || result), in nats.
        top1_agreement: share of positions where both name the same next token.
    """

    tokens: int
    max_logit_difference: float
    max_logit: float
    kl_divergence: float
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fixed_tokens(vocab_size: int) -> torch.Tensor:
    """`[1, T]` token ids spread over the vocabulary, the same on every machine."""
    return (torch.arange(NUM_FIXED_TOKENS) * 7919 + 13).remainder(vocab_size).unsqueeze(0)


def tokenize(load_tokenizer: Callable[[], PreTrainedTokenizerBase], text: str) -> torch.Tensor:
    """`[1, T]` token ids of `text` by the source's tokenizer."""
    try:
        tokens = load_tokenizer()(text, return_tensors="pt").input_ids
    except Exception as error:  # the parsers of these files raise exceptions of any class
        raise ConversionError(
            f"`check_text` needs the source's tokenizer, which does not load: {first_line(error)}"
        ) from error
    if tokens.numel() == 0:
        raise ConversionError(f"`check_text` has no tokens, got {text!r}.")
    return tokens


def compare_logits(source: torch.Tensor, result: torch.Tensor) -> Parity:
    """Compares logits `[B, T, V]`.

    Raises:
        ParityError: if the source's logits are not finite, which no comparison could prove anything about.
    """
    check_finite({"source": source})
    source, result = source.double(), result.double()
    log_source, log_result = source.log_softmax(-1), result.log_softmax(-1)
    return Parity(
        tokens=math.prod(source.shape[:-1]),
        max_logit_difference=(source - result).abs().nan_to_num(nan=math.inf).max().item(),
        max_logit=source.abs().max().item(),
        kl_divergence=(log_source.exp() * (log_source - log_result)).sum(-1).mean().item(),
        top1_agreement=(source.argmax(-1) == result.argmax(-1)).double().mean().item(),
    )


def check_finite(logits: dict[str, torch.Tensor]):
    """Raises `ParityError` if any of the logits is not finite: nothing could be proven with them."""
    if not all(values.isfinite().all() for values in logits.values()):
        raise ParityError("The source's own logits are not finite: its weights are damaged or of another dtype.")


class _AlignedWeights(Mapping):
    """Weights from disk, each at a cache line's start.

    Memory-mapped tensors start at different alignments in different files, and the matrix product of the same numbers
    then takes another path and differs in the last bits.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], progress: tqdm):
        self.weights, self.progress = weights, progress

    def __getitem__(self, name: str) -> torch.Tensor:
        self.progress.update()
        return _aligned(self.weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


def load_whole(folder: Path, dtype: torch.dtype, model_class: type, **keywords) -> PreTrainedModel:
    """A model in memory, ready to be compared bit by bit."""
    model = model_class.from_pretrained(folder, dtype=dtype, **keywords).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = _aligned(tensor.data)
    return model


def load_offloaded(
    folder: Path, dtype: torch.dtype, model_class: type, offload_folder: Path, progress: tqdm
) -> PreTrainedModel:
    """A model whose weights stay on disk and come into memory one submodule at a time.

    Args:
        offload_folder: for what the library has to rearrange first (experts).
        progress: counts the tensors as they are read; its total is set to those of one forward.
    """
    model = model_class.from_pretrained(
        folder, dtype=dtype, device_map={"": "disk"}, offload_folder=offload_folder
    ).eval()
    progress.reset(total=0)
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "weights_map", None) is not None:
            hook.weights_map = _AlignedWeights(hook.weights_map, progress)
            progress.total += len(list(module.parameters(recurse=False)))
    return model


@torch.no_grad()
def logits_of(
    folder: Path,
    dtype: torch.dtype,
    model_class: type,
    inputs: dict[str, torch.Tensor],
    scratch: Path,
    gguf_file: str | None = None,
) -> tuple[dict[str, torch.Tensor], str]:
    """Logits `[1, T, V]` of the model in `folder` for each of `inputs` `[1, T]`, and how it was loaded, in words.

    Args:
        scratch: an existing folder for temporary files.
        gguf_file: the file in `folder` that the model is in, if it is a GGUF file.
    """
    size = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    keywords = {} if gguf_file is None else {"gguf_file": gguf_file}
    whole = size <= WHOLE_MODEL_BYTES or gguf_file is not None
    with (
        tempfile.TemporaryDirectory(dir=scratch) as offload_folder,
        tqdm(desc=f"Running {folder.name}", unit=" tensors", disable=whole) as progress,
    ):
        try:
            if whole:
                model = load_whole(folder, dtype, model_class, **keywords)
            else:
                model = load_offloaded(folder, dtype, model_class, Path(offload_folder), progress)
                progress.total *= len(inputs)
            logits = {name: model(input_ids=tokens, use_cache=False).logits for name, tokens in inputs.items()}
        except OSError:
            raise  # the disk's, not the model's
        except Exception as error:  # a config may build a model that its own code cannot run
            raise ParityError(
                f"{folder}: the model does not run ({type(error).__name__}: {first_line(error)})."
            ) from error
        del model
        gc.collect()  # modules hold reference cycles, and the next model may be as large
    how = "whole" if whole else f"one submodule at a time from disk ({size / 1e9:.1f} GB are too much to load)"
    return logits, how


def compare_sources(source: Source, result: Source, config: AttnResConfig, cast_to: torch.dtype):
    """Compares two checkpoints in whatever dialects, tensor by tensor and with their conventions.

    Args:
        source: whose tensors must be in the result, whole and nothing else; read from its files again.
        result: read from what was written.
        config: the conventions that the result must have.
        cast_to: dtype that the result's tensors may have been cast to.

    Raises:
        ParityError: naming the first difference.
    """
    if result.attnres is not None:
        for name in conventions():
            due, found = getattr(config, name), getattr(result.attnres, name)
            if due != found:
                raise ParityError(f"The result reads back with {name}={found!r} where {due!r} is due.")
    due, found = source.tensors, result.tensors
    if due.keys() != found.keys():
        raise ParityError(f"The result's tensors are not the source's: {shorten(sorted(due.keys() ^ found.keys()))}.")
    pairs = [(name, tensor.read, found[name].read) for name, tensor in due.items()]
    if source.attnres is not None and result.attnres is not None:
        if source.depth.keys() != result.depth.keys():
            raise ParityError(
                f"The result's depth attention has {', '.join(result.depth)}, not {', '.join(source.depth)}."
            )
        kept = [(source.depth, result.depth)]
        if source.unread:
            if source.unread.keys() != result.unread.keys():
                raise ParityError(f"The result does not keep {shorten(source.unread)}.")
            kept.append((source.unread, result.unread))
        pairs += [(name, partial(due.get, name), partial(found.get, name)) for due, found in kept for name in due]
    for name, read_due, read_found in tqdm(pairs, desc="Comparing tensors"):
        if not _same_tensors(read_due(), read_found(), cast_to):
            raise ParityError(f"'{name}' of the result is not the source's.")


def compare_backbones(source: PreTrainedConfig, result: PreTrainedConfig):
    """Raises `ParityError` if two configs of one class describe two backbones, naming the first field."""
    due, found = _backbone_fields(source), _backbone_fields(result)
    if different := sorted(name for name in due.keys() | found.keys() if due.get(name) != found.get(name)):
        raise ParityError(
            f"The result's config reads back with {different[0]}={found.get(different[0])!r:.80} where "
            f"{due.get(different[0])!r:.80} is due."
        )


def _backbone_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a backbone's config that its computation may depend on."""
    return {name: value for name, value in config.to_dict().items() if name not in _OF_A_FILE}


def conventions() -> list[str]:
    """Names of the fields that say how an AttnRes model mixes its sources."""
    common = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(AttnResConfig) if field.name not in common]


def _same_tensors(due: torch.Tensor, found: torch.Tensor, cast_to: torch.dtype) -> bool:
    if found.dtype != due.dtype and found.dtype == cast_to:
        due = due.to(cast_to)
    return due.dtype == found.dtype and _same_bits(due, found)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return a.shape == b.shape and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
