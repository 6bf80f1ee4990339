"""LoRAs (Hu et al. 2021, arXiv 2106.09685): files to low-rank changes of layers, mixed row by row in a UNet call.

A LoRA changes a layer from Wx to Wx + w B A x. Here W is never touched. While a call runs, the layers that some row
changes have another `forward`, which adds each row's own B A x with its own weight; a row without a LoRA pays nothing,
and a call without one is exactly what it was. Rows with the same LoRAs, whatever the weights, lie side by side and
share two small products: that of all their A's, one below the other, and that of all their B's, side by side.

Keys come as kohya's trainer, diffusers and PEFT write them. diffusers' own loader makes one layout of them, and PEFT's
configuration in a file says how its weights are scaled.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import Attention
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional

from sdxl_lab.checksums import sha256_of
from sdxl_lab.config import LoraRef
from sdxl_lab.diffusion.graphs import Graphed
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.diffusion.lora_files import PEFT_CONFIG, identities, identity_of, local_file

log = logging.getLogger(__name__)

METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration in a file's header
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
PEFT_PREFIX = "base_model.model."  # of what PEFT itself saves, which is a UNet's here
PARTS = ("unet", "text_encoder", "text_encoder_2")
# Parts of keys that other kinds of adapters have. Their change of a layer is no B A, or not only that.
FOREIGN = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon with a core (CP decomposition)",
    "lora_embedding": "an embedding's LoRA",
    ".bias": "a bias",
}


class Layer(NamedTuple):
    """The change of one layer: `down` (rank, in) and `up` (out, rank), with a convolution's further axes, and the alpha
    already in `up`. `ranks` says how the rank is made up of the LoRAs that are stacked here."""

    down: torch.Tensor
    up: torch.Tensor
    ranks: tuple[int, ...]


Layers = Mapping[str, Layer]  # by the layer's name in its part


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA, or several stacked, on the device: the layers of each part that it changes."""

    parts: Mapping[str, Layers]

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layers in self.parts.values()
            for layer in layers.values()
            for tensor in (layer.down, layer.up)
        )


Weighted = tuple[tuple[str, float], ...]  # what identifies a LoRA, with its weight


@dataclass(frozen=True)
class Applied:
    """The LoRAs of an image: how much of which it has in the UNet and in the text encoders, and the adapters that are
    all of these together. Those of weight 0 are left out. `weights` is for the image's record."""

    unet: Weighted = ()
    text: Weighted = ()
    in_unet: Adapter | None = None
    in_text: Adapter | None = None
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[str, ...]:
        """What puts images with the same LoRAs side by side."""
        return tuple(name for name, _ in self.unet)


NONE = Applied()


# --- from a file -----------------------------------------------------------------------------------------------------


def file_of(ref: LoraRef) -> Path:
    """The LoRA's file, from the hub if it is one of it, checked against its sha256. Raises `ModelError`."""
    path = local_file(ref)
    if path is None:
        try:
            path = Path(hf_hub_download(ref.source, str(ref.file), revision=ref.revision))
        except Exception as error:  # the hub client raises kinds of its own
            raise ModelError(
                f"a LoRA must be a file of the hub at its commit; received {ref.word!r}: {type(error).__name__}: "
                f"{' '.join(str(error).split())}. Example: org/name@COMMIT/pytorch_lora_weights.safetensors"
            ) from error
        blob = path.resolve().name
        expected = ref.sha256 or (blob if len(blob) == 64 else None)
        if expected is not None and sha256_of(path) != expected:
            raise ModelError(
                f"the LoRA {ref.name} must have the sha256 {expected}; received {str(path)!r} with {sha256_of(path)}. "
                "Remove it to load it again. Example: an untouched download"
            )
    else:
        identity_of(ref)
    return path


class Read(NamedTuple):
    """A LoRA's tensors in PEFT's names by part, and the key that each had in the file."""

    parts: dict[str, dict[str, torch.Tensor]]
    keys: dict[int, str]  # by the tensor's id
    alphas: dict[str, float]  # by the key of the A
    configs: dict[str, Any]  # PEFT's LoraConfig by part


