# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Attention Residuals (arXiv 2603.15031) for any PreNorm decoder of Transformers.

    AttnResForCausalLM -> AttnResModel (its own loop) -> decoder layers of the backbone -> depth attention

The delta to the dense model, once: where a decoder layer adds to the residual stream and reads it back, an
`AttnResDecoderLayer` hands its outputs to the open block and reads a mix over all sources of depth.

Letters: B batch, T tokens, D hidden size, L sublayers (two per decoder layer), S sublayers per block, N blocks,
n sources of a mix.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbone_attnres import check_backbone, check_language_model_head
from .block_summaries_attnres import BlockSummaries
from .compat_attnres import CACHE, given_cache, is_for_attention_alone, slice_logits_to_keep
from .configuration_attnres import AttnResConfig
from .decoder_layer_attnres import (
    AttnResDecoderLayer,
    AttnResDecoderLayers,
    backbone_inputs,
    is_run_apart,
    run_decoder_layers,
)
from .depth_attention_attnres import DepthAttention
from .depth_streams_attnres import open_stream
from .depth_variants_attnres import build_depth_attention
from .flat_config_attnres import on_config_class
from .model_class_attnres import FORMER_LEVEL, blank_model, model_class_for, plain_shell
from .peft_attnres import register_peft_targets
from .state_dict_attnres import refuse_lost_adapters, rename_former_names, to_model_names
from .twin_attnres import check_untested_version


@dataclass
class AttnResModelOutputWithPast(MoeModelOutputWithPast):
    """
    Args:
        hidden_states: as for a PreNorm model: entry i is what decoder layer i's token mixer reads (before its norm),
            `[B, T, D]`; the last entry is after the final norm.
        depth_weights: with `output_depth_weights=True`, the weights `[B, T, n]` of each of the L sublayers' mixes and
            of the output mix, in at least fp32. They sum to 1, or to n under `depth_weights="sum"`.
        block_summaries: with `output_block_summaries=True`, the sources `[B, T, N + 1, D]`: embedding, then blocks.
    """

    depth_weights: tuple[torch.Tensor, ...] | None = None
    block_summaries: torch.Tensor | None = None


