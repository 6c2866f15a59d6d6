"""What stands around the tokens of texts: truncation as `transformers` does it, and the special tokens.

Letters: N texts or pairs, S sequences of each (1, or 2 for pairs), T tokens of all.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Template:
    """Where the special tokens stand: before, between and behind the sequences."""

    specials: tuple[tuple[int, ...], ...]
    """(S + 1,), ids"""
    special_types: tuple[tuple[int, ...], ...]
    """(S + 1,), the segment of each"""
    types: tuple[int, ...]
    """(S,), the segment of each sequence"""

    def __len__(self) -> int:
        return sum(map(len, self.specials))


@dataclass(frozen=True)
class Prompt:
    """Token ids that stand between a text's special tokens and the text: a template around it."""

    before: tuple[int, ...]
    behind: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.behind)

    def wrap(self, ids: IntArray, lengths: npt.NDArray[np.int32], around: tuple[int, int]) -> IntArray:
        """Put the template around each text of (T,) ids, inside the special tokens before and behind it (`around`)."""
        ends = np.cumsum(lengths, dtype=np.int64)
        places = [
            np.repeat(ends - lengths + around[0], len(self.before)),
            np.repeat(ends - around[1], len(self.behind)),
        ]
        values = [np.tile(np.array(one, ids.dtype), len(lengths)) for one in (self.before, self.behind)]
        found: IntArray = np.insert(ids, np.concatenate(places), np.concatenate(values))
        return found


def find_template(backend: Any, num_sequences: int) -> Template | None:
    """Find out with a word for each sequence where a tokenizer puts its special tokens; None if it does something else."""
    words = ("a", "b")[:num_sequences]
    found = backend.encode(*words, add_special_tokens=True)
    specials, special_types, types, at = [], [], [], 0
    for word in words:
        ids = backend.encode(word, add_special_tokens=False).ids
        start = next((place for place in range(at, len(found.ids)) if found.ids[place : place + len(ids)] == ids), None)
        if not ids or start is None:
            return None
        specials.append(tuple(found.ids[at:start]))
        special_types.append(tuple(found.type_ids[at:start]))
        types.append(found.type_ids[start])
        at = start + len(ids)
    template = Template((*specials, tuple(found.ids[at:])), (*special_types, tuple(found.type_ids[at:])), tuple(types))
    return template if len(template) == backend.num_special_tokens_to_add(num_sequences == 2) else None


def fit(counts: npt.NDArray[np.int64], room: int) -> npt.NDArray[np.int64]:
    """How many of (N, S) tokens stay where a text has `room`: of two sequences the longer one gives way ("longest_first")."""
    if counts.shape[1] == 1:
        return np.minimum(counts, room)
    shorter, longer = counts.min(axis=1), counts.max(axis=1)
    halved = np.minimum(shorter, room) + np.maximum(shorter, room - shorter) > room
    shorter = np.where(halved, room // 2, shorter)
    longer = np.where(halved, room - room // 2, room - shorter)
    swapped = counts[:, 0] > counts[:, 1]
    kept = np.stack([np.where(swapped, longer, shorter), np.where(swapped, shorter, longer)], axis=1)
    return np.where((counts.sum(axis=1) <= room)[:, None], counts, np.minimum(counts, kept))


def lay_out(
    tokens: pa.ListArray, kept: npt.NDArray[np.int64], template: Template, side: Literal["left", "right"]
) -> tuple[IntArray, npt.NDArray[np.uint8]]:
    """Put special tokens around what is kept of (N * S) lists, and take the rest away on `side`: ids and segments, (T,) each."""
    offsets = tokens.offsets.to_numpy().astype(np.int64)
    ids = tokens.values.to_numpy()[offsets[0] : offsets[-1]]
    starts, stops, flat = offsets[:-1] - offsets[0], offsets[1:] - offsets[0], kept.ravel()
    if (flat < stops - starts).any():
        first = starts if side == "right" else stops - flat
        ids = np.compress(spans(first[flat > 0], (first + flat)[flat > 0], len(ids)), ids)
    lengths = kept.sum(axis=1) + len(template)
    at = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), ids.dtype)
    types = np.empty(len(out), np.uint8)
    is_text = np.ones(len(out), np.bool_)
    for index, (special, special_types) in enumerate(zip(template.specials, template.special_types, strict=True)):
        places = at[:, None] + np.arange(len(special))
        out[places], types[places], is_text[places] = special, special_types, False
        at = at + len(special) + (kept[:, index] if index < len(template.types) else 0)
    out[is_text] = ids
    if len(template.types) == 2:
        types[is_text] = np.repeat(np.resize(np.array(template.types, np.uint8), flat.shape), flat)
    return out, types


def spans(starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.bool_]:
    """(total,), true within the given ranges; none of them is empty, and they do not overlap."""
    edges = np.zeros(total + 1, np.int8)
    edges[starts] += 1
    edges[stops] -= 1
    return np.cumsum(edges, dtype=np.int8)[:-1].astype(np.bool_)
