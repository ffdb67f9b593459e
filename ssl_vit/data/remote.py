"""Files on servers (S3, Google Cloud Storage, HTTP): their versions, and ranges of their bytes.

fsspec reads them, with the credentials that the tools of each service find. A lost connection is
tried again for some minutes; what trying again does not mend is a user's error, and raised at once.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ssl_vit.common.addresses import without_secrets
from ssl_vit.common.errors import RunFailed, UserError

log = logging.getLogger("ssl_vit")
SCHEMES = ("s3", "gs", "http", "https")
ASKING = 16  # questions at a time for sizes and versions
CHUNK = 16 << 20  # bytes of one request: what a lost connection costs at most
PAUSES = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    30.0,
    60.0,
    60.0,
    60.0,
)  # seconds between tries: four minutes in all
_FIRST = 3  # pauses where a server has not answered yet: its name may be misspelt
_QUIET = 4.0  # seconds: shorter pauses are not logged
_LIBRARIES = {"aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs"}
_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
    *("ProfileNotFound", "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"),
    *("DefaultCredentialsError", "RefreshError"),
}
_ADDRESSES = {"InvalidURL", "InvalidUrlClientError", "ParamValidationError"}
_CERTIFICATES = {"ClientConnectorCertificateError", "ClientConnectorSSLError"}
_VERSIONS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "updated", "mtime")
_LIBRARY = {
    "s3": ("s3fs", "'.[remote]'"),
    "gs": ("gcsfs", "'.[gs]'"),
    "http": ("aiohttp", "'.[remote]'"),
    "https": ("aiohttp", "'.[remote]'"),
}
_KEYS = {
    "s3": "keys are those of the AWS tools (AWS_PROFILE, ~/.aws, AWS_ACCESS_KEY_ID, and "
    "AWS_ENDPOINT_URL for another server than Amazon's); for a public bucket set "
    "FSSPEC_S3='{\"anon\": true}'",
    "gs": "log in by 'gcloud auth application-default login', or set "
    'GOOGLE_APPLICATION_CREDENTIALS; for a public bucket set FSSPEC_GS=\'{"token": "anon"}\'',
    "http": "a name and password can be in ~/.netrc, a token in "
    'FSSPEC_HTTP=\'{"headers": {"Authorization": "Bearer ..."}}\'',
}
_T = TypeVar("_T")
Pause = Callable[[float], object]


class NoRanges(Exception):  # noqa: N818
    """The server sends whole files only."""


@dataclass(frozen=True)
class RemoteFile:
    """File on a server, as it was when it was asked for.

    Attributes:
        size: in bytes.
        version: its ETag, or else when it was changed; empty where the server states neither.
        ranges: False where the server says that it sends whole files only.
    """

    url: str
    size: int
    version: str
    ranges: bool = True

    @property
    def digest(self) -> str:
        """Digest of the address, and one of the version."""
        parts = (self.url, f"{self.version} {self.size}")
        return "-".join(hashlib.sha256(part.encode()).hexdigest()[:12] for part in parts)

    def read(self, start: int, stop: int, pause: Pause = time.sleep) -> bytes:
        """Bytes ``start`` to before ``stop``.

        Raises:
            NoRanges: the server sends whole files only.
            UserError, RunFailed: as ``patiently`` and ``check_unchanged``.
        """

        def attempt() -> bytes:
            data = self._range(start, stop)
            if len(data) != stop - start:
                self.check_unchanged()
                raise EOFError(f"{len(data):,} of {stop - start:,} bytes arrived")
            return data

        if not self.ranges:
            raise NoRanges
        return patiently(attempt, self.url, pause=pause)

    def _range(self, start: int, stop: int) -> bytes:
        system = _system(self.url)
        if not self.url.startswith("http"):
            data: bytes = system.cat_file(self.url, start=start, end=stop)
            return data
        try:  # the file, as cat_file takes the whole answer of a server that ignores ranges
            with system.open(self.url, block_size=CHUNK, cache_type="none", size=self.size) as file:
                file.seek(start)
                found: bytes = file.read(stop - start)
                return found
        except ValueError as error:
            if "range" in str(error):
                raise NoRanges from None
            raise

    def chunks(self, start: int, pause: Pause = time.sleep) -> Iterator[bytes]:
        """Bytes from ``start`` on, by ranges. Raises as ``read``."""
        for at in range(start, self.size, CHUNK):
            yield self.read(at, min(at + CHUNK, self.size), pause)

    def stream(self) -> Iterator[bytes]:
        """Bytes by one request, without trying again."""
        with _system(self.url).open(self.url, block_size=0, size=self.size) as file:
            while data := file.read(CHUNK):
                yield data

    def check_unchanged(self) -> None:
        """Check that it still is what it was.

        Raises:
            RunFailed: there is another file at its address.
        """
        now = describe(self.url, PAUSES)
        if (now.size, now.version) != (self.size, self.version):
            raise RunFailed(
                f"{self.url} was changed on the server in the meantime: its images are other ones. "
                "Start again, and new runs have the new ones"
            )


def describe(url: str, pauses: tuple[float, ...] = ()) -> RemoteFile:
    """The file at an address; ``pauses``: between tries, by default few.

    Raises:
        UserError: there is none, or it may not be read.
        RunFailed: the server does not answer.
    """
    info = patiently(lambda: _system(url).info(url), url, pauses or PAUSES[:_FIRST])
    if info.get("type") == "directory":
        raise UserError(_missing(url))
    if info.get("size") is None:
        raise UserError(f"{url}: the server does not state its size; copy it, and give the path")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return RemoteFile(url, int(info["size"]), version, info.get("partial", True))


def matching(url: str) -> list[str]:
    """The addresses that match wildcards, sorted. Raises as ``describe``."""
    scheme = url.partition("://")[0]
    found = patiently(lambda: _system(url).glob(url), url, PAUSES[:_FIRST])
    return sorted(f"{scheme}://{path.removeprefix(f'{scheme}://')}" for path in found)


def patiently(
    action: Callable[[], _T],
    url: str,
    pauses: tuple[float, ...] | None = None,
    pause: Pause = time.sleep,
) -> _T:
    """Result of ``action``, which is tried again, after growing pauses, where the network fails.

    Raises:
        UserError: the server refuses it.
        RunFailed: it has failed for as long as all pauses.
    """
    for wait in (*(PAUSES if pauses is None else pauses), None):
        try:
            return action()
        except (UserError, RunFailed, NoRanges):
            raise
        except Exception as error:
            cause = _inner(error)
            if reason := _refused(cause, url):
                raise UserError(reason) from None
            if not _of_network(cause):
                raise
            said = without_secrets(f"{type(cause).__name__}: {cause}".partition("\n")[0])
            if wait is None:
                text = f"{url} cannot be read, though tried again and again: {said}"
                raise RunFailed(text) from None
        if wait >= _QUIET:
            log.warning("%s: %s; trying again in %g seconds", url, said, wait)
        pause(wait)
    raise AssertionError


def _inner(error: Exception) -> BaseException:
    """The error itself, where fsspec takes any error of HTTP for a missing file."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        return cause if _root(cause) in ("aiohttp", "builtins", "asyncio") else error
    return error


