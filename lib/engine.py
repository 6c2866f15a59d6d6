"""Engines: what turns the rows of a micro-batch into logits. PyTorch anywhere, OpenVINO on processors, packed rows on GPUs.

PyTorch with a model's own code is the definition of right, and the way back from everything that the others cannot do. An engine
knows nothing of order or probabilities. Letters: B rows of a micro-batch, T their tokens, L its padded length, C classes.
"""

import copy
import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lib.batching import IntArray, spread
from lib.errors import say
from lib.model import logits_of
from lib.packing import PackedClassifier
from lib.quantization import GROUP_SIZE, attend_in_bf16, quantize

EngineName = Literal["torch", "packed", "openvino"]

BoolArray = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.integer]

PackedRows = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, int]
"""Ids and segments (T), offsets (B + 1), the longest row's tokens."""


class EngineError(Exception):
    """This engine cannot run here, or not this model."""


class Engine(Protocol):
    """A model, ready to be given micro-batches."""

    name: EngineName
    dtype: torch.dtype
    """what it computes in"""
    token_budget: int
    """padded tokens of one forward pass, if nobody wants another number; on GPUs the predictor finds a better one"""

    pads: bool
    """whether it computes (B, L) of a micro-batch"""

    def stage(self, ids: Numbers, lengths: IntArray, type_ids: Numbers | None) -> Any:
        """Bring rows that lie one after the other, ids and segments (T) and lengths (B), to where they are computed."""

    def forward(self, staged: Any) -> torch.Tensor:
        """Begin one forward pass over what was brought; the logits (B, C) hold nothing before `wait`."""

    def wait(self) -> None:
        """Return when all logits are there, or can be asked for like any tensor of a GPU."""


class TorchEngine:
    """The model's own code, on a GPU or a processor."""

    name: EngineName = "torch"
    pads = True

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, fill: int) -> None:
        self.device, self.dtype, self.fill = device, dtype, fill
        # On two cores MiniLM-L6 lost speed below 2,048 and gained none above 4,096: all threads share a forward pass.
        self.token_budget = 65_536 if device.type == "cuda" else 4_096
        self.model = copy.deepcopy(model).to(device, dtype)

    def stage(self, ids: Numbers, lengths: IntArray, type_ids: Numbers | None) -> list[torch.Tensor]:
        """Bring a micro-batch to where it is computed: ids, mask and, if there are any, segments (B, L)."""
        padded, mask = spread(ids, lengths, self.fill)
        inputs = [padded, mask.astype(np.int64), *([] if type_ids is None else [spread(type_ids, lengths, 0)[0]])]
        return [to_device(one, self.device) for one in inputs]

    def forward(self, staged: list[torch.Tensor]) -> torch.Tensor:
        """One forward pass: on a GPU begun, on a processor done."""
        ids, mask, *segments = staged
        with torch.inference_mode():
            return logits_of(self.model, ids, mask, segments[0] if segments else None)

    def wait(self) -> None:
        """Nothing: copying a tensor back waits for it."""


class PackedEngine:
    """PyTorch without padding: see `lib.packing`. In half precision on GPUs, where attention has kernels for it."""

    name: EngineName = "packed"
    pads = False
    token_budget = 131_072

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Raises `EngineError` if the model's rows cannot be packed."""
        self.device, self.dtype = device, dtype
        with explained("packed", "prepare"):
            self.model = PackedClassifier(model).to(device, dtype)
        if device.type == "cuda":
            self._compile()

    def _compile(self) -> None:
        try:
            self.model.compile_norms()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            said = " ".join(str(error).split())[:300]
            say(
                f"WARNING: PyTorch cannot compile on this node ({said}): scoring goes on, up to a fifth slower; expected were"
                " triton and a C compiler (apt-get install gcc)"
            )

    def stage(self, ids: Numbers, lengths: IntArray, type_ids: Numbers | None) -> PackedRows:
        """Bring rows to the GPU: ids, segments (T) and offsets (B + 1), and the longest row's tokens."""
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        segments = None if type_ids is None else self._bring(type_ids)
        return self._bring(ids), segments, self._bring(offsets), int(lengths.max())

    def _bring(self, numbers: Numbers) -> torch.Tensor:
        return to_device(numbers.astype(np.int32), self.device)

    def forward(self, staged: PackedRows) -> torch.Tensor:
        """Begin to compute what was brought."""
        with torch.inference_mode(), explained("packed", "compute"):
            logits: torch.Tensor = self.model(*staged)
        return logits

    def wait(self) -> None:
        """Nothing: copying a tensor back waits for it."""


