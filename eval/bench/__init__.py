# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Cost of attention over depth, measured side by side with the PreNorm base and the paper's Figure 2."""
