# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What a conversion did: the report that it returns, prints and writes beside the weights."""

from dataclasses import asdict, dataclass, field
from typing import Any

import modeling_attnres


@dataclass
class ConversionReport:
    """What a conversion did, or with `dry_run` would do.

    Attributes:
        source_name, out_name: for the model card; the last part of a path.
        base_model, revision: Hub id and commit of the source, if it came from there.
        source_kind, target: `"prenorm"`, `"attnres"`, or the name of a dialect.
        model_type: of the backbone.
        num_parameters: of the result, `parameters_added` of them depth attention that the source did not have.
        weight_bytes: size of the result's tensors.
        dropped_keys: tensors of the source that the result leaves out.
        unread_keys: tensors of the source that no model reads, kept beside the weights of an AttnRes checkpoint.
        decoded_weights: how many weights of the result were packed in the source.
        tokenizer: what became of the source's tokenizer, in a sentence.
        check: how the result was checked, in a sentence.
        parity: per input the fields of [`Parity`]; empty if logits were not compared.
        written: whether `out` exists now.
    """

    source_name: str
    out_name: str
    base_model: str | None
    source_kind: str
    target: str
    model_type: str
    num_sublayers: int
    sublayers_per_block: int
    num_blocks: int
    depth_weights: str
    queries_are_zero: bool
    dtype: str
    num_parameters: int
    parameters_added: int
    weight_bytes: int
    dropped_keys: list[str]
    unread_keys: list[str] = field(default_factory=list)
    decoded_weights: int = 0
    version: str = modeling_attnres.__version__
    revision: str | None = None
    tokenizer: str = "Not written."
    check: str = "Not run."
    parity: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    written: bool = False

    @property
    def max_logit_difference(self) -> float | None:
        """Largest difference over all inputs that were compared, `None` if none was."""
        return max((row["max_logit_difference"] for row in self.parity.values()), default=None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
