"""A student in the formats of other software. Each writer fills a folder; nothing here decides whether it is good.

| format | written by | dtypes |
|---|---|---|
| safetensors | transformers' save_pretrained | float32, bfloat16, float16 |
| onnx | transformers' OnnxExporter, onnxruntime's quantisers | float32, float16, int8, int8-static, int4 |
| openvino | transformers' OpenVINOExporter, openvino | float32, float16 |
| gguf | llama.cpp's convert_hf_to_gguf.py, from the safetensors | float32, bfloat16, float16, int8, int4 |
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evlecg.errors import EvlecgError
from evlecg.export.graphs import Graph, classifier_graphs, text_graphs
from evlecg.export.prompt import blank_page, questions_of, runner_file
from evlecg.export.table import FORMATS
from evlecg.models import load as models
from evlecg.models.trained import TrainedWith
from evlecg.models.views import ClassifierEncoder, encoder_for
from evlecg.recipe import page_size
from evlecg.run import RUNNER, Student, open_student

ONE_FILE_BYTES = 1 << 30  # of ONNX: more lies in a .data file beside the graph; protobuf ends at 2 GiB
INT4_BLOCK = 32
MATMULS = ["MatMul", "Gemm"]


def check_packages(name: str) -> None:
    """Raises:
    EvlecgError: a package of the format is missing, or transformers has no exporters.
    """
    from importlib.util import find_spec

    chosen = FORMATS[name]
    missing = [package for package in chosen.packages if find_spec(package) is None]
    if missing:
        raise EvlecgError(f"the format {name} needs {', '.join(missing)}", where="--format",
                          hint=f"pip install 'evlecg[{chosen.extra}]'")  # fmt: skip
    if chosen.runs and not _exports():
        raise EvlecgError(f"the format {name} needs the exporters of a newer transformers", where="--format",
                          hint="pip install --upgrade transformers")  # fmt: skip


def _exports() -> bool:
    """Whether the installed transformers has exporters that give the program they traced (5.24 has)."""
    try:
        from transformers import exporters
    except ImportError:
        return False
    made: Any = exporters  # names are added when they are asked for
    return hasattr(made.OnnxExporter, "export_program")


def write_safetensors(student: models.Loaded, trained: TrainedWith, folder: Path, *, max_shard_size: str) -> None:
    """What transformers loads: weights (adapters merged), config, processor, generation config, chat template."""
    student.model.save_pretrained(folder, max_shard_size=max_shard_size)
    models.save_processor(student, folder)
    trained.write(folder)


def write_graphs(
    student: models.Loaded, trained: TrainedWith, folder: Path, *, runtime: str
) -> None:  # fmt: skip
    """Graphs and runner.json, with config and processor beside them for those who want words.

    Args:
        student: in the dtype that the graphs are to compute in.
        trained: its questions and pages.
        folder: where to.
        runtime: "onnx" or "openvino".

    Raises:
        EvlecgError: the student's family cannot be cut into graphs, or traced.
    """
    encoder = encoder_for(student, size_px=page_size(trained.page.student_size))
    questions = questions_of(student, trained)
    student.model.eval()
    try:
        if isinstance(encoder, ClassifierEncoder):
            graphs = classifier_graphs(student, encoder)
        else:
            side = encoder.encode([blank_page(encoder, trained)], [[encoder.nothing_asked]])
            graphs = text_graphs(student, encoder, int(side.visual_BS.sum()))
        suffix = {"onnx": ".onnx", "openvino": ".xml"}[runtime]
        files = {name: f"{name}{suffix}" for name in graphs}
        told = runner_file(student, encoder, trained, questions, graphs, runtime=runtime, files=files)
        for name, graph in graphs.items():
            _TRACED[runtime](graph, folder / files[name])
    except EvlecgError:
        raise
    except Exception as error:  # exporters raise whatever tracing raises
        hint = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        raise EvlecgError(f"the family {student.checkpoint.model_type!r} cannot be exported to {runtime}",
                          where=student.checkpoint.name,
                          hint=f"{hint}; --format safetensors works") from error  # fmt: skip
    (folder / RUNNER).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    _write_about(student, trained, folder)


def _write_about(student: models.Loaded, trained: TrainedWith, folder: Path) -> None:
    student.checkpoint.config.save_pretrained(folder)
    generation = getattr(student.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    models.save_processor(student, folder)
    trained.write(folder)


def _dims(graph: Graph) -> dict[str, Any]:
    """torch.export's dynamic shapes: every axis that varies, without bounds (a cache may be empty)."""
    from torch.export import Dim

    return {name: dict.fromkeys(graph.axes.get(name, {}), Dim.DYNAMIC) for name in graph.inputs}


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Exporters tell their own developers a lot, on every channel there is."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with models.quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trace_onnx(graph: Graph, path: Path) -> None:
    import onnx_ir
    from transformers import exporters

    made: Any = exporters  # names are added when they are asked for
    with _hushed():
        config = made.OnnxConfig(dynamic_shapes=_dims(graph))
        program, _ = made.OnnxExporter().export_program(graph.module, dict(graph.inputs), config)
    for value in program.graph.inputs:
        dims = [graph.axes.get(value.name, {}).get(axis, size) for axis, size in enumerate(value.shape)]
        value.shape = onnx_ir.Shape(dims)
    _plain(program)
    n_bytes = sum(value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value)
    onnx_ir.save(program, str(path), external_data=f"{path.name}.data" if n_bytes > ONE_FILE_BYTES else None)