def read(path: Path, unet_config: Any) -> Read:
    """A LoRA's file, in whichever layout. Raises `ModelError` where it is damaged or of another kind."""
    tensors, metadata = _opened(path)
    for key in tensors:
        for mark, kind in FOREIGN.items():
            if mark in key:
                raise _refused(path, key, f"of a LoRA's A, B or alpha, not of {kind}")
    kohya = [key.startswith(KOHYA) for key in tensors]
    if any(kohya) and not all(kohya):
        raise _refused(path, next(key for key in tensors if not key.startswith(KOHYA)), f"of {', '.join(KOHYA)}")
    if any(key.startswith(PEFT_PREFIX) for key in tensors):
        tensors = {key.replace(PEFT_PREFIX, "unet.", 1): tensor for key, tensor in tensors.items()}
        metadata = {"unet": _beside(path)}
    keys = {id(tensor): key for key, tensor in tensors.items()}
    alphas = {
        key.replace(".alpha", ".lora_down.weight"): float(tensor)
        for key, tensor in tensors.items()
        if key.endswith(".alpha") and tensor.numel() == 1
    }
    try:
        state, _ = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=unet_config)
    except Exception as error:  # diffusers raises ValueError, KeyError, IndexError, as the key is foreign
        raise ModelError(
            f"the LoRA {str(path)!r} must have the keys that kohya, diffusers or PEFT write for SDXL; diffusers' "
            f"loader says {type(error).__name__}: {' '.join(str(error).split())[:300]}. Example: "
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
        ) from error
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in PARTS}
    for key, tensor in state.items():
        part, dot, rest = key.partition(".")
        if part not in parts or not dot:
            raise _refused(path, keys.get(id(tensor), key), "of SDXL's UNet or one of its text encoders")
        parts[part][rest] = tensor
    for part in PARTS:
        parts[part] = _in_pefts_names(part, parts[part])
    return Read(parts, keys, alphas, {part: _config(path, options) for part, options in metadata.items()})


def _config(path: Path, options: Mapping[str, Any]) -> Any:
    """PEFT's configuration of a part, which says how its weights are scaled."""
    from peft import LoraConfig  # takes a second to import: only for files that have one

    try:
        return LoraConfig(**options)
    except TypeError as error:
        raise ModelError(
            f"the LoRA {str(path)!r} must have options that PEFT's LoraConfig takes; received some that it does not: "
            f"{error}. Example: r, lora_alpha, target_modules"
        ) from error


