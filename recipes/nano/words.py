"""nano's tokenizers: CLIP's byte-pair encoding, trained on captions, so that every word of a caption is one token.

All 256 bytes are in the vocabulary, so that arbitrary text can be encoded, in pieces.
"""

import json
import random
from dataclasses import replace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from recipes.nano.scenes import COLOURS, NOUNS, Scene, caption, sample_scene

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def train_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """SDXL's two tokenizers with one vocabulary: the first pads with the end token, the second with "!"."""
    rng = random.Random(0)
    scenes = [sample_scene(rng, hat=0.5) for _ in range(4000)]
    corpus = [caption(scene) for scene in scenes] + [caption(scene, rng) for scene in scenes]

    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pairs.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=10_000,
            min_frequency=20,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(merge) for merge in _merges(pairs)]
    # CLIP's order: bytes, bytes that end a word, merges, the two marks. "!" comes first, as in SDXL's second tokenizer.
    letters = sorted(alphabet)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    first, second = (
        CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=LENGTH) for pad in (END, "!")
    )
    return first, second


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]


def ids(tokenizer: CLIPTokenizer, texts: list[str], length: int = LENGTH) -> torch.Tensor:
    """Token ids (n, length), padded and cut as the pipeline does."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def contradiction(scene: Scene, rng: random.Random) -> str:
    """A full caption that is wrong in one part: a hard negative for contrastive training."""
    if scene.relation and rng.random() < 0.3:
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return caption(replace(scene, relation=opposite[scene.relation]))
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    kind = rng.choice(("colour", "noun", "noun", "noun", "background"))
    if kind == "background":
        return caption(replace(scene, background=rng.choice([c for c in COLOURS if c != scene.background])))
    if kind == "colour":
        thing = replace(thing, colour=rng.choice([c for c in COLOURS if c != thing.colour]))
    else:
        thing = replace(thing, noun=rng.choice([n for n in NOUNS if n != thing.noun]))
    things = tuple(thing if i == index else old for i, old in enumerate(scene.things))
    return caption(replace(scene, things=things))
