# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Conversion of pretrained checkpoints into AttnRes checkpoints, and between conventions of AttnRes."""

from .checkpoint import CheckpointError, ConversionError
from .convert_checkpoint import convert
from .dialects import DialectError
from .parity import ParityError
from .report import ConversionReport


__all__ = ["CheckpointError", "ConversionError", "ConversionReport", "DialectError", "ParityError", "convert"]
