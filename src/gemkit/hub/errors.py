"""Causes and remedies of failed downloads: settings that cannot work, and network errors.

`check_settings` looks at proxies, addresses, certificates and tokens before the first connection, since the HTTP
library reports a wrong one as a missing package, a malformed header or an unknown hub. `explain` reads the chain of
a failed connection: resolver, proxy, TLS, socket. Little is imported at the top, since a model
that needs no download is also found through this file.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from gemkit.errors import GemkitError, UsageError

if TYPE_CHECKING:
    import ssl

    import httpx2

_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
_SKEW = 600  # seconds between two clocks that are worth a word
# OpenSSL's verify codes
_NOT_YET_VALID, _EXPIRED, _HOSTNAME, _IP_ADDRESS = 9, 10, 62, 64


def check_settings(endpoint: str, variable: str) -> None:
    """Raise UsageError for a setting with which no download can work.

    endpoint: the hub's address. variable: the environment variable that may have set it.
    """
    _check_address(endpoint, variable)
    for scheme, proxy in proxies().items():
        _check_proxy(proxy, _proxy_variable(scheme))
    for name, kind, right in (("SSL_CERT_FILE", "file", os.path.isfile), ("SSL_CERT_DIR", "folder", os.path.isdir)):
        path = os.environ.get(name)
        if path and not right(path):
            raise UsageError(f"{name} is {path!r}, which is no {kind}: correct it, or unset it")
        if path:
            break  # the second is not read if the first is set


def check_token(token: str, origin: str, page: str) -> None:
    """Raise UsageError if a token or key holds a character that none has. The token itself is never shown.

    origin: the variable or file that it is from. page: where to get a new one.
    """
    if token[:1] == token[-1:] and token[:1] in ("'", '"', "“", "”"):
        raise UsageError(f"{origin} stands in quotation marks, which belong to no token: leave them out")
    wrong = re.search(r"[^A-Za-z0-9._~+/=:-]", token)
    if wrong:
        shown = {" ": "a space", "\t": "a tab", "\n": "a line break"}.get(wrong[0], repr(wrong[0]))
        raise UsageError(
            f"{origin} holds a character that no token has ({shown}, number {wrong.start() + 1}): copy the token again "
            f"from {page}"
        )


def _check_address(endpoint: str, variable: str) -> None:
    try:
        parts = urlsplit(endpoint)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{variable} is {endpoint!r}, which is no address ({error}): correct or unset it") from None
    if "://" not in endpoint:
        bare = endpoint.strip("'\" ")
        raise UsageError(f"{variable} is {endpoint!r}, which lacks a scheme: set {variable}=https://{bare}")
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"{variable} is {endpoint!r}: the scheme is https or http; correct or unset it")
    if not host or re.search(r"[\s'\"<>\x00-\x1f]", endpoint):
        raise UsageError(f"{variable} is {endpoint!r}, which is no address: correct or unset it")


def proxies() -> dict[str, str]:
    """Return the proxies that the HTTP library will use, by `http`, `https` and `all`, each with a scheme."""
    from urllib.request import getproxies

    found = getproxies()
    if "*" in [host.strip() for host in found.get("no", "").split(",")]:
        return {}
    schemes = [scheme for scheme in ("http", "https", "all") if found.get(scheme)]
    return {scheme: found[scheme] if "://" in found[scheme] else f"http://{found[scheme]}" for scheme in schemes}


def _check_proxy(proxy: str, variable: str) -> None:
    shown = _shown(proxy)
    unset = f"unset {variable}" if _is_variable(variable) else f"change {variable}"
    try:
        parts = urlsplit(proxy)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(
            f"the proxy {shown} ({variable}) is malformed ({error}): write http://host:port, or {unset}"
        ) from None
    if parts.scheme in ("socks", "socks4", "socks4a") and host:
        works = _shown(proxy.replace(f"{parts.scheme}://", "socks5://", 1))
        more = "" if find_spec("socksio") else ", which also needs pip install 'httpx2[socks]'"
        raise UsageError(
            f"the proxy {shown} ({variable}) has a scheme that is not supported: if it speaks SOCKS 5, write {works}"
            f"{more}; or {unset}"
        )
    named = host and parts.path in ("", "/")
    if parts.scheme not in _PROXY_SCHEMES or not named or re.search(r"[\s'\"<>\x00-\x1f]", proxy):
        raise UsageError(
            f"the proxy {shown} ({variable}) is malformed: write http://host:port or socks5://host:port, or {unset}"
        )
    if parts.scheme in ("socks5", "socks5h") and not find_spec("socksio"):
        raise UsageError(f"the proxy {shown} ({variable}) needs pip install 'httpx2[socks]'; or {unset}")


def _proxy_variable(scheme: str) -> str:
    name = f"{scheme}_proxy"
    found = [variable for variable in (name, name.upper()) if os.environ.get(variable)]
    return found[0] if found else "the system's settings"


def _is_variable(name: str) -> bool:
    return name in os.environ


def _shown(url: str) -> str:
    """Return an address without the name and password in it."""
    return re.sub(r"//[^/\s]*@", "//…@", url)


def _proxy_of(url: SplitResult) -> tuple[str, str] | None:
    """Return the proxy, for messages, through which a URL is asked for, and its variable; None without one."""
    from urllib.request import proxy_bypass

    found = proxies()
    try:
        if not found or proxy_bypass(url.hostname or ""):
            return None
    except (OSError, ValueError):
        return None
    scheme = url.scheme if url.scheme in found else "all"
    return (_shown(found[scheme]), _proxy_variable(scheme)) if scheme in found else None


def explain(error: Exception, url: str) -> tuple[str, bool]:
    """Return cause and remedy of a failed connection to `url`, and whether another try may succeed.

    Example: ``("huggingface.co cannot be reached (Connection refused): check the network", True)``.
    """
    import socket
    import ssl

    with contextlib.suppress(AttributeError, RuntimeError):
        url = str(error.request.url)  # after a redirect another one
    parts = urlsplit(url)
    host, proxy = parts.netloc.rpartition("@")[2], _proxy_of(parts)
    chain = list(_chain(error))
    text = " ".join(str(error).split()) or type(error).__name__
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _certificate(cause, host), False
    through = f" (through the proxy {proxy[0]}, {proxy[1]})" if proxy else ""
    for cause in chain:
        if isinstance(cause, ssl.SSLError):
            how = "check the scheme (https:// or http://)" + (f", in {proxy[1]} as well" if proxy else "")
            how += ", and that no firewall breaks into the connection"
            return f"the TLS connection to {host}{through} failed ({_reason(cause)}): {how}", True
    if type(error).__name__ == "ProxyError":
        if "407" in text:
            at = proxy[1] if proxy else "HTTPS_PROXY"
            return f"the proxy{_named(proxy)} asks for a user: set {at}=http://user:password@host:port", False
        return f"the proxy{_named(proxy)} refuses the connection to {host} ({text}): {_proxy_how(proxy)}", True
    for cause in chain:
        if isinstance(cause, socket.gaierror):
            if proxy:
                return f"the proxy{_named(proxy)} has a host that is not found ({text}): {_proxy_how(proxy)}", True
            return f"the name {host} is not found ({text}): check the network connection and its DNS", True
    if proxy and type(error).__name__ in ("ConnectError", "ConnectTimeout"):
        return f"the proxy{_named(proxy)} cannot be reached ({text}): {_proxy_how(proxy)}", True
    if type(error).__name__.endswith("Timeout"):
        text = "no answer in time; GEMKIT_DOWNLOAD_TIMEOUT gives it longer"
    return f"{host} cannot be reached{through} ({text}): check the network", True


def _certificate(error: ssl.SSLCertVerificationError, host: str) -> str:
    code, reason = error.verify_code, error.verify_message or "CERTIFICATE_VERIFY_FAILED"
    if code in (_NOT_YET_VALID, _EXPIRED):
        now = time.strftime("%Y-%m-%d %H:%M")
        return (
            f"the certificate of {host} is not valid now ({reason}), and this machine's clock says {now}: set the "
            "clock if it is wrong; else a proxy on the way presents an old certificate"
        )
    if code in (_HOSTNAME, _IP_ADDRESS):
        return (
            f"the certificate shown for {host} belongs to another host ({reason}): sign in to the network in a browser "
            "(a login page may stand in between), or correct the proxy or the address"
        )
    how = "save that authority's certificate as a PEM file and set SSL_CERT_FILE to its path"
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if path := os.environ.get(name):
            how = f"set SSL_CERT_FILE={path} as well, since {name} is not read here"
    return (
        f"the certificate of {host} is signed by an authority that this machine does not trust "
        f"(CERTIFICATE_VERIFY_FAILED, {reason}): a company's proxy or a virus scanner may open the connection; {how}"
    )


def _named(proxy: tuple[str, str] | None) -> str:
    return f" {proxy[0]} ({proxy[1]})" if proxy else ""


def _proxy_how(proxy: tuple[str, str] | None) -> str:
    if proxy is None or not _is_variable(proxy[1]):
        return "start it, or correct the proxy settings"
    return f"start it, correct {proxy[1]}, or unset it"


def _reason(error: ssl.SSLError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error).replace("_", " ").lower()


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def is_page(content_type: str, text: str = "") -> bool:
    """Return whether an answer is a web page where data or a file was asked for."""
    return "text/html" in content_type.lower() or bool(re.match(r"\s*<(!doctype html|html|head|script)", text, re.I))


def page_error(host: str, variable: str) -> GemkitError:
    """Return the error for a web page in place of data. variable: the one that sets the hub's address."""
    other = f", or correct {variable}" if os.environ.get(variable) else ""
    return GemkitError(
        f"{host} answers with a web page instead of data: the login page of a network (hotel, company) or a proxy may "
        f"stand in between; open http://example.com in a browser, sign in, and run it again{other}"
    )


