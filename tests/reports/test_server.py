"""The served page: what it answers, what it refuses, and that it follows a study from before its start to its end."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from live_study import LiveStudy
from parsed_page import Page

from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.reports.server import PageServer, make_server


@contextmanager
def serving(directory: Path, **arguments: Any) -> Iterator[PageServer]:
    with make_server(directory, port=0, **arguments) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Answer:
    def __init__(self, server: PageServer, path: str, method: str = "GET", **headers: str):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        response = connection.getresponse()
        self.status, self.headers, self.body = response.status, response.headers, response.read()
        connection.close()

    @property
    def tag(self) -> str:
        return self.headers["ETag"]


def shown(server: PageServer) -> Page:
    """What a reader's page holds after it has asked for its data."""
    data = json.loads(Answer(server, "/view.json").body)
    cards = json.dumps(data["cards"])
    return Page(f"<div>{data['head']}{data['main']}</div><script>{cards}</script>")


def test_page_and_data_are_one_view(finished: Path) -> None:
    with serving(finished) as server:
        answer = Answer(server, "/")
        data = json.loads(Answer(server, "/view.json").body)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    html = answer.body.decode()
    page = Page(html)
    assert data["head"] in html
    assert data["main"] in html
    assert data["ended"] is True
    assert page.cards() == data["cards"]
    (body,) = page.all("body")
    assert body["data-refresh"] == "view.json"
    assert body["data-version"] == data["version"]
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy is not None
    assert "connect-src 'self'" in policy
    assert "default-src 'none'" in policy


def test_page_on_disk_asks_for_nothing(page: Page) -> None:
    (body,) = page.all("body")
    assert "data-refresh" not in body
    assert "connect-src" not in page.html


def test_unchanged_data_are_not_sent_again(finished: Path, tmp_path: Path) -> None:
    study = LiveStudy(finished, tmp_path / "study")
    study.advance("scored")
    with serving(study.directory) as server:
        first = Answer(server, "/view.json")
        again = Answer(server, "/view.json", If_None_Match=first.tag)
        assert (again.status, again.body, again.tag) == (304, b"", first.tag)
        assert Answer(server, "/view.json", If_None_Match=f'"other", W/{first.tag}').status == 304
        assert Answer(server, "/view.json", If_None_Match='"other"').status == 200
        study.advance("scored")
        changed = Answer(server, "/view.json", If_None_Match=first.tag)
        assert changed.status == 200
        assert changed.tag != first.tag
        assert len(changed.body) > len(first.body)


def test_head_has_no_body(finished: Path) -> None:
    with serving(finished) as server:
        whole, head = Answer(server, "/"), Answer(server, "/", "HEAD")
        assert (head.status, head.body, head.tag) == (200, b"", whole.tag)
        assert int(head.headers["Content-Length"]) == len(whole.body)
        assert Answer(server, "/", "POST").status == 501
        assert Answer(server, "/?a=b").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/trials.jsonl", "/config.yaml", "/report.html", "/../finished/trials.jsonl", "/..%2ftrials.jsonl",
        "/%2e%2e/%2e%2e/etc/passwd", "/../../../../../../etc/passwd", "//etc/passwd", "/view.json/../trials.jsonl",
        "/view.json%00", "/./view.json", "/trials/000/metrics.jsonl", "file:///etc/passwd", "//[",
    ],
)  # fmt: skip
def test_no_path_leads_into_the_file_system(finished: Path, path: str) -> None:
    with serving(finished) as server:
        answer = Answer(server, path)
    assert answer.status == 404
    assert b"root:" not in answer.body
    assert b"optimizer" not in answer.body


def test_names_that_were_made_to_point_here_are_refused(finished: Path) -> None:
    with serving(finished) as server:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "["):
            assert Answer(server, "/view.json", Host=host).status == 403, host
        for host in ("localhost", "localhost:9", "127.0.0.1:8808", "[::1]:80"):
            assert Answer(server, "/view.json", Host=host).status == 200, host


def test_other_machines_only_if_asked_for(finished: Path) -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UserError, match=rf"--host {host}: other machines could read .* --public .* ssh -L"):
            make_server(finished, host=host, port=0)
    with serving(finished, host="0.0.0.0", public=True) as server:
        assert Answer(server, "/", Host="workstation.example").status == 200
    with pytest.raises(UserError, match=r"--host no-such-host\.invalid: no such host"):
        make_server(finished, host="no-such-host.invalid")
    with pytest.raises(UserError, match=r"--port 70000: a port is a number from 0 to 65535"):
        make_server(finished, port=70000)


