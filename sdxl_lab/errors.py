"""What can go wrong with an image after its request was found valid. Needs neither torch nor the models' libraries.

`ConfigError` (a value breaks a rule) stands in `sdxl_lab/config.py`, `ImageError` in `sdxl_lab/images.py`.
"""


class Cancelled(Exception):
    """The image was cancelled before it was finished."""


class EngineStopped(RuntimeError):
    """The engine is closed, or its thread has failed; `__cause__` says why."""


class QueueFull(RuntimeError):
    """The engine's queue has as many waiting images as it takes."""


class ModelMismatch(ValueError):
    """A request is for other models than those that would draw it. `field`, `received` and `rule` say which."""

    def __init__(self, received: object, rule: str, example: object) -> None:
        super().__init__(f"model must be {rule}; received {received!r}. Example: model = {example!r}")
        self.field, self.received, self.rule = "model", received, rule
