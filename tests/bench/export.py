"""Size, latency, memory and AUROC of a student in every format: `python -m tests.bench.export [RUN] [--data DIR]`.

Without a run, the quickstart is trained first (about six minutes of one core). Formats whose packages are missing are
passed over. With `--large`, latency alone of random students of 20 and 100 million parameters, float32 in PyTorch
(eager) against float32 and int8 in onnxruntime: what the integers are worth where matrix products take the time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from evlecg.errors import EvlecgError
from evlecg.export import export
from evlecg.export.price import Asked, measure
from evlecg.export.table import FORMATS
from evlecg.models.trained import TrainedWith

CASES = [(name, dtype) for name in ("safetensors", "onnx", "openvino") for dtype in FORMATS[name].dtypes
         if dtype not in ("auto",)]  # fmt: skip
SPEEDUP, DROP_POINTS = 1.5, 0.5
COLUMNS = (
    "MB", "ms, 1 thread (p95)", "ms, 2 threads (p95)", "times faster, 1 / 2 threads", "peak MB", "AUROC",
    "largest drop",
)  # fmt: skip
LARGE = {"20M": (256, 6, 256), "100M": (512, 12, 384)}  # width, layers, page


def table(run: Path, data: Path | None, scratch: Path) -> None:
    """Every format is exported and gated, then all are measured in one go."""
    asked, rows = [Asked("fp32, PyTorch eager", str(run))], {}
    for name, dtype in CASES:
        out = scratch / f"{name}-{dtype}"
        try:
            result = export(run, out=out, format=name, dtype=dtype, data=data, max_drop_points=100)
        except EvlecgError as error:
            print(f"{name} {dtype}: {error}", flush=True)
            continue
        rows[f"{name} {dtype}"] = result
        print(f"{name} {dtype}: exported", flush=True)
        asked.append(Asked(f"{name} {dtype}", str(out), runs=FORMATS[name].runs, dtype="auto"))
    prices = {price.name: price for price in measure(asked, trained=run / "student", data=data)}
    eager = prices[asked[0].name]
    print("\n| | " + " | ".join(COLUMNS) + " |\n| --- |" + " --- |" * len(COLUMNS))
    for name, price in prices.items():
        if price.failed:
            print(f"| {name} | {price.failed} |")
            continue
        result = rows.get(name)
        proof = result.proof if result else None
        faster = [eager.latency_ms[n] / price.latency_ms[n] for n in ("1", "2")]
        auc = proof.exported["macro"] if proof and proof.exported else None
        cells = [
            f"{(result.n_bytes if result else price.disk_bytes or 0) / 1e6:.2f}",
            *(f"{price.latency_ms[n]:.1f} ({price.latency_p95_ms[n]:.1f})" for n in ("1", "2")),
            f"{faster[0]:.2f} / {faster[1]:.2f}", f"{(price.peak_memory_bytes or 0) / 1e6:.0f}",
            "" if auc is None else f"{auc:.4f}",
            "" if proof is None or not proof.exported else f"{proof.worst[1]:.2f} ({proof.worst[0]})",
        ]  # fmt: skip
        print(f"| {name} | " + " | ".join(cells) + " |")
        if "int8" in name and proof is not None and proof.exported:
            met = min(faster) >= SPEEDUP and proof.worst[1] <= DROP_POINTS
            print(
                f"  {'met' if met else 'NOT MET'}: {name} at least {SPEEDUP} times faster, within {DROP_POINTS} points"
            )


def large(name: str, scratch: Path) -> None:
    """Latency of a random student of another size."""
    import torch
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        LlamaConfig,
    )

    from tests import tiny

    width, depth, image = LARGE[name]
    run = scratch / f"run-{name}"
    tiny.idefics3(run / "tiny")  # for its tokenizer
    old = Idefics3Processor.from_pretrained(run / "tiny")
    heads = width // 64
    config = Idefics3Config(
        vision_config={"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
                       "num_attention_heads": heads, "image_size": image, "patch_size": 16},
        text_config=LlamaConfig(vocab_size=len(old.tokenizer), hidden_size=width, intermediate_size=4 * width,
                                num_hidden_layers=2 * depth, num_attention_heads=heads, num_key_value_heads=heads,
                                max_position_embeddings=2048, tie_word_embeddings=True),
        scale_factor=2, image_token_id=old.tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).save_pretrained(run / "student")
    Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size={"longest_edge": image}, max_image_size={"longest_edge": image},
                                               do_image_splitting=False),
        tokenizer=old.tokenizer, image_seq_len=(image // 16 // 2) ** 2, chat_template=tiny.IDEFICS_TEMPLATE,
    ).save_pretrained(run / "student")  # fmt: skip
    labels = {"NORM": "a normal tracing", "MI": "myocardial infarction", "CD": "a conduction disturbance"}
    TrainedWith(labels=labels).write(run / "student")
    asked = [Asked("fp32, PyTorch eager", str(run))]
    for dtype in ("float32", "int8"):
        out = scratch / f"{name}-{dtype}"
        result = export(run, out=out, format="onnx", dtype=dtype)
        asked.append(Asked(f"onnx {dtype}", str(out), runs=True))
        print(f"{name} onnx {dtype}: {result.n_parameters:,} parameters, {result.n_bytes:,} bytes", flush=True)
    for price in measure(asked, trained=run / "student", data=None):
        peak_MB = round((price.peak_memory_bytes or 0) / 1e6)
        found = {"ms": price.latency_ms, "p95": price.latency_p95_ms, "peak MB": peak_MB}
        print(f"{name} {price.name}: {price.failed or json.dumps(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="run folder (default: the quickstart is trained)")
    parser.add_argument(
        "--data", type=Path, default=Path("data/synthetic"), help="prepared folder of its validation split"
    )
    parser.add_argument("--large", choices=sorted(LARGE), nargs="*", help="random students of these sizes instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if given.large is not None:
            for name in given.large or sorted(LARGE):
                large(name, scratch)
            return
        run = given.run
        if run is None:
            run = scratch / "quickstart"
            subprocess.run([sys.executable, "-m", "evlecg.cli", "distill", "--out", str(run), "--set",
                            "finish.control=false", "--set", "finish.eval_split=none"], check=True)  # fmt: skip
        table(run, given.data, scratch)


if __name__ == "__main__":
    main()
