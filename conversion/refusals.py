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
_QUANTISED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# Names of what quantised formats keep beside their weights. The library's own backbones have none of them.
_QUANTISED_NAMES = re.compile(
    r"(weight_scale(_inv|_2)?|input_scale|output_scale|act_scale|scale_weight|scale_input|weight_zero_point"
    r"|input_zero_point|weight_packed|weight_shape|weight_g_idx|qweight|qzeros|qscales?|g_idx|SCB|weight_format|absmax"
    r"|nested_absmax|quant_map|nested_quant_map|quant_state(\..+)?|scaled_fp8)$"
)
# These may mean something else in a backbone that has them; in one that does not they say how to read a weight.
_SCALE_NAMES = re.compile(r"(^|[._])(scales?|scale_inv|zeros|zero_points?|amax|biases|blocks|packed)(_\d+)?$")


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
    if narrow := [name for name in names if checkpoint.tensors[name].dtype in _QUANTISED_DTYPES]:
        raise _quantised(folder, f"8-bit floats, such as {narrow[0]}")
    if odd := [name for name in names if not checkpoint.tensors[name].dtype.is_floating_point]:
        raise CheckpointError(
            f"{folder}: {len(odd)} tensors are not floating point: {shorten(odd)} ('{odd[0]}' is "
            f"{checkpoint.tensors[odd[0]].dtype})."
        )


def _quantisation_field(config: dict[str, Any]) -> tuple[str, Any] | None:
    """The field that says how weights are quantised, wherever in the config it is."""
    for name, value in config.items():
        if name in _QUANTISATION_FIELDS and value is not None and value is not False:
            return name, value
        if isinstance(value, dict) and (found := _quantisation_field(value)) is not None:
            return f"{name}.{found[0]}", found[1]
    return None


def refuse_scales(folder: Path, unknown: Iterable[str]):
    """Raises `ConversionError` if any tensor that the backbone has no place for scales or shifts weights."""
    if scales := [name for name in unknown if _SCALE_NAMES.search(name)]:
        raise _quantised(folder, f"by its tensors {shorten(scales, limit=3)}")


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
    modules = {name.rpartition(".")[0] for name in kept} - {""}
    scaled = {
        ".".join(parts[:length]) for name in kept if (parts := name.split(".")) for length in range(len(parts) + 1)
    }
    scales, bound = [], []
    for name in sorted(dropped):
        scale = _QUANTISED_NAMES.search(name) or _SCALE_NAMES.search(name)
        if scale and name[: scale.start()].rstrip("._") in scaled:
            scales.append(name)
        elif modules.intersection(_modules_of(name)):
            bound.append(name)
    if scales:
        raise _quantised(checkpoint.folder, f"by its tensors {shorten(scales, limit=3)}")
    if bound:
        raise ConversionError(
            f"`drop_keys` leaves out {shorten(bound)}, but other tensors of the same module stay, and these mean "
            "something else without; only whole modules can be left out."
        )


def _modules_of(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


# --- Adapters --------------------------------------------------------------------------------------------------------

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_NAMES = re.compile(
    r"(^|\.)(base_layer|lora_(A|B|embedding_A|embedding_B|magnitude_vector))(\.|$)|^base_model\.model\."
)
_MERGE = "`PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)`"


def refuse_adapter_folder(folder: Path):
    """Raises `ConversionError` if the folder holds a PEFT adapter, alone or beside the weights of a model."""
    is_model = (folder / "config.json").is_file()
    configs = [folder / ADAPTER_CONFIG] if is_model else sorted(folder.glob(f"**/{ADAPTER_CONFIG}"))
    if not configs or not configs[0].is_file():
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
