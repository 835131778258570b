# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Does retrofitting AttnRes onto a pretrained model help at equal cost? The study of docs/evidence.md, resumable."""
