"""A stand-in for the Hugging Face hub: the requests that `huggingface_hub` makes to read, by HTTP.

    with serving({"org/name": {"main": folder}}) as hub:   # on a port of this machine
        v4jax.load("hf://org/name")
        hub.requests                                       # [(method, path, bytes sent)]

Files come from where a redirection says, as the hub's large ones do.
"""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse


class Hub:
    """Args: `repositories` is {name: {revision: folder}}.

    Attributes:
      refuse: is asked (path) before a request is answered; gives (status, error code) or None.
      cut: how many of the next ranges end in their middle, with the connection.
      requests: (method, path, bytes of the body) of each.
    """

    def __init__(self, repositories: dict[str, dict[str, pathlib.Path]]):
        self.repositories, self.requests = repositories, []
        self.refuse, self.cut = (lambda path: None), 0
        self.lock = threading.Lock()

    @staticmethod
    def commit(folder: pathlib.Path) -> str:
        """Returns the commit whose files are in a folder."""
        return hashlib.sha1(str(folder).encode()).hexdigest()

    def find(self, repository: str, revision: str) -> pathlib.Path | str:
        """Returns the folder of a revision, or the code of the error."""
        if repository not in self.repositories:
            return "RepoNotFound"
        folders = self.repositories[repository]
        commits = {self.commit(folder): folder for folder in folders.values()}
        return (folders | commits).get(urllib.parse.unquote(revision), "RevisionNotFound")

    def received(self, part: str) -> int:
        """Returns the bytes sent in answer to requests with `part` in their path."""
        return sum(count for _, path, count in self.requests if part in path)


@contextlib.contextmanager
def serving(repositories):
    """Gives a Hub, and its address as `hub.endpoint`."""
    hub = Hub(repositories)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        if refused := self.hub.refuse(path):
            return self._send(refused[0], b"{}", {"X-Error-Code": refused[1]})
        match path.strip("/").split("/"):
            case ["api", "models", org, name, "revision", revision]:
                folder = self.hub.find(f"{org}/{name}", revision)
                return self._send_json(folder, lambda: self._info(f"{org}/{name}", folder))
            case ["api", "models", org, name, "tree", revision, *below]:
                folder = self.hub.find(f"{org}/{name}", revision)
                below = urllib.parse.unquote("/".join(below))
                return self._send_json(folder, lambda: self._tree(folder, below))
            case [org, name, "resolve", revision, *below]:
                folder = self.hub.find(f"{org}/{name}", revision)
                if isinstance(folder, str):
                    return self._send(404, b"{}", {"X-Error-Code": folder})
                return self._send(302, b"", {"Location": f"/cdn{folder}/{'/'.join(below)}"})
            case ["cdn", *file]:
                return self._send_file(pathlib.Path("/" + "/".join(file)))
        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _info(self, repository, folder):
        return {"id": repository, "sha": self.hub.commit(folder)}

    def _tree(self, folder, below):
        found = (folder / below).iterdir() if (folder / below).is_dir() else ()
        return [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size,
                "oid": "0" * 40,
            }
            for path in sorted(found)
        ]

    def _send_json(self, folder, content):
        if isinstance(folder, str):
            return self._send(404, b"{}", {"X-Error-Code": folder})
        return self._send(200, json.dumps(content()).encode(), {})

    def _send_file(self, file):
        data, asked = file.read_bytes(), self.headers.get("Range")
        if asked is None:
            return self._send(200, data, {})
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        with self.hub.lock:
            cut, self.hub.cut = self.hub.cut > 0, max(self.hub.cut - 1, 0)
        return self._send(206, data[first : last + 1], headers, cut=cut)

    def _send(self, status, body, headers, cut=False):
        with self.hub.lock:  # before the answer, which the test may wait for
            self.hub.requests.append((self.command, self.path, len(body)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut
