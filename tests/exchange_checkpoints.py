# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Run as a script in an environment of its own: writes checkpoints with the package, or reads them without it.

    python exchange_checkpoints.py write FOLDER    checkpoints with their code, an adapter each, and what they answer
    python exchange_checkpoints.py read FOLDER     largest difference of the answers, by checkpoint, as one line of JSON

The two run under different versions of Transformers: a checkpoint that carries its code is used by whoever finds it.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


BACKBONES = ("llama", "qwen3_moe", "kimi_linear", "kimi_k3_text")
FORMS = ("mean", "sum")


@torch.no_grad()
def answers(model, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits with left padding, and text generated from the cache."""
    padding = torch.ones_like(input_ids)
    padding[0, :3] = 0
    generated = model.generate(
        input_ids=input_ids, attention_mask=padding, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    return {"logits": model(input_ids=input_ids, attention_mask=padding).logits, "generated": generated}


def write(folder: Path):
    from peft import get_peft_model
    from tiny_backbones import tiny_inputs, tiny_model

    from modeling_attnres import attnres_lora_config

    for backbone in BACKBONES:
        for form in FORMS:
            path = folder / f"{backbone}-{form}"
            model = tiny_model(backbone, 3, form)
            model.save_pretrained(path)
            found = answers(model, tiny_inputs())
            adapted = get_peft_model(model, attnres_lora_config(r=4, init_lora_weights=False)).eval()
            adapted.save_pretrained(path / "adapter")
            found |= {f"adapted.{name}": value for name, value in answers(adapted, tiny_inputs()).items()}
            save_file({"input_ids": tiny_inputs(), **found}, folder / f"{path.name}.safetensors")


def read(folder: Path) -> dict[str, float]:
    from load_without_package import package_is_blocked  # which blocks it
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not package_is_blocked():
        raise RuntimeError("The package can be imported here: this would not show that a checkpoint's code is enough.")
    differences = {}
    for file in sorted(folder.glob("*.safetensors")):
        expected = load_file(file)
        input_ids = expected.pop("input_ids")
        model = AutoModelForCausalLM.from_pretrained(folder / file.stem, trust_remote_code=True).eval()
        found = answers(model, input_ids)
        adapted = PeftModel.from_pretrained(model, folder / file.stem / "adapter").eval()
        found |= {f"adapted.{name}": value for name, value in answers(adapted, input_ids).items()}
        if found.keys() != expected.keys():
            raise RuntimeError(f"{sorted(found)} were found, {sorted(expected)} were written.")
        for name, value in expected.items():
            difference = (found[name].double() - value.double()).abs().max().item()
            differences[f"{file.stem}.{name}"] = difference
    return differences


if __name__ == "__main__":
    action, folder = sys.argv[1], Path(sys.argv[2])
    if action == "write":
        write(folder)
        print(json.dumps({"transformers": importlib.metadata.version("transformers")}))
    else:
        print(json.dumps({"transformers": importlib.metadata.version("transformers"), **read(folder)}))
