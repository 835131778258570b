# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from fresh_process import LOADER, load_results, run_python
from hub_server import TOKEN, HubServer
from tiny_backbones import tiny_inputs, tiny_model

from modeling_attnres import AttnResForCausalLM, AttnResForSequenceClassification, AttnResModel


REPO = "user/tiny"
CLASSIFIER = "user/classifier"
PUSH = f"""
from modeling_attnres import AttnResForCausalLM, AttnResForSequenceClassification

model = AttnResForCausalLM.from_pretrained("../source")
model.save_pretrained("saved")
for _ in range(2):
    print(model.push_to_hub("{REPO}").oid)
AttnResForSequenceClassification.from_pretrained("../classifier").push_to_hub("{CLASSIFIER}")
"""
# (what is pulled, class that loads it, what it was pushed from, package's class)
PULLS = [
    (REPO, "AutoModelForCausalLM", "source", AttnResForCausalLM),
    (REPO, "AutoModel", "source", AttnResModel),
    (CLASSIFIER, "AutoModelForSequenceClassification", "classifier", AttnResForSequenceClassification),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub to which one process has pushed models, and from which another has loaded them without the package."""
    folder = tmp_path_factory.mktemp("hub")
    tiny_model("llama").save_pretrained(folder / "source")
    tiny_model("llama", model_class=AttnResForSequenceClassification).save_pretrained(folder / "classifier")
    jobs = [
        {
            "source": repo,
            "auto_class": auto_class,
            "inputs": tiny_inputs().tolist(),
            "again": str(folder / f"{auto_class}-again"),
            "results": str(folder / f"{auto_class}.safetensors"),
        }
        for repo, auto_class, _, _ in PULLS
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "push").mkdir()
    with HubServer() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        pushed = run_python("-c", PUSH, folder=folder / "push", HF_TOKEN=TOKEN, **environment)
        pushes, server.requests[:] = list(server.requests), []
        run_python(LOADER, folder / "jobs.json", folder=folder, **environment)
        commits = pushed.stdout.split()
        yield {"folder": folder, "server": server, "commits": commits, "pushes": pushes, "pulls": [*server.requests]}


def test_the_hub_holds_the_files_that_saving_writes(hub):
    oid, files = hub["server"].repositories[REPO].commits[-1]
    saved = {path.name: path.read_bytes() for path in (hub["folder"] / "push" / "saved").iterdir()}
    assert {path: file.content for path, file in files.items() if path != "README.md"} == saved
    assert [path for path, file in files.items() if file.is_lfs] == ["model.safetensors"]
    assert b"library_name: transformers" in files["README.md"].content
    assert hub["commits"] == [oid, oid]  # the second push found nothing to change


def test_the_client_used_the_hubs_own_endpoints(hub):
    assert hub["server"].unknown == []
    weights = hub["server"].repositories[REPO].commits[-1][1]["model.safetensors"]
    for request in (
        "POST /api/repos/create",
        f"POST /api/models/{REPO}/preupload/main",
        f"POST /{REPO}.git/info/lfs/objects/batch",
        f"PUT /lfs/{weights.etag}",
        f"POST /lfs/{weights.etag}/verify",
        f"POST /api/models/{REPO}/commit/main",
    ):
        assert request in hub["pushes"]
    assert f"GET /{REPO}/resolve/main/config.json" in [
        pull.replace(hub["commits"][0], "main") for pull in hub["pulls"]
    ]
    assert not [pull for pull in hub["pulls"] if pull.startswith(("POST", "PUT"))]


@pytest.mark.parametrize(("repo", "auto_class", "source", "model_class"), PULLS)
def test_a_pulled_model_is_the_pushed_one_bit_for_bit(hub, repo, auto_class, source, model_class):
    model = model_class.from_pretrained(hub["folder"] / source).eval()
    with torch.no_grad():
        output = model(tiny_inputs())
    results = load_results(hub["folder"] / f"{auto_class}.safetensors")
    for turn in ("first", "again"):  # straight from the Hub; saved from there and loaded once more
        name = "last_hidden_state" if model_class is AttnResModel else "logits"
        assert torch.equal(results[turn][name], output[name])
        if model.can_generate():
            generated = model.generate(tiny_inputs(), max_new_tokens=6, do_sample=False, eos_token_id=None)
            assert torch.equal(results[turn]["generated"], generated)
    # The second save brings its own code: nothing in it points back to the Hub.
    auto_maps = [
        json.loads((hub["folder"] / folder / "config.json").read_text())["auto_map"]
        for folder in (source, f"{auto_class}-again")
    ]
    assert auto_maps[0] == auto_maps[1]


def test_nobody_pushes_without_a_token(hub):
    script = f"""
from huggingface_hub import create_repo
from huggingface_hub.errors import HfHubHTTPError

try:
    create_repo("{REPO}-other")
except HfHubHTTPError as error:
    print(error.response.status_code)
"""
    environment = {"HF_ENDPOINT": hub["server"].url, "NO_PROXY": "127.0.0.1"}
    assert run_python("-c", script, folder=hub["folder"], **environment).stdout.split() == ["401"]
    assert list(hub["server"].repositories) == [REPO, CLASSIFIER]
