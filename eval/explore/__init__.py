# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-explore`: a local page that shows what a model reads over depth, and what changes when it may not."""
