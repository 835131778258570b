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
"""GGUF files as sources: dequantised by Transformers into a plain checkpoint folder."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .checkpoint import ConversionError


def unpack_gguf(file: Path, folder: Path, dtype: torch.dtype | None):
    """Writes the model and tokenizer of a GGUF file as a plain checkpoint folder. Loads the whole model into memory.

    Args:
        dtype: of the weights; fp32 by default, which holds every dequantised value.

    Raises:
        ConversionError: if the file cannot be read or `gguf` is not installed.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype or torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise ConversionError(
            f"Reading {file} needs the `gguf` package: pip install 'modeling-attnres[gguf]'."
        ) from error
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, TypeError, NotImplementedError) as error:
        raise ConversionError(f"{file}: Transformers cannot read this GGUF file ({error}).") from error
    # What was loaded is flagged as quantised and refuses to be saved: its weights go into a plain model.
    config = loaded.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