class OpenVinoEngine:
    """A model's graph, compiled by OpenVINO: each thread has a micro-batch of its own, so that none waits for another one."""

    name: EngineName = "openvino"
    pads = True

    def __init__(self, graph: Any, dtype: torch.dtype, threads: int, fill: int) -> None:
        openvino = import_openvino()
        self.dtype, self.fill = dtype, fill
        # Of one thread. MiniLM-L6: 512 and 768 are best (fp32 1.05, bf16 1.07 times as fast as 1,024; 256 no better), but with AMX
        # 2,048 (bf16 1.2 to 1.5 times as fast as with 512; fp32 and int8 the same).
        self.token_budget = 2_048 if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else 512
        if dtype == torch.int8:
            graph = graph.clone()
            quantize(graph)
            if torch.cpu._is_avx512_bf16_supported():
                attend_in_bf16(graph)
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # the actors of one node would all be bound to the same first cores
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP_SIZE if dtype == torch.int8 else 0,
        }
        compiled = openvino.Core().compile_model(graph, "CPU", settings)
        self.num_inputs = len(compiled.inputs)
        self.num_classes = compiled.output(0).get_partial_shape()[1].get_length()
        # As many requests again as there are threads: a thread begins the next one while Python still hears of the last one.
        self.queue = openvino.AsyncInferQueue(compiled, 2 * threads)
        self.queue.set_callback(copy_logits)

    def stage(self, ids: Numbers, lengths: IntArray, type_ids: Numbers | None) -> list[IntArray]:
        """Make the graph's inputs (B, L)."""
        padded, mask = spread(ids, lengths, self.fill)
        # Every model that takes segments takes 0 for none.
        segments = np.zeros_like(padded) if type_ids is None else spread(type_ids, lengths, 0)[0]
        return [padded, mask.astype(np.int64), segments][: self.num_inputs]

    def forward(self, staged: list[IntArray]) -> torch.Tensor:
        """Give one forward pass to the next free thread; waits while there is none."""
        logits = torch.empty(len(staged[0]), self.num_classes)
        with explained("openvino", "compute"):
            self.queue.start_async(staged, logits)
        return logits

    def wait(self) -> None:
        """Return when every thread is done."""
        with explained("openvino", "compute"):
            self.queue.wait_all()


def to_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Begin to copy an array to a GPU; elsewhere it is there already."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class PlainLogits(nn.Module):
    """A classifier with tensors in and one tensor out, as tracing wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, type_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Ids, mask and segments (B, L) to logits (B, C)."""
        return logits_of(self.model, ids, mask, type_ids)


def copy_logits(request: Any, logits: torch.Tensor) -> None:
    """Keep a finished request's logits: its own memory is used again by the next one."""
    logits.copy_(torch.from_numpy(request.get_output_tensor(0).data))


def import_openvino() -> Any:
    """OpenVINO without its conversion tools: these report to Google Analytics whenever they are imported.

    Raises `EngineError` if it is not installed or cannot be loaded.
    """
    sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]  # makes importing it an ImportError
    try:
        import openvino
        import openvino.frontend.pytorch.ts_decoder
    except ImportError as error:
        raise EngineError(f"openvino cannot be imported ({error}); pip install openvino, on every node") from error
    return openvino


def openvino_engines(
    model: nn.Module, example: tuple[Numbers, IntArray], dtypes: tuple[torch.dtype, ...], threads: int, fill: int
) -> Iterator[OpenVinoEngine]:
    """Convert a model once, on an example of rows, and compile it in one precision after the other, each when it is asked for.

    Raises `EngineError` if OpenVINO is not there, or cannot take the model.
    """
    import_openvino()
    with explained("openvino", "convert"):
        graph = convert(model, *spread(*example, fill))
    for dtype in dtypes:
        with explained("openvino", "compile"):
            engine = OpenVinoEngine(graph, dtype, threads, fill)
        yield engine


@contextmanager
def explained(engine: EngineName, verb: str) -> Iterator[None]:
    """Raise `EngineError` for whatever an engine, or the model's own code in it, has to complain about but memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        said = " ".join(str(error).split())[:300]
        raise EngineError(f"{engine} cannot {verb} this model ({type(error).__name__}: {said})") from error


def convert(model: nn.Module, ids: IntArray, mask: BoolArray) -> Any:
    """Trace a model on an example, and translate its graph, B and L left open. 1.1 s of processor time for MiniLM-L6.

    Not by `openvino.convert_model`: it traces three times to compare (4.6 s), and its package reports its use.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    inputs = [torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))]
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs.append(torch.zeros_like(inputs[0]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Python values that a trace fixes: the predictor compares the scores
        traced = torch.jit.trace(PlainLogits(model), tuple(inputs), check_trace=False)
        decoder = TorchScriptPythonDecoder(traced)  # in a variable: what the frontend loads does not keep it alive
        frontend = FrontEndManager().load_by_framework("pytorch")
        return frontend.convert(frontend.load(decoder))
