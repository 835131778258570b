import csv
import json
import re

import pytest
import torch
from tiny_backbones import VOCAB_SIZE, tiny_backbone, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from modeling_attnres.eval.dynamics import measure_dynamics
from modeling_attnres.eval.inspect_model import main, read_sequences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An AttnRes model, a PreNorm model, both with a tokenizer of single words, and a text."""
    folder = tmp_path_factory.mktemp("inspect")
    words = [f"w{index}" for index in range(VOCAB_SIZE)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    tiny_model("llama", 2).save_pretrained(folder / "attnres")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_backbone("llama")).save_pretrained(folder / "prenorm")
    for name in ("attnres", "prenorm"):
        tokenizer.save_pretrained(folder / name)
    ids = torch.randint(0, VOCAB_SIZE, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    (folder / "text.txt").write_text(" ".join(words[index] for index in ids))
    return folder


def inspect(folder, output, *models, extra=()):
    models = [str(folder / model) for model in models]
    return main([*models, "--text", str(folder / "text.txt"), "--output", str(output), *extra])


def test_two_models_side_by_side(folder, tmp_path, capsys):
    assert inspect(folder, tmp_path, "prenorm", "attnres", extra=["--sequences", "3", "--tokens", "16"]) == 0
    assert "prenorm" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "dynamics.png",
        "dynamics.csv",
        "depth_weights.png",
        "depth_weights-attnres.csv",
        "summary.json",
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["prenorm", "attnres"]
    rows = list(csv.DictReader((tmp_path / "dynamics.csv").open()))
    ids = torch.tensor([int(word[1:]) for word in (folder / "text.txt").read_text().split()])[:48].view(3, 16)
    for name in ("prenorm", "attnres"):
        expected = measure_dynamics(AutoModelForCausalLM.from_pretrained(folder / name), ids)
        assert summary[name]["magnitude_ratio"] == pytest.approx(expected.magnitude_ratio, rel=1e-5)
        assert summary[name]["gradient_variation"] == pytest.approx(expected.gradient_variation, rel=1e-5)
        found = [float(row["gradient_norm"]) for row in rows if row["model"] == name]
        assert found == pytest.approx(expected.gradient_norm, rel=1e-4)


def test_a_prenorm_model_alone_has_no_depth_weights(folder, tmp_path):
    assert inspect(folder, tmp_path, "prenorm", extra=["--sequences", "1", "--tokens", "8", "--dtype", "bf16"]) == 0
    assert not (tmp_path / "depth_weights.png").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tokens", "200"], "must hold --sequences \\* --tokens = 800 tokens, got 100"),
        (["--tokens", "1"], "`--tokens` at least 2, got 4 and 1"),
        (["--names", "a", "b"], "must give each of the 1 models its own name"),
    ],
)
def test_bad_requests_end_in_one_line(folder, tmp_path, capsys, extra, message):
    assert inspect(folder, tmp_path / "out", "attnres", extra=extra) == 2
    error = capsys.readouterr().err
    assert error.startswith("attnres-inspect: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert re.search(message, error)


def test_sequences_are_the_texts_first_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "attnres")
    found = read_sequences(tokenizer, folder / "text.txt", 2, 5)
    words = (folder / "text.txt").read_text().split()[:10]
    assert found.flatten().tolist() == [int(word[1:]) for word in words]
