"""Single files in the original layout have the parts that the same model's folders have, without a network.

The checkpoints are made of the random model by `tests/original.py`.
"""

import json
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from sdxl_lab.config import MODELS, GenerationConfig, ModelRef, RefinerConfig, RuntimeProfile
from sdxl_lab.diffusion import checkpoint, schedulers, single_file
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import NANO, SDXL, ModelError, identity
from sdxl_lab.diffusion.models import Models, load
from sdxl_lab.images import a1111_parameters
from sdxl_lab.job import ImageRequest
from tests import original
from tests.lab.diffusion.test_denoising import TOLERANCE, Bench, Pipelines, difference
from tests.lab.diffusion.test_hub import cached

CPU = RuntimeProfile(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def files(lively_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.safetensors`, `refiner.safetensors` and `vae.safetensors` of the lively model."""
    folder = tmp_path_factory.mktemp("files")
    original.written(original.base(lively_model), folder / "base.safetensors")
    original.written(original.refiner(lively_model), folder / "refiner.safetensors")
    whole = original.vae(original.part(lively_model / "base" / "vae"), 4)
    plain = {name.removeprefix("first_stage_model."): weight for name, weight in whole.items()}
    original.written(plain, folder / "vae.safetensors")
    return folder


def ref(files: Path, model: Path, **more: Any) -> ModelRef:
    named = {"base": files / "base.safetensors", "refiner": files / "refiner.safetensors", "config": model}
    return ModelRef(**({name: str(path) for name, path in named.items()} | more))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves the machine."""

    def refuse(*_: object) -> None:
        raise AssertionError("a single file is loaded without a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def copied_lively(lively_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lively_model, tmp_path / "lively"))


def parameters(models: Models) -> dict[str, torch.Tensor]:
    assert models.refiner is not None
    parts = {
        "unet": models.base.unet,
        "refiner": models.refiner.unet,
        "vae": models.vae,
        **{f"text {index}": encoder for index, encoder in enumerate(models.base.text_encoders)},
    }
    return {f"{name} {key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


# --- good files ------------------------------------------------------------------------------------------------------


def test_a_file_has_the_parts_of_the_folders_that_it_was_made_of(files, lively_model):
    folders = load(ModelRef.named(str(lively_model)), CPU)
    single = load(ref(files, lively_model), CPU)
    ours, theirs = parameters(single), parameters(folders)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert single.base.scheduler_config == folders.base.scheduler_config
    for text in ("a red cat", ""):
        ids = [tokenizer(text).input_ids for tokenizer in single.base.tokenizers]
        assert ids == [tokenizer(text).input_ids for tokenizer in folders.base.tokenizers]
    assert (single.base.zero_negative, single.refiner.aesthetic) == (True, True)


def test_images_of_a_file_in_a_mixed_batch_are_those_of_the_pipeline_alone(files, lively_model):
    model = ref(files, lively_model)
    config = GenerationConfig(model=model, steps=4, width=64, height=64)
    asked = [
        ImageRequest(config.with_(steps=5), "a red cat", 1),
        ImageRequest(config.with_(scheduler="unipc", guidance_scale=1.0), "a green house", 2),
        ImageRequest(config.with_(scheduler="euler_a", refiner=RefinerConfig(handover=0.5)), "a blue boat", 3),
    ]
    profile = RuntimeProfile(device="cpu", dtype="float32", rows=256)
    with Engine(load(model, profile), profile, {}) as engine:
        bench = Bench(engine, Pipelines.load(lively_model), config)
        found = [
            difference(image, bench.pipelines.draw(each))
            for each, image in zip(asked, bench.together(asked), strict=True)
        ]
    assert max(found) <= TOLERANCE


@pytest.mark.parametrize("name", ["vae.safetensors", "base.safetensors"])
def test_a_vae_comes_from_a_file_of_its_own_or_inside_a_whole_model_s(files, lively_model, name):
    model = ModelRef(base=str(lively_model), vae=str(files / name), config=str(lively_model))
    own, loaded = (load(each, CPU).vae.state_dict() for each in (ModelRef(base=str(lively_model)), model))
    assert own.keys() == loaded.keys()
    assert all(torch.equal(value, own[name]) for name, value in loaded.items())


def test_a_vae_in_diffusers_layout_is_a_file_too(files, lively_model, tmp_path):
    (path,) = (lively_model / "base" / "vae").glob("*.safetensors")
    shutil.copy(path, tmp_path / "plain.safetensors")
    model = ModelRef(base=str(lively_model), vae=str(tmp_path / "plain.safetensors"), config=str(lively_model))
    own, loaded = (load(each, CPU).vae.state_dict() for each in (ModelRef(base=str(lively_model)), model))
    assert all(torch.equal(value, own[name]) for name, value in loaded.items())


def test_a_file_without_a_vae_takes_the_one_that_is_named(files, lively_model, tmp_path):
    bare = {name: each for name, each in load_file(files / "base.safetensors").items() if "first_stage" not in name}
    path = original.written(bare, tmp_path / "bare.safetensors")
    with pytest.raises(ModelError, match=r"without vae. A VAE can be named with --vae"):
        load(ref(files, lively_model, base=str(path)), CPU)
    loaded = load(ref(files, lively_model, base=str(path), vae=str(files / "vae.safetensors")), CPU)
    assert loaded.vae.config.scaling_factor == original.described(lively_model / "base" / "vae")["scaling_factor"]


def test_a_file_in_bfloat16_and_words_that_nobody_needs_load(files, lively_model, tmp_path):
    weights = {name: each.bfloat16() for name, each in load_file(files / "base.safetensors").items()}
    weights["model_ema.decay"] = torch.tensor(1.0)
    path = original.written(weights, tmp_path / "bf16.safetensors", comment="merged by somebody")
    loaded = load(ref(files, lively_model, base=str(path)), CPU)
    assert loaded.base.unet.dtype == torch.float32
    expected = load_file(files / "base.safetensors")["model.diffusion_model.out.2.weight"].bfloat16().float()
    assert torch.equal(loaded.base.unet.state_dict()["conv_out.weight"], expected)


def test_only_the_unet_of_a_file_is_in_low_precision_on_a_cpu(files, lively_model):
    loaded = load(ref(files, lively_model), RuntimeProfile(device="cpu", dtype="bfloat16"))
    assert (loaded.base.unet.dtype, loaded.refiner.unet.dtype) == (torch.bfloat16,) * 2
    assert {part.dtype for part in (loaded.vae, *loaded.base.text_encoders)} == {torch.float32}


def test_the_preview_of_a_file_takes_the_fit_beside_its_configurations(files, lively_model, tmp_path):
    shutil.copytree(lively_model, tmp_path / "model")
    mine = [[row + column / 10 for column in range(3)] for row in range(5)]
    (tmp_path / "model" / "base" / "vae" / "latent_rgb.json").write_text(json.dumps(mine))
    assert np.array_equal(load(ref(files, tmp_path / "model"), CPU).latent_rgb, np.array(mine, np.float32))


# --- what a file predicts --------------------------------------------------------------------------------------------

SAYS: list[tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any], tuple[str, bool, str]]] = [
    ({}, {}, {}, ("epsilon", False, "leading")),
    ({"v_pred": torch.empty(0)}, {}, {}, ("v_prediction", False, "leading")),
    ({"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, {}, {}, ("v_prediction", True, "trailing")),
    ({}, {"modelspec.prediction_type": "v"}, {}, ("v_prediction", False, "leading")),
    ({"v_pred": torch.empty(0)}, {}, {"prediction_type": "epsilon"}, ("epsilon", False, "leading")),
    (
        {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)},
        {},
        {"zero_snr": False},
        ("v_prediction", False, "leading"),
    ),
    ({}, {}, {"prediction_type": "v_prediction", "zero_snr": True}, ("v_prediction", True, "trailing")),
]


@pytest.mark.parametrize(("more", "words", "asked", "expected"), SAYS)
def test_prediction_and_terminal_signal_are_as_the_configuration_says_or_else_the_file(
    files, lively_model, tmp_path, more, words, asked, expected
):
    path = original.written(load_file(files / "base.safetensors") | more, tmp_path / "model.safetensors", **words)
    loaded = load(ref(files, lively_model, base=str(path), **asked), CPU)
    found = loaded.base.scheduler_config
    names = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
    assert tuple(found[name] for name in names) == expected
    assert loaded.refiner.scheduler_config["prediction_type"] == "epsilon", "the refiner is another model"


def test_what_a_scheduler_s_configuration_leaves_out_can_be_said(copied_lively):
    """diffusers notes which of its options were left out, and reads no other value for them from a configuration."""
    path = copied_lively / "base" / "scheduler" / "scheduler_config.json"
    told = json.loads(path.read_text())
    for name in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing"):
        del told[name]
    path.write_text(json.dumps(told))
    model = ModelRef(base=str(copied_lively), prediction_type="v_prediction", zero_snr=True)
    pristine = load(model, CPU).base.scheduler_config
    built = schedulers.build(GenerationConfig(scheduler="ddim"), pristine, seed=1)
    assert (built.config.prediction_type, built.config.timestep_spacing) == ("v_prediction", "trailing")
    assert built.alphas_cumprod[-1] == 0


# --- which file ------------------------------------------------------------------------------------------------------


def test_a_configuration_names_its_file_by_the_checksum_and_refuses_another(files, lively_model, tmp_path):
    path = shutil.copy(files / "base.safetensors", tmp_path / "base.safetensors")
    config = GenerationConfig.for_model(str(path)).changed({"model.config": str(lively_model)})
    assert f"sha256 {config.model.sha256}" == identity(config.model)["base"]
    assert GenerationConfig.from_dict(config.to_dict()).digest == config.digest
    load(config.model, CPU)
    weights = load_file(path)
    weights["model.diffusion_model.out.2.bias"] += 1
    original.written(weights, path)
    with pytest.raises(
        ModelError, match=rf"of the sha256 {config.model.sha256}; received '.*base\.safetensors', which"
    ):
        load(config.model, CPU)
    assert GenerationConfig.for_model(str(path)).digest != GenerationConfig(model=config.model).digest


def test_the_checksum_goes_with_the_name(files, tmp_path):
    first = GenerationConfig.for_model(str(files / "base.safetensors"))
    second = first.changed({"model.base": "nano", "model.vae": str(files / "vae.safetensors")})
    assert second.model.sha256 is None, "the checksum of what is no longer named"
    assert len(second.model.vae_sha256) == 64


def test_the_identity_of_a_file_is_its_checksum_and_that_of_its_configurations(files, lively_model, tmp_path):
    shutil.copytree(lively_model, tmp_path / "model")
    named = ref(files, tmp_path / "model")
    before = identity(named)
    assert set(before) == {"base", "refiner", "config"}
    path = tmp_path / "model" / "base" / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("0.012", "0.013"))
    assert {role for role, value in identity(named).items() if value != before[role]} == {"config"}
    (tmp_path / "model" / "base" / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert {role for role, value in identity(named).items() if value != before[role]} == {"config"}, "no weights"


def test_a_png_names_the_file_as_a1111_does(files, lively_model):
    config = GenerationConfig(
        model=ref(files, lively_model, zero_snr=True).pinned(), steps=4, refiner=RefinerConfig(), width=64, height=64
    )
    from tests.made import image_record

    text = a1111_parameters(image_record(config))
    assert f"Model: base, Model hash: {config.model.sha256[:10]}" in text
    assert f"Refiner: refiner [{config.model.refiner_sha256[:10]}]" in text
    assert "Noise Schedule: Zero Terminal SNR" in text


# --- files that are refused ------------------------------------------------------------------------------------------

UNET = "model.diffusion_model."
FOREIGN = [
    (["edm_mean"], "Playground 2.5"),
    (["edm_vpred.sigma_max"], "CosXL"),
    ([f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale"], "a Flux"),
    ([f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"], "a Stable Diffusion 3"),
    (["cond_stage_model.transformer.text_model.embeddings.position_ids"], "a Stable Diffusion 1"),
    (["cond_stage_model.model.ln_final.weight"], "a Stable Diffusion 2"),
    (["lora_unet_mid_block_attentions_0_proj_in.alpha"], "a LoRA"),
    (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "a LoRA"),
    (["control_model.time_embed.0.weight"], "a ControlNet"),
    (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
    ([f"{UNET}out.2.weight.quant_state.bitsandbytes__nf4"], "a quantized model"),
    (["clip_l", "clip_g"], "an embedding"),
    (["encoder.conv_in.weight"], "a VAE alone"),
    (["conv_in.weight"], "one part in diffusers' layout"),
    (["anything"], "without unet, text_encoder, text_encoder_2, vae"),
]


@pytest.mark.parametrize(("names", "said"), FOREIGN, ids=[said for _, said in FOREIGN])
def test_another_family_is_refused_by_name(files, lively_model, tmp_path, names, said):
    path = original.written({name: torch.zeros(4, 4) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"the base model must be an SDXL in the original layout.*{said}.* Example"):
        load(ref(files, lively_model, base=str(path)), CPU)


@pytest.mark.parametrize(("channels", "said"), [(8, "edits images"), (5, "another family")])
def test_other_channels_are_refused_by_name(files, lively_model, tmp_path, channels, said):
    weights = load_file(files / "base.safetensors")
    weights[checkpoint.LATENTS] = torch.zeros(32, channels, 3, 3)
    path = original.written(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"takes 4 or 9 channels.*with {channels}: .*{said}"):
        load(ref(files, lively_model, base=str(path)), CPU)


def test_base_and_refiner_are_told_apart(files, lively_model):
    base, refiner = str(files / "base.safetensors"), str(files / "refiner.safetensors")
    with pytest.raises(ModelError, match=r"the base model must .*which holds a refiner: name it with --refiner-model"):
        load(ref(files, lively_model, base=refiner), CPU)
    with pytest.raises(ModelError, match=r"the refiner model must .*which holds a base: name it with --model"):
        load(ref(files, lively_model, refiner=base), CPU)


BROKEN = [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "the download broke off"),
    (lambda path: path.write_bytes(b"no tensors at all, but text"), "which is none"),
    (lambda path: path.write_bytes(b""), "which is none"),
    (lambda path: path.unlink(), "must be a .safetensors file that is there"),
]


@pytest.mark.parametrize(("damage", "said"), BROKEN, ids=["cut", "text", "empty", "gone"])
def test_a_broken_file_is_refused(files, lively_model, tmp_path, damage, said):
    path = Path(shutil.copy(files / "base.safetensors", tmp_path / "model.safetensors"))
    damage(path)
    with pytest.raises(ModelError, match=said):
        load(ref(files, lively_model, base=str(path)), CPU)


@pytest.mark.parametrize(
    "lacking",
    [
        f"{UNET}middle_block.1.proj_in.weight",
        "first_stage_model.decoder.conv_out.weight",
        "conditioner.embedders.1.model.ln_final.bias",
    ],
)
def test_a_file_without_one_of_its_weights_is_refused(files, lively_model, tmp_path, lacking):
    """diffusers leaves them empty without a word."""
    weights = load_file(files / "base.safetensors")
    del weights[lacking]
    path = original.written(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"the base model must be|a single-file model must have all weights"):
        load(ref(files, lively_model, base=str(path)), CPU)


def test_a_file_of_another_shape_is_refused(files):
    """nano's weights do not fit SDXL's own configurations, which are taken where none are named."""
    with pytest.raises(ModelError, match=r"the base model must be a complete SDXL checkpoint.*shape"):
        load(ModelRef(base=str(files / "base.safetensors")), CPU)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(files, lively_model, tmp_path, ending):
    path = tmp_path / f"model{ending}"
    torch.save({"state_dict": load_file(files / "base.safetensors"), "epoch": 3}, path)
    with pytest.raises(ModelError, match="since loading a pickle runs whatever code it holds") as caught:
        load(ref(files, lively_model, base=str(path)), CPU)
    command = str(caught.value).partition("Convert it, without running any: ")[2].rpartition(". Example: ")[0]
    words = shlex.split(command)
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:]], check=True, cwd=tmp_path)
    load(ref(files, lively_model, base=str(path.with_suffix(".safetensors"))), CPU)


def test_configurations_without_a_file_are_refused_since_nobody_would_read_them(lively_model):
    with pytest.raises(ModelError, match="config must be left out where neither base, refiner nor vae is a single"):
        load(ModelRef(base=str(lively_model), config="nano"), CPU)


# --- what is SDXL's own ----------------------------------------------------------------------------------------------


def test_sdxl_s_configurations_are_those_of_the_published_models():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def count(module: Any) -> int:
        return sum(weight.numel() for weight in module.parameters())

    with torch.device("meta"):
        base, refiner = (
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL / role, subfolder="unet"))
            for role in ("base", "refiner")
        )
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(SDXL / "base", subfolder="vae"))
        first = CLIPTextModel(CLIPTextConfig.from_pretrained(SDXL / "base" / "text_encoder"))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(SDXL / "base" / "text_encoder_2"))
    counts = [count(part) for part in (base, vae, first, second)]
    assert counts == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert refiner.add_embedding.linear_1.in_features == 1280 + 5 * 256
    assert 2.2e9 < count(refiner) < 2.4e9  # Podell et al. 2023 name 2.3 B


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub client's cache, in which nothing is, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_tokenizers_are_those_of_sdxl_s_own_revision(hub_cache, tmp_path):
    sdxl = MODELS["sdxl"]
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(NANO / "base" / name, tmp_path / "files" / name)
    blob = cached(tmp_path / "files", hub_cache, sdxl.base, str(sdxl.revision))
    found = single_file.tokenizers()
    assert list(found) == ["tokenizer", "tokenizer_2"]
    for name, tokenizer in found.items():
        assert tokenizer("a cat").input_ids == CLIPTokenizer.from_pretrained(NANO / "base" / name)("a cat").input_ids
    blob.write_bytes(blob.read_bytes() + b" ")
    with pytest.raises(ModelError, match="must be those of its revision"):
        single_file.tokenizers()


def test_a_file_without_tokenizers_is_refused_where_the_hub_cannot_be_asked(hub_cache):
    with pytest.raises(ModelError, match=r"must have tokenizers beside it.*the hub says.*Example: model\.config = "):
        single_file.tokenizers()
