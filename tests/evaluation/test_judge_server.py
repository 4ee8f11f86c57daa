"""The judge against `transformers serve`: a real server, and a tiny model that knows one answer."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlkl.evaluation.judge import Judge

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

ANSWER = '{"quality": 7, "diversity": 4}'


def save_one_answer_model(folder: Path) -> None:
    """A chat model that answers every question by one token, which is a whole verdict, and ends."""
    vocabulary = {"<eos>": 0, "<unk>": 1, "<assistant>": 2, ANSWER: 3}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    wrapped.chat_template = "{{ messages[0]['content'] }} <assistant>"
    wrapped.save_pretrained(folder)
    width = 8
    config = GPT2Config(
        vocab_size=4,
        n_positions=1024,
        n_embd=width,
        n_layer=1,
        n_head=1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wte.weight.copy_(torch.eye(4, width))
        # The hidden state is the normalised e_v: <assistant> -> the answer, the answer -> end.
        model.lm_head.weight[3, 2] = model.lm_head.weight[0, 3] = 50.0
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A running `transformers serve`: its URL and the model's name."""
    folder = tmp_path_factory.mktemp("judge")
    save_one_answer_model(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_model_behind_transformers_serve_judges_responses(server, tmp_path):
    url, model = server
    judge = Judge(url, model, cache=tmp_path / "verdicts.jsonl")
    judgement = judge(["the film is", "a plot"], ["very good", "so dull"])
    judge.client.close()
    assert judgement.failed == 0
    assert judgement.mean("quality").mean == 7
    assert judgement.mean("diversity").mean == 4
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 2
