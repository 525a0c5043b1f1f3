# SPDX-License-Identifier: Apache-2.0
"""A small server on loopback that speaks the Hub's protocol: repositories, branches, LFS uploads, downloads, tokens.

A data set's repository is called `datasets/org/name`. It refuses a card's metadata where the Hub does, and can stand
still in the middle of a request, as a net may.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


TOKEN = "hf_local"
REPO = r"(?P<repo>(?:datasets/)?[^/]+/[^/]+)"


@dataclass
class Repository:
    """A repository: the commits of each branch in order, each a mapping from path to content; what went over LFS."""

    private: bool = False
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=lambda: {"main": []})
    large: set[str] = field(default_factory=set)

    @property
    def commits(self) -> list[tuple[str, dict[str, bytes]]]:
        return self.branches["main"]

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        content = (branch, len(self.branches[branch]), sorted(files.items()))
        digest = hashlib.sha1(repr(content).encode()).hexdigest()
        self.branches[branch].append((digest, files))
        return digest

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        every = (commit for commits in self.branches.values() for commit in commits)
        return next((commit for commit in every if commit[0] == revision), None)


def metadata_of(card: str) -> dict:
    """The metadata of a card, empty if it has none."""
    found = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    return (yaml.safe_load(found[1]) if found else None) or {}


def tags_of(repository: Repository) -> list[str]:
    card = repository.commits[-1][1].get("README.md", b"").decode()
    return metadata_of(card).get("tags", [])


def faults_of(card: str) -> list[str]:
    """What the Hub refuses in a card's metadata, as far as these cards have it."""
    try:
        metadata = metadata_of(card)
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    errors = []
    for name in ("library_name", "pipeline_tag", "license", "base_model_relation"):
        if not isinstance(metadata.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for name in ("tags", "datasets", "base_model"):
        values = metadata.get(name, [])
        values = [values] if isinstance(values, str) and name != "tags" else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{name}" must be a list of strings')
        elif name != "tags":
            errors += [f'"{name}" with value "{value}" is not valid' for value in values if not is_repo_id(value)]
    return errors


def entries_of(files: dict[str, bytes]) -> dict[str, dict]:
    """What the Hub says of each file, and of each folder that has one."""
    folders = {str(folder): b"" for path in files for folder in Path(path).parents if folder.name}
    kinds = [*(("file", *item) for item in files.items()), *(("directory", *item) for item in folders.items())]
    return {
        path: {"type": kind, "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for kind, path, content in kinds
    }


def is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


class HubServer(ThreadingHTTPServer):
    """Serves on a free port of loopback while used as a context manager; its state is kept in memory."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.stands_still_at: str | None = None
        self.stands_still = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, name: str, folder: Path, private: bool = False) -> str:
        """Makes a repository of a folder's files, and returns its commit."""
        self.repositories[name] = repository = Repository(private)
        files = {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }
        repository.large = {path for path in files if path.endswith((".safetensors", ".bin", ".parquet"))}
        return repository.commit(files)

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Routes of the Hub that uploading and loading use."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/models", "list"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", "create_branch"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", "commit"),
        ("GET", rf"/api/models/{REPO}/revision/(?P<revision>.+)", "info"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)/?(?P<under>.*)", "tree"),
        ("POST", rf"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)", "paths"),
        ("GET", rf"/api/models/{REPO}", "info"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/(?P<oid>[0-9a-f]+)", "put_object"),
        ("POST", r"/verify", "verify"),
        ("HEAD|GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def handle_request(self) -> None:
        path = unquote(urlparse(self.path).path).replace("/api/datasets/", "/api/models/datasets/")
        self.server.requests.append(f"{self.command} {path}")
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                if name == self.server.stands_still_at:
                    self.stand_still()
                    return
                self.body = self.rfile.read(self.length())
                if self.may(name, **match.groupdict()):
                    getattr(self, name)(**match.groupdict())
                return
        self.rfile.read(self.length())
        self.answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def length(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def stand_still(self) -> None:
        """Takes half of a request, and then nothing happens until its sender is gone; nor is anything kept of it."""
        self.rfile.read(self.length() // 2)
        self.server.stands_still.set()
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.rfile.read()

    def may(self, name: str, repo: str | None = None, **_: str) -> bool:
        """Writing needs the token, and so does a private repository, which else does not seem to exist."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        known = self.server.repositories.get(repo or "")
        if name in ("create", "create_branch", "preupload", "commit", "batch", "whoami"):
            self.answer(401, {"error": "a token is needed"})
            return False
        if known is not None and known.private:
            self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return False
        return True

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name'].split('/')[-1]}"
        if name in self.server.repositories:
            self.answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.repositories[name] = repository = Repository(private)
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def list(self) -> None:
        """Repositories of an author; private ones only for who has the token."""
        author = parse_qs(urlparse(self.path).query).get("author", [None])[0]
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        found = [
            {"id": name, "modelId": name, "private": repository.private, "tags": tags_of(repository)}
            for name, repository in self.server.repositories.items()
            if (known or not repository.private) and author in (None, name.split("/")[0])
        ]
        self.answer(200, found)

    def create_branch(self, repo: str, branch: str) -> None:
        repository = self.server.repositories[repo]
        if branch in repository.branches:
            self.answer(409, {"error": "exists"})
            return
        repository.branches[branch] = list(repository.commits)
        self.answer(200, {})

    def validate(self) -> None:
        errors = faults_of(json.loads(self.body)["content"])
        self.answer(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def verify(self) -> None:
        self.answer(200, {})

    def whoami(self) -> None:
        self.answer(200, {"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def preupload(self, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, repo: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/objects/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put_object(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        repository = self.server.repositories[repo]
        if revision not in repository.branches:
            self.answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return
        files = dict(repository.branches[revision][-1][1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
                repository.large.add(value["path"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        digest = repository.commit(files, revision)
        self.answer(
            200, {"success": True, "commitOid": digest, "commitUrl": f"{self.server.url}/{repo}/commit/{digest}"}
        )

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.find(repo, revision)
        if found:
            digest, files = found
            siblings = [{"rfilename": path} for path in files]
            private = self.server.repositories[repo].private
            name = repo.removeprefix("datasets/")
            self.answer(200, {"id": name, "modelId": name, "sha": digest, "private": private, "siblings": siblings})

    def tree(self, repo: str, revision: str, under: str) -> None:
        """Files and folders in a folder, or below it if it is asked for all."""
        found = self.find(repo, revision)
        if found:
            below = [path for path in entries_of(found[1]) if under in ("", *map(str, Path(path).parents))]
            if "true" not in parse_qs(urlparse(self.path).query).get("recursive", [""])[0].lower():
                below = [path for path in below if str(Path(path).parent) == (under or ".")]
            self.answer(200, [entries_of(found[1])[path] for path in below])

    def paths(self, repo: str, revision: str) -> None:
        """What is at some paths, of which those that aren't there are left out."""
        found = self.find(repo, revision)
        if found:
            wanted = parse_qs(self.body.decode())["paths"]
            self.answer(200, [entries_of(found[1])[path] for path in wanted if path in entries_of(found[1])])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.find(repo, revision)
        if not found:
            return
        digest, files = found
        if path not in files:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": digest})
            return
        content = files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": digest, "ETag": etag}
        if path in self.server.repositories[repo].large:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        self.answer(200, content, headers)

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.server.repositories.get(repo)
        if repository is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.at(revision)
        if commit is None:
            self.answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def answer(self, status: int, content: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
