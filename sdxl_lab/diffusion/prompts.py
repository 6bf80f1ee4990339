"""From a prompt's words to what the UNet reads of them: tokens, chunks, weights. How words are written, and which of
them weigh what, is `sdxl_lab/syntax.py`'s.

CLIP reads 75 tokens between two marks. In the plain syntax a text is cut there, as diffusers cuts it. In A1111's it is
read in as many chunks of 75 as it takes, and the chunks' embeddings stand one after the other. Weights are applied as
A1111 does by default (its `modules/sd_hijack_clip.py` and `sd_emphasis.py`, the emphasis "Original"): the embedding of
each token is multiplied by its weight, and then the whole chunk by what brings its mean back to where it was. compel
moves an embedding away from the empty text's instead, sd_embed from the chunk's last one: their numbers are others.
"""

import copy
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sdxl_lab.config import ConfigError, EmbeddingRef
from sdxl_lab.diffusion.inversions import PARTS, vectors_of
from sdxl_lab.job import ImageRequest
from sdxl_lab.record import TokenCount
from sdxl_lab.syntax import Section, sections, texts, unweighed

CHUNK = 75  # the tokens of a chunk, without its two marks
# A chunk that ends within so many tokens after a comma ends at the comma: A1111's `comma_padding_backtrack`.
COMMA = 20
COMMA_TOKEN = ",</w>"
MOST_WEIGHT = 100.0
AT_ONCE = 16  # chunks that a text encoder gets in one call
PLACEHOLDER = 0  # the token where a vector of its own is put: any but the marks, since those are looked for


class Prompt(NamedTuple):
    """All that decides an embedding: the text of one step, without adapters.

    `text` is None where there is no negative prompt; `second` is the second encoder's, None for the same. `clip_skip`
    is how many layers before the penultimate one are skipped, None for none. `embeddings` have words of their own.
    `chunks` is how many chunks there are at least: a shorter text gets empty ones.
    """

    text: str | None
    clip_skip: int | None = None
    second: str | None = None
    syntax: str = "plain"
    embeddings: tuple[EmbeddingRef, ...] = ()
    chunks: int = 1

    def read_by(self, encoders: int) -> tuple[str, ...]:
        """The text that each of so many encoders reads. A refiner has one encoder, and reads the first text, as in
        diffusers, although it is the base's second encoder."""
        first = self.text or ""
        return (first, self.second or first)[:encoders]


class Embedding(NamedTuple):
    """A prompt as the UNet takes it: `hidden` (1, 77 x chunks, width) and `pooled` (1, projection)."""

    hidden: torch.Tensor
    pooled: torch.Tensor

    @property
    def chunks(self) -> int:
        return self.hidden.shape[1] // (CHUNK + 2)


@dataclass(frozen=True, eq=False)
class Word:
    """A token, or a word that stands for vectors (n, width) of its own. `place` is where it begins in its piece."""

    id: int
    weight: float
    place: int
    vectors: torch.Tensor | None = None

    def __len__(self) -> int:
        """The tokens it takes the place of."""
        return 1 if self.vectors is None else len(self.vectors)


Chunk = list[Word]
Inversions = Mapping[str, torch.Tensor]


def words_of(tokenizer: Any, section: Section, inversions: Inversions) -> list[Word]:
    """A section's tokens, however many. A word of `inversions` is found where the tokens are those of its name."""
    named = {tuple(_tokens(tokenizer, name).input_ids): vectors for name, vectors in inversions.items()}
    longest = sorted(named, key=len, reverse=True)
    found = []
    for text, weight in section:
        if not abs(weight) <= MOST_WEIGHT:
            raise ConfigError("prompt", f"({text}:{weight:g})", f"without weights beyond {MOST_WEIGHT:g}", "(hat:1.3)")
        encoded = _tokens(tokenizer, text)
        ids, places = encoded.input_ids, [start for start, _ in encoded.offset_mapping]
        at = 0
        while at < len(ids):
            name = next((name for name in longest if name and tuple(ids[at : at + len(name)]) == name), None)
            if name is None:
                found.append(Word(ids[at], weight, places[at]))
            else:
                found.append(Word(PLACEHOLDER, weight, places[at], named[name]))
            at += len(name or (0,))
    return found


def _tokens(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)


def chunks_of(tokenizer: Any, text: str, syntax: str, inversions: Inversions) -> list[Chunk]:
    """The chunks in which a text is read, at least one. In the plain syntax it is one, and what is beyond it is cut."""
    if syntax == "plain":
        (section,) = unweighed(text)
        return [cut(words_of(tokenizer, section, inversions))[0]]
    comma = tokenizer.get_vocab().get(COMMA_TOKEN)
    found = [_parted(words_of(tokenizer, section, inversions), comma) for section in sections(text)]
    # Every BREAK ends a chunk, be it empty; the end of the text does so only where there is something in it.
    chunks = [chunk for parts in found[:-1] for chunk in parts or [[]]] + found[-1]
    return chunks or [[]]


def cut(words: Sequence[Word]) -> tuple[Chunk, Word | None]:
    """The words that one chunk holds, and the first one of which something is beyond it."""
    kept: Chunk = []
    room = CHUNK
    for word in words:
        if len(word) > room:
            if room and word.vectors is not None:
                kept.append(Word(word.id, word.weight, word.place, word.vectors[:room]))
            return kept, word
        kept.append(word)
        room -= len(word)
    return kept, None


