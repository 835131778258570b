# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A server sends a config to its workers with the code of its class, since that code is a checkpoint's."""

from pathlib import Path

from fresh_process import run_python
from tiny_backbones import tiny_model


SEND = """
import sys
import cloudpickle
from load_without_package import package_is_blocked  # which blocks it
from transformers import AutoConfig, AutoModelForCausalLM

assert package_is_blocked()
folder = sys.argv[1]
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # every class has been made and registered
import transformers_modules

cloudpickle.register_pickle_by_value(transformers_modules)
with open("config.pickle", "wb") as file:
    cloudpickle.dump(AutoConfig.from_pretrained(folder, trust_remote_code=True), file)
"""
RECEIVE = """
import json
import pickle
from pathlib import Path

config = pickle.loads(Path("config.pickle").read_bytes())
print(json.dumps([type(config).__name__, config.num_blocks, config.text_config.model_type, config.hidden_size]))
"""


def test_a_config_is_sent_by_value(tmp_path):
    model = tiny_model("qwen3_moe", 3, "sum")
    model.save_pretrained(tmp_path / "model")
    tests = str(Path(__file__).parents[1])
    run_python("-c", SEND, tmp_path / "model", folder=tmp_path, PYTHONPATH=tests, HF_HUB_OFFLINE="1")
    modules = tmp_path / "hf_home" / "modules"  # a worker has its parent's path
    process = run_python("-c", RECEIVE, folder=tmp_path, PYTHONPATH=str(modules), HF_HUB_OFFLINE="1")
    assert process.stdout.splitlines()[-1] == '["AttnResConfig", 3, "qwen3_moe", 32]'
