"""The lens page as it is served: texts in, pages out, nothing for anyone else."""

import socket
import struct
import threading
from http.client import HTTPConnection
from urllib.parse import urlencode, urlsplit

import pytest

import depthmix_cli
from browser import PATIENCE
from checkpoints import make_model, make_tokenizer
from depthmix.models.subjects import Subjects
from depthmix.pages import lens_server
from depthmix.pages.lens_server import LensServer

HOSTILE = "</textarea></script><img src=x onerror=alert(1)>\r\n\u202e"


@pytest.fixture
def server():
    tokenizer = make_tokenizer()
    subjects = Subjects(models={"<tiny>": (make_model(tokenizer), tokenizer)}, layers=[2, 4])
    with LensServer() as found:
        found.take(subjects, text="first")
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def ask(server):
    """Give a function that asks the server; headers may be another site's."""

    def request(text=None, *, path="/", host=None, **headers):
        connection = HTTPConnection("127.0.0.1", server.server_port)
        headers = {"Host": host or f"127.0.0.1:{server.server_port}", **headers}
        if text is None:
            connection.request("GET", path, headers=headers)
        else:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            connection.request("POST", path, urlencode({"text": text}), headers)
        response = connection.getresponse()
        page = response.read().decode()
        connection.close()
        return response, page

    return request


def test_the_first_text_is_there(ask, server):
    assert server.server_address[0] == "127.0.0.1"
    for host in (None, f"localhost:{server.server_port}"):
        response, page = ask(host=host)
        assert response.status == 200
        assert "on 5 tokens." in page
        assert ">\nfirst</textarea>" in page
        assert "form-action 'self'" in page
        assert "unsafe" not in page.partition("</head>")[0].partition("<style>")[0]
        assert response.headers["X-Frame-Options"] == "DENY"


def test_a_text_is_read_and_stays_a_text(ask):
    response, page = ask(HOSTILE)
    assert response.status == 200
    assert "<img" not in page
    assert (
        "&lt;/textarea&gt;&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;\n\u202e</textarea>"
        in page
    )
    assert page.count("<script") == page.count("</script>") == 2
    assert "&lt;tiny&gt;" in page
    assert "<tiny>" not in page
    assert f"on {len(HOSTILE.replace(chr(13), '').encode())} tokens." in page


@pytest.mark.parametrize(
    ("text", "message"),
    [(" \n", "Type a text first."), ("x" * 300, "must have between 1 and 256 tokens")],
)
def test_what_cannot_be_read_is_said_on_the_page(text, message, ask):
    response, page = ask(text)
    assert response.status == 400
    assert message in page
    assert 'id="data"' not in page
    assert ask("again")[0].status == 200


def test_a_page_may_become_too_large(ask, monkeypatch):
    monkeypatch.setattr(lens_server, "LARGEST_PAGE", 1000)
    response, page = ask("hello")
    assert response.status == 400
    assert "too long for a page" in page
    monkeypatch.setattr(lens_server, "LARGEST_REQUEST", 10)
    assert ask("hello hello")[0].status == 413


def test_only_this_machine_is_answered(ask, server):
    own = f"http://127.0.0.1:{server.server_port}"
    assert ask("hello", Origin=own)[0].status == 200
    for options in (
        {"host": "evil.example"},
        {"host": f"evil.example:{server.server_port}"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{server.server_port + 1}"},
    ):
        for text in (None, "hello"):
            response, page = ask(text, **options)
            assert response.status == 403
            assert 'id="data"' not in page
    for path in ("/../etc/passwd", "/etc", "/lens.js"):
        assert ask(path=path)[0].status == 404
    assert ask(path="/?a=1")[0].status == 200


def test_a_request_that_is_far_too_long_is_answered(ask):
    response, page = ask("x" * 8_000_000)
    assert response.status == 413
    assert "This text is too long." in page
    assert ask("again")[0].status == 200


def test_a_request_must_say_its_length(server):
    connection = HTTPConnection("127.0.0.1", server.server_port)
    connection.putrequest("POST", "/")
    connection.endheaders()
    assert connection.getresponse().status == 411
    connection.close()
    connection = HTTPConnection("127.0.0.1", server.server_port)
    connection.request("POST", "/", headers={"Content-Length": "9" * 5000})
    connection.sock.shutdown(socket.SHUT_WR)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_client_that_goes_away_leaves_no_traceback(ask, server, capfd):
    for request in (b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n", b"POST / HTTP/1.1\r\nHo"):
        client = socket.create_connection(("127.0.0.1", server.server_port))
        # Closed with a reset, as by a browser that is killed.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(request % server.server_port if b"%d" in request else request)
        client.close()
    assert ask("again")[0].status == 200
    server.shutdown()
    server.server_close()  # waits for the threads that still answer
    assert capfd.readouterr().err == ""


def test_the_command_says_where_and_ends_quietly(server, tmp_path, capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lens_server.ThreadingHTTPServer, "serve_forever", interrupt)
    monkeypatch.setattr(
        lens_server, "load_subjects", lambda sections, **_: Subjects(models={}, layers=None)
    )
    read = []
    monkeypatch.setattr(
        lens_server.LensServer, "take", lambda _, subjects, *, text: read.append(text)
    )
    assert depthmix_cli.main(["lens", "m", "--serve", "--port", "0"]) == 0
    assert depthmix_cli.main(["lens", "m", "mine", "--serve", "--port", "0"]) == 0
    assert read == [lens_server.EXAMPLE, "mine"]
    assert "The lens is at http://127.0.0.1:" in capsys.readouterr().out
    monkeypatch.setattr(lens_server, "load_subjects", lambda *_, **__: pytest.fail("loaded first"))
    assert depthmix_cli.main(["lens", "m", "--serve", "--port", str(server.server_port)]) == 1
    assert "`port` must be free" in capsys.readouterr().err
    assert depthmix_cli.main(["lens", "m", "--serve", "--port", "70000"]) == 1
    assert "`port` must be between 0 and 65535" in capsys.readouterr().err
    assert depthmix_cli.main(["lens", "m", "--serve", "--output", "page.html"]) == 1
    assert "`output` is for what is written" in capsys.readouterr().err
    assert depthmix_cli.main(["lens", "m"]) == 1
    assert "`text` must be what the model reads" in capsys.readouterr().err


@pytest.mark.browser
def test_a_browser_can_ask(server, browser):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    complaints, asked = [], set()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    page.locator("#text").fill("<b>1</b> + 1")
    page.get_by_role("button", name="Look").click()
    page.locator("#tokens .token").first.wait_for()
    assert page.locator("#tokens").inner_text().startswith("<b>1</b> + 1")
    assert page.locator("#text").input_value() == "<b>1</b> + 1"
    page.close()
    assert asked == {f"127.0.0.1:{server.server_port}"}
    assert not [complaint for complaint in complaints if "favicon" not in complaint]
