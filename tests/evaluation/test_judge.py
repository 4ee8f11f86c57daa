"""The judge against a local server of the protocol: strict parsing, retries, resuming.

(The recipe against `transformers serve` is in test_judge_server.py.)
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlkl.evaluation.judge import Judge, parse_verdict

GOOD = '{"quality": 7, "diversity": 4}'


class Endpoint:
    """A server of POST /v1/chat/completions: gives prepared answers and keeps the questions."""

    def __init__(self) -> None:
        self.answers: list[str | int | bytes] = []
        """Content of a message, status of an error, or a whole body."""
        self.requests: list[dict[str, Any]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests.append(json.loads(body))
                answer = endpoint.answers.pop(0) if endpoint.answers else GOOD
                failed = isinstance(answer, int)
                whole = isinstance(answer, bytes)
                message = {"role": "assistant", "content": None if failed or whole else answer}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge"}
                reply |= {"error": {"message": "busy"}} if failed else {"choices": [choice]}
                data = answer if whole else json.dumps(reply).encode()
                self.send_response(answer if failed else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if failed:
                    self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture
def make_judge(endpoint) -> Iterator[Any]:
    judges = []

    def make(**settings: Any) -> Judge:
        judges.append(Judge(**({"url": endpoint.url, "model": "judge"} | settings)))
        return judges[-1]

    yield make
    for judge in judges:
        judge.client.close()


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "7 and 4",
        f"Here you are: {GOOD}",
        f"{GOOD} Thank you.",
        '{"quality": 7}',
        '{"quality": 7, "diversity": 4, "comment": "good"}',
        '{"quality": "7", "diversity": 4}',
        '{"quality": 7.5, "diversity": 4}',
        '{"quality": true, "diversity": 4}',
        '{"quality": 0, "diversity": 4}',
        '{"quality": 11, "diversity": 4}',
        "[7, 4]",
        '{"quality": NaN, "diversity": 4}',
    ],
)
def test_an_answer_that_is_not_exactly_the_two_scores_does_not_count(answer):
    assert parse_verdict(answer) is None


def test_the_object_may_stand_in_a_code_fence_and_white_space():
    expected = {"quality": 7, "diversity": 4}
    for answer in (GOOD, f"  {GOOD}\n", f"```json\n{GOOD}\n```", f"```\n{GOOD}```"):
        assert parse_verdict(answer) == expected


def test_the_question_holds_prompt_and_response_as_they_are(make_judge, endpoint):
    judgement = make_judge()(["a {response} b"], ["c {prompt} {x} d"])
    question = endpoint.requests[0]["messages"][0]["content"]
    assert "<text>\na {response} b\n</text>" in question
    assert "<answer>\nc {prompt} {x} d\n</answer>" in question
    assert endpoint.requests[0]["model"] == "judge"
    assert judgement.failed == 0
    assert judgement.mean("quality").mean == 7
    assert judgement.mean("diversity").mean == 4


def test_an_answer_that_does_not_parse_is_asked_again_and_then_given_up(make_judge, endpoint):
    endpoint.answers = ["hm", GOOD, "no", "no", "no", GOOD]
    judgement = make_judge(attempts=3)(["p", "q", "r"], ["a", "b", "c"])
    assert [v is None for v in judgement.verdicts] == [False, True, False]
    assert judgement.failed == 1
    assert len(endpoint.requests) == 6
    assert endpoint.requests[0]["temperature"] == 0
    assert endpoint.requests[1]["temperature"] > 0


def test_a_busy_server_is_asked_again(make_judge, endpoint):
    endpoint.answers = [503, 429, GOOD]
    assert make_judge()(["p"], ["a"]).failed == 0
    assert len(endpoint.requests) == 3


def test_verdicts_are_kept_and_only_what_is_missing_is_asked_for(make_judge, endpoint, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    endpoint.answers = [GOOD, "no", "no"]
    first = make_judge(cache=cache, attempts=2)(["p", "p"], ["a", "b"])
    assert first.failed == 1
    with cache.open("a") as file:
        file.write('{"key": "cut off in the mid')  # as a killed run leaves it
    endpoint.requests.clear()
    second = make_judge(cache=cache)(["p", "p"], ["a", "b"])
    assert second.failed == 0
    assert len(endpoint.requests) == 1
    assert make_judge(cache=cache)(["p", "p"], ["a", "b"]).failed == 0
    assert len(endpoint.requests) == 1


def test_another_model_or_template_is_another_verdict(make_judge, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    keys = {
        make_judge(cache=cache, **changes).key("p", "a")
        for changes in ({}, {"model": "other"}, {"template": "{prompt} {response}"})
    }
    assert len(keys) == 3


@pytest.mark.parametrize("body", ['{"choices": null}', '{"error": "x"}', "<html>hi</html>", "[]"])
def test_an_endpoint_of_another_protocol_is_named(body, make_judge, endpoint):
    endpoint.answers = [body.encode()]
    with pytest.raises(ValueError, match="does not answer as an OpenAI-compatible endpoint"):
        make_judge()(["p"], ["a"])


def test_an_answer_without_a_choice_is_asked_again(make_judge, endpoint):
    endpoint.answers = [b'{"choices": []}', GOOD]
    assert make_judge()(["p"], ["a"]).failed == 0
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("line", ["broken", '{"key": "a"}', "[1]", '{"key": "a", "score": 1}'])
def test_a_cache_of_something_else_is_named_before_any_work(line, make_judge, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    cache.write_text(f'{{"key": "a", "quality": 1, "diversity": 1}}\n{line}\n')
    with pytest.raises(
        ValueError, match=r"verdicts.jsonl, line 2 is no verdict: .* remove the line"
    ):
        make_judge(cache=cache)


def test_the_folder_of_a_cache_is_made(make_judge, tmp_path):
    cache = tmp_path / "new" / "verdicts.jsonl"
    make_judge(cache=cache)(["p"], ["a"])
    assert len(cache.read_text().splitlines()) == 1


def test_a_judge_that_is_never_asked_is_refused(make_judge):
    with pytest.raises(ValueError, match="attempts is 0; give at least 1"):
        make_judge(attempts=0)


def test_no_valid_verdict_has_no_mean(make_judge, endpoint):
    endpoint.answers = ["no"] * 3
    judgement = make_judge()(["p"], ["a"])
    with pytest.raises(ValueError, match="no valid answer to 1 responses"):
        judgement.mean("quality")


def test_an_endpoint_that_is_not_there_or_refuses_is_named(make_judge, endpoint):
    endpoint.answers = [401]
    with pytest.raises(ValueError, match=r"the judge at http://127.* refused: .*401"):
        make_judge()(["p"], ["a"])
    judge = make_judge(url="http://127.0.0.1:9/v1")
    judge.client = judge.client.with_options(max_retries=0)
    with pytest.raises(ValueError, match=r"no judge answers at http://127\.0\.0\.1:9/v1"):
        judge(["p"], ["a"])
    with pytest.raises(ValueError, match="the judge's url is 'localhost:8000/v1': it begins with"):
        make_judge(url="localhost:8000/v1")
    with pytest.raises(ValueError, match=r"template lacks \{response\}"):
        make_judge(template="{prompt}")
