# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The PreNorm contract: which Transformers decoders depth attention can be laid into, found out by probing them.

Depth attention replaces the two residual adds of a decoder layer. That is right only if the layer is

    h = h + token_mixer(norm_1(h));  h = h + feed_forward(norm_2(h))

and the model around it is `lm_head(norm(layers(embed_tokens(ids))))`, nothing more. Backbones that do more (sandwich
norms, parallel branches, residual multipliers, scaled embeddings...) would run and compute nonsense, so no list of
names decides: the library's own `forward` code is run with tiny stand-ins in the place of its submodules, which record
what reaches them, and every number is compared. The probe needs no weights and takes milliseconds at any model size.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import MoeModelOutputWithPast

from .compat_attnres import CACHE
from .decoder_layer_attnres import LAYER_ARGUMENTS, LayerPlan, layer_attention_mask


_BATCH, _TOKENS, _WIDTH = 3, 5, 4  # 3: a batch that cannot be mistaken for a pair when it is unpacked


class UnsupportedBackboneError(ValueError):
    """The backbone is not a PreNorm decoder of the supported form; the message names the reason."""


def check_backbone(backbone: PreTrainedModel) -> list[LayerPlan]:
    """Checks a backbone (an `AutoModel`, on any device) against the PreNorm contract.

    Returns:
        One plan per decoder layer.

    Raises:
        UnsupportedBackboneError: with the reason, if the backbone is not a PreNorm decoder of the supported form.
    """
    name = backbone.config.model_type
    with _refusal(name):
        layer_kwargs = _probe_model(backbone)
        return [_probe_layer(layer, kwargs) for layer, kwargs in zip(backbone.layers, layer_kwargs, strict=True)]


def check_language_model_head(config: PreTrainedConfig):
    """Checks that the backbone's causal language model is its decoder followed by `lm_head` and nothing else.

    Raises:
        UnsupportedBackboneError: if it scales, caps or biases the logits, or has no such model.
    """
    with _refusal(config.model_type):
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if not inspect.isclass(model_class):
            raise UnsupportedBackboneError("it has no causal language model in this version of Transformers")
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))
        _probe_head(model)


def backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The library's base model class for a backbone config.

    Raises:
        UnsupportedBackboneError: if the installed Transformers has none.
    """
    model_class = MODEL_MAPPING.get(type(config), None)
    if not inspect.isclass(model_class):
        raise UnsupportedBackboneError(f"Transformers has no base model for a '{config.model_type}' config.")
    return model_class


def backbone_problem(model_type: str) -> str | None:
    """Why the default configuration of `model_type` cannot be a backbone, or `None` if it can."""
    try:
        config = CONFIG_MAPPING[model_type]()
        with torch.device("meta"):
            backbone = backbone_class(config)(config)
    except UnsupportedBackboneError as error:
        return str(error)
    except Exception as error:  # some default configs cannot be built by their own model
        return f"Backbone '{model_type}' cannot be judged: its default configuration does not build ({error})."
    try:
        check_backbone(backbone)
        check_language_model_head(config)
    except UnsupportedBackboneError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=1)
def judged_backbones() -> dict[str, str | None]:
    """[`backbone_problem`] of every model type with a language model in this Transformers installation.

    Each is built and probed, which takes about a minute in all.
    """
    causal = {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING if config in MODEL_MAPPING}
    return {name: backbone_problem(name) for name in sorted(causal) if name in CONFIG_MAPPING}


def supported_backbones() -> tuple[str, ...]:
    """Model types of this Transformers installation that can be a backbone (the first call takes about a minute)."""
    return tuple(name for name, problem in judged_backbones().items() if problem is None)


@contextmanager
def _refusal(model_type: str) -> Iterator[None]:
    """Names the backbone in a refusal, and turns a failed run of its own code on stand-ins into one."""
    try:
        # Inside `from_pretrained` the default device is meta; the probe needs real numbers.
        with torch.device("cpu"), torch.no_grad():
            yield
    except UnsupportedBackboneError as error:
        raise UnsupportedBackboneError(f"Backbone '{model_type}' cannot carry depth attention: {error}.") from None
    except Exception as error:
        raise UnsupportedBackboneError(
            f"Backbone '{model_type}' cannot carry depth attention: its forward does not run on a plain PreNorm "
            f"decoder's parts ({type(error).__name__}: {error})."
        ) from error


# --- Stand-ins -------------------------------------------------------------------------------------------------------


class _StandIn(nn.Module):
    """Takes the place of a submodule: records its call and answers with a fixed map of its first argument."""

    def __init__(self, name: str, salt: int, calls: list, tail: tuple = ()):
        super().__init__()
        # Parameters say where a model is and in which dtype; sines are as good as random numbers and disturb no seed.
        entries = torch.arange(_WIDTH * _WIDTH, dtype=torch.float64, device="cpu") * (1.7 + 0.37 * salt) + salt
        # Not by assignment: accelerate and vLLM, which build models without weights, move what is assigned.
        self._parameters["weight"] = nn.Parameter(torch.sin(entries).view(_WIDTH, _WIDTH), requires_grad=False)
        self.name, self.calls, self.tail = name, calls, tail

    def respond(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(hidden_states @ self.weight)

    def forward(self, *args, **kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.calls.append((self.name, args, kwargs))
        output = self.respond(hidden_states)
        return (output, *self.tail) if self.tail else output


class _EmbeddingStandIn(_StandIn):
    def respond(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.sin(input_ids.unsqueeze(-1) * (1.0 + torch.arange(_WIDTH, dtype=torch.float64)))


class _RotaryStandIn(_StandIn):
    def respond(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight, self.weight


def _with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy of `module` (same code, same attributes, no weights copied) with other children.

    In training mode, so that a dropout of the forward itself shows too.
    """
    probe = copy.copy(module)
    # Hooks on modules that run (the library records outputs with them) reach the copy alone.
    hooks = {name: copy.copy(value) for name, value in vars(module).items() if name.endswith("_hooks")}
    probe.__dict__ = {**module.__dict__, **hooks, "_modules": dict(children), "training": True}
    return probe


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b


