"""The judge against a local server that is slow, refuses, fails, answers nonsense or nothing, or hangs up."""

from __future__ import annotations

import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from decomp_bench.errors import UserError
from decomp_bench.judge import Judge, JudgeConfig, scores

PARSE = scores(("concept", "fluency"), 1, 10)
GOOD = '{"concept": 7, "fluency": 4}'


def completion(text, finish="stop", **usage):
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage})


class Server(ThreadingHTTPServer):
    """Answers each request with the next step of a script: (status, body, headers), a function of the request, or `hang up`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.headers, self.open, self.most_open = [], [], [], 0, 0
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append(body)
            server.headers.append(dict(self.headers))
            server.open += 1
            server.most_open = max(server.most_open, server.open)
            step = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        step = step(body) if callable(step) else step
        with server.lock:
            server.open -= 1
        if step == "hang up":
            return
        status, text, headers = (*step, {})[:3]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode()) + headers.get("X-Missing", 0)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server():
    one = Server()
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()
    thread.join()


@pytest.fixture
def judge(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret-key")
    waits = []

    def make(**config):
        endpoint = f"http://127.0.0.1:{server.server_port}/v1"
        settings = JudgeConfig(
            **{"model": "m", "endpoint": endpoint, "key_variable": "TEST_JUDGE_KEY", "attempts": 3, "timeout": 5} | config
        )
        made = Judge(settings, tmp_path / "log.jsonl", tmp_path / "replies", sleep=waits.append)
        made.waits = waits
        return made

    return make


def ask(judge, text="rate this"):
    return judge.ask([{"role": "user", "content": text}], PARSE)


def test_a_reply_is_parsed_counted_logged_and_kept(server, judge, tmp_path):
    server.script = [(200, completion(f"```json\n{GOOD}\n```", prompt_tokens=1000, completion_tokens=500))]
    first = judge(price_in=2.0, price_out=10.0, parameters={"temperature": 0})
    assert ask(first).value == {"concept": 7.0, "fluency": 4.0}
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (1000, 500)
    assert first.usage.cost == pytest.approx(0.007)
    assert server.seen[0]["max_completion_tokens"] == 2000
    assert server.seen[0]["temperature"] == 0
    assert server.headers[0]["Authorization"] == "Bearer secret-key"
    again = judge(parameters={"temperature": 0})
    assert ask(again).value == {"concept": 7.0, "fluency": 4.0}
    assert (again.usage.cached, again.usage.attempts, again.usage.cost) == (1, 0, 0)
    assert ask(judge(parameters={"temperature": 1})).value
    assert len(server.seen) == 2
    log = (tmp_path / "log.jsonl").read_text()
    assert len(log.splitlines()) == 2
    assert "concept" in json.loads(log.splitlines()[0])["reply"]
    assert "secret-key" not in log


@pytest.mark.parametrize(
    "trouble",
    [
        (429, "slow down"),
        (500, "oops"),
        (503, ""),
        "hang up",
        (200, completion(GOOD), {"X-Missing": 50}),
        (200, "{not json"),
        (200, '{"choices": []}'),
        (200, "[]"),
        (200, completion("")),
        (200, completion("", "content_filter")),
    ],
    ids=str,
)
def test_trouble_that_passes_is_waited_out_and_trouble_that_stays_is_missing(server, judge, trouble):
    server.script = [trouble, (200, completion(GOOD))]
    passing = judge()
    assert ask(passing).value == {"concept": 7.0, "fluency": 4.0}
    assert passing.usage.attempts == 2
    assert 1.0 <= passing.waits[0] <= 1.25
    server.script = [trouble]
    staying = judge()
    verdict = ask(staying, "another")
    assert verdict.value is None
    assert verdict.reason
    assert staying.usage.missing == 1
    assert staying.usage.attempts == 3
    assert 2.0 <= staying.waits[-1] <= 2.5
    assert not list(staying.cache.glob("*another*"))
    server.script = [(200, completion(GOOD))]
    assert ask(staying, "another").value  # nothing of the failure was kept


@pytest.mark.parametrize(
    "text", ["I would say seven.", "{}", '{"concept": 7}', '{"concept": 11, "fluency": 4}', '{"concept": "7", "fluency": 4}', "{"]
)
def test_a_reply_of_another_form_is_missing_and_never_a_score(server, judge, text):
    server.script = [(200, completion(text))]
    one = judge()
    verdict = ask(one)
    assert verdict.value is None
    assert "form" in verdict.reason
    assert verdict.text == text
    assert len(server.seen) == 1
    assert one.usage.missing == 1


def test_retry_after_is_obeyed_in_seconds_and_as_a_date(server, judge):
    date = formatdate(time.time() + 90, usegmt=True)
    server.script = [(429, "", {"Retry-After": "17"}), (503, "", {"Retry-After": date}), (200, completion(GOOD))]
    one = judge()
    assert ask(one).value
    assert one.waits[0] == 17
    assert 80 < one.waits[1] <= 90


def test_reasoning_that_eats_the_limit_is_given_more_and_then_missing(server, judge):
    enough = lambda least: lambda body: (200, completion(*((GOOD, "stop") if body["max_completion_tokens"] >= least else ("", "length"))))
    server.script = [enough(800)]
    assert ask(judge(tokens=100, most_tokens=1000)).value
    assert [body["max_completion_tokens"] for body in server.seen] == [100, 200, 400, 800]
    server.script = [enough(5000)]
    verdict = ask(judge(tokens=100, most_tokens=1000), "another")
    assert verdict.value is None
    assert "length" in verdict.reason
    assert server.seen[-1]["max_completion_tokens"] == 1000


def test_a_slow_reply_runs_into_the_timeout(server, judge):
    server.script = [lambda body: time.sleep(0.6) or (200, completion(GOOD)), (200, completion(GOOD))]
    one = judge(timeout=0.2)
    assert ask(one).value
    assert one.usage.attempts == 2


def test_concurrency_is_limited_order_is_kept_and_equal_requests_are_asked_once(server, judge):
    def answer(body):
        time.sleep(0.03)
        return 200, completion(json.dumps({"concept": int(body["messages"][0]["content"]), "fluency": 1}))

    server.script = [answer]
    one = judge(concurrency=3)
    wanted = [i % 9 + 1 for i in range(18)]
    found = one.ask_all([[{"role": "user", "content": str(i)}] for i in wanted], PARSE)
    assert [verdict.value["concept"] for verdict in found] == wanted
    assert len(server.seen) == 9
    assert 1 < server.most_open <= 3


@pytest.mark.parametrize(("status", "said"), [(401, "set TEST_JUDGE_KEY"), (404, "no model 'm'")])
def test_a_refused_key_or_model_ends_at_once_and_names_the_fix(server, judge, status, said):
    server.script = [(status, "no")]
    with pytest.raises(UserError, match=said):
        ask(judge())
    assert len(server.seen) == 1


def test_without_a_key_the_public_endpoint_is_not_asked(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        Judge(JudgeConfig(model="m")).ask([{"role": "user", "content": "x"}], PARSE)


def test_a_request_that_cannot_succeed_is_not_repeated_and_nobody_listening_is_missing(server, judge):
    server.script = [(400, "bad request")]
    assert ask(judge()).reason == "HTTP 400"
    assert len(server.seen) == 1
    nobody = judge(endpoint="http://127.0.0.1:9/v1", attempts=2)
    assert "no reply" in ask(nobody).reason