def _refused(error: BaseException, url: str) -> str:
    """Reason why another try is of no use, as a line with a remedy; empty where it may help."""
    name, status = type(error).__name__, _status(error)
    keys = _KEYS[url.partition("://")[0].replace("https", "http")]
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return _missing(url)
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        return f"{url} may not be read (or is not there): access is denied; {keys}"
    if name in _CREDENTIALS:
        return f"{url} cannot be read without credentials ({name}); {keys}"
    if name in _CERTIFICATES:
        return f"{url}: the certificate of the server is not trusted; SSL_CERT_FILE names others"
    if name in _ADDRESSES or (isinstance(error, OSError) and error.errno == errno.EINVAL):
        said = " ".join(without_secrets(str(error)).split())
        return f"{url} is refused as an address: {said or name}"
    if 400 <= status < 500 and status not in (408, 425, 429):
        return f"{url} is refused by the server, with status {status}"
    return ""


def _status(error: BaseException) -> int:
    """Status of an answer of HTTP; 0 where there was none."""
    status = getattr(error, "status", None)
    status = getattr(error, "code", None) if status is None else status
    return status if isinstance(status, int) else 0


def _missing(url: str) -> str:
    return f"there is no shard {url}"


def _of_network(error: BaseException) -> bool:
    return isinstance(error, OSError | EOFError) or _root(error) in _LIBRARIES


def _root(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _system(url: str) -> Any:
    """fsspec's file system for an address; of this process, as connections survive no fork."""
    return _opened(url.partition("://")[0], os.getpid())


@functools.lru_cache
def _opened(scheme: str, process: int) -> Any:
    library, extra = _LIBRARY[scheme]
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise UserError(f"{scheme}:// needs {library}: pip install -e {extra}") from None
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "gs":  # the plain client: the usual one has gRPC too, which survives no fork
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem(**options)
    if not scheme.startswith("http"):
        return fsspec.filesystem(scheme, **options)
    import aiohttp

    own = fsspec.config.conf.get("http", {})
    # aiohttp ends any answer after five minutes, and takes compressed ones, which have no ranges.
    limits = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    client = {"timeout": limits, "trust_env": True, **own.get("client_kwargs", {})}
    headers = {"Accept-Encoding": "identity", **own.get("headers", {})}
    return fsspec.filesystem("http", client_kwargs=client, headers=headers, **options)