def _opened(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """A file's tensors, and PEFT's options by part where its header has them."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            header = json.loads((file.metadata() or {}).get(METADATA) or "{}")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"the LoRA {str(path)!r} must be a whole .safetensors file; it is damaged or a pickle under another name: "
            f"{type(error).__name__}: {' '.join(str(error).split())}. Example: the file as it was downloaded"
        ) from error
    if not tensors:
        raise ModelError(f"the LoRA {str(path)!r} must have at least one layer; received none. Example: nano/neon")
    options: dict[str, dict[str, Any]] = {}
    for name, value in header.items():
        part, _, option = name.partition(".")
        options.setdefault(part, {})[option] = value
    return tensors, options


def _beside(path: Path) -> dict[str, Any]:
    """PEFT's options, which stand in a file beside its weights."""
    config = path.with_name(PEFT_CONFIG)
    if not config.is_file():
        raise ModelError(
            f"a LoRA that PEFT saved must have its {PEFT_CONFIG} beside it, which has its alpha; received "
            f"{str(path)!r} without one. Example: the whole folder that save_pretrained wrote"
        )
    try:
        options = dict(json.loads(config.read_text()))
        kind = options.pop("peft_type", "LORA")
    except (ValueError, TypeError) as error:
        raise ModelError(f"{str(config)!r} must be PEFT's configuration: {error}. Example: what PEFT wrote") from error
    if kind != "LORA":
        raise ModelError(f"{str(config)!r} must be of a LoRA; received peft_type {kind!r}. Example: LORA")
    kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
    return {name: options[name] for name in kept if name in options}


def _in_pefts_names(part: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not state or all(".lora_A." in key or ".lora_B." in key for key in state):
        return _flat(state)
    if part == "unet":
        return dict(convert_unet_state_dict_to_peft(state))
    return _flat(convert_state_dict_to_peft(convert_state_dict_to_diffusers(state)))


def _flat(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP's text model has lost a level of its names; files still have it."""
    return {key.removeprefix("text_model."): tensor for key, tensor in state.items()}


def _refused(path: Path, key: str, rule: str) -> ModelError:
    return ModelError(
        f"every key of the LoRA {str(path)!r} must be one {rule}; received {key!r}. Example: "
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    )


def fitted(found: Read, path: Path, modules: Mapping[str, nn.Module | None], names: Mapping[str, str]) -> Adapter:
    """The adapter for these parts of a model, on their devices and in their dtypes. `names` is what an error says of
    each part. Raises `ModelError` for the first key that does not fit."""
    parts: dict[str, Layers] = {}
    for part, state in found.parts.items():
        if not state:
            continue
        module = modules.get(part)
        if module is None:
            raise _refused(path, found.keys[id(next(iter(state.values())))], "of a part that the model has")
        known = {_clean(name): layer for name, layer in module.named_modules()}
        parts[part] = {
            name: _layer(found, path, part, name, known.get(name), names[part])
            for name in dict.fromkeys(key.partition(".lora_")[0] for key in state)
        }
    return Adapter(parts)


def _clean(name: str) -> str:
    return name.removeprefix("text_model.")


def _layer(found: Read, path: Path, part: str, name: str, target: nn.Module | None, of: str) -> Layer:
    state = found.parts[part]
    pair = [state.get(f"{name}.lora_{side}.weight") for side in "AB"]
    present = next((each for each in pair if each is not None), None)
    if present is None:
        present = next(tensor for key, tensor in state.items() if key.partition(".lora_")[0] == name)
    key = found.keys.get(id(present), f"{part}.{name}")
    if not isinstance(target, nn.Linear | nn.Conv2d):
        raise _refused(path, key, f"of a linear layer or convolution of {of}, which has no {name}")
    down, up = pair
    if down is None or up is None:
        lacking = "A (down)" if down is None else "B (up)"
        raise _refused(path, key, f"of a pair; it lacks the {lacking}")
    rank = down.shape[0] if down.ndim else 0
    wanted_down = (rank, *target.weight.shape[1:])
    wanted_up = (target.weight.shape[0], rank, *([1] * (target.weight.ndim - 2)))
    for tensor, wanted in ((down, wanted_down), (up, wanted_up)):
        # kohya writes a linear layer that was a 1x1 convolution once as one.
        if tuple(tensor.shape) != wanted and tuple(tensor.shape) != (*wanted, 1, 1):
            raise _refused(
                path,
                found.keys.get(id(tensor), key),
                f"whose shape fits {name} of {of}, {wanted}; this has {tuple(tensor.shape)}",
            )
    scale = _scale(found, part, name, found.keys.get(id(down), ""), rank)
    weight = target.weight
    return Layer(
        down.reshape(wanted_down).to(weight.device, weight.dtype).contiguous(),
        (up.reshape(wanted_up).float() * scale).to(weight.device, weight.dtype).contiguous(),
        (rank,),
    )


def _scale(found: Read, part: str, name: str, key: str, rank: int) -> float:
    """What B A is multiplied by: kohya's alpha for the layer over the rank; with PEFT's options, theirs; else 1."""
    if key in found.alphas:
        return found.alphas[key] / rank
    config = found.configs.get(part)
    if config is None:
        return 1.0
    from peft.utils.other import get_pattern_key

    pattern: dict[str, float] = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), name), float(config.lora_alpha))
    return float(alpha) / (rank**0.5 if config.use_rslora else rank)


def stacked(adapters: Sequence[Adapter]) -> Adapter:
    """Several LoRAs as one: their A's one below the other, their B's side by side."""
    if len(adapters) == 1:
        return adapters[0]
    parts: dict[str, Layers] = {}
    for part in PARTS:
        names = dict.fromkeys(name for adapter in adapters for name in adapter.parts.get(part, ()))
        layers = {}
        for name in names:
            each = [adapter.parts.get(part, {}).get(name) for adapter in adapters]
            there = [layer for layer in each if layer is not None]
            layers[name] = Layer(
                torch.cat([layer.down for layer in there]),
                torch.cat([layer.up for layer in there], 1),
                tuple(0 if layer is None else layer.ranks[0] for layer in each),
            )
        if layers:
            parts[part] = layers
    return Adapter(parts)


