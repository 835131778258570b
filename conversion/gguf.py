# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""GGUF files as sources: dequantised by Transformers into a plain checkpoint folder.

Transformers reads what it has a name for and starts what it does not find at random, so the file's own list of tensors
is held against the model that came out.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .checkpoint import CheckpointError, ConversionError, first_line, shorten
from .library import quiet_library


def unpack_gguf(file: Path, folder: Path, dtype: torch.dtype | None):
    """Writes the model and tokenizer of a GGUF file as a plain checkpoint folder. Loads the whole model into memory.

    Args:
        dtype: of the weights; fp32 by default, which holds every dequantised value.

    Raises:
        ConversionError: if `gguf` is not installed.
        CheckpointError: if the file cannot be read, is one part of several, has too few tensors for its model, or has
            more than Transformers reads.
    """
    dtype = dtype or torch.float32
    reader = _open(file)
    _check_whole(file, reader)
    loaded, info = _load(file, dtype)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{file}: {len(missing)} tensors of its model are missing: {shorten(missing)}.")
    if misshapen := sorted(info["mismatched_keys"]) or _other_shapes(loaded):
        name, found, due = misshapen[0]
        raise CheckpointError(
            f"{file}: {len(misshapen)} tensors have other shapes than the config that Transformers reads from it says: "
            f"{name} is {list(found)}, {list(due)} is due."
        )
    _check_all_read(file, reader, loaded, sorted(info["unexpected_keys"]), dtype)
    _check_rope_read(file, reader, loaded.config)
    # What was loaded is flagged as quantised and refuses to be saved: its weights go into a plain model.
    config = loaded.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    if any(name.startswith("tokenizer.") for name in reader.fields):
        _save_tokenizer(file, folder)


def _save_tokenizer(file: Path, folder: Path):
    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except Exception as error:  # the library raises whatever it meets
        raise CheckpointError(
            f"{file}: Transformers cannot read the tokenizer of this GGUF file ({type(error).__name__}: "
            f"{first_line(error)})."
        ) from error


def _open(file: Path) -> Any:
    """The `gguf.GGUFReader` of a file."""
    try:
        from gguf import GGUFReader  # an extra: whoever converts no GGUF files does without
    except ImportError as error:
        raise ConversionError(
            f'Reading {file} needs the `gguf` package: pip install "modeling-attnres[gguf]".'
        ) from error
    try:
        return GGUFReader(file)
    except Exception as error:  # the reader unpacks what it finds, and raises whatever comes of it
        raise CheckpointError(
            f"{file}: not a sound GGUF file ({type(error).__name__}: {first_line(error)})."
        ) from None


def _load(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        with quiet_library():
            return AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=dtype,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # as above
        raise CheckpointError(
            f"{file}: Transformers cannot read this GGUF file ({type(error).__name__}: {first_line(error)})."
        ) from error


def _other_shapes(model: PreTrainedModel) -> list[tuple[str, torch.Size, torch.Size]]:
    """Name, shape and due shape of tensors of other shapes than the config says, which older Transformers do not report."""
    with torch.device("meta"):
        due = AutoModelForCausalLM.from_config(model.config).state_dict()
    shapes = [(name, tensor.shape, due[name].shape) for name, tensor in sorted(model.state_dict().items())]
    return [shape for shape in shapes if shape[1] != shape[2]]


def _check_whole(file: Path, reader: Any):
    """Raises `CheckpointError` if the file is a part of a model: its other parts would not be read."""
    parts = _number(reader, "split.count") or 1
    due = _number(reader, "split.tensors.count")
    if parts > 1 or (due is not None and due != len(reader.tensors)):
        raise CheckpointError(
            f"{file}: part {(_number(reader, 'split.no') or 0) + 1} of {parts} of a split GGUF file, with "
            f"{len(reader.tensors)} of {due} tensors; join the parts first: llama-gguf-split --merge FIRST_PART OUT."
        )


def _number(reader: Any, name: str) -> int | None:
    found = reader.fields.get(name)
    return None if found is None else int(found.contents())


def _check_all_read(file: Path, reader: Any, model: PreTrainedModel, unexpected: list[str], dtype: torch.dtype):
    """Raises `CheckpointError` if the file has numbers that are not in the model."""
    from gguf import dequantize

    stored = [tensor for tensor in reader.tensors if not _is_neutral(tensor)]
    parameters = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if not unexpected:
        if sum(int(tensor.n_elements) for tensor in stored) == sum(map(torch.numel, parameters.values())):
            return
        # Transformers reorders rows, so what tells which were read must not depend on the order of numbers.
        read = {_fingerprint(tensor) for tensor in parameters.values()}
        for tensor in stored:
            values = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(dtype)
            if _fingerprint(values) not in read:
                unexpected.append(tensor.name)
    raise CheckpointError(
        f"{file}: Transformers has no place for all of its tensors in a '{model.config.model_type}' model and would "
        f"leave them out: {shorten(unexpected)}."
    )


def _is_neutral(tensor: Any) -> bool:
    """Whether this is a scale of the rotary frequencies that scales nothing."""
    return tensor.name == "rope_freqs.weight" and bool((tensor.data == 1).all())


def _fingerprint(tensor: torch.Tensor) -> tuple[int, int]:
    """Equal for tensors of the same numbers in whatever order."""
    return tensor.numel(), int(tensor.float().contiguous().view(torch.int32).long().sum())


def _check_rope_read(file: Path, reader: Any, config: PreTrainedConfig):
    """Raises `CheckpointError` if the file scales rotary embeddings and the config that was read does not."""
    for name, entry in reader.fields.items():
        if name.endswith(".rope.scaling.type") and (kind := entry.contents()) != "none":
            if "rope_type" in str(config.rope_parameters).replace("'rope_type': 'default'", ""):
                return
            raise CheckpointError(
                f"{file}: `{name}` is {kind!r}, which Transformers does not read for '{config.model_type}' models: its "
                "rotary embeddings would not be scaled."
            )
