"""Digests of keys and of contents, the same in every process and version."""

import hashlib


def stable_digest(*parts: str | bytes | int | float) -> str:
    """Hashes the parts to 16 hexadecimal digits, the same in every process and version.

    >>> stable_digest("a", 1), stable_digest("a1")
    ('c25807dbd8416470', '0e8529f9d51ffb1f')
    """
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        h.update(len(raw).to_bytes(8, "little") + raw)
    return h.hexdigest()


def key_hash(key: str) -> int:
    """Hashes a key to 64 bits, which decide whether `split_by_hash` holds the record out.

    >>> key_hash("a") == key_hash("a") != key_hash("b"), 0 <= key_hash("a") < 2**64
    (True, True)
    """
    return int.from_bytes(
        hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
    )
