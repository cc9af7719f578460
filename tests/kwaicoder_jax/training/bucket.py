"""A bucket that lives in this process, as Google's service looks to TensorStore, and as fsspec's memory to etils."""

import http.server
import json
import os
import re
import threading
import types
import urllib.parse
from typing import Any, ClassVar

from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from orbax.checkpoint._src.path import gcs_utils


class Bucket(MemoryFileSystem):
    """Objects by their name behind gs:// or s3://; like a real one it does not know how to append."""

    protocol = ("gs", "s3")

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return MemoryFileSystem._strip_protocol(re.sub(r"^(gs|s3)://", "memory://", str(path)))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode.startswith("a"):
            raise NotImplementedError("objects are written whole")
        return super()._open(path, mode, **options)


class Service(http.server.BaseHTTPRequestHandler):
    """What TensorStore asks of https://storage.googleapis.com: whole objects, ranges, conditions, lists."""

    protocol_version = "HTTP/1.1"
    bucket = Bucket()
    generations: ClassVar[dict[str, int]] = {}
    lock = threading.Lock()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""

    def _answer(self, status: int, body: bytes = b"", generation: int = 0, part: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if generation:
            self.send_header("x-goog-generation", str(generation))
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        self.wfile.write(body)

    def _asked(self) -> tuple[str, str, dict[str, str]]:
        """Bucket, object ("" for none) and options."""
        parsed = urllib.parse.urlparse(self.path)
        parts = parsed.path.split("/b/", 1)[1].split("/o", 1)
        options = dict(urllib.parse.parse_qsl(parsed.query))
        return parts[0], urllib.parse.unquote(parts[1].lstrip("/")), options

    def _generation(self, place: str) -> int:
        return self.generations.setdefault(place, 1) if self.bucket.isfile(place) else 0

    def do_GET(self) -> None:
        """An object, a part of it, or the names that begin with a prefix."""
        bucket, name, options = self._asked()
        with self.lock:
            if not name:
                begin = f"/{bucket}/"
                names = sorted(key.removeprefix(begin) for key in self.bucket.store if key.startswith(begin))
                found = [each for each in names if each.startswith(options.get("prefix", ""))]
                self._answer(200, json.dumps({"items": [{"name": each, "generation": "1"} for each in found]}).encode())
                return
            generation = self._generation(f"/{bucket}/{name}")
            content = self.bucket.cat(f"/{bucket}/{name}") if generation else b""
        if not generation:
            self._answer(404)
        elif options.get("ifGenerationNotMatch") == str(generation):
            self._answer(304)
        elif "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start = int(first) if first else len(content) - int(last)
            body = content[start : int(last) + 1] if first and last else content[start:]
            self._answer(206, body, generation, f"bytes {start}-{start + len(body) - 1}/{len(content)}")
        else:
            self._answer(200, content, generation)

    def do_POST(self) -> None:
        """Writes an object."""
        bucket, _, options = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        place = f"/{bucket}/{options['name']}"
        with self.lock:
            generation = self._generation(place)
            if options.get("ifGenerationMatch", str(generation)) != str(generation):
                self._answer(412)
                return
            self.bucket.pipe(place, content)
            self.generations[place] = generation + 1
        self._answer(200, json.dumps({"name": options["name"], "generation": str(generation + 1)}).encode())

    def do_DELETE(self) -> None:
        """Removes an object."""
        bucket, name, _ = self._asked()
        place = f"/{bucket}/{name}"
        with self.lock:
            there = self.bucket.isfile(place)
            if there:
                self.bucket.rm(place)
        self._answer(204 if there else 404)


def open_bucket() -> Bucket:
    """The bucket, from now on behind every gs:// of this process; before TensorStore is first used."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_port}"
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "nobody"
    backend._FileSystemSpecBackend._get_filesystem = lambda self, name: Service.bucket  # type: ignore[method-assign]
    flat = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    gcs_utils.get_bucket = lambda name: flat  # type: ignore[assignment]  # in place of google-cloud-storage
    return Service.bucket
