"""What a client's prompt may name: the LoRAs that the slot offers, within their limits."""

import pytest

from sdxl_lab.config import ConfigError, GenerationConfig, OfferedLora, ServingLimits
from sdxl_lab.job import ImageRequest
from sdxl_lab.record import ImageRecord
from service.api.schemas import GenerateRequest, RefineRequest
from tests.made import image_record

LIMITS = ServingLimits(loras=(OfferedLora(name="ink", source="a/ink.safetensors", weight=(0.2, 0.8)),))
SLOT = GenerationConfig(prompt_syntax="a1111")


def asked(prompt: str, config: GenerationConfig = SLOT, **more: object) -> ImageRequest:
    request = GenerateRequest(prompt=prompt, **more)
    return ImageRequest(request.over(config, LIMITS), prompt, 1, prompt_2=request.prompt_2)


def weights(request: ImageRequest) -> list[tuple[str, float, float]]:
    return [(ref.name, ref.weight, ref.text_weight) for ref in request.loras]


def test_a_prompt_names_an_offered_lora_and_its_weights():
    assert weights(asked("a cat")) == []
    assert weights(asked("a <lora:ink:0.5> cat")) == [("ink", 0.5, 0.5)]
    assert weights(asked("a <lora:ink:0.3:0.6> cat")) == [("ink", 0.6, 0.3)]
    assert weights(asked("a cat", prompt_2="a <lora:ink:0.5> dog")) == [("ink", 0.5, 0.5)]
    assert weights(asked("a <lora:ink:0.5> cat", loras=[{"name": "ink", "weight": 0.7}])) == [("ink", 0.5, 0.5)]


def test_in_the_plain_syntax_a_name_is_text():
    assert weights(asked("a <lora:pen:9> cat", GenerationConfig())) == []


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a <lora:ink:0.9> cat", "weight must be a number from 0.2 to 0.8"),
        ("a <lora:ink:0.1:0.5> cat", "weight must be a number from 0.2 to 0.8"),
        ("a <lora:ink> cat", "weight must be a number from 0.2 to 0.8"),
        ("a <lora:pen:0.5> cat", "one that is offered here: ink"),
        ("a <lora:ink:much> cat", "prompt must be without adapters"),
    ],
)
def test_what_is_not_offered_is_refused(prompt, said):
    with pytest.raises(ConfigError, match=said):
        asked(prompt)


def refined(
    source: ImageRecord, promoted: GenerationConfig, **more: object
) -> tuple[GenerationConfig, dict[str, object]]:
    request = RefineRequest(id="x", **more)
    return request.over(promoted, LIMITS, source, (256, 256)), request.prompts(source)


def test_a_stored_prompt_is_read_as_it_was_written():
    drawn = asked("a <lora:ink:0.5> (cat:1.2)")
    source = image_record(drawn.config, prompt=drawn.prompt)
    config, said = refined(source, GenerationConfig())
    assert (config.prompt_syntax, config.loras, said) == (
        "a1111",
        drawn.config.loras,
        {"prompt": drawn.prompt, "prompt_2": None},
    )
    config, said = refined(source, GenerationConfig(), prompt="a (dog)")
    assert (config.prompt_syntax, config.loras, said["prompt"]) == ("plain", (), "a (dog)")
    config, _ = refined(source, SLOT, prompt="a <lora:ink:0.7>")
    assert [ref.weight for ref in config.loras] == [0.7]
