# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Arguments of `TrainingArguments` whose name depends on the version of Transformers."""

import dataclasses

from transformers import TrainingArguments


_FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
# Whether decoder layers are recomputed in the backward pass.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"


__all__ = ["CHECKPOINTING"]
