"""Secrets in the addresses of databases and clusters, which nothing may write, log or show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, unquote_plus

__all__ = ["hide_secrets", "redact", "without_secrets"]

HIDDEN = "***"
# Of all that may stand behind a "?" or ";" these alone are known to be no secrets.
OPEN = (
    "application_name autocommit cache charset check_same_thread client_encoding connect_timeout "
    "connection_timeout database db dbname driver encoding gssencmode host hostaddr mode nolock "
    "port protocol read_timeout server ssl sslmode ssl_mode timeout timezone trusted_connection "
    "unix_socket uri user username vfs write_timeout "
)
_HEAD = re.compile(r"^([\w+.-]+://)?(.*)$", re.DOTALL)
_PAIR = re.compile(r"([?&;]|\s|^)([^=?&;\s]*)=('[^']*'|\"[^\"]*\"|[^&;\s]*)")


def redact(url: str | None) -> str | None:
    """Return an address without what may be secret.

    All user information but a name before a password goes, up to the last "@", whether passwords
    are escaped or not; and the values of all parameters but those known to be harmless. Addresses
    that differ in their secrets only become the same.

    Examples
    --------
    >>> redact("postgresql://anna:s3cret@host/db?sslmode=require&sslpassword=s3cret")
    'postgresql://anna:***@host/db?sslmode=require&sslpassword=***'
    >>> redact("mysql://anna:p@ss@host/db")
    'mysql://anna:***@host/db'
    >>> redact("sqlite:///run/study.db")
    'sqlite:///run/study.db'
    """
    return None if url is None else _cut(url)[0]


def hide_secrets(text: str, url: str | None) -> str:
    """Return a text, such as an error, without the secrets of an address and the address itself.

    Examples
    --------
    >>> hide_secrets("no host 'ss@host'", "mysql://anna:p@ss@host/db")
    "no host '***@host'"
    """
    if url is None:
        return text
    hidden, secrets = _cut(url)
    text = text.replace(url, hidden)
    for secret in sorted(_variants(secrets), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


@contextmanager
def without_secrets(url: str | None) -> Iterator[None]:
    """Raise errors that show a secret of an address, they or what caused them, without it."""
    try:
        yield
    except Exception as error:
        text, cause, shows = str(error), error, False
        while cause is not None and not shows:
            shows = hide_secrets(str(cause), url) != str(cause)
            cause = cause.__cause__ or cause.__context__
        if not shows:
            raise
        own = isinstance(error, ValueError)
        text = hide_secrets(text if own else f"{type(error).__name__}: {text}", url)
        raise (ValueError if own else RuntimeError)(text) from None


def _cut(url: str) -> tuple[str, list[str]]:
    """Return the address without secrets, and these."""
    scheme, rest = (part or "" for part in _HEAD.fullmatch(url).groups())  # type: ignore[union-attr]
    secrets: list[str] = []
    user, at, place = rest.rpartition("@")
    if at and "?" in user:  # is it in a password, or behind the "?"? Both are to be hidden
        return f"{scheme}{HIDDEN}", [rest, *re.split(r"[/?&;=:@]", rest)]
    if at and ":" in user:
        name, _, password = user.partition(":")
        rest = f"{name}:{HIDDEN}@{place}"
        secrets.append(password)
    elif at and "/" not in user:  # a token, perhaps
        rest = f"{HIDDEN}@{place}"
        secrets.append(user)

    def cover(found: re.Match[str]) -> str:
        before, key, value = found.groups()
        if unquote_plus(key).strip().lower() + " " in OPEN or not value:
            return found[0]
        secrets.append(value.strip("'\""))
        return f"{before}{key}={HIDDEN}"

    return scheme + _PAIR.sub(cover, rest), secrets


def _variants(secrets: list[str]) -> set[str]:
    """Return how secrets may appear: escaped or not, whole or cut where a driver misread them."""
    found: set[str] = set()
    for secret in secrets:
        for form in (secret, unquote(secret), unquote_plus(secret)):
            found |= {form, *re.split(r"[@/;=:#?]", form)}
    return {form for form in found if len(form) > 1 and form != HIDDEN}
