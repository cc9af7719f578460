"""A model that is asked for marks: a server of our own, which also fails, and says what is no answer."""

import http.server
import json
import threading

import pytest

from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.engine.store import Store
from kwaicoder_jax.data.quality.asking import Judge, parsed
from kwaicoder_jax.errors import UserError


class _Server(http.server.BaseHTTPRequestHandler):
    asked: list[dict] = []  # noqa: RUF012
    failures = 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        if type(self).failures:
            type(self).failures -= 1
            self.send_response(503)
            self.end_headers()
            return
        text = body["messages"][0]["content"]
        good = 10 * ("good" in text.rsplit("\n\n", 1)[1])
        words = "I will not." if "refuse" in text else json.dumps(dict.fromkeys(
            ("readability", "modularity", "clarity", "reusability"), good))  # fmt: skip
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": words}}]}  # fmt: skip
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    pytest.importorskip("openai")
    handler = type("Server", (_Server,), {"asked": [], "failures": 0})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1", handler
    running.shutdown()
    running.server_close()


DOCUMENTS = [Document("code", str(n), f"{'good' if n % 2 else 'poor'} text {n}", language="python") for n in range(9)]


def test_labels_in_the_order_of_the_documents(tmp_path, server):
    url, handler = server
    judge = Judge(url, "judge", workers=3)
    documents = [*DOCUMENTS, Document("code", "x", "good but refuse")]
    asked = judge.ask(Store(tmp_path), documents)
    assert [row["label"] for row in asked.rows] == [float(n % 2) for n in range(9)]
    assert [row["text"] for row in asked.rows] == [document.text for document in DOCUMENTS]
    assert asked.counts == {"judged": 9, "unusable": 1}
    assert {body["model"] for body in handler.asked} == {"judge"}
    assert {body["temperature"] for body in handler.asked} == {0.0}


def test_nothing_is_asked_twice(tmp_path, server):
    url, handler = server
    store = Store(tmp_path)
    first = Judge(url, "judge").ask(store, DOCUMENTS[:5])
    again = Judge(url, "judge").ask(store, DOCUMENTS)
    assert again.rows[:5] == first.rows
    assert again.counts == {"known": 5, "judged": 4}
    assert len(handler.asked) == 9
    Judge(url, "another").ask(store, DOCUMENTS[:1])
    assert len(handler.asked) == 10


def test_a_server_that_fails_is_asked_again_and_then_given_up(tmp_path, server):
    url, handler = server
    handler.failures = 1
    assert Judge(url, "judge", workers=1).ask(Store(tmp_path), DOCUMENTS[:2]).counts == {"judged": 2}
    handler.failures = 100
    with pytest.raises(UserError, match="does not answer"):
        Judge(url, "judge", workers=1, retries=1).ask(Store(tmp_path), DOCUMENTS[3:4])


def test_long_documents_are_shown_in_part(tmp_path, server):
    url, handler = server
    Judge(url, "judge").ask(Store(tmp_path), [Document("code", "long", "y" * 10**6)])
    assert len(handler.asked[0]["messages"][0]["content"]) < 20_000


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('{"readability": 7, "modularity": 5, "clarity": 6, "reusability": 4}', 22),
        (
            'Sure. {"readability": 1}\n```{"readability": 7, "modularity": "5", "clarity": 6.5, "reusability": 4}```',
            22.5,
        ),
        ('{"readability": 11, "modularity": 5, "clarity": 6, "reusability": 4}', 0),
        ('{"readability": 7, "modularity": 5, "clarity": 6}', 0),
        ("seven of ten", 0),
        ("{" * 1000, 0),
        ("", 0),
    ],
)
def test_answers(answer, found):
    assert sum(parsed(answer).values()) == found
