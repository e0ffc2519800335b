"""The nearest vectors by brute force, in numpy or on a GPU. Knows no index and no file.

It is the truth that recall is measured against, and what answers where no FAISS file does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from dinosearch.index.reader import unit

if TYPE_CHECKING:
    import torch

BLOCK = 16384
"""Vectors compared at a time: 25 MB of 384 numbers."""
_BLOCK_SCORES = 16 << 20  # scores held at a time
_FOR_GPU = 64
_SPARE = 32  # candidates beyond k that bfloat16, which keeps three digits, may have put in a wrong order


def nearest(queries: np.ndarray, blocks: Iterable[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k vectors of highest inner product, in no order: positions int64 and scores float32, both [n_queries, k].

    queries: float32 [n_queries, dim]. blocks: float32 [m, dim] each, of at least k vectors together.
    """
    n_queries = len(queries)
    positions, scores = np.empty((n_queries, 0), np.int64), np.empty((n_queries, 0), np.float32)
    start = 0
    for block in blocks:
        found, found_scores = _nearest_of_block(queries, block, min(k, len(block)))
        positions = np.concatenate([positions, found + start], axis=1)
        scores = np.concatenate([scores, found_scores], axis=1)
        start += len(block)
        if positions.shape[1] > k:
            best = np.argpartition(scores, -k, axis=1)[:, -k:]
            positions, scores = np.take_along_axis(positions, best, 1), np.take_along_axis(scores, best, 1)
    return positions, scores


def unit_blocks(halves: np.ndarray) -> Iterable[np.ndarray]:
    """Unit vectors float32 [at most BLOCK, dim] of stored float16 [n, dim], a block at a time."""
    for start in range(0, len(halves), BLOCK):
        yield unit(halves[start : start + BLOCK])


def gpu_repays(n_queries: int) -> bool:
    """Whether a GPU is there and its start is worth so many queries."""
    if n_queries < _FOR_GPU:
        return False
    import faiss

    if faiss.get_num_gpus() == 0:  # asked first: importing torch takes a second
        return False
    import torch

    return torch.cuda.is_available()


def nearest_by_torch(
    queries: np.ndarray, matrix: np.ndarray, k: int, *, device: torch.device | str, block: int = 1 << 18
) -> tuple[np.ndarray, np.ndarray]:
    """As `nearest`, for all vectors [n, dim] of any length: products in bfloat16, the best of them again in float32.

    The candidates of bfloat16 are k and a few more in every block. Written for GPUs; any device of
    torch computes the same.
    """
    import torch

    asked = torch.from_numpy(queries).to(device)  # [n_queries, dim]
    positions = torch.empty((len(queries), 0), dtype=torch.int64, device=device)
    scores = torch.empty((len(queries), 0), dtype=torch.float32, device=device)
    for start in range(0, len(matrix), block):
        part = torch.from_numpy(np.array(matrix[start : start + block])).to(device).float()
        part = torch.nn.functional.normalize(part)  # [block, dim]
        rough = asked.bfloat16() @ part.bfloat16().T  # [n_queries, block]
        near = rough.topk(min(k + _SPARE, len(part)), dim=1).indices  # [n_queries, k + spare]
        exact = torch.einsum("qd,qkd->qk", asked, part[near])
        positions = torch.cat([positions, near + start], dim=1)
        scores = torch.cat([scores, exact], dim=1)
        scores, best = scores.topk(min(k, scores.shape[1]), dim=1)
        positions = positions.gather(1, best)
    return positions.cpu().numpy(), scores.cpu().numpy()


def _nearest_of_block(queries: np.ndarray, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    positions, best_scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    if k == 0:
        return positions, best_scores
    step = max(1, _BLOCK_SCORES // len(block))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ block.T  # [step, n_block]
        best = np.argpartition(scores, -k, axis=1)[:, -k:]
        positions[start : start + step] = best
        best_scores[start : start + step] = np.take_along_axis(scores, best, axis=1)
    return positions, best_scores
