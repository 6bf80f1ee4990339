"""CUDA graphs of a UNet: its kernels are recorded once for each shape of a call, and then replayed.

Python launches the thousands of kernels of a UNet call one by one. Where a call has so few rows that the GPU is done
sooner than that, the processor decides how long a step takes. A graph launches them all at once. It reads and writes
fixed memory: each shape has buffers of its own, into which the inputs of a call are copied, and the answer is copied
out, since the next replay overwrites it. The kernels are those of the same call without a graph, and so are the pixels.

Without CUDA, or where recording failed, the UNet is called as usual.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)

# Graphs kept for one UNet: two sizes of sixteen row counts. The one used longest ago goes first.
MOST = 32

Call = Callable[[], torch.Tensor]
Replay = Callable[[], None]
# Of the tensors in `added_cond_kwargs` and `cross_attention_kwargs`, and `timestep_cond` where it is there.
Names = tuple[tuple[str, ...], ...]
# Runs a call, perhaps several times. Returns what repeats it, and the tensor in which each replay leaves its answer.
Recorder = Callable[[Call], tuple[Replay, torch.Tensor]]


class CudaRecorder:
    """Records with `torch.cuda.graph`, on a stream of its own.

    All its graphs take their memory from one pool, so that together they need little more than the largest: they must
    not be replayed at the same time, nor must an answer be read after another replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Call) -> tuple[Replay, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # The outer context gives the thread its stream back also where recording fails halfway.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            call()  # libraries set themselves up for a stream at its first call, which must not be recorded
            # Another thread that reads latents for a preview meanwhile must not spoil the recording.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                answer = call()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph.replay, answer


@dataclass(frozen=True)
class _Recording:
    """One shape's buffers and what replays its call. `inputs` has the tensors in the order of the arguments."""

    inputs: tuple[torch.Tensor, ...]
    replay: Replay
    answer: torch.Tensor


class Graphed:
    """A UNet that is called as a `Denoiser` calls its own, and replays what it has recorded for the shapes at hand.

    One thread calls it. `recorder` makes a recorder for a device; left out, CUDA's on a CUDA device and none elsewhere.
    """

    def __init__(
        self, unet: Any, recorder: Callable[[torch.device], Recorder | None] | None = None, most: int = MOST
    ) -> None:
        self.unet, self.most = unet, most
        self._recorder_for = recorder or _cuda_recorder
        self._recorder: Recorder | None = None
        self._recordings: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self._failed = False

    @property
    def config(self) -> Any:
        """The UNet's own."""
        return self.unet.config

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The latents' shapes for which something is recorded, the one used longest ago first."""
        return [tuple(recording.inputs[0].shape) for recording in self._recordings.values()]

    def clear(self) -> None:
        """Forget all recordings, and give their memory back."""
        self._recordings.clear()
        self._recorder = None  # a pool without graphs must not be recorded into again

    @torch.no_grad()
    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: Mapping[str, torch.Tensor],
        cross_attention_kwargs: Mapping[str, torch.Tensor] | None = None,
        timestep_cond: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """The UNet's answer in a tuple, as with `return_dict=False`, which is the only way here. Raises what the UNet
        raises, `torch.OutOfMemoryError` also where memory ran out while recording: all recordings are dropped then."""
        if return_dict:
            raise ValueError("return_dict must be false, since a graph returns tensors; received True. Example: False")
        cond = {} if timestep_cond is None else {"timestep_cond": timestep_cond}
        tables = (added_cond_kwargs, cross_attention_kwargs or {}, cond)
        inputs = (sample, timestep, encoder_hidden_states, *(each for table in tables for each in table.values()))
        names = tuple(tuple(table) for table in tables)
        recorder = self._recorder_of(sample.device)
        if recorder is None:
            return (self._answer(inputs, names),)
        key = (names, *((each.shape, each.dtype, each.device) for each in inputs))
        if key not in self._recordings:
            answer = self._answer(inputs, names)  # an error that these inputs cause is raised here
            recording = self._record(recorder, inputs, names)
            if recording is None:
                return (answer,)
            self._recordings[key] = recording
            if len(self._recordings) > self.most:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        for buffer, given in zip(recording.inputs, inputs, strict=True):
            buffer.copy_(given)
        recording.replay()
        return (recording.answer.clone(),)

    def _answer(self, inputs: tuple[torch.Tensor, ...], names: Names) -> torch.Tensor:
        sample, timestep, hidden, *rest = inputs
        added, attended, cond = ({name: rest.pop(0) for name in table} for table in names)
        options: dict[str, Any] = {"added_cond_kwargs": added, **cond}
        if attended:
            options["cross_attention_kwargs"] = attended
        answer: torch.Tensor = self.unet(sample, timestep, encoder_hidden_states=hidden, **options, return_dict=False)[
            0
        ]
        return answer

    def _recorder_of(self, device: torch.device) -> Recorder | None:
        if self._recorder is None and not self._failed:
            self._recorder = self._recorder_for(device)
        return None if self._failed else self._recorder

    def _record(self, recorder: Recorder, inputs: tuple[torch.Tensor, ...], names: Names) -> _Recording | None:
        """None where it cannot be done, which is then not tried again."""
        with torch.inference_mode(False):  # a buffer made in that mode could be written in it only
            buffers = tuple(torch.empty_like(each).copy_(each) for each in inputs)
        try:
            return _Recording(buffers, *recorder(lambda: self._answer(buffers, names)))
        except Exception as error:
            self.clear()
            if memory := _out_of_memory(error):
                raise memory from None
            log.warning("CUDA graphs are off, since recording the UNet failed: %s: %s", type(error).__name__, error)
            self._failed = True
            return None


def _cuda_recorder(device: torch.device) -> Recorder | None:
    return CudaRecorder(device) if device.type == "cuda" else None


def _out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The lack of memory behind an error: that of a recording which could not be ended hides it."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error
