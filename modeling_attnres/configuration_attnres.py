# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Configuration of Attention Residuals (arXiv 2603.15031) around any PreNorm decoder of Transformers.

Letters: L sublayers (the paper's layers: a token mixer or a feed-forward, two per decoder layer), S sublayers per
block, N blocks.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .flat_config_attnres import (
    OwnField,
    backbone_fields,
    backbone_of,
    blank_config,
    config_class_for,
    keep_own_fields_apart,
    plain_architectures,
    public_names,
)


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


class _SublayersPerBlock(OwnField):
    """S; once found valid, it goes on holding for a config whose layers become fewer: the whole depth is one block."""

    def __get__(self, config: "AttnResConfig | None", owner: type | None = None) -> Any:
        value = super().__get__(config, owner)
        if config is None or config._valid_depth is None:
            return value
        return min(value, config.num_sublayers)

    def __set__(self, config: "AttnResConfig", value: Any):
        super().__set__(config, value)
        config._valid_depth = None


@strict
class AttnResConfig(PreTrainedConfig):
    r"""
    Configuration of an AttnRes model: the fields of its backbone's config, and how its residual stream attends over
    depth.

    An instance belongs to a subclass of the backbone's own config class as well (`isinstance(config, Qwen3Config)`),
    made when it is first asked for: fields, aliases, checks and parallel plans are the library's. `config.text_config`
    shows the same fields as a config of the backbone alone. What is written through either is read through both.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `LlamaConfig()`):
            Configuration of the PreNorm decoder whose residual adds become depth attention; copied. A `dict` must
            carry its `model_type`. Fields given beside it (`vocab_size=...`) take the place of its own.
        sublayers_per_block (`int`, *optional*):
            S, the sublayers whose outputs are summed into one block, from 1 (Full AttnRes) to L. Need not divide L:
            the last block takes what remains. Give this or `num_blocks`; without either, `num_blocks=8` (capped at L).
            A config whose `num_hidden_layers` is lowered afterwards, to less than S, is one block over all of them.
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
            which backbone it describes, or one whose fields have names of this config's own.

    ```python
    >>> from transformers import Qwen3Config
    >>> from modeling_attnres import AttnResConfig

    >>> config = AttnResConfig(text_config=Qwen3Config(num_hidden_layers=28), num_blocks=8)
    >>> config.sublayers_per_block, config.block_boundaries
    (7, [0, 7, 14, 21, 28, 35, 42, 49])
    ```
    """

    model_type = "attnres"
    # Set on the subclass of a backbone: that backbone's config class, and the class that the subclass was made of.
    backbone_config_class: ClassVar[type[PreTrainedConfig] | None] = None
    attnres_config_class: ClassVar[type["AttnResConfig"] | None] = None
    # Apart from the `__dict__`, which holds the backbone's fields and is shared with `text_config`.
    __slots__ = ("_own", "_valid_depth")

    sublayers_per_block: int | None = None
    depth_weights: str = "mean"
    depth_norm_eps: float | int | None = None
    depth_query_init_std: float | int = 0.0
    depth_attention_type: str = "softmax"
    depth_window: int | None = None
    depth_heads: int | None = None

    def __new__(cls, *args, text_config: Any = None, backbone_type: str | None = None, **kwargs):
        if cls.backbone_config_class is None:
            cls = config_class_for(
                cls, backbone_of(text_config, backbone_type or kwargs.get("model_type"), cls.model_type)
            )
        return blank_config(cls)

    def __init__(self, **kwargs):
        for name in ("backbone_type", "model_type"):  # the class has them: in the `__dict__` they would be fields too
            kwargs.pop(name, None)
        text_config = kwargs.pop("text_config", None)
        values = backbone_fields(text_config, kwargs)
        plain = text_config if isinstance(text_config, dict) else getattr(text_config, "__dict__", {})
        for field in fields(self):
            default = field.default_factory() if field.default is MISSING else field.default
            setattr(self, field.name, values.pop(field.name, default))
        # A file has one such field, and it names this model. `text_config` has its own.
        vars(self)["architectures"] = plain.get("architectures") or plain_architectures(
            self.architectures, self.backbone_config_class
        )
        self.__post_init__(**values)

    def __init_subclass__(cls, **kwargs):
        # Fields are set by the `__init__` above, or by one that calls it, and not by a generated one.
        if "__init__" not in vars(cls):
            cls.__init__ = super(cls, cls).__init__
        super().__init_subclass__(**kwargs)
        if cls.backbone_config_class is None:
            keep_own_fields_apart(cls)

    def __post_init__(self, **kwargs):
        num_blocks = kwargs.pop("num_blocks", None)
        super().__post_init__(**kwargs)
        if not isinstance(getattr(self, "num_hidden_layers", None), int):
            raise ValueError(
                "`text_config` must describe a decoder and give its `num_hidden_layers`, got a "
                f"'{self.backbone_type}' config (of a multimodal model, pass the text config alone)."
            )
        if num_blocks is not None:
            if self._own["sublayers_per_block"] is not None:
                raise ValueError(
                    "Give `sublayers_per_block` or `num_blocks`, not both: got "
                    f"sublayers_per_block={self._own['sublayers_per_block']} and num_blocks={num_blocks}."
                )
            self.num_blocks = num_blocks
        elif self._own["sublayers_per_block"] is None:
            self.num_blocks = min(DEFAULT_NUM_BLOCKS, self.num_sublayers)
        if self.depth_norm_eps is None:
            self.depth_norm_eps = _backbone_norm_eps(self)
        if self.depth_window is None and self.depth_attention_type == "sliding_window":
            self.depth_window = DEFAULT_DEPTH_WINDOW
        if self.depth_heads is None and self.depth_attention_type == "multi_head":
            self.depth_heads = DEFAULT_DEPTH_HEADS
        self._validate_depth_attention()

    def __reduce_ex__(self, protocol: int):
        # No module holds the class under its name: it is made again. The own fields' slot takes protocol 2.
        *_, (state, slots), _, _ = super().__reduce_ex__(max(protocol, 2))
        made_of = (self.attnres_config_class, self.backbone_config_class)
        return _blank_copy, made_of, (state, {**slots, "_own": dict(self._own)})

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()
        yield from (name for name in self._own if name not in vars(self))

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers: the fields of the backbone, `backbone_type`, and this config's own."""
        output = {**super().to_dict(), **copy.deepcopy(self._own)}
        output["sublayers_per_block"] = self.sublayers_per_block
        output["backbone_type"] = self.backbone_type
        return public_names(output, self.backbone_config_class)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "AttnResConfig":
        """This config: vLLM takes a model whose text config is another object for a multimodal one."""
        return self

    @property
    def text_config(self) -> PreTrainedConfig:
        """The backbone's fields as a config of its own class, without those of depth attention; live, not a copy."""
        view = object.__new__(self.backbone_config_class)
        object.__setattr__(view, "__dict__", self.__dict__)
        return view

    @text_config.setter
    def text_config(self, value: PreTrainedConfig):
        if type(value) is not self.backbone_config_class:
            raise ValueError(
                f"`text_config` of an existing config must stay a {self.backbone_config_class.__name__}, got "
                f"{type(value).__name__}."
            )
        state = copy.deepcopy(vars(value))
        vars(self).clear()
        vars(self).update(state)

    @property
    def backbone_type(self) -> str:
        """The backbone's `model_type`."""
        return self.backbone_config_class.model_type

    @property
    def num_sublayers(self) -> int:
        """L: two sublayers (token mixer, feed-forward) per decoder layer."""
        return 2 * self.num_hidden_layers

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

    def validate_architecture(self):
        """Part of `@strict`-powered validation: runs again when the config is saved or validated by hand."""
        super().validate_architecture()
        self._validate_depth_attention()

    def _validate_depth_attention(self):
        _check_in_range("sublayers_per_block", self.sublayers_per_block, self.num_sublayers)
        self._valid_depth = max(self._valid_depth or 0, self.num_sublayers)
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
        if kind == "multi_head" and self.hidden_size % self.depth_heads:
            raise ValueError(
                f"`depth_heads` must divide the backbone's hidden size {self.hidden_size}, got {self.depth_heads}."
            )


keep_own_fields_apart(AttnResConfig)
AttnResConfig.sublayers_per_block = _SublayersPerBlock("sublayers_per_block", None)


def _check_in_range(name: str, value: Any, num_sublayers: int):
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= num_sublayers:
        raise ValueError(
            f"`{name}` must be an integer from 1 to the {num_sublayers} sublayers of the backbone "
            f"(two per decoder layer), got {value!r}."
        )


def _blank_copy(cls: type[AttnResConfig], backbone_class: type[PreTrainedConfig]) -> AttnResConfig:
    return blank_config(config_class_for(cls, backbone_class))


def _backbone_norm_eps(config: PreTrainedConfig) -> float:
    for name in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon"):
        if (eps := getattr(config, name, None)) is not None:
            return eps
    return 1e-6  # backbones without the field fix the epsilon in code (olmo's non-parametric LayerNorm)


__all__ = ["AttnResConfig"]
