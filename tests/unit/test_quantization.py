"""int8: what 8 bits keep of a matrix, which layers get them, that activations get them too, and who cannot have them."""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lib import checkpoint, engine
from lib import predictor as predictors
from lib.engine import OpenVinoEngine, convert, import_openvino
from lib.errors import UsageError
from lib.model import leave_out_the_unread, load_classifier
from lib.predictor import Predictor
from lib.quantization import attend_in_bf16, has_fast_int8, quantize, to_8_bits
from tests import fakes
from tests.benchmarks.material import make_model

MATRICES = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(-100, 100, width=32)
)


@given(MATRICES)
def test_8_bits_are_half_a_step_off_at_most_and_nothing_stays_nothing(weight: npt.NDArray[np.float32]) -> None:
    values, zero, scale = to_8_bits(weight)
    found = (values.astype(np.float64) - zero) * scale
    assert (np.abs(found - weight) <= scale * 0.501 + np.abs(weight) * 1e-5 + 1e-30).all()
    assert (found[weight == 0] == 0).all()


def test_an_encoders_layers_are_quantized_and_neither_pooler_nor_head(tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, "bert", ("down", "same", "up"))
    model = load_classifier(str(tmp_path))
    import_openvino()
    graph = convert(model, np.ones((2, 5), np.int64), np.ones((2, 5), np.bool_))

    def weights() -> list[str]:
        products = [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]
        kinds = [node.input_value(1).get_node().get_type_name() for node in products]
        return [kind for kind in kinds if kind in ("Constant", "Multiply")]

    layers = model.config.num_hidden_layers  # type: ignore[union-attr]
    assert weights() == ["Constant"] * (6 * layers + 2)  # type: ignore[operator]
    quantize(graph)
    assert weights() == ["Multiply"] * 6 * layers + ["Constant"] * 2  # type: ignore[operator]
    with pytest.raises(ValueError, match="no linear layer"):
        quantize(graph)


def test_attention_is_computed_in_bf16_between_fp32(tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, "bert", ("down", "same", "up"))
    import_openvino()
    graph = convert(load_classifier(str(tmp_path)), np.ones((2, 5), np.int64), np.ones((2, 5), np.bool_))
    attend_in_bf16(graph)
    results = [one for one in graph.get_ordered_ops() if one.get_type_name() == "ScaledDotProductAttention"]
    read = {one.output(0).get_element_type().get_type_name() for one in results if one.output(0).get_target_inputs()}
    assert read == {"bf16"}
    assert graph.output(0).get_element_type().get_type_name() == "f32"


@pytest.mark.skipif(not has_fast_int8(), reason="this processor has no fast instructions for 8-bit numbers")
def test_activations_are_quantized_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By scores that differ from those of 8-bit weights alone, and by little: the shape is MiniLM-L6's."""
    make_model(tmp_path, "MiniLM-L6")
    model = load_classifier(str(tmp_path))
    leave_out_the_unread(model)
    import_openvino()
    ids = np.random.default_rng(0).integers(1_000, 20_000, (4, 32))
    mask = np.ones(ids.shape, np.bool_)
    graph = convert(model, ids, mask)

    def logits(dtype: torch.dtype) -> torch.Tensor:
        one = OpenVinoEngine(graph, dtype, 1, 0)
        found = one.forward(one.stage(ids.ravel(), np.full(len(ids), ids.shape[1]), None))
        one.wait()
        return found

    exact, whole = logits(torch.float32), logits(torch.int8)
    monkeypatch.setattr(engine, "GROUP_SIZE", 0)
    weights_alone = logits(torch.int8)
    assert 1e-5 < (whole - weights_alone).abs().max() < 2e-2
    assert 1e-5 < (weights_alone - exact).abs().max() < 2e-2


def test_int8_is_openvinos_on_processors_alone(classifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint.load(classifier)
    with pytest.raises(UsageError, match=r"model\.precision = int8 is computed by OpenVINO.*model\.engine to auto"):
        Predictor(model, "int8", "torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        UsageError, match=r"model\.precision = int8 is computed by OpenVINO on processors alone; set it to auto$"
    ):
        Predictor(model, "int8")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"model\.precision = int8: openvino cannot be imported"):
        Predictor(model, "int8")


def test_a_processor_without_fast_int8_is_told_so(
    classifier: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predictors, "has_fast_int8", lambda: False)
    assert Predictor(checkpoint.load(classifier), "int8").describe().precision == "int8"
    assert "has no fast instructions for it (VNNI): auto is faster" in "".join(capsys.readouterr())


def test_int8_that_scores_wrongly_is_refused(classifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "quantize", spoil)
    with pytest.raises(UsageError, match=r"openvino, torch\.int8, cpu\) is .* away from plain fp32 transformers"):
        Predictor(checkpoint.load(classifier), "int8")


def spoil(graph: object) -> None:
    """Weights of 8 bits that are not the model's."""
    from lib import quantization

    real = quantization.to_8_bits
    quantization.to_8_bits = lambda weight: real(weight[::-1])
    try:
        quantize(graph)
    finally:
        quantization.to_8_bits = real
