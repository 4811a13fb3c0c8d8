"""A stand-in of the Hugging Face Hub on this machine: the requests of huggingface_hub for a download and for a push.

Files are kept as {(repository, path): content}; every revision is the same commit.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Use :func:`hub`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.large, self.asked, self.made = {}, {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub():
    """A server; ``url`` is for HF_ENDPOINT, ``files`` what it holds, ``asked`` the requests."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, content=b"", code=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        match = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path)
        content = match and self.server.files.get((match[1], match[3]))
        if content is None:
            return self.reply(b"", 404, X_Error_Code="EntryNotFound")
        digest = hashlib.sha256(content).hexdigest()
        return self.reply(content, ETag=f'"{digest}"', X_Repo_Commit=COMMIT, X_Linked_Size=str(len(content)))

    do_HEAD = do_GET

    def do_PUT(self):
        self.server.large[self.path.rsplit("/", 1)[1]] = self.body()
        self.reply()

    def do_POST(self):
        self.server.asked.append(f"POST {self.path}")
        body = self.body()
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            name = self.server.made[-1]["name"]
            return self.reply({"url": f"{self.server.url}/user/{name}", "id": f"user/{name}"})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            modes = [
                {"path": x["path"], "uploadMode": "lfs" if x["path"].endswith("safetensors") else "regular"}
                for x in json.loads(body)["files"]
            ]
            return self.reply({"files": [x | {"shouldIgnore": False, "oid": None} for x in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                x | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{x['oid']}"}}}
                for x in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            return self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self.reply(b"", 404)

    def commit(self, repo, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[repo, value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[repo, value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.url}/{repo}/commit/{COMMIT}"
        self.reply({"success": True, "commitOid": COMMIT, "commitUrl": url})
