"""hash_reference.py -- hash functions and tables of the hashed head in plain Python, one row at a time."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

MASK = 0xFFFFFFFF
HASHING = 7  # Purpose::hashing


def philox(seed: int, row: int, block: int, purpose: int = HASHING, step: int = 0) -> list[int]:
    """Philox 4x32-10 of a stream, as random.h defines it."""
    c = [block & MASK, row & MASK, row >> 32 & MASK, step & MASK]
    k = [(seed & MASK) ^ (purpose * 0x85EBCA6B & MASK), (seed >> 32 & MASK) ^ ((step >> 32) * 0xC2B2AE35 & MASK)]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def below(n: int, seed: int, row: int, index: int) -> int:
    r = philox(seed, row, index >> 1)
    return ((r[(index & 1) * 2 + 1] << 32 | r[(index & 1) * 2]) * n) >> 64


def windows(features: int, tables: int, hashes: int, window: int, seed: int) -> NDArray:
    """Coordinates `[tables, hashes, min(window, features)]`: disjoint pieces of one permutation a table, and of another
    one where it is used up."""
    size = min(window, features)
    each = features // size
    out = np.empty((tables, hashes, size), np.int64)
    for t in range(tables):
        for p in range(-(-hashes // each)):
            order = list(range(features))
            for i in range(features):
                j = i + below(features - i, seed, t * 65536 + p, i)
                order[i], order[j] = order[j], order[i]
            for j in range(p * each, min(hashes, (p + 1) * each)):
                at = (j - p * each) * size
                out[t, j] = order[at : at + size]
    return out


def signs(features: int, tables: int, hashes: int, seed: int) -> NDArray:
    """+-1 `[tables, hashes, features]`."""
    out = np.empty((tables, hashes, features), np.float32)
    for t in range(tables):
        for j in range(hashes):
            for block in range(-(-features // 128)):
                r = philox(seed, (1 << 40) + t * hashes + j, block)
                for k in range(block * 128, min(features, block * 128 + 128)):
                    out[t, j, k] = 1.0 if r[k % 128 // 32] >> k % 32 & 1 else -1.0
    return out


def bits_of(family: str, window: int) -> int:
    return 1 if family == "simhash" else max(1, math.ceil(math.log2(window)))


def _borrow(code: int, attempt: int, codes: int, seed: int) -> int:
    """Where an empty window looks for a code, as SLIDE's densification does, by our own generator."""
    return below(codes, seed, (1 << 41) + code, attempt)


def dense_codes(row: NDArray, places: NDArray) -> list[int]:
    """WTA: the place of the largest coordinate of each window, the lowest place of equals."""
    return [int(np.argmax(row[where])) for where in places.reshape(-1, places.shape[-1])]


def densified_codes(row: NDArray, places: NDArray, seed: int) -> list[int] | None:
    """DWTA: zeros do not take part; a window of zeros alone takes the code of another one."""
    flat = places.reshape(-1, places.shape[-1])
    found: list[int | None] = []
    for where in flat:
        x = row[where].astype(np.float64)
        found.append(int(np.argmax(np.where(x == 0, -np.inf, x))) if np.any(x != 0) else None)
    if all(code is None for code in found):
        return None
    out = []
    for i, code in enumerate(found):
        attempt = 0
        while code is None:
            code = found[_borrow(i, attempt, len(flat), seed)]
            attempt += 1
        out.append(code)
    return out


def keys(rows: NDArray, family: str, tables: int, hashes: int, window: int, seed: int) -> NDArray:
    """Bucket of each row in each table `[n, tables]`; -1: in none."""
    rows = np.asarray(rows, np.float32)
    n, features = rows.shape
    out = np.full((n, tables), -1, np.int64)
    bits = bits_of(family, window)
    places = None if family == "simhash" else windows(features, tables, hashes, window, seed)
    plus = signs(features, tables, hashes, seed) if family == "simhash" else None
    for r, row in enumerate(rows):
        if np.isnan(row).any():
            continue
        if plus is not None:
            total = np.zeros((tables, hashes), np.float32)
            for k in range(features):
                total = total + plus[:, :, k] * row[k]
            codes = [int(x > 0) for x in total.ravel()]
        else:
            assert places is not None
            made = densified_codes(row, places, seed) if family == "dwta" else dense_codes(row, places)
            if made is None:
                continue
            codes = made
        for t in range(tables):
            out[r, t] = sum(codes[t * hashes + j] << j * bits for j in range(hashes))
    return out


def query(
    index_keys: NDArray, query_keys: NDArray, candidates: int, max_bucket: int = 0
) -> list[list[tuple[int, int]]]:
    """(class, collisions) of each query, most collisions first, then by class."""
    tables = index_keys.shape[1]
    sizes = [Counter(index_keys[:, t].tolist()) for t in range(tables)]
    out = []
    for row in query_keys:
        count: Counter[int] = Counter()
        for t in range(tables):
            if row[t] < 0 or (max_bucket and sizes[t][int(row[t])] > max_bucket):
                continue
            count.update(np.flatnonzero(index_keys[:, t] == row[t]).tolist())
        out.append(sorted(count.items(), key=lambda item: (-item[1], item[0]))[:candidates])
    return out
