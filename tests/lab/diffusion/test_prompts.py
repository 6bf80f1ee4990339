"""Tokens, chunks and weights: against the tokenizers themselves, against compel where its arithmetic is A1111's, and
against A1111's formula written out here where it is not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType, SplitLongTextMode
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdxl_lab.config import ConfigError, EmbeddingRef, GenerationConfig
from sdxl_lab.diffusion.denoising import sharing
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.diffusion.inversions import PARTS, pinned_ref, vectors_of
from sdxl_lab.diffusion.prompts import CHUNK, Chunk, Prompt, TokenCounter, chunks_of
from sdxl_lab.job import ImageRequest
from sdxl_lab.record import TokenCount

LONG = "a red cat in a hat on a blue background "  # ten tokens of nano's


def ids(chunks: Sequence[Chunk]) -> list[int]:
    return [word.id for chunk in chunks for word in chunk]


def tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, verbose=False).input_ids[1:-1]


def lengths(tokenizer: Any, text: str) -> list[int]:
    return [sum(map(len, chunk)) for chunk in chunks_of(tokenizer, text, "a1111", {})]


@pytest.fixture(scope="module")
def tokenizer(tiny_models: Any) -> Any:
    return tiny_models.base.tokenizers[0]


# --- chunks ----------------------------------------------------------------------------------------------------------

TEXTS = st.text() | st.lists(st.sampled_from([*"()[]:,.", "cat", "red", " ", "é", "日"]), max_size=300).map("".join)


@given(TEXTS)
@settings(deadline=None, max_examples=30)
@example(text=LONG * 30)
def test_a_plain_text_is_read_as_its_tokenizer_cuts_it(tiny_models, text):
    for tokenizer in tiny_models.base.tokenizers:
        (chunk,) = chunks_of(tokenizer, text, "plain", {})
        cut = tokenizer(text, truncation=True, max_length=CHUNK + 2).input_ids
        assert ids([chunk]) == cut[1:-1]


@given(TEXTS)
@settings(deadline=None, max_examples=30)
@example(text=LONG * 60)
def test_no_token_is_lost_in_chunks(tiny_models, text):
    text = "".join(letter for letter in text if letter not in "()[]:\\").replace("BREAK", "")
    for tokenizer in tiny_models.base.tokenizers:
        chunks = chunks_of(tokenizer, text, "a1111", {})
        assert ids(chunks) == tokens(tokenizer, text)
        assert all(len(chunk) <= CHUNK for chunk in chunks)
        assert all(chunks) or chunks == [[]]


CHUNKED = [
    ("", [0]),
    ("cat", [1]),
    ("cat " * 75, [75]),
    ("cat " * 76, [75, 1]),
    ("cat " * 151, [75, 75, 1]),
    # A chunk ends at a comma within its last twenty tokens; the comma stays in it.
    ("cat " * 60 + ", " + "cat " * 20, [61, 20]),
    ("cat " * 54 + ", " + "cat " * 40, [75, 20]),
    ("cat " * 55 + ", " + "cat " * 40, [56, 40]),
    ("cat " * 74 + ", " + "cat", [75, 1]),
    ("cat " * 75 + ", cat", [75, 2]),
    ("cat " * 60 + ", " + "cat " * 10 + ", " + "cat " * 10, [72, 10]),
    # BREAK ends a chunk, be it full or empty.
    ("cat BREAK red cat", [1, 2]),
    ("cat " * 75 + "BREAK cat", [75, 1]),
    ("cat " * 76 + "BREAK cat", [75, 1, 1]),
    ("BREAK", [0]),
    ("BREAK cat", [0, 1]),
    ("cat BREAK", [1]),
    ("cat BREAK BREAK cat", [1, 0, 1]),
    # Weights do not part words from one another.
    ("(cat:1.2) " * 76, [75, 1]),
]


@pytest.mark.parametrize(("text", "expected"), CHUNKED, ids=[f"{len(text)} {text[:20]}" for text, _ in CHUNKED])
def test_chunks(tokenizer, text, expected):
    assert lengths(tokenizer, text) == expected


# --- embeddings ------------------------------------------------------------------------------------------------------


def by_hand(
    tokenizer: Any, encoder: Any, chunks: Sequence[Sequence[tuple[str, float]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A1111's arithmetic: the hidden states of each chunk times the weights of their tokens, times what restores their
    mean; and the pooled projection of the first, or of a model without one whatever it gives."""
    found, pooled = [], []
    for chunk in chunks:
        row, weights = [tokenizer.bos_token_id], [1.0]
        for words, weight in chunk:
            own = tokenizer(words, add_special_tokens=False).input_ids
            row, weights = row + own, weights + [weight] * len(own)
        row.append(tokenizer.eos_token_id)
        row += [tokenizer.pad_token_id] * (77 - len(row))
        weights += [1.0] * (77 - len(weights))
        with torch.no_grad():
            output = encoder(torch.tensor([row]), output_hidden_states=True)
        before = output.hidden_states[-2]
        after = before * torch.tensor(weights)[None, :, None]
        found.append(after * (before.mean() / after.mean()))
        pooled.append(output[0])
    return torch.cat(found, 1), pooled[0]


