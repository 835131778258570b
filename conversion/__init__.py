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
"""Conversion of pretrained checkpoints into AttnRes checkpoints, and between conventions of AttnRes."""

from .checkpoint import CheckpointError, ConversionError
from .convert_checkpoint import convert
from .dialects import DialectError
from .parity import ParityError
from .report import ConversionReport


__all__ = ["CheckpointError", "ConversionError", "ConversionReport", "DialectError", "ParityError", "convert"]