def _plain(program: Any) -> None:
    """Without what differs between two exports of one model, and what says where it was made: stack traces, names of
    symbols."""
    keep = "pkg.torch.onnx.name_scopes"
    for graph in program.graphs():
        for node in graph:
            for key in [key for key in node.metadata_props if key != keep]:
                del node.metadata_props[key]
            for value in node.outputs:
                value.metadata_props.clear()
                if not value.is_graph_output():
                    value.shape = None
        for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
            value.metadata_props.clear()
    program.metadata_props.clear()
    program.graph.metadata_props.clear()


def _trace_openvino(graph: Graph, path: Path) -> None:
    from transformers import exporters

    made: Any = exporters  # names are added when they are asked for
    with _hushed():
        config = made.OpenVINOConfig(dynamic_shapes=_dims(graph), stateful=False)
        program, _ = made.OpenVINOExporter().export_program(graph.module, dict(graph.inputs), config)
        made.OpenVINOExporter.save_program(program, path)


_TRACED: dict[str, Callable[[Graph, Path], None]] = {"onnx": _trace_onnx, "openvino": _trace_openvino}


def _heard_feeds(
    student: Student, calibration: Callable[[Student], Iterable[Any]]
) -> dict[str, list[dict[str, np.ndarray]]]:
    """What every graph was fed while records were scored."""
    heard: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in student.graphs}

    def listening(name: str, graph: Any) -> Any:
        def run(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            heard[name].append(dict(feed))
            return graph(feed)

        return run

    for name, graph in list(student.graphs.items()):
        student.graphs[name] = listening(name, graph)
    for view in calibration(student):
        student.logits([view])
    return heard


class _Reader:
    """What onnxruntime's calibration reads its inputs through."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def quantise(folder: Path, dtype: str, calibration: Callable[[Student], Iterable[Any]] | None = None) -> None:
    """Makes the graphs of an onnx folder smaller, in place.

    Args:
        folder: of `write_graphs`, in float32.
        dtype: "int8" (activations are quantised as they come), "int8-static" (their ranges are found beforehand) or
            "int4" (weights only).
        calibration: for int8-static: gives views (pages or traces) of records.
    """
    files = json.loads((folder / RUNNER).read_text(encoding="utf-8"))["graphs"]
    feeds: dict[str, list[dict[str, np.ndarray]]] = {}
    if dtype == "int8-static":
        assert calibration is not None
        feeds = _heard_feeds(open_student(folder), calibration)
    for name, file in files.items():
        _quantise_graph(folder / file, name, dtype, feeds.get(name, []))


def _quantise_graph(path: Path, name: str, dtype: str, feeds: list[dict[str, np.ndarray]]) -> None:
    """Replaces a graph by one whose matrix products (of weights) are of integers.

    Weights are unsigned: on CPUs without VNNI, onnxruntime adds products of unsigned and signed bytes in pairs of 16
    bits that saturate. On the quickstart's student that moved log odds by 0.137 on average, unsigned ones by 0.025.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    left_out = _not_to_quantise(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, _hushed():
        made = Path(scratch) / path.name
        if dtype == "int4":
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

            quantiser: Any = MatMulNBitsQuantizer(onnx.load(path), block_size=INT4_BLOCK, is_symmetric=True,
                                             accuracy_level=4, nodes_to_exclude=left_out)  # fmt: skip
            quantiser.process()
            quantised: Any = quantiser.model
            quantised.save_model_to_file(str(made), use_external_data_format=False)
        elif dtype == "int8" or name == "embed" or not feeds:  # a table of words has nothing to calibrate
            kinds = ["Gather"] if name == "embed" else MATMULS
            quantize_dynamic(path, made, op_types_to_quantize=kinds, per_channel=name != "embed",
                             weight_type=QuantType.QUInt8, nodes_to_exclude=left_out)  # fmt: skip
        else:
            reader: Any = _Reader(feeds)  # anything with get_next
            quantize_static(path, made, reader, quant_format=QuantFormat.QDQ, op_types_to_quantize=MATMULS,
                            per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8,
                            nodes_to_exclude=left_out)  # fmt: skip
        for old in path.parent.glob(f"{path.name}*"):
            old.unlink()
        for new in Path(scratch).glob(f"{path.name}*"):
            shutil.move(new, path.parent / new.name)


def _not_to_quantise(path: Path) -> list[str]:
    """Nodes that resize and cut the page: their numbers are exact, and a page is no place for noise."""
    import onnx

    names = []
    for node in onnx.load(path, load_external_data=False).graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")), "")
        if "'pixels'" in scopes:
            names.append(node.name)
    return names
