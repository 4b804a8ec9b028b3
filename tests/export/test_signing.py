"""Signed engine folders: whose key, which folder, and what is no key."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from engine_edits import edit

from hcma_fast import HCMAPipeline
from hcma_fast.errors import EngineError, InputError, UsageError
from hcma_fast.export.manifest import MANIFEST_FILE, load_manifest, read_manifest
from hcma_fast.export.signing import Signer


def make_keys(folder: Path, name: str, key: Any = None, password: bytes = b"") -> tuple[Path, Path]:
    """Files of a private key, and of the public one, as openssl writes them."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    locked = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    pem = serialization.Encoding.PEM
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))
    public.write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def signed(random_engine: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder as ``build --sign-key`` leaves it, and the public key."""
    folder = Path(shutil.copytree(random_engine, tmp_path / "engine"))
    private, public = make_keys(tmp_path, "mine")
    manifest = read_manifest(folder).sealed(Signer(private))
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return folder, public


def test_a_signed_folder_opens_with_its_key_and_without(signed: tuple[Path, Path]) -> None:
    folder, public = signed
    manifest = load_manifest(folder, public)
    assert manifest == load_manifest(folder) and manifest.signature is not None
    key = serialization.load_pem_public_key(public.read_bytes())
    assert isinstance(key, ed25519.Ed25519PublicKey)
    key.verify(
        base64.b64decode(manifest.signature),
        b"hcma-fast engine folder " + manifest.engine_hash.encode(),
    )
    pipe = HCMAPipeline.from_pretrained(folder, verify_key=public)
    assert pipe.engine_hash == manifest.engine_hash


def test_what_the_key_did_not_sign_is_refused(
    signed: tuple[Path, Path], random_engine: Path, tmp_path: Path
) -> None:
    folder, public = signed
    whole = (folder / MANIFEST_FILE).read_text()
    _, other = make_keys(tmp_path, "other")
    with pytest.raises(EngineError, match="not signed by this key"):
        read_manifest(folder, other)
    with pytest.raises(EngineError, match="is not signed"):
        read_manifest(random_engine, public)
    # whoever can write into the folder can make the hash fit, and not the signature
    edit(folder, lambda v: v["info"]["alignment"].update(guidance_scale=1.5), reseal=True)
    read_manifest(folder)
    with pytest.raises(EngineError, match="not signed by this key, or has changed"):
        read_manifest(folder, public)
    for signature in ("", "x", "é", "AAAA", base64.b64encode(bytes(64)).decode()):
        (folder / MANIFEST_FILE).write_text(
            json.dumps({**json.loads(whole), "signature": signature})
        )
        with pytest.raises(EngineError, match="not signed by this key"):
            read_manifest(folder, public)
    # the signature holds for the hash, and the hash for the content
    edit(folder, lambda v: v.update(json.loads(whole), opset=1), reseal=False)
    with pytest.raises(EngineError, match="changed since it was built"):
        read_manifest(folder, public)


def test_what_is_no_key(signed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, public = signed
    private = tmp_path / "mine.pem"
    curve, curve_public = make_keys(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    locked, _ = make_keys(tmp_path, "locked", password=b"secret")
    junk = tmp_path / "junk"
    junk.write_bytes(b"\xff")
    for path in (public, curve, locked, junk, tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"key"):
            Signer(path)
    for path in (private, curve_public, junk, tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"key"):
            read_manifest(folder, path)


def test_keys_are_for_engine_folders(random_checkpoint: Path, signed: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="only engine folders are signed"):
        HCMAPipeline.from_pretrained(random_checkpoint, backend="eager", verify_key=signed[1])


def test_a_missing_package_is_named(
    signed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, public = signed
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(UsageError, match=r"hcma-fast\[sign\]"):
        read_manifest(folder, public)
    read_manifest(folder)
