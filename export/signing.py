"""Signatures of engine folders: ed25519 over the engine hash, in manifest.json."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from hcma_fast.errors import EngineError, InputError, UsageError
from hcma_fast.files import read_file

_PREFIX = b"hcma-fast engine folder "
"""What is signed begins with it, so that no signature made for another purpose fits"""
_MAX_BYTES = 2**16
_MAKE_KEYS = (
    "Make a pair with openssl genpkey -algorithm ed25519 -out KEY and "
    "openssl pkey -in KEY -pubout -out PUBLIC."
)


class Signer:
    """Signs engine hashes with the private key in a PEM file.

    Raises:
        InputError: the file cannot be read, or is not such a key.
        UsageError: the package cryptography is not installed.
    """

    def __init__(self, path: Path) -> None:
        serialization, ed25519 = _cryptography()
        content = _read_key(path)
        try:
            key = serialization.load_pem_private_key(content, password=None)
        except Exception as error:  # ValueError, TypeError where it has a password, and its own
            raise _no_key("an unencrypted private key", path) from error
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise _no_key("a private key of ed25519", path)
        self._key = key

    def __call__(self, engine_hash: str) -> str:
        """The signature in base64."""
        return base64.b64encode(self._key.sign(_PREFIX + engine_hash.encode())).decode()


def verify(path: Path, engine_hash: str, signature: str | None, folder: str) -> None:
    """Whether the owner of the public key in the PEM file ``path`` signed this hash.

    Args:
        folder: for messages.

    Raises:
        EngineError: no.
        InputError: the file cannot be read, or is not such a key.
        UsageError: the package cryptography is not installed.
    """
    serialization, ed25519 = _cryptography()
    content = _read_key(path)
    try:
        key = serialization.load_pem_public_key(content)
    except Exception as error:
        raise _no_key("a public key", path) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise _no_key("a public key of ed25519", path)
    if signature is None:
        raise EngineError(
            "this engine folder is not signed",
            value=folder,
            remedy="Build it with --sign-key, or leave out --verify-key if you trust it.",
        )
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(base64.b64decode(signature, validate=True), _PREFIX + engine_hash.encode())
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise EngineError(
            "this engine folder was not signed by this key, or has changed since",
            value=folder,
            remedy="Get it again from its source, or check that the key is the right one.",
        ) from error


def _read_key(path: Path) -> bytes:
    return read_file(path, "the key", limit=_MAX_BYTES)


def _no_key(what: str, path: Path) -> InputError:
    return InputError(f"this is not {what} in PEM", value=str(path), remedy=_MAKE_KEYS)


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UsageError(
            "signatures need the package cryptography",
            remedy='Run pip install "hcma-fast[sign]".',
        ) from error
    return serialization, ed25519
