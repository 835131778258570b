# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Run as a script in a process of its own: loads checkpoints by their own code where the package cannot be imported.

Takes a JSON file that lists jobs, each with `source` (folder or Hub id), `auto_class`, `inputs` (token ids), `again`
(a folder to save to and to load from once more) and `results` (a safetensors file for what came out of both).
"""

import importlib
import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Blocker(MetaPathFinder):
    """Makes the package impossible to import, however it is installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "modeling_attnres":
            raise ModuleNotFoundError(f"{fullname} is blocked", name=fullname)


sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def require(condition: bool, message: str):
    if not condition:
        raise RuntimeError(message)


def package_is_blocked() -> bool:
    try:
        importlib.import_module("modeling_attnres")
    except ModuleNotFoundError as error:
        return "is blocked" in str(error)
    return False


@torch.no_grad()
def outputs(model, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every tensor that the model's head gives; for a language model the text it generates, too."""
    found = model(inputs)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    results = {name: found[name] for name in names if found.get(name) is not None}
    if model.can_generate():
        results["generated"] = model.generate(inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    return results


def run(job: dict):
    inputs = torch.tensor(job["inputs"])
    auto_class = getattr(transformers, job["auto_class"])
    results = {}
    for name, source in (("first", job["source"]), ("again", job["again"])):
        model = auto_class.from_pretrained(source, trust_remote_code=True).eval()
        require(
            type(model).__module__.startswith("transformers_modules."), f"{type(model)} is not the checkpoint's code"
        )
        require(not any(module.partition(".")[0] == "modeling_attnres" for module in sys.modules), "package imported")
        results |= {f"{name}.{key}": value for key, value in outputs(model, inputs).items()}
        if name == "first":
            model.save_pretrained(job["again"])
    save_file(results, job["results"])


if __name__ == "__main__":
    require(package_is_blocked(), "modeling_attnres can be imported here")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
