"""A Hub on the loopback that speaks to the unmodified huggingface_hub client: repos, commits, LFS, tokens, faults.

    with HubServer() as hub:
        … HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET=1, HF_TOKEN=RIGHT_TOKEN …
        hub.repos["me/model"].files()

Repos live in memory as lists of commits; a commit is there whole or not at all, and an uploaded LFS object belongs to
none until a commit names it. Errors carry the status codes and the X-Error-Code headers of the Hub, on which the client
builds its exceptions: a repo that is private or missing is 404 to whoever has a token and 401 to others.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

RIGHT_TOKEN, OTHER_TOKEN, READ_TOKEN, WRONG_TOKEN = "hf_right", "hf_other", "hf_read", "hf_wrong"
USERS = {RIGHT_TOKEN: "me", READ_TOKEN: "me", OTHER_TOKEN: "someone"}
LFS_SIZE = 1_000_000  # bytes from which any file is stored as LFS


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    lfs: frozenset[str]
    message: str


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path → content at the head of a branch, without what every repo begins with."""
        return {path: content for path, content in self.head(revision).files.items() if path != ".gitattributes"}

    def head(self, revision: str = "main") -> Commit:
        return self.branches[revision][-1]

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.head(revision)
        return next((one for log in self.branches.values() for one in log if one.oid == revision), None)

    def add(
        self, files: dict[str, bytes], lfs: frozenset[str] = frozenset(), message: str = "", branch: str = "main"
    ) -> Commit:
        log = self.branches.setdefault(branch, [])
        oid = hashlib.sha1(f"{id(self)} {branch} {len(log)} {message} {sorted(files)}".encode()).hexdigest()
        log.append(Commit(oid, files, lfs, message))
        return log[-1]


