"""Replays the protocols of Hugging Face and Kaggle from a folder, in a process of its own, with faults on demand.

`python hub_server.py FOLDER` serves FOLDER/hf/org/name/file and FOLDER/kaggle/owner/model/framework/variation/version/…
on 127.0.0.1 and prints a JSON line with two ports: the hub's, and that of the content network it redirects to.
PUT /_faults takes a list of rules {"path": part of the path, "on": "hub" or "cdn", "do": …, "times": n}:
status (status, headers), cut (at: bytes of the answer before the connection dies), stall (seconds), slow (bytes a
second), corrupt (the last byte), whole (a range is ignored), page (a login page in HTML).
PUT /_settings takes {"gated": [repositories], "secret": whether lists keep sizes and checksums from strangers}.
GET /_log returns and empties the list of requests. A token or key is good if it is "good".
"""

import base64
import hashlib
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".model", "tokenizer.json")
PAGE = 3


class State:
    def __init__(self, root: Path) -> None:
        self.root, self.lock = root, threading.Lock()
        self.faults: list[dict] = []
        self.log: list[dict] = []
        self.gated: list[str] = []
        self.secret = False
        self.cdn = 0

    def fault(self, where: str, path: str) -> dict:
        with self.lock:
            for fault in self.faults:
                if fault.get("on", "cdn") == where and fault["path"] in path and fault.get("times", 1) > 0:
                    fault["times"] = fault.get("times", 1) - 1
                    return fault
        return {}


