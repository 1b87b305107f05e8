"""Small servers on loopback that speak WebHDFS and S3 as far as fsspec's clients do, and can be made to misbehave."""

from __future__ import annotations

import base64
import hashlib
import json
import posixpath
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape


class Disk:
    """What a server holds, and how it is to behave."""

    def __init__(self):
        self.files = {}  # absolute path -> bytes
        self.parts = {}  # S3: upload -> {number: bytes}
        self.refusals = 0  # how many requests still get 503
        self.requests = []  # (method, path, query, headers)
        self.damage = None  # function of (path, bytes) -> the bytes to keep
        self.refuse = (
            None  # WebHDFS: function of (operation, whether it is the data node) -> (status, exception, message)
        )
        self.listing = None  # WebHDFS: function of (path, entries) -> entries
        self.password = None  # (user, password) that basic authentication must give
        self.url = ""

    def keep(self, path: str, content: bytes) -> None:
        self.files[path] = self.damage(path, content) if self.damage else content


@contextmanager
def serve(handler):
    """A Disk behind a server of that handler class, at disk.url."""
    disk = Disk()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), type("Handler", (handler,), {"disk": disk}))
    disk.url = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield disk
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: with two, each waits 40 ms for the other side's acknowledgement

    def handle_expect_100(self):
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def log_message(self, *_args):
        pass

    def handle_one(self):
        split = urlsplit(self.path)
        self.where, self.query = unquote(split.path), dict(parse_qsl(split.query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.disk.requests.append((self.command, self.where, self.query, dict(self.headers)))
        if self.disk.refusals > 0:
            self.disk.refusals -= 1
            self.answer(503, b"busy")
        else:
            self.serve_it()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

    def answer(self, status: int, content: bytes = b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class WebHDFS(_Handler):
    """Name node and data node in one: data requests go through a redirect, as on a cluster."""

    def serve_it(self):
        if self.disk.password and not self.where.startswith("/data"):
            expected = "Basic " + base64.b64encode(":".join(self.disk.password).encode()).decode()
            if self.headers.get("Authorization") != expected:
                return self.refuse(401, "AccessControlException", "who are you?")
        refusal = self.disk.refuse and self.disk.refuse(self.query["op"].upper(), self.where.startswith("/data/"))
        if refusal:
            return self.refuse(*refusal)
        if self.where.startswith("/data/"):
            return self.data(self.where[len("/data") :])
        path = posixpath.normpath(self.where[len("/webhdfs/v1") :] or "/")
        return getattr(self, self.query["op"].lower())(path)

    def json(self, **content):
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def refuse(self, status, name, message):
        if name is None:  # what stands before the cluster, as a gateway with a login
            return self.answer(status, message.encode(), Content_Type="text/html")
        self.answer(status, json.dumps({"RemoteException": {"exception": name, "message": message}}).encode())

    def redirect(self, path):
        self.answer(307, Location=f"http://{self.disk.url}/data{path}?{urlsplit(self.path).query}")

    create = append = open = redirect

    def data(self, path):
        if self.query["op"] == "CREATE":
            self.disk.keep(path, self.body)
            self.answer(201)
        elif self.query["op"] == "APPEND":
            self.disk.keep(path, self.disk.files[path] + self.body)
            self.answer(200)
        else:
            start = int(self.query["offset"])
            self.answer(200, self.disk.files[path][start : start + int(self.query["length"])])

    def mkdirs(self, path):
        self.json(boolean=True)

    def delete(self, path):
        self.json(boolean=self.disk.files.pop(path, None) is not None)

    def status_of(self, path, suffix=""):
        if path in self.disk.files:
            return {"pathSuffix": suffix, "type": "FILE", "length": len(self.disk.files[path])}
        return {"pathSuffix": suffix, "type": "DIRECTORY", "length": 0}

    def is_there(self, path):
        return any(file == path or file.startswith(path.rstrip("/") + "/") for file in self.disk.files)

    def getfilestatus(self, path):
        if not self.is_there(path):
            return self.refuse(404, "FileNotFoundException", f"File does not exist: {path}")
        return self.json(FileStatus=self.status_of(path))

    def liststatus(self, path):
        if not self.is_there(path):
            return self.refuse(404, "FileNotFoundException", f"File {path} does not exist.")
        root = path.rstrip("/") + "/"
        below = [file[len(root) :] for file in self.disk.files if file.startswith(root)]
        names = sorted({name.split("/")[0] for name in below})
        entries = [self.status_of(posixpath.join(path, name), name) for name in names]
        if self.disk.listing:
            entries = self.disk.listing(path, entries)
        return self.json(FileStatuses={"FileStatus": entries})


class S3(_Handler):
    """Buckets in path style: objects, listings by prefix, uploads in parts."""

    def serve_it(self):
        bucket, _slash, key = self.where.lstrip("/").partition("/")
        if self.command == "GET" and not key:
            return self.list(bucket)
        return getattr(self, self.command.lower())(f"/{bucket}/{key}")

    def xml(self, text):
        self.answer(200, f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode(), Content_Type="application/xml")

    def list(self, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        keys = [path[len(bucket) + 2 :] for path in sorted(self.disk.files) if path.startswith(f"/{bucket}/{prefix}")]
        folders = {prefix + key[len(prefix) :].split("/")[0] + "/" for key in keys if "/" in key[len(prefix) :]}
        files = [key for key in keys if not delimiter or "/" not in key[len(prefix) :]]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.disk.files[f'/{bucket}/{key}'])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key in files
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in sorted(folders))
        self.xml(
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
            f"<KeyCount>{len(files)}</KeyCount>{contents}{common if delimiter else ''}</ListBucketResult>"
        )

    def head(self, path):
        if path not in self.disk.files:
            return self.answer(404)
        return self.answer(
            200,
            Content_Length=str(len(self.disk.files[path])),
            ETag='"x"',
            Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT",
        )

    def get(self, path):
        if path not in self.disk.files:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")
        content = self.disk.files[path]
        if "Range" not in self.headers:
            return self.answer(200, content)
        start, stop = self.headers["Range"].split("=")[1].split("-")
        part = content[int(start) : int(stop) + 1 if stop else None]
        return self.answer(206, part, Content_Range=f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")

    def put(self, path):
        body = self.body
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = _unchunked(body)
        if "uploadId" in self.query:
            self.disk.parts[self.query["uploadId"]][int(self.query["partNumber"])] = body
        else:
            self.disk.keep(path, body)
        self.answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def post(self, path):
        if "uploads" in self.query:
            upload = f"upload{len(self.disk.parts)}"
            self.disk.parts[upload] = {}
            result = "InitiateMultipartUploadResult"
            return self.xml(f"<{result}><UploadId>{upload}</UploadId></{result}>")
        parts = self.disk.parts.pop(self.query["uploadId"])
        self.disk.keep(path, b"".join(parts[number] for number in sorted(parts)))
        return self.xml('<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>')

    def delete(self, path):
        self.disk.files.pop(path, None)
        self.answer(204)


def _unchunked(body: bytes) -> bytes:
    """The content of AWS's own chunked encoding: `hex size;signature CRLF data CRLF` ... `0;... CRLF`."""
    content = b""
    while body:
        head, _line, body = body.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if size == 0:
            break
        content, body = content + body[:size], body[size + 2 :]
    return content
