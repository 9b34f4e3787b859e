"""What every payload has in common: the field of an answer, its base64, and how it can be wrong."""

from __future__ import annotations

import binascii
import functools

import numpy as np

from ..errors import PayloadError

FIELD = "routed_experts"


def from_base64(text) -> bytes:
    """The bytes of a payload's JSON string.

    Raises:
        PayloadError: There is none, or it is not base64.
    """
    if text is None:
        raise absent("the answer")
    if not isinstance(text, (str, bytes)):
        raise damaged("a base64 string", type(text).__name__)
    try:
        return _base64_decoder()(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise damaged("base64", error) from error


@functools.cache
def _base64_decoder():
    # The same function, thirty times faster. It comes with SGLang; a trainer may be without.
    try:
        from pybase64 import b64decode
    except ImportError:
        from base64 import b64decode
    return b64decode


def size_bytes(dtype: np.dtype, shape) -> int:
    """Bytes of an array, whatever its shape claims."""
    num_bytes = dtype.itemsize
    for size in shape:  # Python integers: a lying shape cannot overflow
        num_bytes *= size
    return num_bytes


def absent(where: str) -> PayloadError:
    """The error of an answer without routes."""
    return PayloadError(
        f"no routes in {where}",
        expected=f"a field {FIELD!r}",
        got="none",
        fix="Ask for them in the request and start the server with "
        "--enable-return-routed-experts; a gateway in between may drop the field: probe() tells",
    )


def damaged(expected, got) -> PayloadError:
    """The error of bytes that are not what they claim to be."""
    return PayloadError(
        "the payload is damaged",
        expected=expected,
        got=got,
        fix="Ask again; if it stays, something between the server and here changes the bytes",
    )