class HubServer:
    """The server; `url` is its endpoint, `storage` that of large files, to the client another host, as on the Hub.

    Attributes:
        repos: `namespace/name` → repo.
        cut_uploads: how many of the next LFS uploads break off half way.
        fail_commits: how many of the next commits the server refuses after reading them.
        part_size: bytes of one part of a multipart upload; None asks for single uploads.
        requests: method and path of all requests so far.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.cut_uploads = self.fail_commits = 0
        self.part_size: int | None = None
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def make(self, name: str, files: dict[str, bytes | str] | None = None, *, private: bool = False) -> Repo:
        """A repo with files, as if they had been pushed before."""
        repo = self.repos[name] = Repo(private)
        first = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        repo.add(first, message="initial commit")
        if files:
            contents = {path: one.encode() if isinstance(one, str) else one for path, one in files.items()}
            repo.add(first | contents, frozenset(p for p in contents if is_lfs(p, len(contents[p]))), "files")
        return repo

    def take_fault(self, name: str) -> bool:
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(left - 1, 0))
            return left > 0


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size > LFS_SIZE


def blob_id(content: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    answer(self, **found.groupdict())
                    return
            self._body()
            raise _Refused(404, f"no such route: {self.command} {path}")
        except _Refused as refusal:
            headers = {"X-Error-Message": refusal.message}
            self._reply({"error": refusal.message}, refusal.status, headers | _code(refusal.code))

    # --- what a request says ---

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in USERS:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return USERS[token]

    def _writer(self, name: str) -> None:
        """Refuse whoever may not write to a repo that they may see."""
        user = self._user()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if user is None or token == READ_TOKEN or name.split("/")[0] != user:
            raise _Refused(403, "Forbidden: pass a token with write access to this repo")

    def _repo(self, name: str) -> Repo:
        user = self._user()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and name.split("/")[0] != user):
            raise _Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # --- what is answered ---

    def _reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def who_am_i(self) -> None:
        user = self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        role = "read" if READ_TOKEN in self.headers["Authorization"] else "write"
        self._reply({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create_repo(self) -> None:
        asked = json.loads(self._body())
        user = self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        self._writer(name)
        if name in self.hub.repos:
            raise _Refused(409, f"You already created this model repo: {name}")
        self.hub.make(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        self._reply({"url": f"{self.hub.url}/{name}", "name": name})

    def validate_yaml(self) -> None:
        self._body()
        self._reply({"errors": [], "warnings": []})

    def create_branch(self, name: str, revision: str) -> None:
        self._body()
        repo = self._repo(name)
        self._writer(name)
        if revision in repo.branches:
            raise _Refused(409, f"Reference already exists: {revision}")
        repo.branches[revision] = list(repo.branches["main"])
        self._reply({})

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        commit = self._commit(repo, revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        facts = {"id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "siblings": siblings}
        self._reply(facts | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        commit = self._commit(self._repo(name), revision)
        paths = [path for path in commit.files if not folder or path.startswith(f"{folder}/")]
        if folder and not paths:
            raise _Refused(404, f"{folder} does not exist", "EntryNotFound")
        entries: list[dict[str, Any]] = []
        for path in paths:
            content = commit.files[path]
            entries.append({"type": "file", "path": path, "size": len(content), "oid": blob_id(content)})
            if path in commit.lfs:
                digest = hashlib.sha256(content).hexdigest()
                entries[-1]["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        self._reply(entries)

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self._body())
        repo = self._repo(name)
        self._writer(name)
        commit = self._commit(repo, revision)
        answers = []
        for file in asked["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if (content := commit.files.get(path)) is not None:
                known = hashlib.sha256(content).hexdigest() if path in commit.lfs else blob_id(content)
                answers[-1]["oid"] = known
        self._reply({"files": answers})

    def lfs_batch(self, name: str) -> None:
        asked = json.loads(self._body())
        self._repo(name)
        self._writer(name)
        objects = []
        for one in asked["objects"]:
            oid, size = one["oid"], one["size"]
            upload: dict[str, Any] = {"href": f"{self.hub.storage}/_lfs/{oid}"}
            if self.hub.part_size is not None:
                count = -(-size // self.hub.part_size)
                places = {f"{n:05d}": f"{self.hub.storage}/_lfs/{oid}/part/{n}" for n in range(1, count + 1)}
                upload = {
                    "href": f"{self.hub.storage}/_lfs/{oid}/complete",
                    "header": {"chunk_size": str(self.hub.part_size)} | places,
                }
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"}}
            objects.append({"oid": oid, "size": size} | ({} if oid in self.hub.objects else {"actions": actions}))
        transfer = "basic" if self.hub.part_size is None else "multipart"
        assert transfer in asked["transfers"]
        self._reply({"transfer": transfer, "objects": objects})

    def lfs_upload(self, oid: str, part: str | None = None) -> None:
        if self.hub.take_fault("cut_uploads"):
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = self._body()
        if part is not None:
            self.hub.parts.setdefault(oid, {})[int(part)] = content
            self._reply(b"", headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
            return
        self._store(oid, content)

    def lfs_complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        named = [(one["partNumber"], one["etag"].strip('"')) for one in json.loads(self._body())["parts"]]
        if named != [(number, hashlib.md5(parts[number]).hexdigest()) for number in sorted(parts)]:
            raise _Refused(400, "the parts are not those that were uploaded")
        self._store(oid, b"".join(parts[number] for number in sorted(parts)))

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, "the content does not have the hash it was announced with")
        self.hub.objects[oid] = content
        self._reply(b"")

    def lfs_verify(self, name: str) -> None:
        asked = json.loads(self._body())
        content = self.hub.objects.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise _Refused(404, "no such object")
        self._reply({})

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        repo = self._repo(name)
        self._writer(name)
        parent = self._commit(repo, revision)
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, parent.oid):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        files, lfs = dict(parent.files), set(parent.lfs)
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            path = value["path"]
            if kind == "deletedFile":
                del files[path]
                lfs.discard(path)
            elif kind == "file":
                files[path] = base64.b64decode(value["content"])
                lfs.discard(path)
            elif kind == "lfsFile" and value["oid"] in self.hub.objects:
                files[path] = self.hub.objects[value["oid"]]
                lfs.add(path)
            else:
                raise _Refused(400, f"cannot commit {kind} {path}")
        if self.hub.take_fault("fail_commits"):
            raise _Refused(500, "Internal Error")
        branch = f"refs/pr/{len(repo.branches)}" if "create_pr" in self.query else revision
        if branch != revision:
            repo.branches[branch] = list(repo.branches["main"])
        made = repo.add(files, frozenset(lfs), f"{header['summary']}\n\n{header['description']}".strip(), branch)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}", "commitOid": made.oid}
        pull = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{branch.rpartition('/')[2]}"}
        self._reply(answer | (pull if branch != revision else {}))

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit(self._repo(name), revision)
        headers = {"X-Repo-Commit": commit.oid}
        content = commit.files.get(path)
        if content is None:
            refused = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._reply({"error": "Entry not found"}, 404, headers | refused)
        elif path in commit.lfs:
            digest = hashlib.sha256(content).hexdigest()
            self.hub.objects.setdefault(digest, content)
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            self._reply(b"", 302, headers | linked | {"Location": f"{self.hub.storage}/_lfs/{digest}"})
        else:
            self._send_file(content, headers | {"ETag": f'"{blob_id(content)}"'})

    def lfs_download(self, oid: str) -> None:
        if oid not in self.hub.objects:
            raise _Refused(404, "no such object")
        self._send_file(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        headers = headers | {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self._reply(content, 200, headers)
            return
        start, stop = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        span = {"Content-Range": f"bytes {start}-{stop}/{len(content)}"}
        self._reply(content[start : stop + 1], 206, headers | span)


def _code(code: str | None) -> dict[str, str]:
    return {"X-Error-Code": code} if code else {}


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.who_am_i),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/{_REVISION}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/branch/{_REVISION}", _Handler.create_branch),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/verify", _Handler.lfs_verify),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]+)(/part/(?P<part>\d+))?", _Handler.lfs_upload),
    ("POST", r"/_lfs/(?P<oid>[0-9a-f]+)/complete", _Handler.lfs_complete),
    ("GET HEAD", r"/_lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_download),
    ("GET HEAD", rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