def _parted(words: Sequence[Word], comma: int | None) -> list[Chunk]:
    """The words in chunks, none of them empty. A full one ends at its last comma, if that is near its end."""
    chunks: list[Chunk] = [[]]
    used, last = 0, None  # tokens in the chunk, and how many of its words end with its last comma
    for word in words:
        is_comma = word.vectors is None and word.id == comma
        if used == CHUNK and last is not None and not is_comma:
            moved = chunks[-1][last:]
            if sum(map(len, moved)) < COMMA:
                chunks[-1] = chunks[-1][:last]
                chunks.append(moved)
                used, last = sum(map(len, moved)), None
        if used + len(word) > CHUNK:
            chunks.append([])
            used, last = 0, None
        chunks[-1].append(word)
        used += len(word)
        if is_comma:
            last = len(chunks[-1])
    return [chunk for chunk in chunks if chunk]


def encode(
    encoder: Any, tokenizer: Any, chunks: Sequence[Chunk], skipped: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The hidden states (1, 77 x chunks, width), `skipped` layers before the penultimate one, with the words' weights;
    and the first chunk's pooled projection (1, projection), which skips and weighs nothing, where the encoder has one.
    Raises `ConfigError` where it has too few layers."""
    hidden, pooled = [], None
    for start in range(0, len(chunks), AT_ONCE):
        part = chunks[start : start + AT_ONCE]
        ids = torch.tensor([_ids(tokenizer, chunk) for chunk in part], device=encoder.device)
        with _vectors_in(encoder, part):
            output = encoder(ids, output_hidden_states=True)
        most = len(output.hidden_states) - 2  # which begin with the embedded tokens, before the first layer
        if skipped > most:
            rule = f"at most {most}, since a text encoder of the model has {most + 1} layers"
            raise ConfigError("clip_skip", skipped, rule, most)
        hidden.append(_weighed(output.hidden_states[-(skipped + 2)], part))
        if pooled is None and output[0].ndim == 2:
            pooled = output[0][:1]
    return torch.cat(hidden).flatten(0, 1)[None], pooled


def _ids(tokenizer: Any, chunk: Chunk) -> list[int]:
    """The 77 tokens of a chunk."""
    ids = [tokenizer.bos_token_id, *(word.id for word in chunk for _ in range(len(word))), tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (CHUNK + 2 - len(ids))


@contextmanager
def _vectors_in(encoder: Any, chunks: Sequence[Chunk]) -> Iterator[None]:
    """Around a call of the encoder: the words' own vectors take the place of their tokens' embeddings."""
    placed: list[tuple[int, int, torch.Tensor]] = []
    for row, chunk in enumerate(chunks):
        at = 1
        for word in chunk:
            if word.vectors is not None:
                placed.append((row, at, word.vectors))
            at += len(word)
    if not placed:
        yield
        return

    def put(_: object, __: object, embedded: torch.Tensor) -> torch.Tensor:
        changed = embedded.clone()
        for row, at, vectors in placed:
            changed[row, at : at + len(vectors)] = vectors.to(embedded)
        return changed

    hook = encoder.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def _weighed(hidden: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Hidden states (chunks, 77, width) with the words' weights, and every chunk's mean as it was."""
    weights = torch.ones(hidden.shape[:2])
    for row, chunk in enumerate(chunks):
        own = [word.weight for word in chunk for _ in range(len(word))]
        weights[row, 1 : 1 + len(own)] = torch.tensor(own)
    if bool((weights == 1).all()):
        return hidden
    whole = hidden.float()
    scaled = whole * weights.to(whole.device)[..., None]
    ratio = whole.mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True)
    return (scaled * ratio).to(hidden.dtype)


# --- how many tokens -------------------------------------------------------------------------------------------------


class TokenCounter:
    """Says what the text encoders read of a request's texts, and what they cut, before it is drawn.

    It has tokenizers of its own, and one thread at a time: a tokenizer that two threads share fails with "Already
    borrowed", or encodes for the one with the other's truncation.
    """

    def __init__(self, tokenizers: Sequence[Any]) -> None:
        self._tokenizers = copy.deepcopy(tuple(tokenizers))
        self._lock = threading.Lock()

    def __call__(self, request: ImageRequest) -> dict[str, TokenCount]:
        """Each text's count by its name: of the encoder that reads most of it, and of the step that has the longest
        text. Raises `ModelError` for an embedding that is not there."""
        config = request.config
        named = [vectors_of(config.embeddings, part) for part in PARTS][-len(self._tokenizers) :]
        both = list(zip(self._tokenizers, named, strict=True)) if self._tokenizers else []
        said = {"prompt": request.words, "prompt_2": request.words_2}
        said |= {"negative_prompt": config.negative_prompt, "negative_prompt_2": config.negative_prompt_2}
        found = {}
        with self._lock:
            for name, text in said.items():
                if text is None:
                    continue
                readers = both[-1:] if name.endswith("_2") else both
                if said.get(f"{name}_2") is not None:
                    readers = readers[:1]
                steps = dict.fromkeys(texts(text, config.steps)) if config.prompt_syntax == "a1111" else [text]
                counts = [_count(*each, step, config.prompt_syntax) for each in readers for step in steps]
                if counts:
                    found[name] = max(counts, key=lambda count: count.tokens)
        return found


def _count(tokenizer: Any, inversions: Inversions, text: str, syntax: str) -> TokenCount:
    if syntax != "plain":
        words = [word for chunk in chunks_of(tokenizer, text, syntax, inversions) for word in chunk]
        return TokenCount(tokens=sum(map(len, words)))
    (section,) = unweighed(text)
    words = words_of(tokenizer, section, inversions)
    _, first = cut(words)
    beyond = None
    if first is not None:
        begun = re.search(r"[A-Za-z0-9]*$", text[: first.place])  # a word of which the encoders read a part
        beyond = text[first.place - len(begun[0] if begun else "") :].strip()
    return TokenCount(tokens=sum(map(len, words)), limit=CHUNK, beyond=beyond)
