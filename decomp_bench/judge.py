"""A language model as judge, over any endpoint that speaks the OpenAI chat protocol. Imports no torch.

A reply that does not parse, an exhausted budget of tokens and an unreachable endpoint are missing values, never scores. Every reply is
kept on disk by the hash of its request, so that nothing is asked, or paid, twice.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt

from decomp_bench.config import Config, digest
from decomp_bench.data.cache import cache_dir
from decomp_bench.errors import UserError
from decomp_bench.files import write_json

Value = TypeVar("Value")
RETRIED = frozenset({408, 409, 425, 429})
"""Client errors that another attempt may cure; every 5xx is tried again too."""
Messages = Sequence[dict[str, str]]


class JudgeConfig(Config):
    """How a judge is asked. The key is read from the environment and is stored nowhere."""

    model: str
    endpoint: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; an endpoint without one takes requests without it."""
    tokens: PositiveInt = 2000
    """max_completion_tokens, hidden reasoning included."""
    most_tokens: PositiveInt = 16_000
    """Up to which the limit is doubled when a reply ends for its length without a usable answer."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Other fields of the request, such as temperature or reasoning_effort."""
    timeout: PositiveFloat = 120.0
    """Seconds for one attempt."""
    attempts: PositiveInt = 6
    backoff: Annotated[float, Field(ge=0)] = 1.0
    """Seconds before the second attempt; doubled each time, a minute at most, with up to a quarter of jitter."""
    concurrency: PositiveInt = 8
    price_in: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million prompt tokens; for the count alone."""
    price_out: Annotated[float, Field(ge=0)] = 0.0


@dataclass
class Usage:
    """What was asked and what it cost. Cached replies are counted apart and cost nothing."""

    requests: int = 0
    attempts: int = 0
    cached: int = 0
    missing: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class Verdict(Generic[Value]):
    """A judge's answer to one request: the parsed value, or None and why it is missing."""

    value: Value | None
    reason: str = ""
    text: str = ""


