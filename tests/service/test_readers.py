"""What other people's programs read in a downloaded PNG."""

import io

import pytest
from PIL import Image
from sd_parsers import ParserManager
from sd_parsers.data import Generators

BODY = {
    "prompt": "a red ring: small, on a white background\nand a second line, Steps: 99",
    "negative_prompt": "blue, (blurry:1.2)",
    "seed": 2**63 - 1,
    "steps": 3,
    "guidance_scale": 6.5,
}
# As A1111 has it since 1.9: the sampler, and the schedule apart from it.
SAMPLERS = {"euler": ("Euler", None), "dpmpp_2m_karras": ("DPM++ 2M", "Karras"), "unipc": ("UniPC", None)}


@pytest.mark.parametrize(("scheduler", "told"), SAMPLERS.items())
def test_sd_parsers_reads_the_a1111_text(client, scheduler, told):
    answer = client.post("/generate", json=BODY | {"scheduler": scheduler})
    with Image.open(io.BytesIO(client.get(answer.json()["url"]).content)) as png:
        read = ParserManager().parse(png)
    assert read.generator is Generators.AUTOMATIC1111
    (sampler,) = read.samplers
    assert (sampler.name, sampler.parameters.get("scheduler")) == told
    told = {"steps": "3", "cfg_scale": "6.5", "seed": str(2**63 - 1)}
    assert {key: str(sampler.parameters[key]) for key in told} == told
    assert [prompt.value for prompt in sampler.prompts] == [BODY["prompt"]]
    plain = BODY["negative_prompt"].replace("(", "\\(").replace(")", "\\)")  # where brackets are text, not weights
    assert [prompt.value for prompt in sampler.negative_prompts] == [plain]
    assert read.metadata["Size"] == "64x64"
