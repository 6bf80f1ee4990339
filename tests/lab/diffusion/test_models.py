"""Checkpoints: a good one loads as diffusers loads it, a bad one is refused with rule, value and example."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_lab.config import ModelRef, RuntimeProfile
from sdxl_lab.diffusion import models
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import ModelError, identity
from sdxl_lab.diffusion.models import load, placement
from sdxl_lab.diffusion.prompts import Prompt

CPU = RuntimeProfile(device="cpu", dtype="float32")


def ref(folder: Path, **more: str | None) -> ModelRef:
    return ModelRef(**({"base": str(folder / "base"), "refiner": str(folder / "refiner")} | more))


@pytest.fixture
def copied(tiny_model, tmp_path):
    """A copy to break."""
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


# --- bad input -------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    path = folder / "base/unet/diffusion_pytorch_model.fp16.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def scrambled(folder: Path) -> None:
    (folder / "base/vae/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"no tensors at all")


def lacking(folder: Path) -> None:
    shutil.rmtree(folder / "base/text_encoder")


def of_other_shape(folder: Path) -> None:
    path = folder / "base/unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [16, 32, 64]}))


def of_another_class(folder: Path) -> None:
    path = folder / "base/model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "FluxPipeline"}))


def without_index(folder: Path) -> None:
    (folder / "base/model_index.json").unlink()


def broken_index(folder: Path) -> None:
    (folder / "base/model_index.json").write_text("{")


def listed_index(folder: Path) -> None:
    (folder / "base/model_index.json").write_text("[]")


def gone(folder: Path) -> None:
    shutil.rmtree(folder / "base")


INDEX_RULE = "the base model must be a folder with the model_index.json of an SDXL pipeline"
WHOLE_RULE = "the base model must be a complete SDXL checkpoint, to load as StableDiffusionXLPipeline"
BROKEN = [
    (cut, WHOLE_RULE, "Unable to load weights from checkpoint file"),
    (scrambled, WHOLE_RULE, "base/vae/diffusion_pytorch_model.fp16.safetensors"),
    (lacking, WHOLE_RULE, "no file named model.safetensors"),
    (of_other_shape, WHOLE_RULE, "expected shape"),
    (of_another_class, INDEX_RULE, "which holds a FluxPipeline"),
    (without_index, INDEX_RULE, "FileNotFoundError"),
    (broken_index, INDEX_RULE, "JSONDecodeError"),
    (listed_index, INDEX_RULE, "TypeError"),
    (gone, INDEX_RULE, "FileNotFoundError"),
]


@pytest.mark.parametrize(("breaking", "rule", "reason"), BROKEN, ids=[each.__name__ for each, *_ in BROKEN])
def test_a_broken_checkpoint_is_refused(copied, breaking, rule, reason):
    breaking(copied)
    with pytest.raises(ModelError) as caught:
        load(ref(copied), CPU)
    text = str(caught.value)
    assert text.startswith(rule)
    assert f"received {str(copied / 'base')!r}" in text
    assert reason in text, text
    assert text.endswith("Example: nano")


def test_a_broken_refiner_is_refused_as_the_refiner(copied):
    shutil.rmtree(copied / "refiner")
    with pytest.raises(ModelError, match=r"the refiner model must be a folder with the model_index\.json of an SDXL"):
        load(ref(copied), CPU)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere", "nowhere"])
def test_a_folder_that_is_not_there_is_refused_without_asking_the_network(name):
    with pytest.raises(ModelError, match=r"the base model must be a folder .* Example: nano"):
        load(ModelRef(base=name), CPU)


def test_a_broken_vae_is_refused(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"the vae must be an AutoencoderKL checkpoint; received .* Example: madebyollin"
    ):
        load(ref(tiny_model, vae=str(tmp_path)), CPU)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"device must be one this machine has; received 'cuda:1'.* Example: cpu"):
        placement(RuntimeProfile(device="cuda:1"))


PLACES = [
    (RuntimeProfile(), False, "cpu", torch.float32),
    (RuntimeProfile(dtype="bfloat16"), False, "cpu", torch.bfloat16),
    (RuntimeProfile(), True, "cuda", torch.float16),
    (RuntimeProfile(device="cpu"), True, "cpu", torch.float32),
    (RuntimeProfile(device="cuda:1", dtype="float32"), True, "cuda:1", torch.float32),
]


@pytest.mark.parametrize(("profile", "cuda", "device", "dtype"), PLACES)
def test_auto_is_settled_by_the_machine(monkeypatch, profile, cuda, device, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert placement(profile) == (torch.device(device), dtype)


@pytest.mark.parametrize(("able", "dtype"), [(False, "bfloat16"), (True, "bfloat16"), (False, "auto")])
def test_a_dtype_that_the_processor_does_not_multiply_is_slow_and_said_so(tiny_model, monkeypatch, caplog, able, dtype):
    """Asked for by name it is used all the same: it halves the weights' memory."""
    monkeypatch.setattr(models.processor, "multiplies", lambda dtype: able or dtype == torch.float32)
    monkeypatch.setattr(models.processor, "capability", lambda: "AVX2")
    loaded = load(ref(tiny_model), RuntimeProfile(device="cpu", dtype=dtype))
    warned = "bfloat16 is slow on this processor: it has AVX2, torch's kernels for it take AVX-512" in caplog.text
    assert warned == (not able and dtype == "bfloat16")
    assert loaded.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)


