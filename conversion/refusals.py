# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Sources that must not be converted as they lie: quantised weights, adapters, and tensors whose loss would be silent.

A comparison of logits cannot see these: what a checkpoint says beside its weights (scales, an adapter) is left out on
both sides of it.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, CheckpointError, ConversionError, read_json, shorten


# --- Quantised weights -----------------------------------------------------------------------------------------------

_QUANTISATION_FIELDS = ("quantization_config", "compression_config", "quantization")
_QUANTISATION_FILE = re.compile(r".*quant.*config\.json", re.IGNORECASE)
# Names of tensors that quantised formats keep beside their weights. No backbone of the library has them.
_QUANTISED_NAMES = re.compile(
    r"(weight_scale(_inv|_2)?|input_scale|output_scale|act_scale|scale_weight|scale_input|weight_zero_point"
    r"|input_zero_point|weight_packed|weight_shape|weight_g_idx|qweight|qzeros|qscales?|g_idx|SCB|weight_format|absmax"
    r"|nested_absmax|quant_map|nested_quant_map|quant_state(\..+)?|scaled_fp8)$"
)
# A backbone may have parameters of these names. In one that has none, they say how to read a weight.
_SCALE_NAMES = re.compile(r"(^|[._])(scales?|scale_inv|zeros|zero_points?|amax|biases|blocks|packed)(_\d+)?$")

_LAYER = re.compile(r"\.\d+(\.|$)")


def check_not_quantised(checkpoint: Checkpoint, names: Iterable[str]):
    """Raises `ConversionError` unless the weights of these names are plain floating-point numbers."""
    folder, names = checkpoint.folder, list(names)
    if (field := _quantisation_field(checkpoint.config)) is not None:
        name, value = field
        method = value.get("quant_method") or name if isinstance(value, dict) else value
        raise _quantised(folder, f"{method}, by `{name}` of its config")
    for file in sorted(folder.iterdir()):
        if _QUANTISATION_FILE.fullmatch(file.name) and read_json(file):
            raise _quantised(folder, f"by its {file.name}")
    if scales := [name for name in names if _QUANTISED_NAMES.search(name)]:
        raise _quantised(folder, f"by its tensors {shorten(scales, limit=3)}")
    if narrow := [name for name in names if _is_narrow_float(checkpoint.tensors[name].dtype)]:
        raise _quantised(folder, f"8-bit floats, such as {narrow[0]}")
    if odd := [name for name in names if not checkpoint.tensors[name].dtype.is_floating_point]:
        raise CheckpointError(
            f"{folder}: {len(odd)} tensors are not floating point: {shorten(odd)} ('{odd[0]}' is "
            f"{checkpoint.tensors[odd[0]].dtype})."
        )


def _is_narrow_float(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype have too few bits to be weights without scales, wherever these are kept."""
    return dtype.is_floating_point and dtype.itemsize < 2


def _quantisation_field(config: dict[str, Any]) -> tuple[str, Any] | None:
    """The field that says how weights are quantised, wherever in the config it is."""
    for name, value in config.items():
        if name in _QUANTISATION_FIELDS and value is not None and value is not False:
            return name, value
        if isinstance(value, dict) and (found := _quantisation_field(value)) is not None:
            return f"{name}.{found[0]}", found[1]
    return None


def refuse_scales(folder: Path, unknown: Iterable[str], kept: Iterable[str]):
    """Raises `ConversionError` if any tensor without a place in the backbone scales or shifts one of those kept."""
    modules = _prefixes(kept)
    scales = [name for name in unknown if (scale := _scale_of(name)) is not None and scale in modules]
    if scales:
        raise _quantised(folder, f"by its tensors {shorten(scales, limit=3)}")


def _scale_of(name: str) -> str | None:
    """What a tensor scales or shifts by its name, or `None` for other names."""
    found = _QUANTISED_NAMES.search(name) or _SCALE_NAMES.search(name)
    return None if found is None else name[: found.start()].rstrip("._")


def _prefixes(names: Iterable[str]) -> set[str]:
    """The names, and those of all modules around them."""
    return {name[:end] for name in names for end in (*(m.start() for m in re.finditer(r"\.", name)), len(name))} | {""}


def _quantised(folder: Path, shown: str) -> ConversionError:
    return ConversionError(
        f"{folder}: quantised weights ({shown}) cannot be converted; save the model dequantised first."
    )


# --- Tensors left out on request -------------------------------------------------------------------------------------


def check_droppable(checkpoint: Checkpoint, dropped: Iterable[str]):
    """Checks that what is left out are parts of the model as a whole, not something that its other parts need.

    A head for multi-token prediction or a vision tower can be left out. A scale or a bias beside a weight that stays
    cannot: the weight alone means something else, and no comparison with the source would show it.

    Raises:
        ConversionError: naming the tensors.
    """
    dropped = set(dropped)
    kept = [name for name in checkpoint.tensors if name not in dropped]
    refuse_scales(checkpoint.folder, sorted(dropped), kept)
    owners = {name.rpartition(".")[0] for name in kept} - {""}
    around = _prefixes(kept)
    bound = []
    for name in sorted(dropped):
        modules = _prefixes([name]) - {name, ""}
        # A scale without a weight beside it, such as one of activations, still belongs to the layer that it is in.
        in_layer = _scale_of(name) is not None and _LAYER.search(max(modules & around, key=len, default=""))
        if modules & owners or in_layer:
            bound.append(name)
    if bound:
        raise ConversionError(
            f"`drop_keys` leaves out {shorten(bound)}, but other tensors of the same module stay, and these mean "
            "something else without; only whole modules can be left out."
        )


# --- Adapters --------------------------------------------------------------------------------------------------------

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_NAMES = re.compile(
    r"(^|\.)(base_layer|lora_(A|B|embedding_A|embedding_B|magnitude_vector))(\.|$)|^base_model\.model\."
)
_MERGE = "`PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)`"


def refuse_adapter_folder(folder: Path):
    """Raises `ConversionError` if the folder holds a PEFT adapter, alone or beside the weights of a model."""
    is_model = (folder / "config.json").is_file()
    configs = list(folder.glob(ADAPTER_CONFIG))
    if not is_model:  # PEFT saves adapters with names of their own into subfolders
        configs += sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))
    if not configs:
        return
    base = read_json(configs[0]).get("base_model_name_or_path")
    if not is_model:
        raise ConversionError(
            f"{configs[0].parent}: a PEFT adapter of {base!r}, not a model; merge it first with {_MERGE}, or convert "
            "the base model and load the adapter into the result."
        )
    raise ConversionError(
        f"{folder}: holds a model and a PEFT adapter ({ADAPTER_CONFIG}), so it does not say whether the adapter is "
        f"merged into the weights; save the merged model to a folder of its own with {_MERGE}."
    )


def refuse_adapter_tensors(checkpoint: Checkpoint):
    """Raises `ConversionError` if an adapter was saved inside the weights, not merged."""
    found = [name for name in checkpoint.tensors if _ADAPTER_NAMES.search(name)]
    if found:
        raise ConversionError(
            f"{checkpoint.folder}: weights of a PEFT model that are not merged ({shorten(found, limit=3)}); merge and "
            f"save them first with {_MERGE}."
        )
