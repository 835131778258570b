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
"""Proof of a conversion: logits of source and result on the same tokens.

Letters: B batch, T tokens, V vocabulary.
"""

import gc
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from .checkpoint import ConversionError


NUM_FIXED_TOKENS = 48


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


def tokenize(folder: Path, text: str) -> torch.Tensor:
    """`[1, T]` token ids of `text` by the tokenizer in `folder`."""
    try:
        tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"`check_text` needs the source's tokenizer, which does not load: {error}") from error
    if tokens.numel() == 0:
        raise ConversionError(f"`check_text` has no tokens, got {text!r}.")
    return tokens


def compare_logits(source: torch.Tensor, result: torch.Tensor) -> Parity:
    """Compares logits `[B, T, V]`.

    Raises:
        ParityError: if the source's logits are not finite, which no comparison could prove anything about.
    """
    if not source.isfinite().all():
        raise ParityError("The source's own logits are not finite: its weights are damaged or of another dtype.")
    source, result = source.double(), result.double()
    log_source, log_result = source.log_softmax(-1), result.log_softmax(-1)
    return Parity(
        tokens=math.prod(source.shape[:-1]),
        max_logit_difference=(source - result).abs().nan_to_num(nan=math.inf).max().item(),
        max_logit=source.abs().max().item(),
        kl_divergence=(log_source.exp() * (log_source - log_result)).sum(-1).mean().item(),
        top1_agreement=(source.argmax(-1) == result.argmax(-1)).double().mean().item(),
    )


def load_for_comparison(folder: Path, dtype: torch.dtype, model_class: type) -> PreTrainedModel:
    """A model ready to be compared bit by bit.

    The weights are cloned: memory-mapped tensors start at different alignments in different files, and the matrix
    product of the same numbers then takes another path and differs in the last bits.
    """
    model = model_class.from_pretrained(folder, dtype=dtype).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


@torch.no_grad()
def logits_of(folder: Path, dtype: torch.dtype, model_class: type, inputs: dict[str, torch.Tensor]) -> dict:
    """Logits `[1, T, V]` of the model in `folder` for each of `inputs` `[1, T]`."""
    model = load_for_comparison(folder, dtype, model_class)
    logits = {name: model(input_ids=tokens, use_cache=False).logits for name, tokens in inputs.items()}
    del model
    gc.collect()  # modules hold reference cycles, and the next model may be as large
    return logits