def test_a_taken_port(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot listen at .*; --port 0 takes a free one"):
            make_server(finished, port=port)
        # The port that nobody asked for gives way to a free one.
        monkeypatch.setattr("jaxtune.reports.server.PORT", port)
        with make_server(finished) as server:
            assert server.port not in (0, port)
            assert server.url == f"http://127.0.0.1:{server.port}/"


def test_a_study_appears_grows_and_ends(finished: Path, tmp_path: Path) -> None:
    study = LiveStudy(finished, tmp_path / "study")
    with serving(study.directory) as server:
        assert "There is no study here yet" in shown(server).text
        study.advance("study")
        assert "No trial has been started yet" in shown(server).text
        study.advance("proposed")
        page = shown(server)
        assert "No trial is being trained" in page.text
        assert page.tables[-1][1][:2] == ["0 reference", "waiting"]

        study.train(0, 40)
        page = shown(server)
        assert "left, about not known yet" in page.text
        assert page.tables[0][1][:3] == ["0", "to its early score", "40 of 80"]
        assert page.tables[-1][1][1] == "under way"
        assert page.tables[-1][1][4] == "40"

        study.train(0, 80)
        study.advance("scored", trial=0)
        page = shown(server)
        assert "The reference configuration leads after 1 scored trial" in page.text
        assert "1 of 8" in page.text
        study.train(0, 200)  # goes on: the reference is finished without a record that says so
        study.advance("proposed", trial=1)
        study.train(1, 60)
        page = shown(server)
        # Several trials at once.
        assert [row[:3] for row in page.tables[0][1:]] == [
            ["0", "to the end", "200 of 400"], ["1", "to its early score", "60 of 80"],
        ]  # fmt: skip
        assert "Training losses as a table" in page.text
        assert "Validation losses as a table" in page.text
        assert json.loads(Answer(server, "/view.json").body)["ended"] is False

        study.end()
        page = shown(server)
        assert json.loads(Answer(server, "/view.json").body)["ended"] is True
        assert "Progress" not in page.text
        assert "is the best of 8 trials" in page.text
        (study.directory / "summary.json").unlink()  # as when the study is extended
        assert "leads after" in shown(server).text


@pytest.mark.parametrize("torn", [b'{"event": "scor', '{"event": "scored", "note": "\u00e9'.encode()[:-1], b"\x00\x00"])
def test_a_record_that_is_being_written(finished: Path, tmp_path: Path, torn: bytes) -> None:
    study = LiveStudy(finished, tmp_path / "study")
    study.advance("proposed", trial=1)
    study.train(1, 20)
    with (study.directory / "trials" / "001" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 22, "loss": 0.')
    with serving(study.directory) as server:
        before = shown(server)
        assert before.tables[0][1][:3] == ["1", "to its early score", "20 of 80"]
        study.write(torn)
        assert shown(server).tables == before.tables


def test_damaged_files_are_told_until_they_are_whole(finished: Path, tmp_path: Path) -> None:
    study = LiveStudy(finished, tmp_path / "study")
    study.advance("scored")
    whole = (study.directory / "trials.jsonl").read_bytes()
    with serving(study.directory) as server:
        (study.directory / "trials.jsonl").write_bytes(b"<b>\n" + whole)
        page = shown(server)
        assert "cannot be read" in page.text
        assert "trials.jsonl, line 1" in page.text
        assert not page.all("b")
        (study.directory / "trials.jsonl").write_bytes(whole)
        assert "leads after 1 scored trial" in shown(server).text


def test_many_readers_at_once(finished: Path) -> None:
    found: list[str] = []
    with serving(finished) as server:
        threads = [threading.Thread(target=lambda: found.append(Answer(server, "/").tag)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_command_serves_until_it_is_interrupted(finished: Path) -> None:
    command = [sys.executable, "-m", "jaxtune", "report", str(finished), "--serve", "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        assert told["url"] == f"http://127.0.0.1:{told['port']}/"
        connection = http.client.HTTPConnection("127.0.0.1", told["port"], timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert errors.strip() == "the page is no longer served"


def test_command_refuses_what_it_cannot_do(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--host", "0.0.0.0"], "--host: only goes with --serve"),
        (["--port", "0"], "--port: only goes with --serve"),
        (["--serve", "--host", "0.0.0.0"], "other machines could read the study there"),
        (["--serve", "key=value"], "overrides go with a YAML file"),
    ):
        assert main(["report", str(finished), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["report", str(tmp_path / "missing.yaml"), "--serve"]) == 2
    assert "missing.yaml" in capsys.readouterr().err