def test_a_cpu_decodes_image_by_image_so_company_does_not_move_a_bit(tiny_models):
    latents = torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    together = tiny_models.decode(latents)
    alone = [tiny_models.decode(each[None]) for each in latents]
    assert together.shape == (3, 64, 128, 3)
    assert np.array_equal(together, np.concatenate(alone))


def test_the_layout_of_the_vae_moves_rounding_only(tiny_model):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    last, first = (load(ref(tiny_model), CPU.with_(channels_last=each)) for each in (True, False))
    assert last.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert first.vae.decoder.conv_in.weight.is_contiguous()
    assert np.abs(last.decode(latents) - first.decode(latents)).max() <= 1e-4


def test_allocations_are_kept_from_the_load_on(tiny_model, monkeypatch):
    """Not before: what a load takes for a moment would stay in the process."""
    order = []
    monkeypatch.setattr(models, "keep_allocations", lambda: order.append("kept"))
    read = models._load_parts
    monkeypatch.setattr(models, "_load_parts", lambda *given: (order.append("read"), read(*given))[1])
    load(ref(tiny_model), CPU)
    assert order == ["read", "kept"]


# --- good input ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_what_its_files_say(tiny_models):
    assert (tiny_models.scale_factor, tiny_models.dtype) == (8, torch.float32)
    base, refiner = tiny_models.base, tiny_models.refiner
    assert (base.zero_negative, base.aesthetic, len(base.text_encoders)) == (True, False, 2)
    assert (refiner.zero_negative, refiner.aesthetic, len(refiner.text_encoders)) == (False, True, 1)
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())
    assert not base.unet.training


def test_without_a_negative_prompt_the_base_gets_zeros_and_the_refiner_the_empty_prompt(tiny_models):
    base, refiner = tiny_models.base, tiny_models.refiner
    assert not base.embed(Prompt(None)).hidden.any()
    assert base.embed(Prompt("")).hidden.any()
    assert torch.equal(refiner.embed(Prompt(None)).hidden, refiner.embed(Prompt("")).hidden)


@pytest.mark.parametrize("prompt", ["x" * 2000, "日本 🐈 é", " ", "a cat " * 300])
def test_any_text_becomes_an_embedding_of_77_tokens(tiny_models, prompt):
    found = tiny_models.base.embed(Prompt(prompt))
    assert found.hidden.shape[:2] == (1, 77)
    assert torch.isfinite(found.hidden).all()


