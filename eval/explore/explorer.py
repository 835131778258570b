# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What a model reads over depth in one text, and what it predicts with some of its connections weakened.

Letters: T tokens, D hidden size, L sublayers, S sublayers per block, N blocks, n sources of a mix, V vocabulary.

A *connection* is a pair (sublayer, source): both are counted from 0, sublayer L is the output mix, source 0 the embedding.
Its *kept part* is between 0, where the connection is removed, and 1, where it is as the model has it.
"""

import csv
import io
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from modeling_attnres import AttnResForCausalLM

from ..ablation import Connection, GatedStream, check_ablation, check_gates, decode_gated, num_sources


# Longer texts are refused before they are tokenized, which may take a while.
CHARACTERS_PER_TOKEN = 40


class RefusedError(ValueError):
    """A text or a connection cannot be what was asked for; the message says why, to the person at the page."""


@dataclass(frozen=True)
class Text:
    """A text as the model reads it.

    Attributes:
        ids: T token ids.
        pieces: the same as text, one piece a token.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What one forward over a text found. All tensors are on the CPU, in fp32.

    Attributes:
        shares: `[T, L + 1, N + 1]`, how each mix divides its weight; sums to 1 over the sources, NaN where a source does
            not exist yet.
        scale: `[L + 1, 1]`, by which a share is a weight relative to the plain residual stream's: the sum of all kept
            parts, which is n where nothing is weakened.
        losses: `[T - 1]` in nats; entry t is about token t + 1.
        hidden: `[T, D]`, what the head reads.
    """

    shares: torch.Tensor
    scale: torch.Tensor
    losses: torch.Tensor
    hidden: torch.Tensor

    @property
    def loss(self) -> float:
        """The mean over tokens, in nats."""
        return float(self.losses.mean())

    def heatmap(self, token: int | None) -> torch.Tensor:
        """The shares `[L + 1, N + 1]` of one token, or their mean over all."""
        return self.shares.mean(0) if token is None else self.shares[token]


@dataclass(frozen=True)
class NextToken:
    """A token that may follow, and its probability in each of the runs that were asked."""

    token_id: int
    piece: str
    probabilities: tuple[float, ...]


class WatchedStream(GatedStream):
    """A stream that keeps the weights `[B, T, n]` of all its mixes, as they are without gates."""

    def start(self, embedding: torch.Tensor):
        self.weights: list[torch.Tensor] = []
        return super().start(embedding)

    def mix(self, read, *state: torch.Tensor):
        mix, found = super().mix(read, *state)
        self.weights.append(self.mix_weights(read, found))
        return mix, found


class Explorer:
    """A model and its tokenizer, for any number of people at the same time: calls take turns, and nothing is kept.

    Args:
        model: an AttnRes language model.
        tokenizer: its tokenizer.
        max_tokens: how long a text may be.

    Raises:
        ValueError: if the depth attention of `model` is a variant whose connections cannot be weakened.
    """

    def __init__(self, model: AttnResForCausalLM, tokenizer, max_tokens: int):
        check_ablation(model.config)
        self.model, self.tokenizer, self.max_tokens = model.eval(), tokenizer, max_tokens
        self.num_sublayers, self.sublayers_per_block = model.config.num_sublayers, model.config.sublayers_per_block
        self.num_sources = model.config.num_blocks + 1
        # With zero queries a forward has other tensors in the model for as long as it runs.
        self._turn = threading.Lock()

    def close(self):
        """Waits for the call that is running and lets no other begin: a process cannot end inside a forward."""
        self._turn.acquire()

    # --- Text

    def read(self, text: str) -> Text:
        """
        Raises:
            RefusedError: if the text is too short or too long, or has a token that the model lacks.
        """
        limit = f"a text may have {self.max_tokens:,} tokens and {self.max_tokens * CHARACTERS_PER_TOKEN:,} characters"
        if len(text) > self.max_tokens * CHARACTERS_PER_TOKEN:
            raise RefusedError(f"Too long: {limit}; this one has {len(text):,} characters.")
        ids = self.tokenizer(text)["input_ids"]
        if len(ids) > self.max_tokens:
            raise RefusedError(f"Too long: {limit}; this one has {len(ids):,} tokens.")
        if len(ids) < 2:
            raise RefusedError(f"Too short: a text needs at least 2 tokens, this one has {len(ids)}.")
        if max(ids) >= self.model.config.vocab_size:
            raise RefusedError(f"The tokenizer makes a token that the model does not know: {max(ids)}.")
        return Text(tuple(ids), tuple(self._piece(token_id) for token_id in ids))

    def _piece(self, token_id: int) -> str:
        piece = self.tokenizer.decode([token_id])
        # A part of a character, or nothing at all: the vocabulary's own name says more.
        if not piece or "\N{REPLACEMENT CHARACTER}" in piece:
            piece = str(self.tokenizer.convert_ids_to_tokens(token_id))
        return piece

    # --- Runs

    @torch.no_grad()
    def run(self, text: Text, kept: Mapping[Connection, float] | None = None) -> Run:
        """The model's forward with the connections of `kept` weakened; without any, the model as it is.

        Raises:
            RefusedError: if a sublayer would have no source left.
        """
        kept = {connection: part for connection, part in (kept or {}).items() if part != 1}
        try:
            check_gates(self.model.config, kept)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        ids, decoder = torch.tensor([text.ids], device=self.model.device), self.model.model
        with self._turn:
            if not kept:
                outputs = decoder(input_ids=ids, use_cache=False, output_depth_weights=True)
                return self._as_run(outputs.last_hidden_state, outputs.depth_weights, ids, kept)
            hidden, depth = decode_gated(decoder, decoder.embed_tokens(ids), kept, stream=WatchedStream)
            return self._as_run(hidden, depth.weights, ids, kept)

    @torch.no_grad()
    def run_plain(self, text: Text) -> Run:
        """The same weights with zero queries, so that no source is preferred.

        Under `"sum"` that is the PreNorm model, under `"mean"` every mix is the average of its sources.
        """
        ids = torch.tensor([text.ids], device=self.model.device)
        zeros = {"depth_attention.query": torch.zeros_like(self.model.model.depth_attention.query)}
        with self._turn:
            inputs = {"input_ids": ids, "use_cache": False, "output_depth_weights": True}
            outputs = functional_call(self.model.model, zeros, (), inputs)
            return self._as_run(outputs.last_hidden_state, outputs.depth_weights, ids, {})

    def _as_run(self, hidden, depth_weights, ids: torch.Tensor, kept: Mapping[Connection, float]) -> Run:
        losses = nn.functional.cross_entropy(self.model.lm_head(hidden[0, :-1]).float(), ids[0, 1:], reduction="none")
        shares = torch.full((ids.shape[1], self.num_sublayers + 1, self.num_sources), math.nan)
        scale = torch.empty(self.num_sublayers + 1, 1)
        for sublayer, weights in enumerate(depth_weights):
            n = weights.shape[-1]
            parts = torch.tensor([kept.get((sublayer, source), 1.0) for source in range(n)])
            weights = weights[0].float().cpu() * parts
            shares[:, sublayer, :n] = weights / weights.sum(-1, keepdim=True)
            scale[sublayer] = parts.sum()
        return Run(shares, scale, losses.cpu(), hidden[0].float().cpu())

    @torch.no_grad()
    def next_tokens(self, runs: Sequence[Run], position: int, count: int = 10) -> list[NextToken]:
        """The `count` tokens that one of the runs finds likeliest after `position`, by their likelihood in the first."""
        hidden = torch.stack([run.hidden[position] for run in runs]).to(self.model.device, self.model.dtype)
        with self._turn:
            probabilities = self.model.lm_head(hidden).float().softmax(-1).cpu()
        ids = probabilities.amax(0).topk(min(count, probabilities.shape[-1])).indices
        ids = ids[probabilities[0, ids].argsort(descending=True, stable=True)]
        return [
            NextToken(token_id, self._piece(token_id), tuple(probabilities[:, token_id].tolist()))
            for token_id in ids.tolist()
        ]

    # --- Names

    def sources_of(self, sublayer: int) -> int:
        """n, the number of sources that a sublayer reads."""
        return num_sources(self.model.config, sublayer)

    def name_sublayer(self, sublayer: int) -> str:
        if sublayer == self.num_sublayers:
            return "output"
        return f"layer {sublayer // 2} {'feed-forward' if sublayer % 2 else 'token mixer'}"

    def name_source(self, sublayer: int, source: int) -> str:
        if source == 0:
            return "embedding"
        is_open = source == sublayer // self.sublayers_per_block + 1
        return f"block {source} so far" if is_open else f"block {source}"

    def name(self, connection: Connection) -> str:
        return f"{self.name_sublayer(connection[0])} reads {self.name_source(*connection)}"


# --- Tables ----------------------------------------------------------------------------------------------------------


def weights_csv(explorer: Explorer, run: Run, token: int | None, kept: Mapping[Connection, float]) -> str:
    """A heatmap as a table, one connection a row."""
    rows = [["sublayer", "source", "sublayer_name", "source_name", "kept", "share", "times_plain"]]
    matrix = run.heatmap(token)
    for sublayer in range(len(matrix)):
        for source in range(explorer.sources_of(sublayer)):
            share = float(matrix[sublayer, source])
            names = explorer.name_sublayer(sublayer), explorer.name_source(sublayer, source)
            part = kept.get((sublayer, source), 1.0)
            rows.append([sublayer, source, *names, part, f"{share:.6g}", f"{share * float(run.scale[sublayer]):.6g}"])
    return _as_csv(rows)


def predictions_csv(tokens: Sequence[NextToken], columns: Sequence[str]) -> str:
    """Next tokens as a table; `columns` name the runs."""
    rows = [["token_id", "token", *columns]]
    rows += [[token.token_id, token.piece, *(f"{part:.6g}" for part in token.probabilities)] for token in tokens]
    return _as_csv(rows)


def _as_csv(rows: Sequence[Sequence]) -> str:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()
