"""Google Cloud Storage as far as objects need it: its JSON API over a dictionary, with generations and conditions."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from threading import RLock, Thread
from typing import Any
from urllib.parse import unquote

from werkzeug import Request, Response
from werkzeug.serving import make_server


def environment(url: str) -> dict[str, str]:
    """The variables that lead gcsfs to the server at ``url``, without credentials and without gRPC."""
    return {"STORAGE_EMULATOR_HOST": url, "FSSPEC_GS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@dataclass
class GcsServer:
    """Buckets exist as soon as something is put into them. One request at a time."""

    objects: dict[tuple[str, str], tuple[bytes, int]] = field(default_factory=dict)
    """Bucket and name -> content and generation."""
    uploads: dict[str, tuple[str, str, int | None, bytearray]] = field(default_factory=dict)
    """Resumable uploads: id -> bucket, name, the generation that the object must have (0: none), what has arrived."""

    def __post_init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._generations, self._lock = count(1), RLock()
        self._server = make_server("127.0.0.1", 0, self._application, threaded=True)
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()

    def _application(self, environ: dict[str, Any], start: Any) -> Any:
        request = Request(environ)
        path = environ["RAW_URI"].partition("?")[0].removeprefix(self.url)
        body = request.get_data()
        with self._lock:
            for pattern, handle in ROUTES:
                if match := re.fullmatch(pattern, path):
                    return handle(self, request, body, *map(unquote, match.groups()))(environ, start)
        return failure(400, f"no such request: {request.method} {path}")(environ, start)

    def insert(self, request: Request, body: bytes, bucket: str) -> Response:
        name, condition = request.args.get("name", ""), request.args.get("ifGenerationMatch", type=int)
        if upload := request.args.get("upload_id"):
            return self._part(body, upload, request.headers["Content-Range"])
        match request.args["uploadType"]:
            case "resumable":
                upload = str(len(self.uploads))
                self.uploads[upload] = (bucket, name, condition, bytearray())
                location = f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}"
                return Response("", headers={"Location": location})
            case "multipart":
                boundary = re.search('boundary="?([^"]+)"?', request.headers["Content-Type"])[1].encode()
                _, metadata, content = body.removesuffix(b"\n--" + boundary + b"--").split(b"--" + boundary + b"\n", 2)
                name = json.loads(metadata.partition(b"\n\n")[2])["name"]
                body = content.partition(b"\n\n")[2]
        return self._write(bucket, name, body, condition)

    def _part(self, body: bytes, upload: str, extent: str) -> Response:
        bucket, name, condition, arrived = self.uploads[upload]
        arrived += body
        if len(arrived) < int(extent.rpartition("/")[2]):
            return Response("", 308, headers={"Range": f"bytes=0-{len(arrived) - 1}"})
        del self.uploads[upload]
        return self._write(bucket, name, bytes(arrived), condition)

    def _write(self, bucket: str, name: str, content: bytes, condition: int | None) -> Response:
        _, generation = self.objects.get((bucket, name), (b"", 0))
        if condition is not None and condition != generation:
            return failure(412, "conditionNotMet")
        self.objects[bucket, name] = content, next(self._generations)
        return answer(self._describe(bucket, name))

    def _describe(self, bucket: str, name: str) -> dict[str, str]:
        content, generation = self.objects[bucket, name]
        digest = b64encode(hashlib.md5(content).digest()).decode()
        size = str(len(content))
        return {"bucket": bucket, "name": name, "generation": str(generation), "size": size, "md5Hash": digest}

    def object(self, request: Request, body: bytes, bucket: str, name: str) -> Response:
        if (bucket, name) not in self.objects:
            return failure(404, "notFound")
        if request.method == "DELETE":
            del self.objects[bucket, name]
            return Response("", 204)
        if request.args.get("alt") != "media":
            return answer(self._describe(bucket, name))
        content, _ = self.objects[bucket, name]
        if (wanted := request.range) is None:
            return Response(content)
        start, stop = wanted.range_for_length(len(content)) or (0, 0)
        return Response(content[start:stop], 206) if start < stop else failure(416, "requestedRangeNotSatisfiable")

    def rewrite(self, request: Request, body: bytes, *names: str) -> Response:
        source, target = names[:2], names[2:]
        if source not in self.objects:
            return failure(404, "notFound")
        self._write(*target, self.objects[source][0], None)
        return answer({"done": True, "resource": self._describe(*target)})

    def list(self, request: Request, body: bytes, bucket: str) -> Response:
        prefix, delimiter = request.args.get("prefix", ""), request.args.get("delimiter", "")
        names = sorted(name for b, name in self.objects if b == bucket and name.startswith(prefix))
        folders = {prefix + n[len(prefix) :].partition(delimiter)[0] + delimiter for n in names} if delimiter else set()
        folders = {folder for folder in folders if any(name.startswith(folder) for name in names)}
        items = [self._describe(bucket, n) for n in names if not delimiter or delimiter not in n[len(prefix) :]]
        return answer({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})


def answer(document: dict[str, Any]) -> Response:
    return Response(json.dumps(document), content_type="application/json")


def failure(status: int, reason: str) -> Response:
    return Response(json.dumps({"error": {"code": status, "message": reason}}), status, content_type="application/json")


ROUTES: list[tuple[str, Callable[..., Response]]] = [
    (r"/upload/storage/v1/b/([^/]+)/o", GcsServer.insert),
    (r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", GcsServer.rewrite),
    (r"/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)", GcsServer.object),
    (r"/storage/v1/b/([^/]+)/o", GcsServer.list),
]
