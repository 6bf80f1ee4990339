"""Parity of prompts: images in a mixed batch against diffusers' pipelines, which get embeddings made by A1111's formula
as it is written out in test_prompts.py, their own second prompts, or their own textual inversions."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_lab.config import ConfigError, EmbeddingRef, LoraRef, RefinerConfig
from sdxl_lab.diffusion.inversions import pinned_ref
from sdxl_lab.job import ImageRequest
from sdxl_lab.source import SourceImage
from tests.lab.diffusion.test_denoising import PROMPTS, TOLERANCE, Bench, Pipelines, bench, difference
from tests.lab.diffusion.test_prompts import by_hand, widths_of, written
from tests.made import image_record

__all__ = ["bench"]  # the fixture

log = logging.getLogger(__name__)

Chunks = list[list[tuple[str, float]]]  # words and their weights
Embedded = tuple[torch.Tensor, torch.Tensor]


def embedded(pipe: Any, chunks: Chunks, second: Chunks | None = None) -> Embedded:
    """What a pipeline takes as `prompt_embeds` and `pooled_prompt_embeds`."""
    said = [chunks, chunks if second is None else second]
    pairs = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    found = [by_hand(*pair, each) for pair, each in zip(pairs, said, strict=True) if pair[1] is not None]
    return torch.cat([hidden for hidden, _ in found], -1), found[-1][1]


@torch.no_grad()
def drawn(
    pipelines: Pipelines, request: ImageRequest, positive: Sequence[Embedded], negative: Sequence[Embedded]
) -> np.ndarray:
    """A plain loop over the base that calls the UNet for each row alone, with the texts of each of its calls."""
    pipe, config = pipelines.base, request.config
    scheduler = pipelines.scheduler(request)
    scheduler.set_timesteps(config.steps)
    ids = torch.tensor([[config.height, config.width, 0, 0, config.height, config.width]], dtype=torch.float32)
    generator = torch.Generator().manual_seed(request.seed)
    noise = torch.randn(1, 4, config.height // 8, config.width // 8, generator=generator)
    latents = noise * scheduler.init_noise_sigma
    for t, texts in zip(scheduler.timesteps, zip(negative, positive, strict=True), strict=True):
        scaled = scheduler.scale_model_input(latents, t)
        without, answer = (
            pipe.unet(scaled, t, hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
            for hidden, pooled in texts
        )
        guided = without + config.guidance_scale * (answer - without)
        latents = scheduler.step(guided, t, latents).prev_sample
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(decoded, output_type="np")[0]


def zeros(like: Embedded) -> Embedded:
    return torch.zeros_like(like[0]), torch.zeros_like(like[1])


# --- weights and lengths, in one batch -------------------------------------------------------------------------------

WORDS = "a red cat on a blue background "  # seven tokens of nano's
CASES: dict[str, tuple[str, Chunks, str | None, Chunks | None]] = {
    "plain": ("a red cat", [[("a red cat", 1)]], None, None),
    "weights": (
        "a (red:1.5) [cat] on a ((blue)) background",
        [[("a", 1), ("red", 1.5), ("cat", 1 / 1.1), ("on a", 1), ("blue", 1.1 * 1.1), ("background", 1)]],
        "(yellow:1.3), blurry",
        [[("yellow", 1.3), (", blurry", 1)]],
    ),
    "two chunks": (WORDS * 11, [[(WORDS * 10 + "a red cat on a", 1)], [("blue background", 1)]], None, None),
    "three chunks": (
        "(a small green house:0.7) BREAK " + WORDS * 11,
        [[("a small green house", 0.7)], [(WORDS * 10 + "a red cat on a", 1)], [("blue background", 1)]],
        "blurry BREAK yellow BREAK (black star:1.2)",
        [[("blurry", 1)], [("yellow", 1)], [("black star", 1.2)]],
    ),
    "more chunks than the negative prompt": (
        "a red cat BREAK a (blue:1.2) hat BREAK white",
        [[("a red cat", 1)], [("a", 1), ("blue", 1.2), ("hat", 1)], [("white", 1)]],
        "blurry BREAK yellow",
        [[("blurry", 1)], [("yellow", 1)]],
    ),
    "fewer chunks than the negative prompt": (
        "black star",
        [[("black star", 1)]],
        "red " * 400,
        [[("red " * 75, 1)]] * 5 + [[("red " * 25, 1)]],
    ),
    "an empty negative prompt": ("a (red) cat", [[("a", 1), ("red", 1.1), ("cat", 1)]], "", [[]]),
}
SCHEDULERS = ["euler", "dpmpp_2m", "ddim", "unipc", "heun", "euler", "dpmpp_2m"]


@pytest.fixture(scope="module")
def together(bench: Bench) -> dict[str, tuple[ImageRequest, np.ndarray]]:
    """All of them in one batch, with company of the plain syntax."""
    requests = {}
    for index, (name, (prompt, _, negative, _)) in enumerate(CASES.items()):
        config = bench.config.with_(
            prompt_syntax="a1111",
            negative_prompt=negative,
            scheduler=SCHEDULERS[index],
            steps=3 + index % 3,
            guidance_scale=3.0 + index,
        )
        requests[name] = ImageRequest(config, prompt, 500 + index)
    company = [ImageRequest(bench.config.with_(steps=5), prompt, 7) for prompt in PROMPTS]
    images = bench.together([*requests.values(), *company])
    return {name: (request, image) for (name, request), image in zip(requests.items(), images, strict=False)}


@pytest.mark.parametrize("name", CASES)
def test_an_image_in_a_mixed_batch_has_its_own_weights_and_its_own_length(bench, together, name):
    request, image = together[name]
    _, chunks, _, without = CASES[name]
    pipe = bench.pipelines.base
    positive = embedded(pipe, chunks)
    negative = zeros(positive) if without is None else embedded(pipe, without)
    if negative[0].shape == positive[0].shape:  # which the pipeline asks for
        pipe.scheduler = bench.pipelines.scheduler(request)
        expected = pipe(
            prompt_embeds=positive[0],
            pooled_prompt_embeds=positive[1],
            negative_prompt_embeds=negative[0],
            negative_pooled_prompt_embeds=negative[1],
            num_inference_steps=request.config.steps,
            guidance_scale=request.config.guidance_scale,
            width=request.config.width,
            height=request.config.height,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="np",
        ).images[0]
    else:
        calls = len(bench_calls(bench, request))
        expected = drawn(bench.pipelines, request, [positive] * calls, [negative] * calls)
    found = difference(image, expected)
    log.info("difference %.1e", found)
    assert found <= TOLERANCE


def bench_calls(bench: Bench, request: ImageRequest) -> Any:
    scheduler = bench.pipelines.scheduler(request)
    scheduler.set_timesteps(request.config.steps)
    return scheduler.timesteps


def test_company_of_any_length_moves_nothing(bench, together):
    request, image = together["two chunks"]
    (alone,) = bench.together([request])
    assert difference(image, alone) <= TOLERANCE / 10


MUTATIONS: dict[str, Callable[[ImageRequest], ImageRequest]] = {
    "prompt_syntax": lambda request: replace(request, config=request.config.with_(prompt_syntax="plain")),
    "a weight": lambda request: replace(request, prompt=request.prompt.replace("1.5", "4")),
    "a bracket": lambda request: replace(request, prompt=request.prompt.replace("[cat]", "(((((((cat)))))))")),
    "a weight of the negative prompt": lambda request: replace(
        request, config=request.config.with_(negative_prompt="(yellow:-1), blurry")
    ),
    "prompt_2": lambda request: replace(request, prompt_2="a (red:1.5) [dog] on a ((blue)) background"),
    "negative_prompt_2": lambda request: replace(request, config=request.config.with_(negative_prompt_2="blurry")),
    "clip_skip": lambda request: replace(request, config=request.config.with_(clip_skip=1)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_turns_red_when_one_of_them_changes(bench, together, name):
    request, image = together["weights"]
    (changed,) = bench.together([MUTATIONS[name](request)])
    found = difference(image, changed)
    log.info("difference %.1e", found)
    assert found > TOLERANCE


# --- schedules -------------------------------------------------------------------------------------------------------

SCHEDULED = {
    "from one to another": ("a [red cat:green house:0.5]", "euler", 6, ["a red cat"] * 3 + ["a green house"] * 3),
    "at a step": ("a [red:green:2] cat", "dpmpp_2m", 5, ["a red cat"] * 2 + ["a green cat"] * 3),
    "in turn": ("a [red|green|blue] cat", "ddim", 4, ["a red cat", "a green cat", "a blue cat", "a red cat"]),
    "two calls a step": ("a [red:green:2] cat", "heun", 4, ["a red cat"] * 4 + ["a green cat"] * 3),
}


@pytest.fixture(scope="module")
def scheduled(bench: Bench) -> dict[str, tuple[ImageRequest, np.ndarray]]:
    requests = {
        name: ImageRequest(
            bench.config.with_(prompt_syntax="a1111", scheduler=scheduler, steps=steps, negative_prompt="[blurry:]"),
            prompt,
            600,
        )
        for name, (prompt, scheduler, steps, _) in SCHEDULED.items()
    }
    company = [ImageRequest(bench.config.with_(prompt_syntax="a1111"), WORDS * 11, 7)]
    return dict(
        zip(requests, zip(requests.values(), bench.together([*requests.values(), *company]), strict=False), strict=True)
    )


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_changes_the_text_from_step_to_step(bench, scheduled, name):
    request, image = scheduled[name]
    pipe = bench.pipelines.base
    positive = [embedded(pipe, [[(text, 1)]]) for text in SCHEDULED[name][3]]
    negative = [embedded(pipe, [[("blurry:", 1 / 1.1)]])] * len(positive)
    found = difference(image, drawn(bench.pipelines, request, positive, negative))
    log.info("difference %.1e", found)
    assert found <= TOLERANCE


def test_a_step_later_is_another_image(bench, scheduled):
    request, image = scheduled["from one to another"]
    (changed,) = bench.together([replace(request, prompt="a [red cat:green house:4]")])
    assert difference(image, changed) > TOLERANCE


def test_a_shorter_text_of_a_schedule_has_the_chunks_of_the_longest(bench):
    config = bench.config.with_(prompt_syntax="a1111", steps=4)
    request = ImageRequest(config, "[red cat:black star BREAK white:2]", 601)
    pipe = bench.pipelines.base
    texts: list[Chunks] = [[[("red cat", 1)], []]] * 2 + [[[("black star", 1)], [("white", 1)]]] * 2
    positive = [embedded(pipe, chunks) for chunks in texts]
    (image,) = bench.together([request])
    expected = drawn(bench.pipelines, request, positive, [zeros(each) for each in positive])
    assert difference(image, expected) <= TOLERANCE


def test_the_refiner_reads_on_where_the_base_stopped(bench):
    """Of six steps the base makes two, as `denoising_end` has it, and the text is another one from the third on."""
    config = bench.config.with_(prompt_syntax="a1111", steps=6, refiner=RefinerConfig(handover=0.5))
    request = ImageRequest(config, "a [red cat:green house:2] BREAK star", 602)
    pipes = bench.pipelines
    pipes.base.scheduler, pipes.refiner.scheduler = pipes.scheduler(request), pipes.scheduler(request)
    settings = {"num_inference_steps": 6, "guidance_scale": config.guidance_scale}
    hidden, pooled = embedded(pipes.base, [[("a red cat", 1)], [("star", 1)]])
    latents = pipes.base(
        prompt_embeds=hidden,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=torch.zeros_like(hidden),
        negative_pooled_prompt_embeds=torch.zeros_like(pooled),
        width=64,
        height=64,
        denoising_end=0.5,
        generator=torch.Generator("cpu").manual_seed(602),
        output_type="latent",
        **settings,
    ).images
    hidden, pooled = embedded(pipes.refiner, [[("a green house", 1)], [("star", 1)]])
    without, pooled_without = embedded(pipes.refiner, [[]])
    expected = pipes.refiner(
        image=latents,
        prompt_embeds=hidden,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=torch.cat([without] * 2, 1),  # the same keys and values twice: the same attention
        negative_pooled_prompt_embeds=pooled_without,
        denoising_start=0.5,
        output_type="np",
        **settings,
    ).images[0]
    (image,) = bench.together([request])
    found = difference(image, expected)
    log.info("difference %.1e", found)
    assert found <= TOLERANCE


# --- a second prompt -------------------------------------------------------------------------------------------------

SECOND: list[tuple[str | None, dict[str, Any]]] = [
    ("a green house", {}),
    ("black star", {"negative_prompt": "blurry", "negative_prompt_2": "a yellow dog"}),
    (None, {"negative_prompt": "blurry", "negative_prompt_2": "a yellow dog", "clip_skip": 1}),
    ("a green house", {"refiner": RefinerConfig(handover=0.5)}),
    (None, {"negative_prompt_2": "a yellow dog"}),
    ("house", {"refiner": RefinerConfig(handover=0.5), "negative_prompt": "a", "negative_prompt_2": "red"}),
]


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
@pytest.mark.parametrize("source", [False, True], ids=["from noise", "from an image"])
def test_second_prompts_are_those_of_the_pipelines(bench, syntax, source):
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    given = SourceImage(image, 0.6, image_record(), stage="refiner") if source else None
    requests = [
        ImageRequest(bench.config.with_(prompt_syntax=syntax, **settings), PROMPTS[0], 31, given, second)
        for second, settings in SECOND
    ]
    found = [
        difference(mine, bench.pipelines.draw(request))
        for request, mine in zip(requests, bench.together(requests), strict=True)
    ]
    log.info("difference %.1e", max(found))
    assert max(found) <= TOLERANCE


# --- textual inversion -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inverted(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, EmbeddingRef]:
    """An embedding of three vectors, and pipelines that have loaded it as diffusers loads it."""
    path = written(tmp_path_factory.mktemp("embedding") / "style.safetensors", 3, widths_of(bench.engine.models))
    vectors = load_file(path)
    folder = bench.config.model.base
    pipelines = Pipelines.load(type(path)(folder).parent)
    pipelines.base.load_textual_inversion(
        vectors["clip_l"], token="qzstyle", text_encoder=pipelines.base.text_encoder, tokenizer=pipelines.base.tokenizer
    )
    pipelines.base.load_textual_inversion(
        vectors["clip_g"],
        token="qzstyle",
        text_encoder=pipelines.base.text_encoder_2,
        tokenizer=pipelines.base.tokenizer_2,
    )
    return pipelines, pinned_ref(EmbeddingRef(token="qzstyle", source=str(path)))


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_an_embedding_is_what_diffusers_makes_of_it(bench, inverted, syntax):
    pipelines, ref = inverted
    config = bench.config.with_(embeddings=(ref,), prompt_syntax=syntax)
    requests = [
        ImageRequest(config, "a red cat in qzstyle", 41),
        ImageRequest(config.with_(negative_prompt="qzstyle"), "a red cat", 42),
        ImageRequest(config.with_(refiner=RefinerConfig(handover=0.5)), "qzstyle cat", 43),
        ImageRequest(config.with_(embeddings=()), "a red cat in qzstyle", 41),
    ]
    *images, without = bench.together(requests)
    found = [difference(mine, pipelines.draw(each)) for each, mine in zip(requests, images, strict=False)]
    log.info("difference %.1e", max(found))
    assert max(found) <= TOLERANCE < difference(images[0], without)


def test_an_embedding_weighs_what_its_word_weighs(bench, inverted):
    _, ref = inverted
    config = bench.config.with_(embeddings=(ref,), prompt_syntax="a1111")
    prompts = ("a cat in qzstyle", "a cat in (qzstyle:1.5)")
    one, other = bench.together([ImageRequest(config, prompt, 44) for prompt in prompts])
    assert difference(one, other) > TOLERANCE


# --- LoRAs in the prompt ---------------------------------------------------------------------------------------------


def test_a_prompt_gives_weights_to_the_loras_of_the_configuration(bench):
    refs = (LoraRef(source="a/ink.safetensors", weight=0), LoraRef(source="b/oil.safetensors", weight=0.3))
    config = bench.config.with_(loras=refs, prompt_syntax="a1111")

    def weights(prompt: str, second: str | None = None) -> list[tuple[float, float]]:
        request = ImageRequest(config, prompt, 1, prompt_2=second)
        return [(ref.weight, ref.text_weight) for ref in request.loras]

    assert weights("a cat") == [(0, 0), (0.3, 0.3)]
    assert weights("a <lora:ink:0.6> cat") == [(0.6, 0.6), (0.3, 0.3)]
    assert weights("<lora:oil> <lora:ink:0.2:0.8>") == [(0.8, 0.2), (1, 1)]
    assert weights("<lora:ink:0.2>", "<lyco:ink:0.4>") == [(0.4, 0.4), (0.3, 0.3)]
    plain = ImageRequest(config.with_(prompt_syntax="plain"), "a <lora:pen:0.6> cat", 1)
    assert (plain.loras, plain.words) == (refs, "a <lora:pen:0.6> cat")
    assert ImageRequest(config, "a <lora:ink:0.6>cat", 1).words == "a cat"


UNKNOWN = [
    ("<lora:pen:0.6>", r"without adapters that are no LoRA of the configuration, by the name of its file \(ink\)"),
    ("<hypernet:ink:1>", "no LoRA of the configuration"),
    ("<lora:ink:much>", "with numbers for the weights of its LoRAs; received '<lora:ink:much>'"),
    ("<lora:ink:11>", "weight must be a number from -10 to 10"),
    ("<lora:ink:nan>", "weight must be a number from -10 to 10"),
]


@pytest.mark.parametrize(("prompt", "said"), UNKNOWN, ids=[prompt for prompt, _ in UNKNOWN])
def test_an_adapter_that_is_not_known_is_refused_before_any_work(bench, prompt, said):
    config = bench.config.with_(loras=(LoraRef(source="a/ink.safetensors"),), prompt_syntax="a1111")
    with pytest.raises(ConfigError, match=said):
        ImageRequest(config, prompt, 1)


# --- what is told ----------------------------------------------------------------------------------------------------


def test_the_record_says_what_was_cut(bench):
    long = "cat " * 74 + "red hat"
    cut, whole = (
        bench.engine.draw(ImageRequest(bench.config.with_(steps=1, prompt_syntax=syntax), long, 1)).record
        for syntax in ("plain", "a1111")
    )
    assert (cut.tokens["prompt"].tokens, cut.tokens["prompt"].limit, cut.tokens["prompt"].beyond) == (76, 75, "hat")
    assert len(cut.warnings) == 1
    assert (whole.tokens["prompt"].tokens, whole.warnings) == (76, [])
