"""What can go wrong with a job of the service, beside what the library and the store raise."""

from sdxl_lab.errors import Cancelled


class KeyReused(ValueError):
    """An idempotency key comes again with another request."""

    def __init__(self) -> None:
        super().__init__("this Idempotency-Key came before with another request; each request takes a key of its own")


class AlreadyOver(RuntimeError):
    """A job is to be cancelled that is done, failed or cancelled."""


class NotOver(RuntimeError):
    """An image is to be deleted that is in the making."""


class StillRunning(LookupError):
    """An image is asked for that is in the making, for so many more `seconds`, where that is known."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class CancelledByClient(Cancelled):
    """Somebody cancelled the job through its id, unless the message says otherwise."""

    def __init__(self, message: str = "the image was cancelled by DELETE /jobs") -> None:
        super().__init__(message)