WEIGHED: list[tuple[str, list[list[tuple[str, float]]]]] = [
    ("a red cat", [[("a red cat", 1)]]),
    ("a (red:1.4) cat", [[("a", 1), ("red", 1.4), ("cat", 1)]]),
    ("a [red] (cat)", [[("a", 1), ("red", 1 / 1.1), ("cat", 1.1)]]),
    ("(a red cat:0)", [[("a red cat", 0)]]),
    ("(red:-1) cat", [[("red", -1), ("cat", 1)]]),
    ("a (red:2) BREAK (cat:0.5) a", [[("a", 1), ("red", 2)], [("cat", 0.5), ("a", 1)]]),
    ("(" + "red " * 100 + ":1.3)", [[("red " * 75, 1.3)], [("red " * 25, 1.3)]]),
]


@pytest.mark.parametrize(("text", "chunks"), WEIGHED, ids=[text[:30] for text, _ in WEIGHED])
def test_weights_are_those_of_a1111(tiny_models, text, chunks):
    base = tiny_models.base
    found = base.embed(Prompt(text, syntax="a1111"))
    pairs = [by_hand(*each, chunks) for each in zip(base.tokenizers, base.text_encoders, strict=True)]
    torch.testing.assert_close(found.hidden, torch.cat([hidden for hidden, _ in pairs], -1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pooled, pairs[-1][1], atol=1e-5, rtol=1e-4)


def compels(tokenizer: Any, encoder: Any, text: str, *, pooled: bool) -> Any:
    compel = Compel(
        tokenizer=tokenizer,
        text_encoder=encoder,
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=pooled,
        truncate_long_prompts=False,
        split_long_text_mode=SplitLongTextMode.BRUTAL,
    )
    return compel(text)


@pytest.mark.parametrize("count", [1, 8, 9, 17, 40])
def test_without_weights_a_text_of_any_length_is_what_compel_makes_of_it(tiny_models, count):
    base, text = tiny_models.base, (LONG * count).strip()
    found = base.embed(Prompt(text, syntax="a1111"))
    first = compels(base.tokenizers[0], base.text_encoders[0], text, pooled=False)
    second, pooled = compels(base.tokenizers[1], base.text_encoders[1], text, pooled=True)
    expected = torch.cat([first, second], -1)
    assert found.hidden.shape == expected.shape == (1, 77 * -(-10 * count // 75), found.hidden.shape[-1])
    torch.testing.assert_close(found.hidden, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pooled, pooled, atol=1e-5, rtol=1e-4)


def test_a_text_without_notation_is_the_same_in_both_syntaxes(tiny_models):
    for denoiser in (tiny_models.base, tiny_models.refiner):
        for clip_skip in (None, 1):
            plain, other = (denoiser.embed(Prompt(LONG, clip_skip, syntax=each)) for each in ("plain", "a1111"))
            assert all(torch.equal(*pair) for pair in zip(plain, other, strict=True))


def test_a_second_prompt_is_the_second_encoders(tiny_models):
    base, refiner = tiny_models.base, tiny_models.refiner
    first, second = base.embed(Prompt("a cat")), base.embed(Prompt("a red dog"))
    both = base.embed(Prompt("a cat", second="a red dog"))
    width = base.text_encoders[0].config.hidden_size
    assert torch.equal(both.hidden[..., :width], first.hidden[..., :width])
    assert torch.equal(both.hidden[..., width:], second.hidden[..., width:])
    assert torch.equal(both.pooled, second.pooled)
    alone = refiner.embed(Prompt("a cat", second="a red dog"))
    assert torch.equal(alone.hidden, refiner.embed(Prompt("a cat")).hidden)


def test_where_one_encoder_reads_more_chunks_the_other_gets_empty_ones(tiny_models):
    base = tiny_models.base
    found = base.embed(Prompt("a cat", second=LONG * 9, syntax="a1111"))
    empty = base.embed(Prompt(""))
    width = base.text_encoders[0].config.hidden_size
    assert found.hidden.shape[1] == 154
    torch.testing.assert_close(found.hidden[:, 77:, :width], empty.hidden[..., :width], atol=1e-6, rtol=1e-5)


def test_a_weight_out_of_all_bounds_is_refused(tiny_models):
    for text in ("(cat:101)", "(cat:-100.1)", "(cat:" + "9" * 400 + ")", "((cat:0):" + "9" * 400 + ")"):
        with pytest.raises(ConfigError, match="prompt must be without weights beyond 100"):
            tiny_models.base.embed(Prompt(text, syntax="a1111"))


# --- who shares a call -----------------------------------------------------------------------------------------------

SHARING = [
    ([], []),
    ([1, 1], [[0, 1]]),
    ([1, 2, 1], [[0, 1, 2]]),
    ([3, 1], [[0, 1]]),
    ([4, 2, 1], [[0, 1, 2]]),
    ([1, 2, 3], [[0, 1], [2]]),
    ([5, 1], [[1], [0]]),
    ([2, 3], [[0, 1]]),
    ([80, 27, 80], [[1], [0, 2]]),
]


@pytest.mark.parametrize(("chunks", "expected"), SHARING, ids=[str(chunks) for chunks, _ in SHARING])
def test_rows_whose_texts_have_a_small_common_multiple_share_a_call(chunks, expected):
    assert sharing([77 * count for count in chunks]) == expected


def test_a_text_that_is_repeated_is_the_same_text_to_the_unet(tiny_models):
    draw = torch.Generator().manual_seed(0)
    unet = tiny_models.base.unet
    embedding = tiny_models.base.embed(Prompt("a red cat"))
    latents = torch.randn(1, 4, 8, 8, generator=draw)
    added = {"text_embeds": embedding.pooled, "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        once, thrice = (
            unet(latents, torch.tensor(500), hidden, added_cond_kwargs=added).sample
            for hidden in (embedding.hidden, embedding.hidden.repeat(1, 3, 1))
        )
    torch.testing.assert_close(once, thrice, atol=1e-5, rtol=1e-4)


# --- how many tokens -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counter(tiny_models: Any) -> TokenCounter:
    return TokenCounter(tiny_models.base.tokenizers)


def asked(prompt: str, prompt_2: str | None = None, **settings: Any) -> ImageRequest:
    return ImageRequest(GenerationConfig(**settings), prompt, 1, prompt_2=prompt_2)


def test_a_count_has_the_limit_and_the_words_beyond_it(counter):
    found = counter(asked("cat " * 75, negative_prompt="red " * 76 + "cat "))
    assert found == {
        "prompt": TokenCount(tokens=75, limit=75),
        "negative_prompt": TokenCount(tokens=77, limit=75, beyond="red cat"),
    }
    assert found["prompt"].warning("prompt") is None
    said = found["negative_prompt"].warning("negative_prompt")
    assert said.startswith("negative_prompt: the text encoders read 75 of its 77 tokens and cut 'red cat'")


def test_a_word_of_which_a_part_is_cut_is_told_whole(counter, tokenizer):
    word = "qwrtzpsd"
    assert len(tokens(tokenizer, word)) > 2
    count = counter(asked("cat " * 74 + word + " red"))["prompt"]
    assert count.beyond == f"{word} red"


def test_in_chunks_nothing_is_cut_and_the_longest_step_counts(counter):
    found = counter(asked("cat " * 80 + "[:red red:0.5] (hat:1.2)", prompt_syntax="a1111"))
    assert found == {"prompt": TokenCount(tokens=83)}


def test_each_text_is_counted_for_the_encoder_that_reads_it(counter):
    found = counter(asked("cat", "red cat", negative_prompt="a", negative_prompt_2="red red red"))
    assert {name: count.tokens for name, count in found.items()} == {
        "prompt": 1,
        "prompt_2": 2,
        "negative_prompt": 1,
        "negative_prompt_2": 3,
    }


def test_adapters_are_no_tokens(counter, monkeypatch):
    monkeypatch.setattr(ImageRequest, "loras", ())
    assert counter(asked("cat <lora:outlines:0.5>", prompt_syntax="a1111"))["prompt"].tokens == 1


# --- textual inversion -----------------------------------------------------------------------------------------------


def written(path: Path, count: int = 3, widths: tuple[int, int] = (64, 64), **more: torch.Tensor) -> Path:
    draw = torch.Generator().manual_seed(7)
    vectors = {part: torch.randn(count, width, generator=draw) for part, width in zip(PARTS, widths, strict=True)}
    save_file(vectors | more, path)
    return path


def widths_of(models: Any) -> tuple[int, int]:
    first, second = (encoder.config.hidden_size for encoder in models.base.text_encoders)
    return first, second


def test_a_word_stands_for_vectors_which_are_read_in_one_chunk(tokenizer, tmp_path):
    ref = EmbeddingRef(token="my style", source=str(written(tmp_path / "x.safetensors")))
    named = vectors_of([ref], "clip_l")
    chunks = chunks_of(tokenizer, "a MY  style cat", "plain", named)
    assert [len(word) for word in chunks[0]] == [1, 3, 1]
    assert torch.equal(chunks[0][1].vectors, named["my style"])
    assert all(word.vectors is None for word in chunks_of(tokenizer, "my styles", "plain", named)[0])
    parted = chunks_of(tokenizer, "cat " * 73 + "my style", "a1111", named)
    assert [sum(map(len, chunk)) for chunk in parted] == [73, 3]
    (cut,) = chunks_of(tokenizer, "cat " * 73 + "my style", "plain", named)
    assert sum(map(len, cut)) == 75


def test_of_two_words_the_longer_one_is_found(tokenizer, tmp_path):
    refs = [
        EmbeddingRef(token=token, source=str(written(tmp_path / f"{count}.safetensors", count)))
        for token, count in (("my", 1), ("my style", 2))
    ]
    named = vectors_of(refs, "clip_g")
    (chunk,) = chunks_of(tokenizer, "my style my", "plain", named)
    assert [len(word) for word in chunk] == [2, 1]


def test_vectors_are_counted(tmp_path, counter):
    ref = EmbeddingRef(token="style", source=str(written(tmp_path / "x.safetensors", 5)))
    assert counter(asked("a style", embeddings=(ref,)))["prompt"].tokens == 6


def pickled(path: Path) -> Path:
    torch.save({"clip_l": torch.zeros(1, 64)}, path)
    return path


REFUSED = {
    "a pickle": (
        lambda folder: pickled(folder / "x.pt"),
        "since a pickle may run any code",
    ),
    "a pickle in disguise": (lambda folder: pickled(folder / "x.safetensors"), "must be a whole .safetensors file"),
    "nothing": (lambda folder: folder / "x.safetensors", "which is not there"),
    "one encoder": (
        lambda folder: (
            (save_file({"emb_params": torch.zeros(2, 64)}, folder / "x.safetensors"), None)[1]
            or folder / "x.safetensors"
        ),
        "must be an SDXL's, with the keys clip_l and clip_g; received emb_params",
    ),
    "one more key": (
        lambda folder: written(folder / "x.safetensors", other=torch.zeros(1)),
        "received clip_g, clip_l, other",
    ),
    "too many": (
        lambda folder: written(folder / "x.safetensors", 76),
        "as many vectors .* 1 to 75",
    ),
    "none": (lambda folder: written(folder / "x.safetensors", 0), "1 to 75"),
    "unlike counts": (
        lambda folder: written(folder / "x.safetensors", clip_g=torch.zeros(2, 64)),
        r"the shapes \(3, 64\) and \(2, 64\)",
    ),
    "no number": (
        lambda folder: written(folder / "x.safetensors", clip_g=torch.full((3, 64), torch.nan)),
        "must be made of finite numbers",
    ),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_no_embedding_of_an_sdxl_is_refused(tmp_path, make, said):
    ref = EmbeddingRef(token="style", source=str(make(tmp_path)))
    with pytest.raises(ModelError, match=said):
        vectors_of([ref], "clip_l")


def test_vectors_of_another_width_are_refused(tiny_models, tmp_path):
    first, second = widths_of(tiny_models)
    ref = EmbeddingRef(token="style", source=str(written(tmp_path / "x.safetensors", 1, (first, second + 1))))
    with pytest.raises(ModelError, match=rf"made for this model, whose clip_g has {second} numbers a vector"):
        tiny_models.base.embed(Prompt("a style", embeddings=(ref,)))


def test_another_file_than_the_one_that_was_named_is_refused(tmp_path):
    path = written(tmp_path / "x.safetensors", 1)
    ref = pinned_ref(EmbeddingRef(token="style", source=str(path)))
    assert len(ref.sha256) == 64
    vectors_of([ref], "clip_l")
    written(path, 2)
    with pytest.raises(ModelError, match="must be the file with the sha256"):
        vectors_of([ref], "clip_l")
