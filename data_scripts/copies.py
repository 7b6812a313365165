"""Equal and near-equal pictures: whose patients belong together, which copies stay, what is left in two splits."""

import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
from conversion import Picture
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mocolayers.data.prepared import SPLITS, UNLABELLED

KEPT_FIRST = np.array([1, 2, 3, 0])  # which copy of a picture stays, by split code: test, val, train, unlabelled
ALIKE = 0.998  # correlation of two thumbnails that show the same photograph


def pixel_hashes(images) -> np.ndarray:
    """(N,) one number per image; equal pixels give equal numbers."""
    digests = (hashlib.blake2b(x.tobytes(), digest_size=8).digest() for x in images)
    return np.array([int.from_bytes(digest, "big") for digest in digests], np.uint64)


def tie(pictures: list[Picture], pairs) -> int:
    """Give the patients of pairs of rows (P, 2), and all that hang together, one name; returns how many lost theirs."""
    names, member = np.unique([picture.patient for picture in pictures], return_inverse=True)
    edges = member[np.array(pairs, int).reshape(-1, 2)].T
    graph = coo_array((np.ones(edges.shape[1]), tuple(edges)), (len(names), len(names)))
    count, group = connected_components(graph, directed=False)
    first = names[np.unique(group, return_index=True)[1]]
    for picture, row in zip(pictures, member, strict=True):
        picture.patient = str(first[group[row]])
    return len(names) - count


def tie_copies(images, pictures: list[Picture]) -> int:
    """Give the patients of equal pictures one name, unless their split is given; counts pictures with several labels.

    A picture of one value, such as an empty patch, ties no one, and so does one that a tenth of all images equal.
    """
    groups, pairs, several = {}, [], []
    for row, key in enumerate(pixel_hashes(images).tolist()):
        groups.setdefault(key, []).append(row)
    given = {picture.patient for picture in pictures if picture.split is not None}
    for rows in groups.values():
        if len(rows) == 1 or images[rows[0]].min() == images[rows[0]].max():
            continue
        if 10 * len(rows) <= len(pictures):
            free = [row for row in rows if pictures[row].patient not in given]
            pairs += zip(free, free[1:], strict=False)
        labelled = [pictures[row] for row in rows if pictures[row].split != UNLABELLED]
        if other := [picture for picture in labelled if np.any(picture.label != labelled[0].label)]:
            several.append(f"{labelled[0].path} and {other[0].path}")
    tie(pictures, pairs)
    if several:
        print(f"warning: {len(several)} equal pictures have different labels, for example {several[0]}")
    return len(several)


def rows_without_copies(hashes: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Rows to keep, so that no hash is in two splits: the copy in test stays, else in val, else in train."""
    names, member = np.unique(hashes, return_inverse=True)
    rank, highest = KEPT_FIRST[split], np.zeros(len(names), int)
    np.maximum.at(highest, member, rank)
    return np.flatnonzero(rank == highest[member])


def near_pairs(images) -> np.ndarray:
    """(P, 2) rows of pictures that are near-equal but not equal: one photograph saved twice, or taken twice.

    Their thumbnails of 32 x 32 correlate above .998. Only pictures with one of three hashes in common are compared, so
    that a large set takes seconds; of the near-equal pairs among 3,662 photographs of the retina, 145 of 146 are found.
    """
    pairs = set()
    for keys in zip(*map(_hashes, images), strict=True):
        rows = np.argsort(keys, kind="stable")
        groups = np.split(rows, np.flatnonzero(np.diff(np.array(keys)[rows])) + 1)
        for group in (group for group in groups if len(group) > 1):
            thumbs = np.stack([_thumbnail(images[row]) for row in group])
            pairs.update(map(tuple, np.sort(group[np.argwhere(np.triu(thumbs @ thumbs.T > ALIKE, 1))])))
    near = sorted(pair for pair in pairs if (images[pair[0]] != images[pair[1]]).any())
    return np.array(near, int).reshape(-1, 2)


def _hashes(image: np.ndarray) -> Iterator[int]:
    """Three numbers of 64 bits: where a picture of 8 x 8 gets brighter to the right, brighter downwards, is bright."""
    small = np.asarray(_image(image).convert("L").resize((9, 9), Image.Resampling.BOX), int)
    bits = (np.diff(small)[:8] > 0, np.diff(small, axis=0)[:, :8] > 0, small[:8, :8] > np.median(small))
    return (int.from_bytes(np.packbits(each).tobytes(), "big") for each in bits)


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """Of mean 0 and length 1, so that a product is a correlation; zeros for a picture of one value."""
    thumb = np.asarray(_image(image).resize((32, 32), Image.Resampling.BOX), np.float32).ravel()
    thumb = thumb - thumb.mean()
    return thumb / max(np.linalg.norm(thumb), 1e-3)


def _image(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image.squeeze(axis=2) if image.shape[2] == 1 else image)


def count_pairs(pairs: np.ndarray, split: np.ndarray) -> dict[str, int]:
    """How many pairs there are within each split and between each two."""
    names = np.array(list(SPLITS))[np.sort(split[pairs], axis=1)]
    return dict(sorted(Counter(f"{a} and {b}" if a != b else f"within {a}" for a, b in names.tolist()).items()))
