"""LoRAs: every layout gives one adapter, what does not fit is refused by its key, and rows are mixed as they should be.

That the images are diffusers' own stands in test_denoising.py.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from safetensors.torch import load_file, save_file
from torch import nn

from sdxl_lab.config import GenerationConfig, LoraRef
from sdxl_lab.diffusion import adapters
from sdxl_lab.diffusion.adapters import Loras, MixedLinear, Run, changed
from sdxl_lab.diffusion.graphs import Graphed
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.diffusion.lora_files import identities, pinned
from sdxl_lab.job import ImageRequest
from tests.loras import UNET, pairs, write

BUDGET = 1 << 30
ATTENTIONS = r".*attn[12]\.(to_[qkv]|to_out\.0)"


@pytest.fixture(scope="module")
def loras(tiny_models: Any) -> Loras:
    return Loras(tiny_models.base, BUDGET)


def loaded(loras: Loras, path: Path) -> adapters.Adapter:
    found = loras.applied([LoraRef(source=str(path))])
    assert found.in_unet is not None
    return found.in_unet


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["kohya", "sgm", "diffusers", "old diffusers", "peft"])
def test_every_layout_is_the_same_adapter(loras: Loras, tiny_models: Any, tmp_path: Path, layout: str) -> None:
    made = pairs(tiny_models, unet=ATTENTIONS if layout == "sgm" else UNET)
    adapter = loaded(loras, write(tmp_path / f"{layout}.safetensors", made, layout))
    assert {part: set(layers) for part, layers in adapter.parts.items()} == {
        part: set(layers) for part, layers in made.items()
    }
    for part, layers in made.items():
        for name, (down, up) in layers.items():
            found = adapter.parts[part][name]
            assert torch.equal(found.down, down), name
            assert torch.equal(found.up, up), name


@pytest.mark.parametrize(("layout", "scale"), [("kohya", 0.5), ("peft", 0.5), ("diffusers", 1.0)])
def test_the_alpha_is_over_the_rank(loras: Loras, tiny_models: Any, tmp_path: Path, layout: str, scale: float) -> None:
    made = pairs(tiny_models)
    adapter = loaded(loras, write(tmp_path / "half.safetensors", made, layout, alpha=2.0))
    for part, layers in made.items():
        for name, (_, up) in layers.items():
            assert torch.allclose(adapter.parts[part][name].up, scale * up), name


def test_what_peft_saves_itself_is_read_with_its_configuration(loras: Loras, tiny_models: Any, tmp_path: Path) -> None:
    made = pairs(tiny_models, text=False)
    path = write(tmp_path / "adapter_model.safetensors", made, "peft")
    tensors = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"must have its adapter_config\.json beside it"):
        loaded(loras, path)
    from peft import LoraConfig

    LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]).save_pretrained(tmp_path)
    adapter = loaded(loras, path)
    for name, (_, up) in made["unet"].items():
        assert torch.allclose(adapter.parts["unet"][name].up, 2 * up)


MID = "lora_unet_mid_block_attentions_0_proj_in"


def _renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def _without(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    return change


def _with(key: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: tensor})


REFUSED = {
    "a layer of another base": (
        _renamed(MID, "lora_unet_mid_block_attentions_7_proj_in"),
        "lora_unet_mid_block_attentions_7_proj_in",
    ),
    "a part of another base": (_renamed("lora_unet_mid", "lora_te3_mid"), "lora_te3_mid"),
    "an input of another width": (
        _with(f"{MID}.lora_down.weight", torch.zeros(4, 320)),
        f"{MID}.lora_down.weight",
    ),
    "an output of another width": (_with(f"{MID}.lora_up.weight", torch.zeros(320, 4)), f"{MID}.lora_up.weight"),
    "ranks that do not agree": (_with(f"{MID}.lora_up.weight", torch.zeros(128, 8)), f"{MID}.lora_up.weight"),
    "half a pair": (_without(f"{MID}.lora_up.weight"), f"{MID}.lora_up"),
    "DoRA": (_with(f"{MID}.dora_scale", torch.zeros(1)), f"{MID}.dora_scale"),
    "LoHa": (_with(f"{MID}.hada_w1_a", torch.zeros(1)), f"{MID}.hada_w1_a"),
    "LoKr": (_with(f"{MID}.lokr_w1", torch.zeros(1)), f"{MID}.lokr_w1"),
    "a core": (_with(f"{MID}.lora_mid.weight", torch.zeros(1)), f"{MID}.lora_mid.weight"),
    "a whole difference": (_with(f"{MID}.diff", torch.zeros(1)), f"{MID}.diff"),
    "nothing": (dict.clear, "at least one layer"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_its_key(
    loras: Loras, tiny_models: Any, tmp_path: Path, change: Any, said: str
) -> None:
    path = write(tmp_path / "bad.safetensors", pairs(tiny_models, text=False))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        loaded(loras, path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "Example: " in str(caught.value)


def test_a_damaged_file_a_pickle_and_a_missing_one_are_refused(loras: Loras, tiny_models: Any, tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", pairs(tiny_models))
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    torch.save({"a": torch.zeros(1)}, tmp_path / "disguised.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pt")
    for name, said in {
        "cut.safetensors": "must be a whole .safetensors file",
        "disguised.safetensors": "or a pickle under another name",
        "pickle.pt": "a pickle may run any code",
        "missing.safetensors": "which is not there",
    }.items():
        with pytest.raises(ModelError, match=said):
            loaded(loras, tmp_path / name)


def test_a_folder_is_its_one_file_or_the_one_that_is_named(loras: Loras, tiny_models: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", pairs(tiny_models, text=False))
    assert loras.applied([LoraRef(source=str(tmp_path))]).unet
    write(tmp_path / "b.safetensors", pairs(tiny_models, text=False, seed=1))
    with pytest.raises(ModelError, match="which holds 2"):
        loras.applied([LoraRef(source=str(tmp_path))])
    assert loras.applied([LoraRef(source=str(tmp_path), file="b.safetensors")]).unet


def test_a_file_is_the_one_that_was_tuned_with(tiny_models: Any, tmp_path: Path) -> None:
    loras = Loras(tiny_models.base, BUDGET)
    path = write(tmp_path / "a.safetensors", pairs(tiny_models, text=False))
    config = pinned(GenerationConfig(loras=[str(path)]))
    (ref,) = config.loras
    assert identities([ref, ref]) == {"lora a": f"sha256 {ref.sha256}", "lora a 2": f"sha256 {ref.sha256}"}
    moved = tmp_path / "elsewhere" / "a.safetensors"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    assert config.with_(loras=[ref.with_(source=str(moved))]).digest == config.digest
    write(path, pairs(tiny_models, text=False, seed=1))
    with pytest.raises(
        ModelError, match=f"must be the file that the configuration names, with the sha256 {ref.sha256}"
    ):
        loras.applied([ref])


# --- kept ------------------------------------------------------------------------------------------------------------


def test_a_lora_is_read_once_and_the_one_used_longest_ago_goes_first(tiny_models: Any, tmp_path: Path) -> None:
    refs = [
        LoraRef(source=str(write(tmp_path / f"{seed}.safetensors", pairs(tiny_models, text=False, seed=seed))))
        for seed in range(3)
    ]
    size = loaded(Loras(tiny_models.base, BUDGET), tmp_path / "0.safetensors").size
    loras = Loras(tiny_models.base, 2 * size)
    for ref in (refs[0], refs[1], refs[0]):
        loras.applied([ref])
    assert loras.loads == 2
    held = loras.applied([refs[0]])
    loras.applied([refs[2]])  # the second one goes
    assert loras.size <= loras.budget
    loras.applied([refs[0]])
    assert loras.loads == 3
    loras.applied([refs[1]])
    assert loras.loads == 4
    assert held.in_unet is not None, "an image under way keeps its own"


# --- mixed -----------------------------------------------------------------------------------------------------------


def test_each_row_gets_its_own_and_the_layer_is_what_it_was_afterwards() -> None:
    layer, other = nn.Linear(6, 5), nn.Conv2d(3, 4, 3, stride=2, padding=1)
    holder = nn.ModuleDict({"one": layer, "two": other})
    draw = torch.Generator().manual_seed(0)
    a = adapters.Adapter({"unet": {"one": _layer(layer, 2, draw), "two": _layer(other, 2, draw)}})
    b = adapters.Adapter({"unet": {"one": _layer(layer, 3, draw)}})
    both = adapters.stacked([a, b])
    runs = [Run(1, 3, ("a",), a, [(0.5,), (1.0,)]), Run(3, 4, ("a", "b"), both, [(1.0, -2.0)])]
    x, image = torch.randn(4, 7, 6, generator=draw), torch.randn(4, 3, 9, 9, generator=draw)
    plain, plain_image = layer(x), other(image)
    with torch.no_grad(), changed(holder, "unet", runs):
        assert type(layer) is MixedLinear
        found, found_image = layer(x), other(image)
        flat = layer(x[:, 0])
    assert (type(layer), type(other)) == (nn.Linear, nn.Conv2d)
    assert "shares" not in layer.__dict__
    assert torch.equal(layer(x), plain)
    down, up, _ = a.parts["unet"]["one"]
    more, much, _ = b.parts["unet"]["one"]
    for row, (weight, second) in enumerate([(0, 0), (0.5, 0), (1, 0), (1, -2)]):
        delta = weight * x[row] @ down.T @ up.T + second * x[row] @ more.T @ much.T
        assert torch.allclose(found[row], plain[row] + delta, atol=1e-5), row
        assert torch.allclose(flat[row], (plain[row] + delta)[0], atol=1e-5), row
        down2, up2, _ = a.parts["unet"]["two"]
        kernel = torch.einsum("or,rihw->oihw", up2[:, :, 0, 0], down2)
        whole = nn.functional.conv2d(image[row : row + 1], other.weight + weight * kernel, other.bias, 2, 1)
        assert torch.allclose(found_image[row : row + 1], whole, atol=1e-5), row
    assert torch.equal(found[0], plain[0]), "a row without a LoRA is what it was"
    assert torch.equal(found_image[0], plain_image[0])


def _layer(layer: Any, rank: int, draw: torch.Generator) -> adapters.Layer:
    out, *inner = layer.weight.shape
    up = (out, rank, *[1] * (layer.weight.ndim - 2))
    return adapters.Layer(torch.randn(rank, *inner, generator=draw), torch.randn(up, generator=draw) * 0.3, (rank,))


def test_the_layers_come_back_where_the_call_fails() -> None:
    layer = nn.Linear(6, 5)
    adapter = adapters.Adapter({"unet": {"one": _layer(layer, 2, torch.Generator())}})
    with (
        pytest.raises(RuntimeError),
        changed(nn.ModuleDict({"one": layer}), "unet", [Run(0, 1, ("a",), adapter, [(1.0,)])]),
    ):
        layer(torch.zeros(1, 7))
    assert type(layer) is nn.Linear


def test_fused_projections_are_changed_like_their_parts() -> None:
    torch.manual_seed(0)
    attn = Attention(16, cross_attention_dim=None, heads=2, dim_head=8).eval()
    cross = Attention(16, cross_attention_dim=12, heads=2, dim_head=8).eval()
    holder = nn.ModuleDict({"attn": attn, "cross": cross})
    draw = torch.Generator().manual_seed(0)
    adapter = adapters.Adapter(
        {
            "unet": {
                f"{name}.{projection}": _layer(getattr(each, projection), 2, draw)
                for name, each in (("attn", attn), ("cross", cross))
                for projection in ("to_q", "to_k", "to_v")
            }
        }
    )
    x, context = torch.randn(2, 5, 16, generator=draw), torch.randn(2, 3, 12, generator=draw)
    runs = [Run(1, 2, ("a",), adapter, [(0.7,)])]

    def answers() -> list[torch.Tensor]:
        with torch.no_grad(), changed(holder, "unet", runs):
            return [attn(x), cross(x, context)]

    apart = answers()
    for each in (attn, cross):
        each.fuse_projections()
        each.set_processor(FusedAttnProcessor2_0())
    holder.__dict__.pop("lora_targets")
    for one, other in zip(apart, answers(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_layer_whose_forward_a_hook_replaced_is_refused() -> None:
    layer = nn.Linear(6, 5)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    adapter = adapters.Adapter({"unet": {"one": _layer(layer, 2, torch.Generator())}})
    with (
        pytest.raises(ModelError, match="must have its class's own forward"),
        changed(nn.ModuleDict({"one": layer}), "unet", [Run(0, 1, ("a",), adapter, [(1.0,)])]),
    ):
        pass


def test_a_bare_call_passes_over_graphs_and_compiled_code_but_not_over_hooks() -> None:
    layer = nn.Linear(2, 2)
    layer._compiled_call_impl = lambda *_: pytest.fail("compiled code is called")
    layer.register_forward_pre_hook(lambda _, given: (given[0] + 1,))
    expected = layer.forward(torch.ones(1, 2))
    for wrapped in (layer, Graphed(layer)):
        assert torch.equal(adapters.bare(wrapped)(torch.zeros(1, 2)), expected)


# --- in the engine ---------------------------------------------------------------------------------------------------


def test_images_with_and_without_loras_share_their_calls(
    engine: Any, tiny_config: GenerationConfig, tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = str(write(tmp_path / "one.safetensors", pairs(tiny_models)))
    two = str(write(tmp_path / "two.safetensors", pairs(tiny_models, seed=1), "peft"))
    counted = []
    predict = engine._predict
    monkeypatch.setattr(
        engine, "_predict", lambda name, inputs, *more: counted.append(len(inputs)) or predict(name, inputs, *more)
    )
    configs = [
        tiny_config.with_(loras=refs) for refs in ([], [f"{one}:0.5"], [two], [one, f"{two}:-0.3"], [f"{one}:0"])
    ]
    jobs = [engine.submit(ImageRequest(config, "a ring", 5)) for config in configs]
    images = [job.result(60) for job in jobs]
    assert max(counted) >= 4, "at the latest with its second call every image shares"
    pixels = [image.image.tobytes() for image in images]
    assert pixels[0] == pixels[4]
    assert len(set(pixels)) == 4
    assert images[3].record.weights == engine.weights | identities(configs[3].loras)
    assert type(tiny_models.base.unet.mid_block.attentions[0].proj_in) is nn.Linear


def test_an_embedding_is_kept_under_the_loras_of_the_text_encoders(
    engine: Any, tiny_config: GenerationConfig, tiny_models: Any, tmp_path: Path
) -> None:
    path = str(write(tmp_path / "one.safetensors", pairs(tiny_models)))
    for word in ("", ":1:0", ":0.5:0.5", ":1:0.5"):
        engine.draw(ImageRequest(tiny_config.with_(loras=[path + word]), "a boat", 5))
    engine.draw(ImageRequest(tiny_config, "a boat", 5))
    kept = {key[3] for key in engine._embeddings if key[0] == "base" and key[1].text == "a boat"}
    assert sorted(weight for key in kept for _, weight in key) == [0.5, 1.0]
    assert len(kept) == 3, "the weight 0 and no LoRA are one"


def test_a_lora_that_cannot_be_read_fails_its_own_image(
    engine: Any, tiny_config: GenerationConfig, tmp_path: Path
) -> None:
    bad = engine.submit(ImageRequest(tiny_config.with_(loras=[str(tmp_path / "gone.safetensors")]), "a ring", 5))
    good = engine.submit(ImageRequest(tiny_config, "a ring", 5))
    assert good.result(60).image
    with pytest.raises(ModelError, match="which is not there"):
        bad.result(60)