# --- in a call -------------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """What some rows of a call, `low` to before `high`, get from a layer's change: `weights` (rows, rank) multiplies
    what comes out of `down`. `offset` is where its outputs begin in a layer that several projections share."""

    low: int
    high: int | None
    down: torch.Tensor
    up: torch.Tensor
    weights: torch.Tensor
    offset: int


class MixedLinear(nn.Linear):
    """A linear layer while rows of a call change it, each in its own way."""

    shares: tuple[Share, ...]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = functional.linear(hidden, self.weight, self.bias)
        for low, high, down, up, weights, offset in self.shares:
            inner = functional.linear(hidden[low:high], down)
            inner *= weights if inner.ndim == 2 else weights[:, None]
            part = out[low:high].view(-1, out.shape[-1])[:, offset : offset + len(up)]
            part.addmm_(inner.flatten(0, -2), up.T)
        return out


class MixedConv(nn.Conv2d):
    """A convolution while rows of a call change it, each in its own way."""

    shares: tuple[Share, ...]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(hidden)
        for low, high, down, up, weights, _ in self.shares:
            inner = functional.conv2d(hidden[low:high], down, None, self.stride, self.padding, self.dilation)
            inner *= weights[:, :, None, None]
            out[low:high] += functional.conv2d(inner, up)
        return out


MIXED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MixedLinear, nn.Conv2d: MixedConv}


class Run(NamedTuple):
    """Rows of a call that have the same LoRAs, from `low` to before `high` (None: to the last), with each row's
    weights; one row of weights is for all of them."""

    low: int
    high: int | None
    names: tuple[str, ...]
    adapter: Adapter
    weights: Sequence[tuple[float, ...]]


@contextmanager
def changed(module: nn.Module, part: str, runs: Sequence[Run]) -> Iterator[None]:
    """The part of a model as these rows of its next call change it. One thread calls it."""
    targets = _targets(module)
    shares: dict[nn.Module, list[Share]] = {}
    for run in runs:
        layers = run.adapter.parts.get(part, {})
        spread: dict[tuple[Any, ...], torch.Tensor] = {}
        for name, layer in layers.items():
            target, offset = targets[name]
            like = (layer.ranks, layer.down.device, layer.down.dtype)
            if like not in spread:
                spread[like] = _spread(run.weights, layer)
            shares.setdefault(target, []).append(Share(run.low, run.high, layer.down, layer.up, spread[like], offset))
    try:
        for target, found in shares.items():
            if "forward" in target.__dict__:
                raise ModelError(
                    "a layer that a LoRA changes must have its class's own forward; received one that a hook replaced, "
                    "as those of offloading and layerwise casting do. Example: a model without them"
                )
            target.__dict__["shares"] = tuple(found)  # past nn.Module's own: it is no part of the model
            target.__class__ = MIXED[type(target)]
        yield
    finally:
        for target in shares:
            if type(target) in (MixedLinear, MixedConv):
                target.__class__ = type(target).__bases__[0]
            target.__dict__.pop("shares", None)


def _spread(weights: Sequence[tuple[float, ...]], layer: Layer) -> torch.Tensor:
    """Each row's weights (rows, rank), one for every direction of the LoRA it is of."""
    rows = [[weight for weight, rank in zip(row, layer.ranks, strict=True) for _ in range(rank)] for row in weights]
    return torch.tensor(rows, dtype=layer.down.dtype, device=layer.down.device)


Targets = dict[str, tuple[nn.Module, int]]


def _targets(module: nn.Module) -> Targets:
    """Every layer by its name, and where its outputs begin: the projections of an attention may be fused into one."""
    found = module.__dict__.get("lora_targets")
    if found is None:
        found = {}
        for name, each in module.named_modules():
            if type(each) in MIXED:
                found.setdefault(_clean(name), (each, 0))
        for name, each in module.named_modules():
            if isinstance(each, Attention) and each.fused_projections:
                for projection, place in _fused(each).items():
                    found[f"{name}.{projection}"] = place
        module.__dict__["lora_targets"] = found  # past nn.Module's own: it is no part of the model
    return found


def _fused(attn: Attention) -> Targets:
    query = attn.to_q.out_features
    if attn.is_cross_attention:
        return {"to_k": (attn.to_kv, 0), "to_v": (attn.to_kv, attn.to_k.out_features)}
    return {
        "to_q": (attn.to_qkv, 0),
        "to_k": (attn.to_qkv, query),
        "to_v": (attn.to_qkv, query + attn.to_k.out_features),
    }


def bare(unet: Any) -> Any:
    """What calls a UNet, with its hooks, without its graphs and its compiled code: these know its layers as they are
    without LoRAs."""
    return (unet.unet if isinstance(unet, Graphed) else unet)._call_impl


# --- what is loaded --------------------------------------------------------------------------------------------------