class _Failed(Exception):
    """An attempt that failed; `after` is when the endpoint wants the next one, `final` says that none would help."""

    def __init__(self, reason: str, after: float | None = None, final: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.after, self.final = reason, after, final


@dataclass
class Judge:
    """Asks, retries, caches and counts. `log` is a JSONL file that receives every raw exchange."""

    config: JudgeConfig
    log: Path | None = None
    cache: Path = field(default_factory=lambda: cache_dir() / "judge")
    usage: Usage = field(default_factory=Usage)
    sleep: Callable[[float], object] = time.sleep

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._random = random.Random(0)

    def ask_all(self, requests: Sequence[Messages], parse: Callable[[str], Value]) -> list[Verdict[Value]]:
        """Verdicts in the order of the requests. `parse` turns a reply's text into a value and raises ValueError, KeyError or TypeError
        where it cannot; identical requests are asked once. Raises UserError where the endpoint refuses the key or the model."""
        if self.config.endpoint.startswith("https://api.openai.com") and not os.environ.get(self.config.key_variable):
            raise UserError(f"no key for {self.config.endpoint}: set the environment variable {self.config.key_variable}")
        keys = [digest([self.config.model, self.config.endpoint, self.config.parameters, list(one)], 32) for one in requests]
        distinct = dict(zip(keys, requests, strict=True))
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            found = dict(zip(distinct, pool.map(lambda item: self._ask(*item, parse), distinct.items()), strict=True))
        return [found[key] for key in keys]

    def ask(self, messages: Messages, parse: Callable[[str], Value]) -> Verdict[Value]:
        """The verdict on one request."""
        return self.ask_all([messages], parse)[0]

    def _ask(self, key: str, messages: Messages, parse: Callable[[str], Value]) -> Verdict[Value]:
        self._count(requests=1)
        kept = self._kept(key)
        if kept is not None:
            verdict = _parsed(kept, parse)
            if verdict.value is not None:
                self._count(cached=1)
                return verdict
        verdict = self._ask_longer(key, messages, parse)
        self._count(missing=int(verdict.value is None))
        return verdict

    def _ask_longer(self, key: str, messages: Messages, parse: Callable[[str], Value]) -> Verdict[Value]:
        """Ask with more room while a reply ends for its length; the last verdict where there is no more to give."""
        limit = self.config.tokens
        while True:
            try:
                text, finish = self._persist(key, messages, limit)
            except _Failed as failed:
                return Verdict(None, failed.reason)
            verdict = _parsed(text, parse)
            if verdict.value is not None:
                write_json({"text": text}, self.cache / f"{key}.json")
                return verdict
            if finish != "length" or limit >= self.config.most_tokens:
                return Verdict(None, "ended for its length" if finish == "length" else verdict.reason, text)
            limit = min(2 * limit, self.config.most_tokens)

    def _persist(self, key: str, messages: Messages, limit: int) -> tuple[str, str]:
        """Text and finish reason, however many attempts it takes."""
        wait = self.config.backoff
        for attempt in range(1, self.config.attempts + 1):
            try:
                return self._attempt(key, messages, limit)
            except _Failed as failed:
                if failed.final or attempt == self.config.attempts:
                    raise
                jitter = 1 + self._random.random() / 4
                self.sleep(max(failed.after or 0.0, min(wait, 60.0) * jitter))
                wait *= 2
        raise AssertionError

    def _attempt(self, key: str, messages: Messages, limit: int) -> tuple[str, str]:
        body = {"model": self.config.model, "messages": list(messages), "max_completion_tokens": limit, **self.config.parameters}
        self._count(attempts=1)
        started, reply, problem = time.time(), b"", ""
        try:
            reply = self._post(body)
            return self._content(reply)
        except _Failed as failed:
            problem = failed.reason
            raise
        finally:
            raw = reply.decode("utf-8", "replace")
            self._write({"key": key, "request": body, "reply": raw, "problem": problem, "seconds": round(time.time() - started, 3)})

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "decomp-bench"}
        secret = os.environ.get(self.config.key_variable)
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        url = self.config.endpoint.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise _refused(error, self.config) from None
        except (OSError, HTTPException) as error:  # timeouts, closed and refused connections, truncated replies
            reason = getattr(error, "reason", error)
            raise _Failed(f"no reply ({type(reason).__name__ if isinstance(reason, Exception) else reason})") from None

    def _content(self, reply: bytes) -> tuple[str, str]:
        """The text of a chat completion, '' where it is empty, and why it ended; counts its tokens."""
        try:
            data = json.loads(reply)
            choice = data["choices"][0]
            text, finish = choice["message"].get("content") or "", str(choice.get("finish_reason") or "")
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _Failed("not a chat completion") from None
        usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        prompt, completion = (count if isinstance(count, int) else 0 for count in counts)
        cost = (prompt * self.config.price_in + completion * self.config.price_out) / 1e6
        self._count(prompt_tokens=prompt, completion_tokens=completion, cost=cost)
        if not text.strip() and finish != "length":
            raise _Failed("empty reply")
        return text, finish

    def _kept(self, key: str) -> str | None:
        try:
            text = json.loads((self.cache / f"{key}.json").read_text())["text"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return text if isinstance(text, str) else None

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self.usage, name, getattr(self.usage, name) + value)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.log is not None:
            with self._lock:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with self.log.open("a") as stream:
                    stream.write(json.dumps(entry) + "\n")


def _parsed(text: str, parse: Callable[[str], Value]) -> Verdict[Value]:
    if not text.strip():
        return Verdict(None, "empty reply")
    try:
        return Verdict(parse(text), "", text)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return Verdict(None, f"not in the form asked for ({type(error).__name__})", text)


def _refused(error: urllib.error.HTTPError, config: JudgeConfig) -> Exception:
    """What an HTTP error means: a user's mistake, a request that cannot succeed, or one to be made again."""
    if error.code in (401, 403):
        return UserError(f"{config.endpoint} refuses the key (HTTP {error.code}): set {config.key_variable} to a valid one")
    if error.code == 404:
        return UserError(f"{config.endpoint} has no model '{config.model}' (HTTP 404): set model or endpoint")
    return _Failed(f"HTTP {error.code}", _retry_after(error.headers.get("Retry-After")), error.code < 500 and error.code not in RETRIED)


def _retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date), five minutes at most."""
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), 300.0) if seconds == seconds else None


def scores(names: Sequence[str], lowest: float, highest: float) -> Callable[[str], dict[str, float]]:
    """A parser of replies that are one JSON object with these keys and numbers in a range, perhaps inside a code fence."""

    def parse(text: str) -> dict[str, float]:
        data = json.loads(text[text.index("{") : text.rindex("}") + 1])
        found = {name: data[name] for name in names}
        for value in found.values():
            if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
                raise ValueError(f"{value} is not a number from {lowest} to {highest}")
        return {name: float(value) for name, value in found.items()}

    return parse