def _close(a: Any, b: torch.Tensor) -> bool:
    # Some backbones add in fp32 whatever the input: looser than fp64 rounding, far tighter than any real difference.
    return isinstance(a, torch.Tensor) and a.shape == b.shape and torch.allclose(a.double(), b, rtol=0, atol=1e-5)


# --- Probes ----------------------------------------------------------------------------------------------------------


def _probe_model(backbone: PreTrainedModel) -> list[dict[str, Any]]:
    """Runs the model's own forward over stand-ins; returns the keyword arguments that each layer was called with."""
    children = dict(backbone.named_children())
    missing = [name for name in ("embed_tokens", "layers", "norm") if not isinstance(children.get(name), nn.Module)]
    if missing:
        raise UnsupportedBackboneError(f"its model has no `{'`, `'.join(missing)}`")
    extra = sorted(set(children) - {"embed_tokens", "layers", "norm", "rotary_emb"})
    extra += [name for name, _ in backbone.named_parameters(recurse=False)]
    if extra:
        raise UnsupportedBackboneError(
            f"its model holds more than embedding, layers, norm and rotary: {', '.join(extra)}"
        )

    calls = []
    stand_ins = {"embed_tokens": _EmbeddingStandIn("embed_tokens", 0, calls), "norm": _StandIn("norm", 1, calls)}
    if "rotary_emb" in children:
        stand_ins["rotary_emb"] = _RotaryStandIn("rotary_emb", 2, calls)
    layers = [_StandIn("layer", 3 + index, calls) for index in range(len(backbone.layers))]
    stand_ins["layers"] = nn.ModuleList(layers)
    input_ids = torch.arange(_BATCH * _TOKENS).view(_BATCH, _TOKENS)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :2] = 0
    position_ids = torch.arange(_TOKENS).unsqueeze(0)
    # A real cache: without one, any name of the argument would pass.
    cache = DynamicCache(config=backbone.config)
    output = _with_children(backbone, stand_ins)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        **{CACHE: cache},
    )

    hidden_states = stand_ins["embed_tokens"].respond(input_ids)
    masks = create_masks_for_generate(backbone.config, hidden_states, attention_mask, cache, position_ids)
    if any(len(args) + len(kwargs) != 2 for name, args, kwargs in calls if name == "rotary_emb"):
        raise UnsupportedBackboneError("its rotary embedding takes more than hidden states and positions")
    layer_calls = [(args, kwargs) for name, args, kwargs in calls if name == "layer"]
    if len(layer_calls) != len(layers):
        raise UnsupportedBackboneError(f"its model calls {len(layer_calls)} of its {len(layers)} layers once")
    for index, (args, kwargs) in enumerate(layer_calls):
        received, *rest = (*args, *([kwargs["hidden_states"]] if "hidden_states" in kwargs else []))
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if not _close(received, hidden_states):
            what = "scales or changes the embedding" if index == 0 else f"does more than call layer {index}"
            raise UnsupportedBackboneError(f"its model {what} before handing it on")
        if rest:
            raise UnsupportedBackboneError("its model passes further positional arguments to its layers")
        expected = {
            "attention_mask": layer_attention_mask(masks, backbone.config, index),
            "position_ids": position_ids,
            CACHE: cache,
            "use_cache": True,
        }
        _check_layer_arguments(kwargs, expected, stand_ins.get("rotary_emb"))
        hidden_states = layers[index].respond(hidden_states)
    if not _close(output.last_hidden_state, stand_ins["norm"].respond(hidden_states)):
        raise UnsupportedBackboneError("its model does more than apply the final norm to the last layer's output")
    return [kwargs for _, kwargs in layer_calls]


