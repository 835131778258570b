# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from fresh_process import LOADER, run_python
from tiny_checkpoints import save_backbone, save_tokenizer
from tiny_tokenizers import VOCAB_SIZE, save_tekken
from transformers import AutoTokenizer

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.conversion import convert


def snippet(card: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return code


# The package is blocked by the import; nobody is there to answer a question.
AS_PRINTED = """
import json, sys
sys.path.insert(0, {tests!r})
import load_without_package

sys.stdin = None
exec({code!r})
if "modeling_attnres" in sys.modules:
    raise RuntimeError("the package was imported")
ids = tokenizer("depth attends over blocks", return_tensors="pt").input_ids
print(json.dumps([type(model).__name__, ids.tolist(), model(ids).logits.tolist()]))
"""


@pytest.mark.parametrize(("save", "out"), [(save_tokenizer, "out"), (save_tekken, 'a "quoted" name')])
def test_snippet_runs_as_printed_without_the_package(tmp_path, save, out):
    source = save_backbone(tmp_path / "source", vocab_size=VOCAB_SIZE)
    save(source)
    convert(source, tmp_path / out, check=False)
    code = snippet(tmp_path / out / "README.md")
    process = run_python("-c", AS_PRINTED.format(tests=str(LOADER.parent), code=code), folder=tmp_path)
    name, ids, logits = json.loads(process.stdout.strip().splitlines()[-1])
    expected = AutoTokenizer.from_pretrained(source)("depth attends over blocks", return_tensors="pt").input_ids
    assert (name, ids) == ("AttnResForCausalLM", expected.tolist())
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(logits),
            AttnResForCausalLM.from_pretrained(tmp_path / out)(expected).logits,
            rtol=0,
            atol=1e-5,
        )


def test_card_is_valid_whatever_the_source_is_called(tmp_path, llama):
    source = llama.rename(tmp_path / "odd | name")
    convert(source, tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    rows = [line for line in card.splitlines() if line.startswith("| tokenizer")]
    assert rows == ["| tokenizer | The source has none. |"]
