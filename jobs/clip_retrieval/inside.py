"""clip-retrieval's index and back, run by the Python of its own environment: `python -I inside.py COMMAND …`.

Nothing of densebridge is imported here, and nothing of the caller's environment is there: a line of JSON on stdin is a
question, a line on stdout an answer, and whatever the libraries print goes to stderr. When stdin ends, so does this.

    index EMBEDDINGS INDEX      clip_index, from a folder in clip-retrieval's layout; answers when both indices are there
    search INDEX                answers {"vectors", "count"} with {"positions", "scores"} from a file of faiss, until stdin ends
    back FOLDER NAME PORT       clip_back; asks {"text"} or {"image"} for the vectors of queries
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

LARGEST_REQUEST = 32 << 20  # bytes, a picture in base64 among them
OWN_NAMES = ("127.0.0.1", "localhost")


class Caller:
    """The process that started this one."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # the libraries print
        self._lines: queue.Queue[str] = queue.Queue()
        self._turn = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        os._exit(0)  # the caller is gone, whatever is under way

    def say(self, **answer: Any) -> None:
        """A line to the caller."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()

    def hear(self) -> dict[str, Any]:
        """The caller's next line."""
        return json.loads(self._lines.get())

    def ask(self, **question: Any) -> dict[str, Any]:
        """Asks, for one thread at a time."""
        with self._turn:
            self.say(**question)
            return self.hear()


def stand_in(name: str, **holds: Any) -> None:
    """Puts an empty module in the place of one that is not installed here."""
    module = ModuleType(name)
    module.__dict__.update(holds)
    sys.modules[name] = module


def open_package() -> None:
    """Makes clip_retrieval's modules importable one by one: the package itself imports all, torch and models among it."""
    spec = importlib.machinery.PathFinder.find_spec("clip_retrieval")
    assert spec
    sys.modules["clip_retrieval"] = importlib.util.module_from_spec(spec)


def index(caller: Caller, embeddings: str, out: str, index_memory: str, memory: str) -> None:
    """Builds image.index and text.index, and copies the metadata beside them."""
    from clip_retrieval.clip_index import clip_index

    clip_index(embeddings, out, max_index_memory_usage=index_memory, current_memory_available=memory)
    caller.say(made=True)


def search(caller: Caller, path: str) -> None:
    """Answers from an index; a position is -1 where it found fewer than asked for."""
    import faiss
    import numpy as np

    found = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    caller.say(rows=found.ntotal, width=found.d)
    while True:
        asked = caller.hear()
        scores, positions = found.search(np.asarray(asked["vectors"], np.float32), min(asked["count"], found.ntotal))
        caller.say(positions=positions.tolist(), scores=scores.tolist())


def back(caller: Caller, folder: str, name: str, port: str) -> None:
    """Serves the index on this machine alone. The models that back would load stay out: the caller embeds the queries, a
    query by a picture's URL (which back would fetch from anywhere) is refused, and no other site's page may ask.
    """
    stand_in("torch", cuda=SimpleNamespace(is_available=lambda: False))
    stand_in("all_clip", load_clip=lambda *_, **__: (None, None, None))
    import numpy as np
    from clip_retrieval import clip_back as module
    from flask import Flask, request
    from werkzeug.exceptions import BadRequest, Forbidden
    from werkzeug.serving import make_server

    def compute_query(
        self: Any,
        clip_resource: Any,
        text_input: Any,
        image_input: Any,
        image_url_input: Any,
        embedding_input: Any,
        **_: Any,
    ) -> Any:
        width = clip_resource.image_index.d
        if text_input:
            answer = caller.ask(text=str(text_input))
        elif image_input:
            answer = caller.ask(image=str(image_input))
        elif image_url_input:
            raise BadRequest("a query by image_url is not answered here: send the picture itself as image, in base64")
        else:
            answer = {"vector": embedding_input}
        if "wrong" in answer:
            raise BadRequest(answer["wrong"])
        query = np.asarray(answer["vector"], np.float32).reshape(1, -1)
        if query.shape[1] != width or not np.isfinite(query).all():
            raise BadRequest(f"an embedding here has {width} numbers")
        return query

    def check_host() -> None:
        if request.host.rsplit(":", 1)[0] not in OWN_NAMES:  # a page whose own name was made to point here
            raise Forbidden("this server answers for its own machine only")

    class LocalFlask(Flask):
        """Listens on the loopback address, whatever it is told."""

        def run(self, *_: Any, **__: Any) -> None:
            self.config["MAX_CONTENT_LENGTH"] = LARGEST_REQUEST
            self.before_request(check_host)
            server = make_server("127.0.0.1", int(port), self, threaded=True)
            caller.say(port=server.port)
            server.serve_forever()

    module.KnnService.compute_query = compute_query
    module.Flask = LocalFlask
    module.CORS = lambda app: None
    with tempfile.TemporaryDirectory() as aside:
        paths = Path(aside) / "indices_paths.json"
        paths.write_text(json.dumps({name: folder}))
        module.clip_back(
            indices_paths=str(paths),
            columns_to_return=["key", "url", "caption"],
            enable_faiss_memory_mapping=True,
            enable_mclip_option=False,
            use_jit=False,
            provide_safety_model=False,
            provide_violence_detector=False,
            provide_aesthetic_embeddings=False,
        )


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    started = Caller()
    open_package()
    commands: dict[str, Callable[..., None]] = {"index": index, "search": search, "back": back}
    commands[command](started, *arguments)