def facts(path: Path) -> dict:
    """The entry of a file in the hub's list."""
    data = path.read_bytes()
    entry = {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if path.name.endswith(LARGE):
        entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return entry


def commit(folder: Path) -> str:
    files = [(path.name, facts(path)["blobId"]) for path in sorted(folder.rglob("*")) if path.is_file()]
    return hashlib.sha1(json.dumps(files).encode()).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """A client that goes away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    where: str

    def log_message(self, *args: object) -> None:
        pass

    def do_PUT(self) -> None:
        value = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/_faults":
            self.state.faults = value
        else:
            self.state.gated, self.state.secret = value["gated"], value.get("secret", False)
        self.send(200, b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/_log":
            with self.state.lock:
                log, self.state.log = self.state.log, []
            self.send(200, json.dumps(log).encode())
            return
        authorization = self.headers.get("Authorization", "")
        entry = {"on": self.where, "path": path, "range": self.headers.get("Range", ""), "auth": authorization}
        with self.state.lock:
            self.state.log.append({**entry, "method": self.command})
        self.fault = self.state.fault(self.where, path)
        if self.fault.get("do") == "page":
            self.send(200, b"<!DOCTYPE html><html>Sign in</html>", {"Content-Type": "text/html; charset=utf-8"})
        elif self.fault.get("do") == "status":
            self.send(self.fault["status"], b"", self.fault.get("headers", {}))
        elif self.where == "cdn":
            self.content(path)
        elif path.startswith("/api/v1/models/"):
            self.kaggle(path.removeprefix("/api/v1/models/").split("/"))
        else:
            self.hugging_face(path)

    def hugging_face(self, path: str) -> None:
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        org, name, *rest = parts[2:] if api else parts
        folder = self.state.root / "hf" / org / name
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in ("good", "stranger"):
            self.send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        if not folder.is_dir():
            self.send(404 if token else 401, b"{}", {"X-Error-Code": "RepoNotFound"} if token else {})
            return
        sha = commit(folder)
        kind, revision = (rest + ["", "main"])[:2] if rest else ("", "main")
        if revision not in ("main", "v1", sha):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif api and kind in ("", "revision"):
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            listed = [{"rfilename": path.relative_to(folder).as_posix(), **facts(path)} for path in files]
            listed += [
                {"rfilename": name, "size": 1, "blobId": "0" * 40} for name in ("../outside.gguf", "/etc/x.gguf")
            ]
            if self.state.secret and token != "good":
                listed = [{"rfilename": entry["rfilename"]} for entry in listed]
            self.send(200, json.dumps({"id": f"{org}/{name}", "sha": sha, "siblings": listed}).encode())
        elif api and kind == "tree":
            listed = []
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    entry = facts(path)
                    lfs = entry.get("lfs")
                    listed.append({"type": "file", "path": path.relative_to(folder).as_posix(), "size": entry["size"]})
                    listed[-1]["oid"] = entry["blobId"]
                    if lfs:
                        listed[-1]["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 134}
            self.send(200, json.dumps(listed).encode())
        elif kind == "resolve":
            self.resolve(folder, f"{org}/{name}", "/".join(rest[2:]), sha, token)
        else:
            self.send(404, b"{}")

    def resolve(self, folder: Path, repo: str, file: str, sha: str, token: str) -> None:
        path = folder / file
        if repo in self.state.gated and token != "good":
            self.send(403 if token else 401, b"gated", {"X-Error-Code": "GatedRepo", "X-Repo-Commit": sha})
            return
        if not path.is_file():
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        entry, headers = facts(path), {"X-Repo-Commit": sha}
        if lfs := entry.get("lfs"):
            headers |= {"X-Linked-Etag": f'"{lfs["sha256"]}"', "X-Linked-Size": str(lfs["size"])}
            self.redirect(path, headers)
        else:
            self.send_file(path, {**headers, "ETag": f'"{entry["blobId"]}"'})

    def kaggle(self, parts: list[str]) -> None:
        *handle, what = parts[:5]
        variation = self.state.root / "kaggle" / Path(*handle)
        given = self.headers.get("Authorization", "")
        good = given in ("Bearer good", "Basic " + base64.b64encode(b"user:good").decode())
        if given and not good:
            self.send(401, b'{"code":401,"message":"Unauthenticated"}')
        elif not variation.is_dir() or (what != "get" and not (variation / what).is_dir()):
            self.send(404, b'{"code":404,"message":"Not found"}')
        elif "/".join(handle) in self.state.gated and not good:
            self.send(403, b'{"code":403,"message":"Permission denied"}')
        elif what == "get":
            newest = max(int(path.name) for path in variation.iterdir())
            self.send(200, json.dumps({"id": 1, "versionNumber": newest}).encode())
        elif parts[5] == "files":
            folder = variation / what
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            start = int(parse_qs(urlsplit(self.path).query).get("page_token", ["0"])[0])
            page = [
                {"name": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "creationDate": ""}
                for path in files[start : start + PAGE]
            ]
            more = str(start + PAGE) if start + PAGE < len(files) else ""
            self.send(200, json.dumps({"files": page, "nextPageToken": more}).encode())
        elif (path := variation / what / "/".join(parts[6:])).is_file():
            self.redirect(path, {})
        else:
            self.send(404, b"{}")

    def redirect(self, path: Path, headers: dict) -> None:
        target = f"http://127.0.0.1:{self.state.cdn}/{quote(path.relative_to(self.state.root).as_posix())}?signature=1"
        self.send(302, b"", {**headers, "Location": target})

    def content(self, path: str) -> None:
        file = self.state.root / path.lstrip("/")
        md5 = base64.b64encode(hashlib.md5(file.read_bytes()).digest()).decode()
        hashes = {"x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"} if path.startswith("/kaggle/") else {}
        self.send_file(file, {"Accept-Ranges": "bytes", "ETag": '"of-the-network"', **hashes})

    def send_file(self, path: Path, headers: dict) -> None:
        data, status, start = path.read_bytes(), 200, 0
        if self.fault.get("do") == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = self.headers.get("Range", "")
        if wanted and self.fault.get("do") != "whole":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            status = 206
        self.send(status, data[start:], headers)

    def send(self, status: int, data: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        kind = getattr(self, "fault", {}).get("do")
        try:
            if kind in ("cut", "stall"):
                self.wfile.write(data[: self.fault.get("at", len(data) // 2)])
                self.wfile.flush()
                time.sleep(self.fault.get("seconds", 0))
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif kind == "slow":
                step = max(1, int(self.fault["rate"] / 50))
                for at in range(0, len(data), step):
                    self.wfile.write(data[at : at + step])
                    self.wfile.flush()
                    time.sleep(0.02)
            else:
                self.wfile.write(data)
        except OSError:
            self.close_connection = True


def main() -> None:
    state = State(Path(sys.argv[1]))
    servers = []
    for where in ("hub", "cdn"):
        kind = type(where, (Handler,), {"state": state, "where": where})
        servers.append(Server(("127.0.0.1", 0), kind))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
    hub, state.cdn = (server.server_address[1] for server in servers)
    print(json.dumps({"hub": hub, "cdn": state.cdn}), flush=True)
    sys.stdin.read()  # ends with the process that started it


if __name__ == "__main__":
    main()
