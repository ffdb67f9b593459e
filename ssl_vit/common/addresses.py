"""Addresses of the network that are given in place of paths; and secrets in them."""

import re

from ssl_vit.common.errors import UserError

ADDRESS = re.compile(r"([a-zA-Z][\w+.-]*)://|pipe:")
# A name and a password: KEY:SECRET@, with any characters, or NAME@ before the first slash. A port
# is none; buckets have none.
_USER = re.compile(
    r"(?<=://)(?:[^/@:\s]+:(?!\d+/)[^@\s]*|[^/@\s]*)@|(?:(?<=s3://)|(?<=gs://))[^/@:\s]+:[^@\s]*@"
)
_QUERY = re.compile(r"(https?://[^?\s]*)\?\S*")


def check_no_secret(spec: str) -> None:
    """Check that a source of images has no password and no signature in its address: what names it
    is written to config.yaml, to logs and to reports.

    Raises:
        UserError: it may have; the message does not show it.
    """
    shown = without_secrets(spec)
    if shown != spec:
        raise UserError(
            f"{shown!r}: an address with a password or a query (?...) would be written to "
            "config.yaml and logs; give it without. Names and passwords are read from ~/.netrc, "
            "AWS keys from ~/.aws or the environment (docs/remote.md)"
        )


def without_secrets(text: str) -> str:
    """The text, without the passwords and the queries of addresses in it."""
    return _QUERY.sub(r"\1", _USER.sub("", text))
