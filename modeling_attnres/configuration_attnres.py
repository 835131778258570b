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
"""Configuration of Attention Residuals (arXiv 2603.15031) around any PreNorm decoder of Transformers.

Letters: L sublayers (the paper's layers: a token mixer or a feed-forward, two per decoder layer), S sublayers per
block, N blocks.
"""

import copy
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .compat_attnres import CACHE


DEFAULT_NUM_BLOCKS = 8  # the paper's choice: most of Full AttnRes' gain at a fraction of its sources
DEPTH_WEIGHTS = ("mean", "sum")
# "softmax" is the method; the others replace one step of it each, as the paper's ablations do.
DEPTH_ATTENTION_TYPES = (
    "softmax",
    "static",
    "sigmoid",
    "no_key_norm",
    "sliding_window",
    "multi_head",
    "input_dependent",
)
DEFAULT_DEPTH_WINDOW = 8  # the paper's ablation, as are 16 heads
DEFAULT_DEPTH_HEADS = 16

# Read through the wrapper these would be written into its own config.json or looked up under the wrong class.
_NOT_FORWARDED = ("rope_parameters", "per_layer_config", "auto_map")


@strict
class AttnResConfig(PreTrainedConfig):
    r"""
    Configuration of an AttnRes model: a backbone (`text_config`) and how its residual stream attends over depth.

    Attributes of `text_config` can be read and written on this config (`config.hidden_size`).

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `LlamaConfig()`):
            Configuration of the PreNorm decoder whose residual adds become depth attention. A `dict` must carry its
            `model_type`.
        sublayers_per_block (`int`, *optional*):
            S, the sublayers whose outputs are summed into one block, from 1 (Full AttnRes) to L. Need not divide L:
            the last block takes what remains. Give this or `num_blocks`; without either, `num_blocks=8` (capped at L).
        num_blocks (`int`, *optional*):
            N, as constructor sugar for `sublayers_per_block=ceil(L / N)`; not stored. Reading `config.num_blocks`
            gives the number of blocks that S results in.
        depth_weights (`str`, *optional*, defaults to `"mean"`):
            `"mean"`: the weights of a mix sum to 1 (the paper, Kimi K3). `"sum"`: they sum to the number of sources,
            so that zero queries give the plain residual stream exactly (lossless conversion).
        depth_norm_eps (`float`, *optional*):
            Epsilon of the key RMSNorm over sources. Defaults to the backbone's norm epsilon.
        depth_query_init_std (`float`, *optional*, defaults to 0.0):
            Standard deviation the queries are initialised with. The paper requires zero.
        depth_attention_type (`str`, *optional*, defaults to `"softmax"`):
            The method, or one of the paper's ablations (Table 4), which go with `depth_weights="mean"`: `"static"` (a
            learned scalar per sublayer and source), `"sigmoid"` (in place of softmax), `"no_key_norm"`,
            `"sliding_window"` (the embedding and the last `depth_window` sources), `"multi_head"` (`depth_heads`
            slices of channels with a softmax each), `"input_dependent"` (queries projected from the latest source).
        depth_window (`int`, *optional*):
            Sources a sliding window sees beside the embedding; with `"sliding_window"` only, where it defaults to 8.
        depth_heads (`int`, *optional*):
            Heads over depth, a divisor of the hidden size; with `"multi_head"` only, where it defaults to 16.

    Raises:
        ValueError: if an argument is out of range, both block arguments are given, or `text_config` does not say
            which backbone it describes.

    ```python
    >>> from transformers import Qwen3Config
    >>> from modeling_attnres import AttnResConfig

    >>> config = AttnResConfig(text_config=Qwen3Config(num_hidden_layers=28), num_blocks=8)
    >>> config.sublayers_per_block, config.block_boundaries
    (7, [0, 7, 14, 21, 28, 35, 42, 49])
    ```
    """

    model_type = "attnres"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = [CACHE]
    # The default plan names layers this model does not have at its top level; the backbone brings its own.
    base_model_fsdp_plan = {}

    text_config: dict | PreTrainedConfig | None = None
    sublayers_per_block: int | None = None
    depth_weights: str = "mean"
    depth_norm_eps: float | int | None = None
    depth_query_init_std: float | int = 0.0
    depth_attention_type: str = "softmax"
    depth_window: int | None = None
    depth_heads: int | None = None

    def __post_init__(self, **kwargs):
        num_blocks = kwargs.pop("num_blocks", None)
        _check_text_config(self.text_config)
        if isinstance(self.text_config, PreTrainedConfig):
            # Setting up the wrapper resets attributes of its parts, and a dense model may run on this very object.
            self.text_config = copy.deepcopy(self.text_config)
        else:
            self.text_config = AutoConfig.for_model(**(self.text_config or {"model_type": "llama"}))
        super().__post_init__(**kwargs)
        if not isinstance(getattr(self.text_config, "num_hidden_layers", None), int):
            raise ValueError(
                "`text_config` must describe a decoder and give its `num_hidden_layers`, got a "
                f"'{self.text_config.model_type}' config (of a multimodal model, pass the text config alone)."
            )
        if num_blocks is not None:
            if self.sublayers_per_block is not None:
                raise ValueError(
                    "Give `sublayers_per_block` or `num_blocks`, not both: got "
                    f"sublayers_per_block={self.sublayers_per_block} and num_blocks={num_blocks}."
                )
            self.num_blocks = num_blocks
        elif self.sublayers_per_block is None:
            self.num_blocks = min(DEFAULT_NUM_BLOCKS, self.num_sublayers)
        if self.depth_norm_eps is None:
            self.depth_norm_eps = _backbone_norm_eps(self.text_config)
        if self.depth_window is None and self.depth_attention_type == "sliding_window":
            self.depth_window = DEFAULT_DEPTH_WINDOW
        if self.depth_heads is None and self.depth_attention_type == "multi_head":
            self.depth_heads = DEFAULT_DEPTH_HEADS
        self._validate_depth_attention()

    def __getattr__(self, name: str) -> Any:
        # Only called when normal lookup fails: what the wrapper lacks is read from the backbone's config.
        if not name.startswith("_") and name not in _NOT_FORWARDED:
            text_config = self.__dict__.get("text_config")
            if isinstance(text_config, PreTrainedConfig) and hasattr(text_config, name):
                return getattr(text_config, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any):
        # What is read from the backbone's config is written there too: a copy here would hide it and do nothing.
        own = name.startswith("_") or name in _NOT_FORWARDED or name in self.__dict__ or hasattr(type(self), name)
        text_config = None if own else self.__dict__.get("text_config")
        if isinstance(text_config, PreTrainedConfig) and hasattr(text_config, name):
            setattr(text_config, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def num_sublayers(self) -> int:
        """L: two sublayers (token mixer, feed-forward) per decoder layer."""
        return 2 * self.text_config.num_hidden_layers

    @property
    def num_blocks(self) -> int:
        """N = ceil(L / S)."""
        return math.ceil(self.num_sublayers / self.sublayers_per_block)

    @num_blocks.setter
    def num_blocks(self, value: int):
        _check_in_range("num_blocks", value, self.num_sublayers)
        self.sublayers_per_block = math.ceil(self.num_sublayers / value)

    @property
    def block_boundaries(self) -> list[int]:
        """Indices (from 0) of the sublayers that start a block."""
        return list(range(0, self.num_sublayers, self.sublayers_per_block))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The config of the text model: this one, which reads and writes through to the backbone's.

        With `decoder=True` the backbone's own, from whose fields generation defaults (special tokens) and caches are
        made. Without it, whoever gets another config than the one asked takes the model for a multimodal one, as vLLM
        does.
        """
        return super().get_text_config(decoder=decoder, encoder=encoder) if decoder else self

    def validate_architecture(self):
        """Part of `@strict`-powered validation: runs again when the config is saved or validated by hand."""
        self._validate_depth_attention()

    def _validate_depth_attention(self):
        _check_in_range("sublayers_per_block", self.sublayers_per_block, self.num_sublayers)
        if self.depth_weights not in DEPTH_WEIGHTS:
            raise ValueError(f"`depth_weights` must be one of {DEPTH_WEIGHTS}, got {self.depth_weights!r}.")
        if not self.depth_norm_eps > 0:
            raise ValueError(f"`depth_norm_eps` must be positive, got {self.depth_norm_eps}.")
        if not self.depth_query_init_std >= 0:
            raise ValueError(f"`depth_query_init_std` must not be negative, got {self.depth_query_init_std}.")
        self._validate_variant()

    def _validate_variant(self):
        kind = self.depth_attention_type
        if kind not in DEPTH_ATTENTION_TYPES:
            raise ValueError(f"`depth_attention_type` must be one of {DEPTH_ATTENTION_TYPES}, got {kind!r}.")
        if kind != "softmax" and self.depth_weights != "mean":
            raise ValueError(
                f"`depth_attention_type={kind!r}` goes with `depth_weights='mean'` only, got {self.depth_weights!r}."
            )
        for name, owner in (("depth_window", "sliding_window"), ("depth_heads", "multi_head")):
            value = getattr(self, name)
            if kind != owner and value is not None:
                raise ValueError(
                    f"`{name}` goes with `depth_attention_type='{owner}'` only, got {value} with '{kind}'."
                )
            if kind == owner and (isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
        if kind == "multi_head" and self.text_config.hidden_size % self.depth_heads:
            raise ValueError(
                f"`depth_heads` must divide the backbone's hidden size {self.text_config.hidden_size}, got "
                f"{self.depth_heads}."
            )


def _check_in_range(name: str, value: Any, num_sublayers: int):
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= num_sublayers:
        raise ValueError(
            f"`{name}` must be an integer from 1 to the {num_sublayers} sublayers of the backbone "
            f"(two per decoder layer), got {value!r}."
        )


def _check_text_config(text_config: Any):
    if text_config is None:
        return
    if isinstance(text_config, dict):
        if not text_config.get("model_type"):
            raise ValueError(
                "`text_config` given as a dict must name its backbone in `model_type` (for example 'llama'), got keys "
                f"{sorted(text_config)}."
            )
        model_type = text_config["model_type"]
    elif isinstance(text_config, PreTrainedConfig):
        model_type = text_config.model_type
    else:
        raise ValueError(f"`text_config` must be a config object or a dict, got {type(text_config).__name__}.")
    if model_type == AttnResConfig.model_type:
        raise ValueError("`text_config` must describe the PreNorm backbone, got an AttnRes config.")


def _backbone_norm_eps(text_config: PreTrainedConfig) -> float:
    for name in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon"):
        if (eps := getattr(text_config, name, None)) is not None:
            return eps
    return 1e-6  # backbones without the field fix the epsilon in code (olmo's non-parametric LayerNorm)


__all__ = ["AttnResConfig"]
