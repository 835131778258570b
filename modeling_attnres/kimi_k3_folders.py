# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Folders in Kimi K3's own layout are converted before they are loaded: whoever loads one is told the command."""

from typing import NoReturn

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


class KimiK3Config(PreTrainedConfig):
    """The multimodal config of a released folder, whose depth attention lies in tensors that only a conversion reads.

    Raises:
        ValueError: always, with the command that converts the folder.
    """

    model_type = "kimi_k3"

    def __post_init__(self, **kwargs) -> NoReturn:
        raise ValueError(
            "A 'kimi_k3' checkpoint in its own layout is converted before it is loaded: `attnres-convert SOURCE OUT`, "
            "then load OUT."
        )


def refuse_kimi_k3_folders():
    """Has the auto classes answer to `kimi_k3`, unless the installed Transformers knows it."""
    if KimiK3Config.model_type not in CONFIG_MAPPING:
        AutoConfig.register(KimiK3Config.model_type, KimiK3Config)
