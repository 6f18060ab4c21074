"""Settings and networks with which no download works: the cause is named, and a remedy that helps. Budget: 8 s."""

import email.utils
import socket
import ssl
import time
from pathlib import Path

import httpx2
import pytest
from hub.test_resolve import fails, same
from hub.world import KAGGLE, SHARDS, World, gemma, server_fixture, world_fixture  # noqa: F401

from gemkit.errors import GemkitError, UsageError
from gemkit.hub import errors as hub_errors
from gemkit.hub import fetch as hub_fetch
from gemkit.hub.resolve import resolve

NAME = "gemma-2b"
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
VARIABLES += ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(hub_errors, "find_spec", lambda name: None)


def settings_error(endpoint: str = "https://huggingface.co") -> str:
    with pytest.raises(UsageError) as caught:
        hub_errors.check_settings(endpoint, "HF_ENDPOINT")
    return str(caught.value)


@pytest.mark.parametrize("variable", ["ALL_PROXY", "all_proxy", "HTTPS_PROXY"])
@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://127.0.0.1:9", "needs pip install 'httpx2[socks]'; or unset"),
        ("socks5h://u:secret@127.0.0.1:9", "needs pip install 'httpx2[socks]'; or unset"),
        ("socks://127.0.0.1:9", "write socks5://127.0.0.1:9, which also needs pip install 'httpx2[socks]'; or unset"),
        ("socks4://u:secret@127.0.0.1:9", "write socks5://…@127.0.0.1:9,"),
        ("http://127.0.0.1:abc", "malformed"),
        ("http//127.0.0.1:3128", "malformed"),
        ("http://", "malformed"),
        ("ftp://127.0.0.1", "malformed"),
        ("'http://127.0.0.1:3128'", "malformed"),
        ("http://[::1", "malformed"),
        ("http://a b:1", "malformed"),
    ],
)
def test_a_proxy_that_cannot_work_is_named_with_its_variable(monkeypatch, variable: str, proxy: str, words: str):
    monkeypatch.setenv(variable, proxy)
    message = settings_error()
    assert words in message and f"({variable})" in message and f"unset {variable}" in message, message
    assert "secret" not in message and "\n" not in message
    monkeypatch.setenv("NO_PROXY", "x, *")
    hub_errors.check_settings("https://huggingface.co", "HF_ENDPOINT")


@pytest.mark.parametrize(
    "proxy", ["http://127.0.0.1:3128", "127.0.0.1:3128", "https://u:p@proxy", "http://[::1]:3128/"]
)
def test_a_proxy_that_may_work_is_left_to_work(monkeypatch, proxy: str):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    hub_errors.check_settings("https://huggingface.co", "HF_ENDPOINT")
    httpx2.Client().close()  # the library takes it too


def test_socks_is_fine_with_its_package(monkeypatch):
    monkeypatch.setattr(hub_errors, "find_spec", lambda name: name == "socksio")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    hub_errors.check_settings("https://huggingface.co", "HF_ENDPOINT")
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:9")
    message = settings_error()
    assert "write socks5://127.0.0.1:9;" in message and "pip" not in message


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("hf-mirror.com", "set HF_ENDPOINT=https://hf-mirror.com"),
        ("localhost:8000", "set HF_ENDPOINT=https://localhost:8000"),
        ('"https://hf-mirror.com"', "the scheme is https or http"),
        ("ftp://hf-mirror.com", "https or http"),
        ("https://", "no address"),
        ("https://a b", "no address"),
        ("https://a:port", "no address"),
        ("http://[::1", "no address"),
    ],
)
def test_an_address_that_cannot_be_one_is_named(endpoint: str, words: str):
    message = settings_error(endpoint)
    assert words in message and message.startswith("HF_ENDPOINT is "), message


def test_certificates_that_are_not_there(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    assert "SSL_CERT_FILE" in settings_error() and "no file" in settings_error()
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    assert "SSL_CERT_DIR" in settings_error() and "no folder" in settings_error()


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_äbc", "('ä', number 4)"),
        ("hf_a bc", "(a space, number 5)"),
        ("Bearer hf_abc", "(a space, number 7)"),
        ("hf_a\tb", "(a tab, number 5)"),
        ("hf_abc\u200b", r"('\u200b', number 7)"),
        ('"hf_abc"', "quotation marks"),
        ("'hf_abc'", "quotation marks"),
        ("“hf_abc”", "holds a character"),
    ],
)
@pytest.mark.parametrize("name", [NAME, KAGGLE])
def test_a_token_that_cannot_be_sent_is_not_tried(world: World, monkeypatch, name: str, token: str, words: str):
    variable = "HF_TOKEN" if name == NAME else "KAGGLE_API_TOKEN"
    monkeypatch.setenv(variable, token)
    message = fails(words, name, UsageError)
    assert variable in message and "bc" not in message.replace("huggingface", "")
    assert world.log() == []
    monkeypatch.setenv(variable, " good\n")
    assert same(resolve(name), gemma())


def test_a_kaggle_key_that_cannot_be_one_is_named(world: World, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "user")
    monkeypatch.setenv("KAGGLE_KEY", "ä")
    fails("KAGGLE_KEY holds a character", KAGGLE, UsageError)
    monkeypatch.setenv("KAGGLE_KEY", "good\n")
    assert same(resolve(KAGGLE), gemma())
    monkeypatch.setenv("KAGGLE_API_TOKEN", "x" * 5000)  # longer than any file's name
    fails("get a new key", f"{KAGGLE}/9")


def test_a_token_file_that_cannot_be_read_is_named(world: World, monkeypatch):
    import huggingface_hub.constants

    path = world.caches / "token"
    path.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(path))
    assert "hf auth login" in fails(f"the token in {path} cannot be read", NAME)
    path.rmdir()
    path.write_bytes(b"hf_\xff")
    fails("cannot be read", NAME)
    path.write_text("hf_ä", "utf-8")
    fails(f"the token in {path} holds a character", NAME, UsageError)