def clock_note(headers: Mapping[str, str]) -> str:
    """Return a clause on this machine's clock, if it differs much from the server's; else an empty string."""
    from email.utils import parsedate_to_datetime

    try:
        skew = time.time() - parsedate_to_datetime(headers.get("Date", "")).timestamp()
    except (ValueError, TypeError):
        return ""
    if abs(skew) < _SKEW:
        return ""
    size = f"{abs(skew) / 3600:,.1f} hours" if abs(skew) >= 3600 else f"{abs(skew) / 60:.0f} minutes"
    return f"; this machine's clock is {size} {'ahead' if skew > 0 else 'behind'}: set it"


def import_error(error: ImportError) -> GemkitError:
    """Return the error for a hub client that cannot be imported."""
    package = (error.name or "huggingface_hub").partition(".")[0]
    return GemkitError(f"downloads need the package {package} ({error}): {sys.executable} -m pip install {package}")


def client_error(error: Exception) -> GemkitError:
    """Return the error for an HTTP client that cannot be made."""
    names = [_proxy_variable(scheme) for scheme in proxies()]
    names += [name for name in ("NO_PROXY", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
    what = ", ".join(dict.fromkeys(names)) or "the proxy settings"
    text = " ".join(str(error).split()) or type(error).__name__
    return GemkitError(f"no connection can be made with the present settings ({text}): correct or unset {what}")


def session(endpoint: str, variable: str) -> httpx2.Client:
    """Return the hub's HTTP client after the settings were checked. Raises GemkitError."""
    check_settings(endpoint, variable)
    try:
        from huggingface_hub import get_session
    except ImportError as error:
        raise import_error(error) from None
    except ValueError as error:  # it reads its variables when it is imported
        raise client_error(error) from None
    try:
        return get_session()
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise client_error(error) from None
    except Exception as error:
        if type(error).__name__ in ("InvalidURL", "UnsupportedProtocol"):
            raise client_error(error) from None
        raise