@dataclass
class AttnResCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Fields as in [`AttnResModelOutputWithPast`], with `loss`, `aux_loss` and `logits` in front."""

    depth_weights: tuple[torch.Tensor, ...] | None = None
    block_summaries: torch.Tensor | None = None


class AttnResPreTrainedModel(PreTrainedModel):
    """What all AttnRes models share: names of weights in files, initialisation of the queries, capabilities."""

    config: AttnResConfig
    config_class = AttnResConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AttnResDecoderLayer"]
    _skip_keys_device_placement = [CACHE, "block_summaries"]
    # Upper bounds: the class that is made for a backbone has the backbone's own.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # PEFT brings an adapter's names by this to the model's: adapters of earlier versions have one level more.
    _checkpoint_conversion_mapping = {FORMER_LEVEL: ""}
    # On the class that is made for a backbone: the backbone's model class, and what makes the class again.
    backbone_model_class: type[PreTrainedModel] | None = None
    made_of: tuple[type, ...] | None = None
    # Where the library keeps the class of its own that plays the part of this one.
    library_classes: Mapping | None = None

    def __new__(cls, config: AttnResConfig | None = None, *args, **kwargs):
        if config is not None and cls.made_of is None:
            cls = model_class_for(cls, config)
        return super().__new__(cls)

    def __init__(self, config: AttnResConfig, *args, **kwargs):
        config.validate_architecture()
        if not isinstance(config, AttnResConfig):
            # Out of a folder, Transformers imports the config's file twice: by itself, and for this one. The generic
            # heads ask `AutoModel` by the config's class.
            AutoModel.register(type(config), AttnResModel, exist_ok=True)
        super().__init__(config, *args, **kwargs)

    def __reduce_ex__(self, protocol: int):
        # No module holds the class under its name: it is made again.
        _, _, *state = super().__reduce_ex__(protocol)
        return (blank_model, self.made_of, *state)

    # The library answers these two by the source of the module that a class is from.

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return (cls.backbone_model_class or super())._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return (cls.backbone_model_class or super())._can_set_experts_implementation()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # For remote code Transformers skips modules without weights of their own, and some of those initialise their
        # children's (the routers of qwen3_next). Loaded weights are left alone either way.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DepthAttention):
            module.init_weights(self.config.depth_query_init_std)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in Transformers; `auto_map` names a class for every task, not only the saved one.

        The code goes with the checkpoint, so any auto class can load it with `trust_remote_code=True`, as it can where
        the package is installed: the base model alone, or another head on top of it.
        """
        if self.made_of[0].__module__ == __name__:  # a subclass from elsewhere brings its own file, not this one
            self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | auto_map(type(self))
        super().save_pretrained(save_directory, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As in torch; takes a checkpoint file's names for the model's own, as `Trainer` gives them on resuming."""
        return super().load_state_dict(to_model_names(self, state_dict), strict=strict, assign=assign)


class AttnResModel(AttnResPreTrainedModel):
    """The backbone's decoder with attention over depth in place of its residual adds.

    An instance belongs to a subclass of the backbone's own model class as well (`isinstance(model, Qwen3Model)`), whose
    constructor builds it: children and their names, initialisation, masks, KV caches and parallel plans are the
    library's. Every decoder layer becomes an [`AttnResDecoderLayer`], and [`DepthAttention`] is the one module with
    weights that is added.

    Raises:
        UnsupportedBackboneError: at construction, if the backbone is not a plain PreNorm decoder.
    """

    library_classes = MODEL_MAPPING

    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        plans = check_backbone(plain_shell(self))
        check_untested_version(config.text_config, build_twin)
        depth_attention, self.depth_form = build_depth_attention(config)
        self.layers = AttnResDecoderLayers(
            AttnResDecoderLayer(layer, plan, index, config.sublayers_per_block)
            for index, (layer, plan) in enumerate(zip(self.layers, plans, strict=True))
        )
        # The embedding as the first source of depth: where sequence sharding cuts it, after masks and positions are
        # made. First of the children, so that a device map puts it beside the embedding.
        children = dict(self._modules)
        self._modules.clear()
        self._modules.update({"depth_input": nn.Identity(), **children})
        self.depth_attention = depth_attention
        self.gradient_checkpointing = False
        self.post_init()

    def post_init(self):
        """As in Transformers, once all is built: the backbone's own constructor calls it before."""
        if "depth_attention" in self._modules:
            super().post_init()

    def __setattr__(self, name: str, value: Any):
        # Others copy, drop or reorder layers by giving a model another list (PEFT's `layer_replication`).
        layers = self.__dict__.get("_modules", {}).get("layers") if name == "layers" else None
        if isinstance(layers, AttnResDecoderLayers) and not _starts_with(layers, value):
            raise ValueError(
                f"`layers` must stay the model's {len(layers)} decoder layers in their order, or the first of them: "
                f"each has queries over depth that belong to its place; got another {type(value).__name__}."
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args):
        # Here, and not in `load_state_dict`, which is called on whatever is around this model (PEFT, DDP...).
        rename_former_names(self, state_dict, prefix)
        refuse_lost_adapters(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        block_summaries: BlockSummaries | None = None,
        output_depth_weights: bool = False,
        output_block_summaries: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> AttnResModelOutputWithPast:
        """
        Args:
            block_summaries: an allocation to reuse for this forward's block summaries; its contents are discarded.
                A forward with gradients takes a new one.
            output_depth_weights: whether to return the weights of every mix over depth.
            output_block_summaries: whether to return the sources of the output mix.
            cache: `past_key_values`, by its newer name.

        The other arguments are those of the backbone.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if is_for_attention_alone(cache):
            kwargs["cache"], cache = cache, None
        cache = given_cache(past_key_values, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        masks, layer_kwargs = backbone_inputs(self, self.config, inputs_embeds, attention_mask, position_ids, cache)
        layer_kwargs.update(use_cache=use_cache, output_depth_weights=output_depth_weights, **kwargs)

        layers = list(self.layers)[: self.config.num_hidden_layers]  # fewer while `assistant_early_exit` drafts
        embedding = self.depth_input(inputs_embeds)
        bank = None
        # Compiled code plans its own memory; a bank from outside would only be guarded and recompiled for.
        if not torch.compiler.is_compiling():
            bank = getattr(cache, "block_summaries", None) if block_summaries is None else block_summaries
        bank = BlockSummaries() if bank is None else bank
        # Beside the embedding, where the bank lies, also if a device map has put the module elsewhere.
        folded = bank.fold_queries(self.depth_attention, embedding)
        queries, norm_floor = (tensor.to(embedding.device) for tensor in folded)
        if 2 * len(layers) + 1 < len(queries):  # an early exit; else the bank knows them from the step before
            queries = queries[: 2 * len(layers) + 1]
        depth = open_stream(
            self.depth_form,
            embedding,
            queries,
            norm_floor,
            bank,
            self.config.sublayers_per_block,
            undivided=not any(is_run_apart(layer, self.training) for layer in layers),
        )
        state = depth.start(embedding)
        wanted = self._wanted_hidden_states(kwargs)
        state, hidden_states, depth_weights = run_decoder_layers(
            layers, depth, state, masks, self.training, wanted, **layer_kwargs
        )
        mix, output_weights = depth.mix_output(state, with_weights=output_depth_weights)
        last_hidden_state = self.norm(mix)
        hidden_states.append(last_hidden_state if len(hidden_states) in wanted else None)

        return AttnResModelOutputWithPast(
            last_hidden_state=last_hidden_state,
            hidden_states=tuple(hidden_states) if wanted else None,
            depth_weights=(*depth_weights, output_weights) if output_depth_weights else None,
            block_summaries=depth.stacked_sources(state) if output_block_summaries else None,
            **{CACHE: cache},
        )

    def _wanted_hidden_states(self, kwargs: dict) -> set[int]:
        """Indices of the hidden states that `output_hidden_states` asks for: none, all, or those it names."""
        requested = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        count = self.config.num_hidden_layers + 1
        if requested is None or requested is False:
            return set()
        if requested is True:
            return set(range(count))
        selected = [requested] if isinstance(requested, int) else requested
        return {index % count for index in selected if -count <= index < count}


def _starts_with(layers: nn.ModuleList, value: Any) -> bool:
    """Whether `value` is a list of the first of `layers`, or of all."""
    if not isinstance(value, nn.ModuleList) or len(value) > len(layers):
        return False
    return all(new is old for new, old in zip(value, layers))


class AttnResForCausalLM(AttnResPreTrainedModel, GenerationMixin):
    """[`AttnResModel`] with the language model head of its backbone."""

    library_classes = MODEL_FOR_CAUSAL_LM_MAPPING
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        self.model = AttnResModel(config)
        check_language_model_head(config.text_config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # As the library's heads have them: others read them here, and set the coefficient.
        for name in ("vocab_size", "num_experts", "num_experts_per_tok", "router_aux_loss_coef"):
            if hasattr(config, name):
                setattr(self, name, getattr(config, name))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> AttnResCausalLMOutputWithPast:
        """
        Args:
            labels: `[B, T]`; the loss is the backbone's next-token cross-entropy.
            output_router_logits: for mixture-of-experts backbones that train with it, whether to return router logits
                and add their load-balancing loss. Defaults to the backbone's config.
            logits_to_keep: how many last positions to compute logits for; 0 for all.
            cache: `past_key_values`, by its newer name.
            kwargs: further arguments of [`AttnResModel`] (`output_depth_weights`, `block_summaries`, ...).

        ```python
        >>> from transformers import AutoTokenizer
        >>> from modeling_attnres import AttnResForCausalLM

        >>> model = AttnResForCausalLM.from_pretrained("path/to/converted")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/converted")
        >>> inputs = tokenizer("The capital of France is", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, max_new_tokens=5)[0])
        ```
        """
        if output_router_logits is None:
            output_router_logits = getattr(self.config, "output_router_logits", False)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits and outputs.router_logits and hasattr(self, "router_aux_loss_coef"):
            num_experts = outputs.router_logits[0].shape[-1]
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, num_experts, self.num_experts_per_tok, attention_mask
            )
            if loss is not None:
                loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)

        return AttnResCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            depth_weights=outputs.depth_weights,
            block_summaries=outputs.block_summaries,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # One bank for the whole `generate`: every decode step reuses its allocation. It goes along with the cache, and not
        # as one more argument: exporters, which record a step's arguments, know tensors and caches alone.
        if isinstance(model_kwargs.get(CACHE), Cache):
            model_kwargs[CACHE].block_summaries = BlockSummaries()

    def _get_candidate_generator(self, *args, model_kwargs: dict[str, Any], **kwargs):
        # The bank is this model's own: an assistant knows no such argument, or makes one itself.
        shared_kwargs = {name: value for name, value in model_kwargs.items() if name != "block_summaries"}
        return super()._get_candidate_generator(*args, model_kwargs=shared_kwargs, **kwargs)


def build_twin(text_config: PreTrainedConfig, with_head: bool) -> AttnResPreTrainedModel:
    """The model that must equal the plain one while its queries are zero; Full AttnRes, where most can go wrong."""
    config = AttnResConfig(text_config=text_config, sublayers_per_block=1, depth_weights="sum")
    return AttnResForCausalLM(config) if with_head else AttnResModel(config)


class AttnResForSequenceClassification(GenericForSequenceClassification, AttnResPreTrainedModel):
    """[`AttnResModel`] with a head for one label for a sequence, read from its last token; a decoder's generic head of the library."""


class AttnResForTokenClassification(GenericForTokenClassification, AttnResPreTrainedModel):
    """[`AttnResModel`] with a head for a label for every token; a decoder's generic head of the library."""


class AttnResForQuestionAnswering(GenericForQuestionAnswering, AttnResPreTrainedModel):
    """[`AttnResModel`] with a head for the first and the last token of an answer; a decoder's generic head of the library."""


# Registered here, not by the package: a checkpoint's own copy of this file has to be as complete. (The generic heads
# build their base model through `AutoModel`.)
AUTO_CLASSES = {
    AutoModel: AttnResModel,
    AutoModelForCausalLM: AttnResForCausalLM,
    AutoModelForQuestionAnswering: AttnResForQuestionAnswering,
    AutoModelForSequenceClassification: AttnResForSequenceClassification,
    AutoModelForTokenClassification: AttnResForTokenClassification,
}
for _auto_class, _model_class in AUTO_CLASSES.items():
    _auto_class.register(AttnResConfig, _model_class)
    # Trainer (for shifting labels), pipelines and model cards look a class's name up here.
    _auto_class._model_mapping._model_mapping[AttnResConfig.model_type] = _model_class.__name__
    _model_class.register_for_auto_class(_auto_class.__name__)


def _register(config_class: type[AttnResConfig]):
    """Maps a config class that was made for a backbone to the models of the class that it was made of."""
    for auto_class, model_class in AUTO_CLASSES.items():
        models = auto_class._model_mapping
        models.register(config_class, models.get(config_class.attnres_config_class, model_class), exist_ok=True)


on_config_class(_register)
register_peft_targets(AttnResConfig.model_type)


def auto_map(model_class: type[AttnResPreTrainedModel]) -> dict[str, str]:
    """The classes in `AUTO_CLASSES`, as the `auto_map` of a checkpoint names them that carries the file of `model_class`."""
    module = model_class.__module__.rpartition(".")[-1]
    return {auto.__name__: f"{module}.{model.__name__}" for auto, model in AUTO_CLASSES.items()}


__all__ = [
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "AttnResPreTrainedModel",
]
