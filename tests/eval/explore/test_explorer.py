# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import csv
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from naive_ablation import naive_gated_logits
from tiny_backbones import NUM_SUBLAYERS, VOCAB_SIZE, tiny_backbone, tiny_inputs, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_attnres.eval.explore.explorer import Explorer, RefusedError, predictions_csv, weights_csv


# fp32: gated mixes sum in another order than the model's two phases.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
IDS = tiny_inputs(batch=1, tokens=9)
TEXT = " ".join(f"w{index}" for index in IDS[0].tolist())


def tokenizer(size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is the word wi."""
    words = {f"w{index}": index for index in range(size)}
    words_alone = Tokenizer(models.WordLevel(words, unk_token="w0"))
    words_alone.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_alone, unk_token="w0")


def explorer(sublayers_per_block: int = 3, depth_weights: str = "sum", **changes) -> Explorer:
    return Explorer(
        tiny_model("llama", sublayers_per_block, depth_weights), tokenizer(), **{"max_tokens": 16, **changes}
    )


def losses_of(logits: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:], reduction="none")


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize("sublayers_per_block", [1, 3, 4])
def test_a_run_is_the_models_own_forward(sublayers_per_block, depth_weights):
    shown = explorer(sublayers_per_block, depth_weights)
    run = shown.run(shown.read(TEXT))
    with torch.no_grad():
        outputs = shown.model(IDS, output_depth_weights=True, output_hidden_states=True)
        assert run.loss == pytest.approx(shown.model(IDS, labels=IDS).loss.item(), abs=1e-6)
    assert torch.equal(run.losses, losses_of(outputs.logits))
    assert torch.equal(run.hidden, outputs.hidden_states[-1][0])
    for sublayer, weights in enumerate(outputs.depth_weights):
        n = weights.shape[-1]
        assert n == shown.sources_of(sublayer) == run.scale[sublayer]
        total = n if depth_weights == "sum" else 1
        torch.testing.assert_close(run.shares[:, sublayer, :n] * total, weights[0])
        assert run.shares[:, sublayer, n:].isnan().all()
    assert torch.equal(run.heatmap(4).nan_to_num(2), run.shares[4].nan_to_num(2))
    torch.testing.assert_close(run.heatmap(None)[5, 0], run.shares[:, 5, 0].mean())


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize("sublayers_per_block", [1, 3, 4])
def test_weakened_connections_against_brute_force(sublayers_per_block, depth_weights):
    shown = explorer(sublayers_per_block, depth_weights)
    kept = {(1, 0): 0.25, (3, 1): 0.0, (6, 1): 0.5, (NUM_SUBLAYERS, 0): 0.0, (5, 0): 1.0}
    text = shown.read(TEXT)
    run = shown.run(text, kept)
    torch.testing.assert_close(run.losses, losses_of(naive_gated_logits(shown.model, kept, IDS)), **CLOSE)

    own = shown.run(text)
    # Sublayer 1 reads the same sources as before: its share is the model's, with the kept part.
    parts = torch.tensor([0.25, 1.0])
    expected = own.shares[:, 1, :2] * parts
    torch.testing.assert_close(run.shares[:, 1, :2], expected / expected.sum(-1, keepdim=True))
    assert run.scale[1] == 1.25
    assert (run.shares[:, 3, 1] == 0).all()
    assert (run.shares[:, NUM_SUBLAYERS, 0] == 0).all()
    assert torch.equal(shown.run(text, {(5, 0): 1.0}).losses, own.losses)


def test_zero_queries_are_the_prenorm_model():
    shown = explorer(2, "sum")
    plain = AutoModelForCausalLM.from_config(tiny_backbone("llama")).eval()
    assert not plain.load_state_dict(shown.model.state_dict(), strict=False).missing_keys
    query = shown.model.model.depth_attention.query.clone()
    text = shown.read(TEXT)
    run = shown.run_plain(text)
    with torch.no_grad():
        assert torch.equal(run.losses, losses_of(plain(IDS).logits))
    torch.testing.assert_close((run.shares * run.scale).nan_to_num(1), torch.ones_like(run.shares))
    assert torch.equal(shown.model.model.depth_attention.query, query)
    assert not torch.equal(shown.run(text).losses, run.losses)


def test_zero_queries_under_mean_are_averages():
    shown = explorer(2, "mean")
    text = shown.read(TEXT)
    run = shown.run_plain(text)
    torch.nn.init.zeros_(shown.model.model.depth_attention.query)
    assert torch.equal(run.losses, shown.run(text).losses)


def test_next_tokens_of_several_runs():
    shown = explorer()
    text = shown.read(TEXT)
    runs = [shown.run(text), shown.run(text, {(4, 0): 0.0})]
    found = shown.next_tokens(runs, 5, count=4)
    with torch.no_grad():
        expected = torch.stack([shown.model.lm_head(run.hidden[5]).softmax(-1) for run in runs])
        torch.testing.assert_close(expected[0], shown.model(IDS).logits[0, 5].softmax(-1))
    assert {token.token_id for token in found} == set(expected.amax(0).topk(4).indices.tolist())
    assert [token.piece for token in found] == [f"w{token.token_id}" for token in found]
    for token in found:
        assert token.probabilities == pytest.approx(expected[:, token.token_id].tolist(), rel=1e-6)
    first = [token.probabilities[0] for token in found]
    assert first == sorted(first, reverse=True)
    assert len(shown.next_tokens(runs, 0, count=1000)) == VOCAB_SIZE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w1 " * 17, "Too long: a text may have 16 tokens and 640 characters; this one has 17 tokens."),
        ("w" * 641, "Too long: a text may have 16 tokens and 640 characters; this one has 641 characters."),
        ("w1", "Too short: a text needs at least 2 tokens, this one has 1."),
        ("", "Too short: a text needs at least 2 tokens, this one has 0."),
        (f"w1 w{VOCAB_SIZE}", f"The tokenizer makes a token that the model does not know: {VOCAB_SIZE}."),
    ],
)
def test_texts_that_are_refused(text, message):
    shown = Explorer(tiny_model("llama", 2), tokenizer(VOCAB_SIZE + 1), max_tokens=16)
    with pytest.raises(RefusedError) as raised:
        shown.read(text)
    assert str(raised.value) == message
    assert len(shown.read("w1 " * 16).ids) == 16


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({(0, 0): 0.0}, "Sublayer 0 reads the embedding alone"),
        ({(1, 0): 0.0, (1, 1): 0.0}, "Sublayer 1 must keep at least one of its sources"),
    ],
)
def test_connections_that_are_refused(kept, message):
    shown = explorer()
    with pytest.raises(RefusedError, match=message):
        shown.run(shown.read(TEXT), kept)


def test_a_variant_without_a_softmax_is_refused():
    with pytest.raises(ValueError, match="must mix by one softmax over depth"):
        Explorer(tiny_model("llama", 2, depth_attention_type="sigmoid"), tokenizer(), 16)


def test_people_at_the_same_time_see_what_each_would_see_alone():
    shown = explorer()
    text = shown.read(TEXT)
    jobs = [lambda: shown.run(text), lambda: shown.run(text, {(5, 1): 0.0}), lambda: shown.run_plain(text)]
    alone = [job().losses for job in jobs]
    assert not torch.equal(alone[0], alone[2])
    with ThreadPoolExecutor(6) as pool:
        found = [future.result() for future in [pool.submit(job) for _ in range(10) for job in jobs]]
    for index, run in enumerate(found):
        assert torch.equal(run.losses, alone[index % 3])


def test_nothing_runs_after_close():
    shown = explorer()
    text = shown.read(TEXT)
    shown.close()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shown.run, text)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        shown._turn.release()  # or the pool would wait for ever
        assert waiting.result(timeout=60).loss > 0


def test_names():
    shown = explorer(3)
    assert shown.name((0, 0)) == "layer 0 token mixer reads embedding"
    assert shown.name((3, 1)) == "layer 1 feed-forward reads block 1"
    assert shown.name((4, 2)) == "layer 2 token mixer reads block 2 so far"
    assert shown.name((NUM_SUBLAYERS, 2)) == "output reads block 2"


def test_a_piece_that_is_no_text_is_shown_by_its_name():
    shown = explorer()
    shown.tokenizer.add_special_tokens({"additional_special_tokens": ["w3"]})
    assert shown._piece(3) == "w3"

    class HalfCharacters:
        def decode(self, ids):
            return "\N{REPLACEMENT CHARACTER}"

        def convert_ids_to_tokens(self, token_id):
            return "Ã"

    shown.tokenizer = HalfCharacters()
    assert shown._piece(3) == "Ã"


def test_tables():
    shown = explorer(4)
    text, kept = shown.read(TEXT), {(5, 1): 0.5}
    run = shown.run(text, kept)
    rows = list(csv.DictReader(io.StringIO(weights_csv(shown, run, 2, kept))))
    assert len(rows) == sum(map(shown.sources_of, range(NUM_SUBLAYERS + 1)))
    (row,) = [row for row in rows if (row["sublayer"], row["source"]) == ("5", "1")]
    assert (row["sublayer_name"], row["source_name"]) == ("layer 2 feed-forward", "block 1")
    assert float(row["kept"]) == 0.5
    assert float(row["share"]) == pytest.approx(float(run.shares[2, 5, 1]), rel=1e-5)
    assert float(row["times_plain"]) == pytest.approx(float(run.shares[2, 5, 1] * 2.5), rel=1e-5)

    tokens = shown.next_tokens([run], 2)
    rows = list(csv.DictReader(io.StringIO(predictions_csv(tokens, ["as it is"]))))
    assert [int(row["token_id"]) for row in rows] == [token.token_id for token in tokens]
    assert float(rows[0]["as it is"]) == pytest.approx(tokens[0].probabilities[0], rel=1e-5)