class Loras:
    """The LoRAs of one model: each is read once and kept while all that are kept fit into `budget` bytes; the one used
    longest ago goes first. The engine's thread uses it."""

    def __init__(self, denoiser: Any, budget: int) -> None:
        encoders = zip(("text_encoder", "text_encoder_2"), denoiser.text_encoders, strict=False)
        self.budget = budget
        self._unet = denoiser.unet.unet if isinstance(denoiser.unet, Graphed) else denoiser.unet
        self._modules = {"unet": self._unet, **dict(encoders)}
        self._names = {part: f"the model's {part.replace('_', ' ').replace('unet', 'UNet')}" for part in self._modules}
        self._cast = any("forward" in layer.__dict__ for layer in self._unet.modules())
        self._kept: OrderedDict[tuple[str, ...], Adapter] = OrderedDict()
        self.loads = 0  # files read since the start

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(adapter.size for adapter in self._kept.values())

    @property
    def kept(self) -> list[tuple[str, ...]]:
        """What is kept, the one used longest ago first: the identity of each LoRA, or of several that go together."""
        return list(self._kept)

    def applied(self, refs: Sequence[LoraRef]) -> Applied:
        """These LoRAs, loaded, as an image has them; as long as it is under way it keeps them. Raises `ModelError`."""
        if not refs:
            return NONE
        if self._cast:
            raise ModelError(
                "a LoRA must be applied to weights that are stored as they are computed with; received "
                f'{refs[0].word!r} where a hook casts them. Example: storage = "own"'
            )
        unet: dict[str, float] = {}
        text: dict[str, float] = {}
        for ref in refs:
            name = self._name(ref)
            parts = self._loaded(name, ref).parts
            if "unet" in parts:
                unet[name] = unet.get(name, 0.0) + ref.weight
            if parts.keys() - {"unet"}:
                text[name] = text.get(name, 0.0) + ref.text_weight
        of = {self._name(ref): ref for ref in refs}
        in_unet, in_text = (tuple(sorted((n, w) for n, w in each.items() if w)) for each in (unet, text))
        first, second = (self._stacked({name: of[name] for name, _ in each}) for each in (in_unet, in_text))
        return Applied(in_unet, in_text, first, second, identities(refs, self._name))

    def _name(self, ref: LoraRef) -> str:
        """What identifies it. Of one that is kept under its checksum the file is not looked at again."""
        name = f"sha256 {ref.sha256}"
        return name if (name,) in self._kept else identity_of(ref)

    def _loaded(self, name: str, ref: LoraRef) -> Adapter:
        if (name,) not in self._kept:
            path = file_of(ref)
            self._kept[(name,)] = fitted(read(path, self._unet.config), path, self._modules, self._names)
            self.loads += 1
        return self._used((name,))

    def _stacked(self, named: Mapping[str, LoraRef]) -> Adapter | None:
        names = tuple(named)
        if not names:
            return None
        if names not in self._kept:
            self._kept[names] = stacked([self._loaded(name, ref) for name, ref in named.items()])
        return self._used(names)

    def _used(self, names: tuple[str, ...]) -> Adapter:
        """What is kept under these names, now the last to go."""
        self._kept.move_to_end(names)
        while len(self._kept) > 1 and self.size > self.budget:
            gone, _ = self._kept.popitem(last=False)
            log.debug("let go of %s", ", ".join(gone))
        return self._kept[names]

    @contextmanager
    def in_unet(self, rows: Sequence[Applied]) -> Iterator[None]:
        """Around a UNet call: what each of its rows has, in their order."""
        runs: list[Run] = []
        for low, applied in enumerate(rows):
            if applied.in_unet is None:
                continue
            weights = tuple(weight for _, weight in applied.unet)
            last = runs[-1] if runs else None
            if last and last.high == low and last.names == applied.order:
                runs[-1] = last._replace(high=low + 1, weights=[*last.weights, weights])
            else:
                runs.append(Run(low, low + 1, applied.order, applied.in_unet, [weights]))
        with changed(self._unet, "unet", runs):
            yield

    @contextmanager
    def in_text(self, applied: Applied) -> Iterator[None]:
        """Around the encoding of one prompt: the text encoders as the image's LoRAs have them."""
        runs = []
        if applied.in_text is not None:
            names = tuple(name for name, _ in applied.text)
            runs = [Run(0, None, names, applied.in_text, [tuple(weight for _, weight in applied.text)])]
        with ExitStack() as stack:
            for part, module in self._modules.items():
                if part != "unet":
                    stack.enter_context(changed(module, part, runs))
            yield
