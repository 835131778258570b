# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A small Hub on 127.0.0.1: enough of its HTTP interface for the `huggingface_hub` client to push and to pull models.

Repositories live in memory; a commit replaces the branch's listing of paths. What a client uploads as LFS arrives
through the batch endpoint and a `PUT` of its own, as on the Hub, and nothing but the content is trusted: sizes and
checksums are compared. A request that the server does not know is answered 404 and kept in `unknown`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_local"  # a writer must show it
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass
class File:
    """One file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def etag(self) -> str:
        """As on the Hub: the sha256 of an LFS file, the git blob id of any other."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """The `main` branch of a repository: its commits, newest last."""

    commits: list[tuple[str, dict[str, File]]] = field(default_factory=list)

    def files(self, revision: str) -> tuple[str, dict[str, File]] | None:
        """Commit id and files of a branch or commit."""
        if revision == "main" and self.commits:
            return self.commits[-1]
        return next(((oid, files) for oid, files in self.commits if oid == revision), None)

    def commit(self, files: dict[str, File]) -> str:
        parts = [f"{path} {file.etag}" for path, file in sorted(files.items())]
        oid = hashlib.sha1("\n".join([str(len(self.commits)), *parts]).encode()).hexdigest()
        self.commits.append((oid, files))
        return oid


class HubServer(ThreadingHTTPServer):
    """The server and all that it stores. Use as a context manager; `url` is what `HF_ENDPOINT` takes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[str] = []
        self.unknown: list[str] = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class HubError(Exception):
    """An answer with an error status, and the header by which the client tells one 404 from another."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        """The request list is the log."""

    def _dispatch(self):
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.server.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, answer in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    answer(self, body, **match.groupdict())
                    return
            self.server.unknown.append(f"{self.command} {path}")
            raise HubError(404, f"{self.command} {path} is not an endpoint of this server")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.reply_json({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, value, status: int = 200, headers: dict[str, str] | None = None):
        content = json.dumps(value).encode()
        self.reply(content, status, {"Content-Type": "application/json", **(headers or {})})

    def check_token(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid credentials")

    def repository(self, repo: str) -> Repository:
        if repo not in self.server.repositories:
            raise HubError(404, f"Repository {repo} not found", "RepoNotFound")
        return self.server.repositories[repo]

    def commit_files(self, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        found = self.repository(repo).files(revision)
        if found is None:
            raise HubError(404, f"No revision {revision} in {repo}", "RevisionNotFound")
        return found


# --- Endpoints -------------------------------------------------------------------------------------------------------


def create_repository(handler: _Handler, body: bytes):
    handler.check_token()
    request = json.loads(body)
    repo = f"{request['organization']}/{request['name']}"
    exists = repo in handler.server.repositories
    if not exists:
        handler.server.repositories[repo] = Repository()
        handler.server.repositories[repo].commit({})
    handler.reply_json({"url": f"{handler.server.url}/{repo}", "name": repo}, 409 if exists else 200)


def validate_card(handler: _Handler, body: bytes):
    handler.reply_json({"errors": [], "warnings": []})


def choose_upload_modes(handler: _Handler, body: bytes, repo: str, revision: str):
    handler.check_token()
    _, files = handler.commit_files(repo, revision)
    answers = []
    for file in json.loads(body)["files"]:
        path = file["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        if path in files:
            answers[-1]["oid"] = files[path].etag
    handler.reply_json({"files": answers})


def plan_lfs_uploads(handler: _Handler, body: bytes, repo: str):
    handler.check_token()
    request = json.loads(body)
    if "basic" not in request["transfers"] or request["hash_algo"] != "sha256":
        raise HubError(422, f"Cannot transfer by {request['transfers']} with {request['hash_algo']}")
    objects = []
    for wanted in request["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in handler.server.uploads:
            href = f"{handler.server.url}/lfs/{wanted['oid']}"
            answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        objects.append(answer)
    handler.reply_json({"transfer": "basic", "objects": objects})


def upload_lfs_object(handler: _Handler, body: bytes, oid: str):
    if hashlib.sha256(body).hexdigest() != oid:
        raise HubError(422, f"The content of {oid} has another checksum")
    handler.server.uploads[oid] = body
    handler.reply(b"")


def verify_lfs_object(handler: _Handler, body: bytes, oid: str):
    handler.check_token()
    if len(handler.server.uploads.get(oid, b"")) != json.loads(body)["size"]:
        raise HubError(422, f"{oid} is incomplete")
    handler.reply_json({})


def create_commit(handler: _Handler, body: bytes, repo: str, revision: str):
    handler.check_token()
    files = dict(handler.commit_files(repo, revision)[1])
    header, *operations = (json.loads(line) for line in body.splitlines())
    if header["key"] != "header" or not header["value"]["summary"]:
        raise HubError(400, "A commit starts with its message")
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
        elif operation["key"] == "lfsFile" and value["oid"] in handler.server.uploads:
            files[value["path"]] = File(handler.server.uploads[value["oid"]], is_lfs=True)
        else:
            raise HubError(400, f"Cannot commit {operation['key']} {value.get('path')}")
    oid = handler.repository(repo).commit(files)
    handler.reply_json({"commitUrl": f"{handler.server.url}/{repo}/commit/{oid}", "commitOid": oid})


def resolve_file(handler: _Handler, body: bytes, repo: str, revision: str, path: str):
    oid, files = handler.commit_files(repo, revision)
    headers = {"X-Repo-Commit": oid}
    if path not in files:
        raise HubError(404, f"No {path} in {repo}", "EntryNotFound")
    file = files[path]
    headers["ETag"] = f'"{file.etag}"'
    if file.is_lfs:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
    handler.reply(file.content, headers=headers)


def describe_repository(handler: _Handler, body: bytes, repo: str, revision: str = "main"):
    oid, files = handler.commit_files(repo, revision)
    siblings = [{"rfilename": path} for path in sorted(files)]
    handler.reply_json(
        {"id": repo, "sha": oid, "private": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
    )


def list_tree(handler: _Handler, body: bytes, repo: str, revision: str):
    entries = []
    for path, file in sorted(handler.commit_files(repo, revision)[1].items()):
        entries.append({"type": "file", "path": path, "size": len(file.content), "oid": file.etag})
        if file.is_lfs:
            entries[-1]["lfs"] = {"oid": file.etag, "size": len(file.content), "pointerSize": 134}
    handler.reply_json(entries)


def list_harnesses(handler: _Handler, body: bytes):
    """Which shells the client should tell about in its user agent: none."""
    handler.reply_json({"standardEnvVars": [], "harnesses": {}})


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", r"/api/agent-harnesses", list_harnesses),
    ("POST", r"/api/repos/create", create_repository),
    ("POST", r"/api/validate-yaml", validate_card),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", choose_upload_modes),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", plan_lfs_uploads),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", upload_lfs_object),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", verify_lfs_object),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", create_commit),
    ("HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve_file),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve_file),
    ("GET", rf"/api/models/{REPO}", describe_repository),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", describe_repository),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)/?", list_tree),
]