def _check_layer_arguments(kwargs: dict[str, Any], expected: dict[str, Any], rotary: nn.Module | None):
    """The layer's arguments must be those of the model's loop, with the values that the loop gives them."""
    for name, value in kwargs.items():
        if name == "position_embeddings":
            right = rotary is not None and isinstance(value, tuple) and all(part is rotary.weight for part in value)
        elif name in expected:
            right = _same(value, expected[name])
        else:
            # Harmless defaults, such as `output_attentions=False`.
            right = value is None or value is False
        if not right:
            raise UnsupportedBackboneError(f"its model feeds its layers a `{name}` of its own")
    for name in ("attention_mask", CACHE):
        if name not in kwargs:
            raise UnsupportedBackboneError(f"its model feeds its layers no `{name}`")


def _probe_layer(layer: nn.Module, model_kwargs: dict[str, Any]) -> LayerPlan:
    """Runs the layer's own forward over stand-ins, and compares with norm, mixer, add, norm, feed-forward, add."""
    children = {
        name: child
        for name, child in layer.named_children()
        if not (isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0))
    }
    if len(children) != 4 or list(layer.parameters(recurse=False)):
        raise UnsupportedBackboneError(
            "its decoder layer must hold a token mixer, a feed-forward and a norm before each, and holds "
            f"{', '.join(sorted(children))}"
        )
    offered = {name: _Sentinel(name) for name in model_kwargs if name != "hidden_states"}
    hidden_states = torch.sin(torch.arange(_BATCH * _TOKENS * _WIDTH, dtype=torch.float64))
    hidden_states = hidden_states.view(_BATCH, _TOKENS, _WIDTH)
    calls, stand_ins, output = _run_layer(layer, children, hidden_states, {**offered, "probe_kwarg": True})

    order = [name for name, _, _ in calls]
    if sorted(order) != sorted(children):
        raise UnsupportedBackboneError(f"its decoder layer calls its parts in the order {', '.join(order)}")
    norm_1, mixer, norm_2, feed_forward = order
    mixing = [name for (name, args, kwargs) in calls if len(args) + len(kwargs) > 1]
    if mixing == [norm_1]:
        raise UnsupportedBackboneError(f"its `{norm_1}` reads the residual stream without a norm: a post-norm decoder")
    fed_more = [name for name in mixing if name != mixer]
    if fed_more and mixer in mixing:
        raise UnsupportedBackboneError(f"its `{', '.join(fed_more)}` reads more than the normed hidden states")
    if mixing != [mixer] or not _is_norm(children[norm_1]) or not _is_norm(children[norm_2]):
        raise UnsupportedBackboneError(
            f"its decoder layer calls {', '.join(order)} where norm, token mixer, norm, feed-forward are due"
        )
    after_mixer = hidden_states + stand_ins[mixer].respond(stand_ins[norm_1].respond(hidden_states))
    expected = after_mixer + stand_ins[feed_forward].respond(stand_ins[norm_2].respond(after_mixer))
    if not _close(output, expected):
        raise UnsupportedBackboneError(
            "its decoder layer is not two plain residual adds around pre-normed sublayers (a scaled, gated, parallel "
            "or post-normed residual)"
        )
    _check_no_scales(layer, children, hidden_states, offered, expected)
    arguments = _call_arguments(children[mixer], *calls[1][1:])
    sources = {name: value.name for name, value in arguments.items() if isinstance(value, _Sentinel)}
    lacking = sorted(set(sources.values()) - set(LAYER_ARGUMENTS))
    if lacking:
        raise UnsupportedBackboneError(
            f"its token mixer takes `{'`, `'.join(lacking)}`, which the loop here does not pass"
        )
    constants = {
        name: value for name, value in arguments.items() if name not in sources and name not in ("probe_kwarg",)
    }
    if any(value is not None and value is not False for value in constants.values()):
        raise UnsupportedBackboneError(f"its token mixer is fed {sorted(constants)} by the decoder layer itself")
    return LayerPlan(norm_1, mixer, norm_2, feed_forward, sources, "probe_kwarg" in arguments)


