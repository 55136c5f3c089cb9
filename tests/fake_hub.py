"""A small Hugging Face Hub for tests: a web server of this machine with the requests that huggingface_hub makes to read files,
and to publish them (by Git LFS, not by Xet).

Set ``HF_ENDPOINT`` to the server's address before huggingface_hub is imported, or see the fixture ``hub``.
"""

import json
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_valid"


@dataclass
class Repository:
    """A repository.

    Attributes:
        commits: files by name, by commit hash.
        refs: commit hash by branch or tag; ``main`` is the default branch.
        gated: its files are for those who have accepted its license, which nobody has.
        private: it is there for those who send :data:`TOKEN`.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> str:
        """The commit hash of a branch, tag or commit; empty if there is none."""
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else ""


@dataclass
class FakeHub:
    """The repositories by kind and id (``models/owner/name``), and the requests so far (method and path).

    Attributes:
        owner: who may write with :data:`TOKEN`, to repositories of this name alone.
        large: contents of the large files that have arrived, by their SHA-256.
        refused: status of the answer to requests that begin with a text (method and path); 0 cuts the connection.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    address: str = ""
    is_down: bool = False
    owner: str = "me"
    large: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, files: dict[str, bytes] | Path, revision: str = "main", **flags) -> str:
        """Add a repository or a revision of one, or a commit to a revision; return the commit's hash.

        Args:
            name: such as ``models/owner/name``.
            files: contents by name, or a folder.
            revision: branch or tag.
            flags: see :class:`Repository`.
        """
        if isinstance(files, Path):
            found = [path for path in files.rglob("*") if path.is_file()]
            files = {str(path.relative_to(files)): path.read_bytes() for path in found}
        repository = self.repositories.setdefault(name, Repository())
        commit = sha1(repr(sorted(files.items())).encode()).hexdigest()
        repository.commits[commit], repository.refs[revision] = files, commit
        for flag, value in flags.items():
            setattr(repository, flag, value)
        return commit


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Serve a hub until the block ends."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds until it sees that it should end
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the hub does: the information of a repository, the listing of its files, a file."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if self.hub.is_down:
            self.refuse(503, "")
        elif parts[0] == "api" and len(parts) > 3:
            kind, *owner_and_name = parts[1:4]
            self.answer_api(kind, "/".join(owner_and_name), parts[4:])
        elif "resolve" in parts:
            at = parts.index("resolve")
            kind = "datasets" if parts[0] == "datasets" else "models"
            self.answer_file(kind, "/".join(parts[at - 2 : at]), parts[at + 1], "/".join(parts[at + 2 :]))
        else:
            self.refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        if "/paths-info/" in path:
            self.do_GET()  # a question
            return
        self.hub.requests.append(f"{self.command} {path}")
        refused = [status for start, status in self.hub.refused.items() if f"{self.command} {path}".startswith(start)]
        if refused == [0]:
            self.close_connection = True  # in the middle of the body
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = path.strip("/").split("/")
        if refused:
            self.refuse(refused[0], "", "said the test")
        elif parts[0] == "lfs":
            self.hub.large[sha256(body).hexdigest()] = body
            self.send(b"", 200 if sha256(body).hexdigest() == parts[1] else 400)
        elif path == "/api/validate-yaml":
            self.answer_metadata(json.loads(body)["content"])
        elif (self.headers.get("Authorization") or "").removeprefix("Bearer ") != TOKEN:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/repos/create":
            self.create(**json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer_batch(json.loads(body)["objects"])
        elif parts[1] == "models" and parts[4] in ("preupload", "commit"):
            repository = self.hub.repositories[f"models/{parts[2]}/{parts[3]}"]
            if parts[4] == "preupload":
                self.answer_preupload(repository.commits[repository.refs["main"]], json.loads(body)["files"])
            else:
                self.commit("/".join(parts[2:4]), repository, [json.loads(line) for line in body.splitlines()])

    do_PUT = do_POST

    def answer_metadata(self, card: str) -> None:
        """Check the metadata of a model card; only the license, by a few that the hub knows."""
        license = yaml.safe_load(card.split("---")[1]).get("license")
        errors = [] if license in (None, "apache-2.0", "llama2", "other") else [{"message": f"license {license} is unknown"}]
        self.send(json.dumps({"errors": errors, "warnings": []}).encode(), 400 if errors else 200)

    def create(self, name: str, organization: str, visibility: str | None = None, **_) -> None:
        """Create a repository."""
        if organization != self.hub.owner:
            self.refuse(403, "", f"You don't have the rights to create a model under the namespace {organization}")
        elif f"models/{organization}/{name}" in self.hub.repositories:
            self.refuse(409, "", "You already created this model repo")
        else:
            self.hub.add(f"models/{organization}/{name}", {".gitattributes": b""}, private=visibility == "private")
            self.send(json.dumps({"url": f"{self.hub.address}/{organization}/{name}"}).encode())

    def answer_batch(self, objects: list[dict]) -> None:
        """Say where large files are sent to that have not arrived yet."""
        for each in objects:
            if each["oid"] not in self.hub.large:
                each["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}"}}
        self.send(json.dumps({"transfer": "basic", "objects": objects}).encode())

    def answer_preupload(self, there: dict[str, bytes], files: list[dict]) -> None:
        """Say how each file is sent, and the digest that its present version has."""
        answers = []
        for name in (file["path"] for file in files):
            is_large = name.endswith(".safetensors")
            content = there.get(name)
            digest = content and (sha256(content) if is_large else sha1(b"blob %d\0" % len(content) + content)).hexdigest()
            answers.append(
                {"path": name, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": digest or None}
            )
        self.send(json.dumps({"files": answers}).encode())

    def commit(self, name: str, repository: Repository, lines: list[dict]) -> None:
        """Make a commit."""
        files = dict(repository.commits[repository.refs["main"]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.add(f"models/{name}", files)
        self.send(json.dumps({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit}).encode())

    def log_message(self, *_) -> None:
        pass

    def find(self, kind: str, name: str, revision: str, to_read: bool) -> tuple[Repository, str] | None:
        """A repository and the commit of a revision; answers with an error if there are none for this user."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if token not in ("", TOKEN):
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not token):
            self.refuse(
                404 if token else 401, "RepoNotFound", "Repository not found" if token else "Invalid username or password."
            )
        elif repository.gated and to_read:
            self.refuse(403 if token else 401, "GatedRepo", f"Access to {kind} {name} is restricted.")
        elif not repository.commit(revision):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository, repository.commit(revision)
        return None

    def answer_api(self, kind: str, name: str, rest: list[str]) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        found = self.find(kind, name, revision, to_read=False)
        if found is None:
            return
        repository, commit = found
        files = repository.commits[commit]
        if rest[:1] == ["refs"]:
            refs = [{"name": name, "ref": name, "targetCommit": commit} for name, commit in repository.refs.items()]
            self.send(json.dumps({"branches": refs, "converts": [], "tags": []}).encode())
            return
        if rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            if folder and not any(file.startswith(f"{folder}/") for file in files):
                self.refuse(404, "EntryNotFound", f"{folder} does not exist")
            else:
                self.send(json.dumps(listing(files, folder, "recursive=true" in self.path.lower())).encode())
            return
        if rest[:1] == ["paths-info"]:
            asked = unquote(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send(json.dumps([entry for entry in listing(files, "", True) if entry["path"] in asked]).encode())
            return
        siblings = [{"rfilename": file} for file in files]
        card = files.get("README.md", b"").decode().split("---")
        flags = {"private": repository.private, "gated": "manual" if repository.gated else False}
        flags["cardData"] = yaml.safe_load(card[1]) if len(card) > 2 else None
        self.send(json.dumps({"id": name, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0, **flags}).encode())

    def answer_file(self, kind: str, name: str, revision: str, file: str) -> None:
        found = self.find(kind, name, revision, to_read=True)
        if found is None:
            return
        repository, commit = found
        files = repository.commits[commit]
        if file not in files:
            self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        content, status = files[file], 200
        if wanted := (self.headers.get("Range") or "").removeprefix("bytes="):
            first, last = wanted.split("-")
            content, status = content[int(first) : int(last) + 1 if last else None], 206
        digest = sha1(files[file]).hexdigest()
        self.send(content, status, {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "X-Linked-Size": str(len(files[file]))})

    def refuse(self, status: int, code: str, message: str = "", headers: dict[str, str] | None = None) -> None:
        self.send(b"{}", status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def listing(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """The entries below a folder, as the hub lists them."""
    prefix = f"{folder}/" if folder else ""
    entries = {}
    for file, content in files.items():
        if not file.startswith(prefix):
            continue
        inner = file.removeprefix(prefix).split("/")
        for depth in range(1, len(inner)) if recursive else range(1, 2):
            if len(inner) > depth:
                path = prefix + "/".join(inner[:depth])
                entries[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        if recursive or len(inner) == 1:
            entries[file] = {"type": "file", "path": file, "oid": sha1(content).hexdigest(), "size": len(content)}
    return list(entries.values())
