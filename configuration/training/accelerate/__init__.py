# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Configurations for `accelerate launch --config_file`: no recipes, but ways to run one."""