def _check_no_scales(layer, children, hidden_states, kwargs, expected):
    """A residual multiplier that happens to be 1 is still a breach: the layer scales, depth attention would not."""
    for name, value in vars(layer).items():
        if isinstance(value, float):
            changed = _with_children(layer, dict(layer.named_children()))
            setattr(changed, name, 0.5 * value + 0.25)
            if not _close(_run_layer(changed, children, hidden_states, kwargs)[2], expected):
                raise UnsupportedBackboneError(f"its decoder layer scales the residual stream by `{name}`")


@dataclass(frozen=True, eq=False)
class _Sentinel:
    """An argument recognised by identity wherever it arrives."""

    name: str


def _run_layer(layer: nn.Module, children: dict[str, nn.Module], hidden_states: torch.Tensor, kwargs: dict[str, Any]):
    """Runs the layer's own forward over stand-ins; returns their calls, the stand-ins and the layer's output.

    Sublayers return their output alone or at the head of a tuple, and only the layer's code knows which: try each.
    """
    parameters = inspect.signature(type(layer).forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        kwargs = {name: value for name, value in kwargs.items() if name in parameters}
    untouched = {name: child for name, child in layer.named_children() if name not in children}
    failure = None
    for tail_of_mixer, tail_of_feed_forward in itertools.product(((None,), (), (None, None)), ((), (None,))):
        calls, stand_ins = [], {}
        for salt, (name, child) in enumerate(children.items()):
            tail = tail_of_mixer if _mixes_tokens(child) else () if _is_norm(child) else tail_of_feed_forward
            stand_ins[name] = _StandIn(name, salt, calls, tail)
        try:
            output = _with_children(layer, {**stand_ins, **untouched})(hidden_states, **kwargs)
        except (TypeError, ValueError, AttributeError) as error:
            failure = failure or error
            continue
        return calls, stand_ins, output[0] if isinstance(output, tuple) else output
    raise failure


def _mixes_tokens(module: nn.Module) -> bool:
    return "attention_mask" in inspect.signature(type(module).forward).parameters


def _is_norm(module: nn.Module) -> bool:
    return all(parameter.ndim <= 1 for parameter in module.parameters())


def _call_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What a child was called with besides the hidden states, by the names of the real child's own signature."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    arguments = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        arguments.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return {name: value for name, value in list(arguments.items())[1:] if name != "hidden_states"}


def _probe_head(model: PreTrainedModel):
    """Runs the causal language model's own forward over stand-ins: its logits must be `lm_head(hidden states)`."""
    prefix = model.base_model_prefix
    children = set(dict(model.named_children()))
    if children != {prefix, "lm_head"} or list(model.parameters(recurse=False)):
        raise UnsupportedBackboneError(
            f"its language model must be a decoder `{prefix}` and `lm_head`, and holds {', '.join(sorted(children))}"
        )
    if model.lm_head.bias is not None:
        raise UnsupportedBackboneError("its `lm_head` has a bias")
    calls = []
    lm_head = _StandIn("lm_head", 1, calls)
    embedding = _EmbeddingStandIn("embed_tokens", 0, calls)
    input_ids = torch.arange(_BATCH * _TOKENS).view(_BATCH, _TOKENS)
    hidden_states = embedding.respond(input_ids)
    decoder = _StandIn(prefix, 2, calls)
    decoder.forward = lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=hidden_states)
    logits = _with_children(model, {prefix: decoder, "lm_head": lm_head})(input_ids=input_ids, use_cache=False).logits
    if not _close(logits, lm_head.respond(hidden_states)):
        raise UnsupportedBackboneError("its language model scales or caps the logits")


__all__ = ["UnsupportedBackboneError", "check_backbone", "check_language_model_head", "supported_backbones"]
