# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Presets: model configurations (JSON) and training recipes (YAML), and what loads them."""

from .presets import VARIANTS, list_presets, list_recipes, load_preset, load_recipe


__all__ = ["VARIANTS", "list_presets", "list_recipes", "load_preset", "load_recipe"]
