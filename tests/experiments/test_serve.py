"""The HTTP server as clients see it: answers against the library's own, errors, a full queue, clients that leave."""

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from experiments import generate, loading, serve, serve_http
from kwaicoder_jax import checkpoints, data, inference, models
from kwaicoder_jax.errors import UserError
from tests.experiments import commands, tiny_checkpoint

NEW = 20
ROWS, QUEUE, MOST_TOKENS, MOST_BYTES = 4, 68, 4096, 20_000


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def loaded(stage):
    return loading.load({"seed": 0, "generate": {**generate.DEFAULTS, "init_from": str(stage)}}, "generate")


def make_engine(loaded):
    return loaded.engine(max_rows=ROWS, max_tokens=MOST_TOKENS, fixed_rows=True)  # so that little is compiled


@contextlib.contextmanager
def serving(loaded, *, most=ROWS + QUEUE, engine=None, grace=10.0):
    """A server in a thread; yields its address and its service."""
    service = inference.Service(engine or make_engine(loaded), most=most)
    service.start()
    app = serve_http.App(loaded, service, model="tiny", max_body_bytes=MOST_BYTES)
    listener = serve._listen("127.0.0.1", 0)
    server = serve_http.HttpServer(app.asgi, service, grace)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(60)
        assert service.close(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def running(loaded):
    with serving(loaded) as found:
        yield found


@pytest.fixture
def service(running):
    return running[1]


@pytest.fixture
def http(running):
    with httpx.Client(base_url=running[0], timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=running[0] + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def expected(stage):
    """Greedy texts of the library's one call, for prompts of tokens."""
    config = models.ModelConfig.from_dict(checkpoints.read_meta(stage)["model"])
    params = checkpoints.read_params(stage, models.abstract(config))
    tokenizer = data.Tokenizer.from_file(stage / "tokenizer.json")

    def texts(prompts, **options):
        options = {"max_new_tokens": NEW, "stop_tokens": (0, 1, 2, 3, 4), **options}
        rows = [*prompts, *[prompts[0]] * (ROWS - len(prompts))]  # the programs of the server
        return [tokenizer.decode(ids) for ids in inference.generate(params, config, rows, **options)][: len(prompts)]

    return texts


def complete(client, prompt, **fields):
    return client.completions.create(
        **{"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0, **fields}
    )


def until(condition, seconds=300.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it does not come"
        time.sleep(0.02)


def test_every_form_of_a_prompt(client, loaded, expected):
    one, two = list(loaded.prompt("def f(")), list(loaded.prompt("naïve 日本"))
    first, second = expected([one, two])
    for prompt, texts in (
        ("def f(", [first]),
        (["def f(", "naïve 日本"], [first, second]),
        (one, [first]),
        ([one, two], [first, second]),
    ):
        answer = complete(client, prompt)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        sent = len(one) + (len(two) if len(texts) > 1 else 0)
        assert answer.usage.prompt_tokens == sent
        assert answer.usage.completion_tokens == NEW * len(texts) == answer.usage.total_tokens - sent


def test_samples_depend_on_the_seed(client, loaded, expected):
    prompts = [list(loaded.prompt("x"))] * 3
    texts = expected(prompts, temperature=1.0, top_p=0.9, seed=5)
    answer = complete(client, "x", n=3, temperature=1.0, top_p=0.9, seed=5, best_of=3, user="me")
    assert [choice.text for choice in answer.choices] == texts
    assert len({*texts}) == 3
    assert (
        complete(client, "x", temperature=1.0).choices[0].text != complete(client, "x", temperature=1.0).choices[0].text
    )


@pytest.mark.parametrize("options", [{}, {"n": 2, "echo": True}, {"stop": ["q"]}, {"logprobs": 1}])
def test_a_stream_is_the_whole(client, options):
    fields = {"temperature": 1.2, "seed": 3, **options}
    whole = complete(client, ["def naïve(", "x"], **fields)
    texts, reasons, chunks = [""] * len(whole.choices), {}, 0
    for chunk in complete(client, ["def naïve(", "x"], stream=True, stream_options={"include_usage": True}, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            assert choice.index not in reasons
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        chunks += 1
    assert chunk.usage == whole.usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks > 5


def test_streams_are_server_sent_events_of_whole_characters(http, loaded, expected):
    with http.stream(
        "POST", "/v1/completions", json={"prompt": "x", "max_tokens": NEW, "temperature": 0, "stream": True}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
    (text,) = expected([list(loaded.prompt("x"))])
    assert "".join(pieces) == text
    for count in range(len(pieces)):
        assert text.startswith("".join(pieces[:count]))


def test_infilling(client, loaded, expected):
    prompt = data.infilling_prompt(loaded.tokenizer, "def f(", "):\n")
    (text,) = expected([prompt])
    answer = complete(client, "def f(", suffix="):\n")
    assert (answer.choices[0].text, answer.usage.prompt_tokens) == (text, len(prompt))
    assert complete(client, "def f(", suffix="").choices[0].text == complete(client, "def f(").choices[0].text != text


def test_stop_strings_and_echo(client):
    fields = {"temperature": 1.4, "seed": 9}
    text = complete(client, "x", **fields).choices[0].text
    for stop in (text[4:7], [text[3], "never"]):
        choice = complete(client, "x", stop=stop, **fields).choices[0]
        assert (choice.text, choice.finish_reason) == (
            text[: text.index(stop[0] if isinstance(stop, list) else stop)],
            "stop",
        )
    assert complete(client, "x€", echo=True, max_tokens=0).choices[0].text == "x€"
    assert complete(client, "x", echo=True, **fields).choices[0].text == "x" + text


def test_log_probabilities(client, loaded):
    answer = complete(client, "def f(", logprobs=2).choices[0]
    scores, ids = answer.logprobs, []
    engine = make_engine(loaded)
    generation = engine.submit(inference.Request(loaded.prompt("def f("), NEW, logprobs=2))
    engine.run()
    ids = generation.ids
    assert scores.token_logprobs == pytest.approx([token.logprob for token in generation.tokens], abs=1e-5)
    for place, (token, start, top) in enumerate(zip(ids, scores.text_offset, scores.top_logprobs, strict=True)):
        assert scores.tokens[place] in top
        assert len(top) in (2, 3)
        whole = loaded.tokenizer.decode(ids[:place])
        assert start == len(whole.rstrip("\N{REPLACEMENT CHARACTER}")) or start == len(whole)
        if scores.tokens[place].startswith("bytes:"):
            hexadecimal = scores.tokens[place].removeprefix("bytes:").replace("\\x", "")
            assert bytes.fromhex(hexadecimal) == loaded.tokenizer.token_bytes(token)
        else:
            assert scores.tokens[place] in answer.text[start : start + 8]  # behind a character that broke off
    cut = complete(client, "def f(", logprobs=2, stop=answer.text[-1]).choices[0]
    assert all(start < len(cut.text) for start in cut.logprobs.text_offset)
    assert cut.logprobs.tokens == scores.tokens[: len(cut.logprobs.tokens)]


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (b"{", 400, None, "not JSON"),
        (b"[" * 9_000, 400, None, "not JSON"),
        (b"[1]", 400, None, "no JSON object"),
        (b'{"temperature": NaN}', 400, None, "NaN is no number"),
        (b'{"prompt": "\xff"}', 400, None, "not JSON"),
        (b'{"prompt": "\\ud800"}', 400, "prompt", "is not UTF-8"),
        (b" " * (MOST_BYTES + 1), 413, None, f"longer than {MOST_BYTES} bytes"),
        ({"prompt": 3}, 400, "prompt", "a string or a list"),
        ({"prompt": []}, 400, "prompt", "empty list"),
        ({"prompt": ["a", 1]}, 400, "prompt", "a list of token ids"),
        ({"prompt": [True]}, 400, "prompt", "a list of token ids"),
        ({"prompt": [[1], [100_000]]}, 400, "prompt", "token 100000 is outside the vocabulary"),
        ({"prompt": [1], "suffix": "a"}, 400, "suffix", "not token ids"),
        ({"prompt": "a " * 4500}, 400, "prompt", "are more than 4096; shorten the prompt"),
        ({"max_tokens": 5000}, 400, "prompt", "are more than 4096"),
        ({"max_tokens": -1}, 400, "max_tokens", "use 0 or more"),
        ({"max_tokens": 1.5}, 400, "max_tokens", "not an integer"),
        ({"temperature": 2.5}, 400, "temperature", "use 0 to 2"),
        ({"temperature": "hot"}, 400, "temperature", "not a number"),
        ({"temperature": 1e999}, 400, None, "no number"),
        ({"top_p": 0}, 400, "top_p", "more than 0"),
        ({"n": 0}, 400, "n", "1 or more"),
        ({"n": 1000}, 400, "n", f"at most {ROWS + QUEUE}"),
        ({"best_of": 4}, 400, "best_of", "not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ({"frequency_penalty": -1}, 400, "frequency_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
        ({"logprobs": 6}, 400, "logprobs", "use 0 to 5"),
        ({"logprobs": 1, "echo": True}, 400, "logprobs", "echoed prompt"),
        ({"stop": [""]}, 400, "stop", "is empty"),
        ({"stop": [3]}, 400, "stop", "list of strings"),
        ({"stop": ["a"] * 17}, 400, "stop", "17 stop strings"),
        ({"stream": 1}, 400, "stream", "true or false"),
        ({"stream_options": {"what": 1}}, 400, "stream_options.what", "no field"),
        ({"messages": []}, 400, "messages", "no field 'messages'"),
        ({"model": "gpt"}, 404, "model", "there is no model 'gpt'; this server has 'tiny'"),
    ],
)
def test_bad_requests(http, body, status, param, words):
    body = body if isinstance(body, bytes) else json.dumps({"prompt": "x", **body}).encode()
    answer = http.post("/v1/completions", content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_neutral_values_and_null_are_accepted(http):
    names = ("suffix", "stop", "seed", "logprobs", "best_of", "logit_bias", "stream_options", "model", "n", "echo")
    fields = {"presence_penalty": 0.0, "frequency_penalty": 0, **dict.fromkeys(names), "prompt": "x", "max_tokens": 1}
    assert http.post("/v1/completions", json=fields).status_code == 200
    assert http.post("/v1/completions", json={"logit_bias": {}}).json()["usage"]["completion_tokens"] == 16


def test_other_routes(http, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert http.get("/health").json() == {"status": "ok", "requests": 0}
    for method, place, status in (
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/models/gpt", 404),
        ("POST", "/v1/chat", 404),
    ):
        answer = http.request(method, place)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_forgotten(running, service, stream):
    fields = {"prompt": "x", "max_tokens": 4000, "temperature": 0, "n": 6, "stream": stream}  # more than have rows
    with socket.create_connection(running[0].removeprefix("http://").split(":")) as connection:
        body = json.dumps(fields).encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: service.live == 6)
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    until(lambda: service.live == 0)


def test_a_full_queue_is_429(loaded):
    with serving(loaded, most=3) as (address, service), httpx.Client(base_url=address, timeout=60) as http:
        long = {"prompt": "x", "max_tokens": 4000, "temperature": 0, "stream": True}
        with http.stream("POST", "/v1/completions", json={**long, "n": 2}):
            answer = http.post("/v1/completions", json={"prompt": ["x", "y"]})
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert answer.json()["error"]["code"] == "queue_full"
            assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
            assert service.live == 2
        until(lambda: service.live == 0)
        assert http.post("/v1/completions", json={"prompt": ["x", "y"], "max_tokens": 1}).status_code == 200


def test_a_failed_engine_is_503(loaded):
    engine, count = make_engine(loaded), 0
    step = engine.step

    def failing():
        nonlocal count
        count += 1
        if count > 10:
            raise RuntimeError("out of memory")
        return step()

    engine.step = failing
    with serving(loaded, engine=engine) as (address, service), httpx.Client(base_url=address, timeout=60) as http:
        with http.stream(
            "POST", "/v1/completions", json={"prompt": "x", "max_tokens": 99, "temperature": 0, "stream": True}
        ) as stream:
            events = stream.read().decode().strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "unavailable"
        assert len(events) > 3
        assert isinstance(service.error, RuntimeError)
        answer = http.post("/v1/completions", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        health = http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed", "error": "RuntimeError"})


def test_under_load(running, service, loaded, expected):
    """64 clients at once, a third of which leave: the others get what they would get alone."""
    words = ["a", "def f", "naïve", "x = 日", "  return", "'€'", "12"]
    right = dict(zip(words, expected([list(loaded.prompt(word)) for word in words])))
    draw = random.Random(0)

    async def one(http, number):
        word, stream, leaves = words[number % len(words)], number % 2 == 0, number % 3 == 0
        fields = {"prompt": word, "max_tokens": NEW, "temperature": 0, "stream": stream}
        if leaves:
            with contextlib.suppress(httpx.TimeoutException):
                await http.post("/v1/completions", json={**fields, "max_tokens": 400}, timeout=draw.random())
            return
        answer = await http.post("/v1/completions", json=fields)
        assert answer.status_code == 200, answer.text
        if not stream:
            assert answer.json()["choices"][0]["text"] == right[word]
            return
        events = answer.text.strip().split("\n\n")
        assert events.pop() == "data: [DONE]"
        assert "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events) == right[word]

    async def everyone():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=running[0], timeout=120, limits=limits) as http:
            await asyncio.gather(*(one(http, number) for number in range(64)))

    asyncio.run(everyone())
    until(lambda: service.live == 0)
    assert service.error is None


def test_shutting_down_tells_who_waits(loaded):
    with serving(loaded, grace=0.3) as (address, service):
        answers = []

        def ask(stream):
            fields = {"prompt": "x", "max_tokens": 4000, "temperature": 0, "stream": stream}
            answers.append(httpx.post(f"{address}/v1/completions", json=fields, timeout=60))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        until(lambda: service.live == 2)
    for thread in threads:
        thread.join(30)
    whole, stream = sorted(answers, key=lambda answer: answer.status_code, reverse=True)
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "unavailable")
    assert stream.status_code == 200
    assert json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "unavailable"


def test_missing_libraries_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "experiments.serve_http")
    monkeypatch.delattr("experiments.serve_http")
    with pytest.raises(UserError, match=r"^uvicorn is not installed, and serve needs it; pip install 'kwaicoder_jax"):
        serve._http()


def test_the_command(stage):
    """Starts, completes, ends what runs when SIGTERM comes, exits 0; another one cannot take its port."""
    command = [sys.executable, "-m", "experiments.serve", f"--checkpoint={stage}", "--model_name=mine"]
    options = {"cwd": commands.ROOT, "env": commands.environment(), "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--port=0"], stdout=subprocess.PIPE, **options)
    line = process.stderr.readline()
    assert line.startswith("serve: mine at http://127.0.0.1:"), line
    address = line.split()[-1]
    taken = subprocess.run([*command, f"--port={address.split(':')[-1].split('/')[0]}"], timeout=120, **options)
    assert taken.returncode == 2
    assert taken.stderr.startswith("error: --port: cannot listen at 127.0.0.1:")
    assert taken.stderr.count("\n") == 1
    fields = {"prompt": "x", "max_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{address}/completions", json=fields, timeout=120) as stream:
        pieces = stream.iter_text()
        first = next(pieces)
        process.send_signal(signal.SIGTERM)
        rest = first + "".join(pieces)
    assert '"finish_reason": "' in rest
    assert rest.endswith("data: [DONE]\n\n")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "", "")