def test_an_expired_token_is_no_missing_model(world: World, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "old")
    message = fails("does not accept your token (HF_TOKEN)", NAME)
    assert "expired or been revoked" in message and "settings/tokens" in message and "unset HF_TOKEN" in message
    world.fault("/api/models/", "status", status=401, on="hub", headers={"X-Error-Message": "Token x is expired"})
    assert "which has expired" in fails("does not accept your token", NAME)


@pytest.mark.parametrize("name", [NAME, KAGGLE])
@pytest.mark.parametrize("where", ["list", "file"])
def test_a_login_page_in_place_of_data_is_named(world: World, name: str, where: str):
    part = SHARDS[0] if where == "file" else "/api/models/" if name == NAME else "/files"
    world.fault(part, "page", on="cdn" if where == "file" else "hub", times=9)
    message = fails("answers with a web page instead of data", name)
    assert "sign in" in message
    assert not [path for path in world.left() if "incomplete" in path and SHARDS[0] in path]
    world.calm()
    assert same(resolve(name), gemma())


def test_what_the_network_login_answers_is_named_too(world: World):
    world.fault("/api/models/", "status", status=511, on="hub")
    fails("web page", NAME)
    world.calm()
    world.fault("/api/models/", "status", status=407, on="hub")
    fails("the proxy asks for a user", NAME)


def connect_error(*causes: BaseException, kind: type[Exception] = httpx2.ConnectError) -> Exception:
    """An error of the HTTP library as it arises: raised from others."""
    error = kind(str(causes[0]) if causes else "")
    current: BaseException = error
    for cause in causes:
        current.__cause__ = cause
        current = cause
    return error


def certificate_error(code: int, text: str) -> Exception:
    error = ssl.SSLCertVerificationError(1, f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {text}")
    error.verify_code, error.verify_message = code, text
    return connect_error(OSError("mapped"), error)


@pytest.mark.parametrize(
    ("error", "words", "passes"),
    [
        (certificate_error(19, "self-signed certificate in certificate chain"), "set SSL_CERT_FILE", False),
        (certificate_error(20, "unable to get local issuer certificate"), "set SSL_CERT_FILE", False),
        (certificate_error(10, "certificate has expired"), "set the clock", False),
        (certificate_error(9, "certificate is not yet valid"), "set the clock", False),
        (certificate_error(62, "Hostname mismatch"), "sign in to the network", False),
        (connect_error(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER]")), "check the scheme", True),
        (connect_error(socket.gaierror(-2, "Name or service not known")), "DNS", True),
        (connect_error(ConnectionRefusedError(111, "Connection refused")), "Connection refused", True),
        (connect_error(kind=httpx2.ReadTimeout), "no answer in time", True),
        (httpx2.ProxyError("407 Proxy Authentication Required"), "asks for a user", False),
        (httpx2.ProxyError("403 Forbidden"), "refuses the connection", True),
        (httpx2.RemoteProtocolError("Server disconnected"), "Server disconnected", True),
    ],
)
def test_the_cause_is_found_below_the_error(error: Exception, words: str, passes: bool):
    message, may_pass = hub_errors.explain(error, "https://huggingface.co/api")
    assert words in message and may_pass is passes and "\n" not in message
    assert passes or "check the network" not in message


def test_a_proxy_in_between_is_the_one_to_blame(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy.example:3128")
    url = "https://huggingface.co/api"
    for error in (
        connect_error(socket.gaierror(-2, "Name or service not known")),
        connect_error(ConnectionRefusedError(111, "Connection refused")),
        connect_error(kind=httpx2.ConnectTimeout),
        httpx2.ProxyError("503 Service Unavailable"),
    ):
        message, _ = hub_errors.explain(error, url)
        assert "the proxy http://…@proxy.example:3128 (HTTPS_PROXY)" in message and "secret" not in message
    assert "HTTPS_PROXY=http://user:password@host" in hub_errors.explain(httpx2.ProxyError("407 x"), url)[0]
    monkeypatch.setenv("NO_PROXY", "huggingface.co")
    message, _ = hub_errors.explain(connect_error(ConnectionRefusedError(111, "Connection refused")), url)
    assert "proxy" not in message
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/company.pem")
    message, _ = hub_errors.explain(certificate_error(19, "self-signed certificate"), url)
    assert "set SSL_CERT_FILE=/etc/company.pem as well, since REQUESTS_CA_BUNDLE is not read" in message


def test_a_connection_refused_by_a_real_proxy(world: World, monkeypatch):
    import huggingface_hub

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    huggingface_hub.close_session()
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    message = fails(f"the proxy http://127.0.0.1:{port} (HTTP_PROXY) cannot be reached", NAME, hub_fetch.Unreachable)
    assert "gemkit ls" in message
    huggingface_hub.close_session()


def test_the_clock_is_mentioned_where_it_is_off():
    def date(skew: float) -> dict[str, str]:
        return {"Date": email.utils.formatdate(time.time() + skew, usegmt=True)}

    assert hub_errors.clock_note(date(0)) == hub_errors.clock_note({}) == hub_errors.clock_note({"Date": "x"}) == ""
    assert "2.0 hours ahead: set it" in hub_errors.clock_note(date(-7200))
    assert "minutes behind: set it" in hub_errors.clock_note(date(1200))


def test_a_missing_client_is_named_by_its_package():
    error = hub_errors.import_error(ModuleNotFoundError("No module named 'httpx2'", name="httpx2.x"))
    assert isinstance(error, GemkitError) and str(error).endswith("-m pip install httpx2")
