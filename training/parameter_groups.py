# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A learning rate of their own for the pseudo-queries.

A converted model's queries start at zero, so each Adam step moves them by about the learning rate, not by a share of their size.
On SmolLM2-135M, Adam on the queries alone falls steadily at 3e-4 and explodes at 3e-3 (loss 5.66 -> 8.99), while a
backbone is fine-tuned at 2e-5 and LoRA at 2e-4 and more: no one rate fits both.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory


DEFAULT_QUERY_LR = 3e-4

# By name, as Trainer does it: names outlive DDP, FSDP2, PEFT's copies (`modules_to_save`) and torch.compile.
_DEPTH_ATTENTION = re.compile(r"(?:^|\.)depth_attention\.")
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|[._])norm(?:$|\.)", re.IGNORECASE)
_FLATTENED = re.compile(r"(?:^|\.)(?:_fsdp_wrapped_module|_flat_param)(?:$|\.)")


def attnres_parameter_groups(
    model: nn.Module, lr: float, query_lr: float = DEFAULT_QUERY_LR, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The model's trainable parameters in groups for any optimizer.

    ```python
    optimizer = torch.optim.AdamW(attnres_parameter_groups(model, lr=2e-5, weight_decay=0.1))
    ```

    Queries and key norms (every parameter of `depth_attention`) learn at `query_lr` and never decay: zero queries are
    the plain residual stream, so decay would pull the model back to it. Of the rest, matrices decay; biases, norms and
    other vectors do not.

    The queries are one stacked `[L, D]` tensor, which looks like a matrix to optimizers such as Muon. It is a list of
    L vectors and must not be orthogonalised: give Muon the group "decay" (without embedding and head), and Adam the
    group "depth_attention".

    Args:
        model: a model with depth attention, as it is or wrapped by PEFT, DDP, FSDP2 or `torch.compile`.
        lr: learning rate of the backbone, or of its adapter.
        query_lr: learning rate of the queries and key norms. The default suits fine-tuning with Adam. Pretraining from
            scratch may use `lr` for both, as in the paper; the projections of an input-dependent query want a quarter
            of it or less, since one Adam step moves a score by up to `D * D` times the rate.
        weight_decay: of the matrices outside depth attention.

    Returns:
        Up to three groups, the empty ones left out, each with `name` ("decay", "no_decay", "depth_attention"),
        `params`, `lr` and `weight_decay`. Frozen parameters are in none.

    Raises:
        ValueError: if a rate is negative, the model has no depth attention, all of it is frozen, or FSDP1 has
            flattened the parameters (with FSDP1, make the groups first; FSDP2 keeps them apart).
    """
    for argument, value in (("lr", lr), ("query_lr", query_lr), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"`{argument}` must not be negative, got {value!r}.")
    named = list(model.named_parameters())
    if any(_FLATTENED.search(name) for name, _ in named):
        raise ValueError("`model` is wrapped by FSDP1, which flattens its parameters: they cannot be told apart.")
    if not any(_DEPTH_ATTENTION.search(name) for name, _ in named):
        raise ValueError(f"`model` must have depth attention, got a {type(model).__name__} without.")

    parameters: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "depth_attention": []}
    for name, parameter in named:
        if parameter.requires_grad:
            parameters[_group_of(name, parameter)].append(parameter)
    if not parameters["depth_attention"]:
        raise ValueError(
            "`query_lr` has nothing to train: the model's depth attention is frozen. Under PEFT, "
            "`attnres_lora_config()` trains it beside the adapter; to keep it frozen, no groups of its own are needed."
        )
    rates = {"decay": (lr, weight_decay), "no_decay": (lr, 0.0), "depth_attention": (query_lr, 0.0)}
    return [
        {"name": name, "params": parameters[name], "lr": rate, "weight_decay": decay}
        for name, (rate, decay) in rates.items()
        if parameters[name]
    ]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if _DEPTH_ATTENTION.search(name):
        return "depth_attention"
    shape = getattr(parameter, "ds_shape", parameter.shape)  # under DeepSpeed's ZeRO-3 a parameter is empty at rest
    return "no_decay" if len(shape) < 2 or _NO_DECAY.search(name) else "decay"


class AttnResOptimizerFactory:
    """Builds an optimizer over [`attnres_parameter_groups`] of the model that Trainer ends up with.

    Trainer instantiates it and calls it with the model, after wrapping it in PEFT or FSDP where that comes first.
    """

    def __call__(
        self,
        model: nn.Module,
        optimizer_class: Callable[..., torch.optim.Optimizer],
        query_lr: float,
        weight_decay: float,
        lr: float,
        **kwargs,
    ) -> torch.optim.Optimizer:
        return optimizer_class(attnres_parameter_groups(model, lr, query_lr, weight_decay), lr=lr, **kwargs)


def attnres_optimizer(
    args: TrainingArguments, query_lr: float = DEFAULT_QUERY_LR
) -> tuple[type[AttnResOptimizerFactory], dict[str, Any]]:
    """What `Trainer` and TRL's trainers take as `optimizer_cls_and_kwargs`.

    ```python
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=attnres_optimizer(args), ...)
    ```

    The optimizer is `args.optim` with its usual arguments, `args.learning_rate` and `args.weight_decay`. The learning
    rate schedule multiplies both rates alike; the one that Trainer logs is that of the first group.

    Args:
        args: the trainer's `TrainingArguments` (or `SFTConfig`...).
        query_lr: as in [`attnres_parameter_groups`].

    Raises:
        ValueError: if `args.optim` makes its own parameter groups (GaLore, APOLLO, LOMO...).
    """
    refusal = f"`args.optim` must be an optimizer that takes parameter groups, got {str(args.optim)!r}"
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError as error:
        raise ValueError(f"{refusal} ({error}).") from error
    if is_optimizer_factory(optimizer_class) or {"params", "model", "optimizer_dict"} & set(kwargs):
        raise ValueError(f"{refusal}.")
    own = {"optimizer_class": optimizer_class, "query_lr": query_lr, "weight_decay": args.weight_decay}
    return AttnResOptimizerFactory, {**kwargs, **own}