def test_a_image_of_another_vae_is_drawn_by_that_vae(tiny_model, tmp_path):
    shutil.copytree(tiny_model / "base" / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"] += 0.5
    save_file(weights, path, metadata={"format": "pt"})
    own, other = (load(ref(tiny_model, refiner=None, vae=vae), CPU) for vae in (None, str(tmp_path / "vae")))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.abs(own.decode(latents) - other.decode(latents)).max() > 0.1


def test_a_vae_with_channel_statistics_encodes_and_decodes_as_diffusers_does(tiny_models, tiny_model):
    """Fine-tuned SDXL VAEs carry them; a pipeline that ignores them draws in the wrong colours."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    base = StableDiffusionXLPipeline.from_pretrained(tiny_model / "base", variant="fp16", dtype=torch.float32)
    base.vae.register_to_config(latents_mean=[0.5, -0.3, 0.1, 0.0], latents_std=[2.0, 0.5, 1.5, 1.0])
    mine = replace(tiny_models, refiner=None, vae=base.vae)
    pipe = StableDiffusionXLImg2ImgPipeline(**base.components)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    theirs = pipe.prepare_latents(
        pipe.image_processor.preprocess(image),
        None,
        1,
        1,
        torch.float32,
        torch.device("cpu"),
        torch.Generator().manual_seed(1),
        add_noise=False,
    )
    assert torch.allclose(mine.encode(image, torch.Generator().manual_seed(1)), theirs, atol=1e-5)
    mean, deviation = (torch.tensor(v).view(1, 4, 1, 1) for v in ([0.5, -0.3, 0.1, 0.0], [2.0, 0.5, 1.5, 1.0]))
    with torch.no_grad():
        decoded = base.vae.decode(theirs * deviation / base.vae.config.scaling_factor + mean).sample
    expected = pipe.image_processor.postprocess(decoded, output_type="np")
    assert np.abs(mine.decode(theirs) - expected).max() <= 1e-5


@pytest.mark.parametrize(("overflows", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_float16_spares_a_vae_that_overflows_in_it(tiny_models, overflows, dtype):
    vae = copy.deepcopy(tiny_models.vae).to(torch.float16)
    vae.register_to_config(force_upcast=overflows)
    assert models._steadied(vae).dtype == dtype


def test_on_a_cpu_only_the_unets_are_in_low_precision(copied):
    loaded = load(ref(copied), RuntimeProfile(device="cpu", dtype="bfloat16"))
    assert (loaded.dtype, loaded.base.unet.dtype, loaded.refiner.unet.dtype) == (torch.bfloat16,) * 3
    encoders = [*loaded.base.text_encoders, *loaded.refiner.text_encoders]
    assert {part.dtype for part in [loaded.vae, *encoders]} == {torch.float32}
    assert models._dtypes(torch.device("cuda"), torch.float16) == {"default": torch.float16, "unet": torch.float16}


def test_weights_in_pickles_are_not_unpickled(copied):
    """Loading one runs whatever it holds."""
    path = copied / "base/unet/diffusion_pytorch_model.fp16.safetensors"
    path.unlink()
    torch.save({}, path.with_name("diffusion_pytorch_model.bin"))
    said = r"since loading a pickle runs whatever code it holds; received .* with unet/diffusion_pytorch_model\.bin\. "
    with pytest.raises(ModelError, match=said + "If you trust its source, convert it: python -c "):
        load(ref(copied), CPU)


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def renamed(folder: Path, variant: str = "") -> None:
    """Under a plain name, or another variant's."""
    for path in folder.rglob("*.fp16.safetensors"):
        path.rename(path.with_name(path.name.replace(".fp16.", f".{variant}." if variant else ".")))


def plain(folder: Path) -> None:
    renamed(folder)


def as_bf16(folder: Path) -> None:
    renamed(folder, "bf16")


def some_plain(folder: Path) -> None:
    renamed(folder / "base" / "vae")
    renamed(folder / "base" / "text_encoder")


def both(folder: Path) -> None:
    """The plain files would be other weights: the fp16 ones are taken."""
    path = weights_of(folder / "base" / "vae")
    save_file(
        {name: weight + 1 for name, weight in load_file(path).items()},
        path.with_name("diffusion_pytorch_model.safetensors"),
        metadata={"format": "pt"},
    )


def sharded(folder: Path, variant: str | None = "fp16") -> None:
    """Case 7."""
    place = folder / "base" / "unet"
    unet = UNet2DConditionModel.from_pretrained(place, variant="fp16", dtype=torch.float16)
    weights_of(place).unlink()
    unet.save_pretrained(place, variant=variant, max_shard_size="2MB")
    assert len(list(place.glob("*-of-*.safetensors"))) > 1


def sharded_plain(folder: Path) -> None:
    sharded(folder, None)
    renamed(folder)


def in_bfloat16(folder: Path) -> None:
    """Small whole numbers, which both formats have."""
    for path in folder.rglob("*.safetensors"):
        rounded = {name: (8 * weight).round().clamp(-8, 8) / 8 for name, weight in load_file(path).items()}
        save_file({name: weight.bfloat16() for name, weight in rounded.items()}, path, metadata={"format": "pt"})


FORMS = [plain, as_bf16, some_plain, both, sharded, sharded_plain, in_bfloat16]


@pytest.mark.parametrize("form", FORMS, ids=[form.__name__ for form in FORMS])
def test_a_checkpoint_in_any_of_its_forms_has_the_same_weights(copied, form):
    expected = {path.parent: load_file(path) for path in copied.rglob("*.safetensors") if "clip" not in path.parts}
    form(copied)
    if form is in_bfloat16:
        expected = {folder: load_file(weights_of(folder)) for folder in expected}
    loaded = load(ref(copied), CPU)
    parts = {
        "base/unet": loaded.base.unet,
        "refiner/unet": loaded.refiner.unet,
        "base/vae": loaded.vae,
        "base/text_encoder": loaded.base.text_encoders[0],
        "base/text_encoder_2": loaded.base.text_encoders[1],
    }
    for name, part in parts.items():
        found = {key.removeprefix("text_model."): value for key, value in part.state_dict().items()}
        for key, value in expected[copied / name].items():
            assert torch.equal(found[key.removeprefix("text_model.")], value.float()), (name, key)


def test_the_folder_that_holds_a_model_names_its_vae(tiny_model):
    own, named = (load(ref(tiny_model, refiner=None, vae=vae), CPU) for vae in (None, str(tiny_model)))
    assert all(torch.equal(a, b) for a, b in zip(own.vae.parameters(), named.vae.parameters(), strict=True))


def test_the_clip_beside_a_model_scores_a_image(tiny_model):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tiny_model / "clip"
    clip = CLIPModel.from_pretrained(folder, variant="fp16", dtype=torch.float32)
    words = CLIPTokenizer.from_pretrained(folder)(["a cat", "a dog"], padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(Image.new("RGB", (64, 64)), return_tensors="pt")
    with torch.no_grad():
        assert clip(**words, **pixels).logits_per_image.shape == (1, 2)


def test_a_folder_with_base_and_refiner_is_a_model(tiny_model, tiny_config):
    whole = ModelRef.named(str(tiny_model))
    assert identity(whole) == identity(tiny_config.model)
    with Engine.load(tiny_config.with_(model=whole), CPU) as engine:
        assert engine.models.refiner is not None
        assert engine.weights == identity(whole)


def test_a_vae_with_a_preview_fit_of_its_own_uses_it_and_others_sdxl_s(copied):
    assert np.array_equal(load(ref(copied)).latent_rgb, np.array(models.SDXL_LATENT_RGB, np.float32))
    mine = [[row + column / 10 for column in range(3)] for row in range(5)]
    (copied / "base/vae/latent_rgb.json").write_text(json.dumps(mine))
    assert np.array_equal(load(ref(copied)).latent_rgb, np.array(mine, np.float32))
    assert np.array_equal(load(ref(copied, vae=str(copied / "base/vae"))).latent_rgb, np.array(mine, np.float32))
    assert load(ModelRef.named("nano")).latent_rgb[0, 2] == pytest.approx(0.748, abs=0.001)
