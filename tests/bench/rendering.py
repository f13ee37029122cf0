"""Drawing a page beside what others do, on the same records, in one process, on one thread.

    python -m tests.bench.rendering [--wfdb DIR] [--ecg-image-kit DIR] [--json FILE]

Ways: evlecg's anti-aliased page at 2200x1700; the same page decoded from PNG by Pillow and by OpenCV; `ecg_plot`
(`pip install "ecg-plot>=0.3" cairosvg`), its page of the same width as a PNG; ecg-image-kit's generator at 200 dots
an inch, which is 2200x1700, as its batch script calls it (it reads a WFDB record and leaves a PNG). `--ecg-image-kit`
is the folder of its `ecg-image-generator`; ways that are not there are left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from evlecg.data.synthetic import generate
from evlecg.page.render import render
from evlecg.schema import LEADS
from tests.bench.timing import one_thread, print_table, save, timed, told

SIZE_PX = (2200, 1700)
OURS = "evlecg"
TARGETS = {"ecg-image-kit": 100.0, "ecg_plot": 40.0, "PNG decoded by Pillow": 1.0, "PNG decoded by OpenCV": 1.0}


def records(folder: Path | None, n: int) -> list[tuple[np.ndarray, float]]:
    """Signals (float32 [12, T], mV) and sampling rates: synthetic, or the first of a folder of WFDB records."""
    if folder is None:
        made = generate({"train": n}, seed=0)
        return [(record.signal_mV, record.fs_hz) for record in made]
    import wfdb

    found = []
    for header in sorted(folder.rglob("*.hea")):
        record = wfdb.rdrecord(str(header.with_suffix("")))
        signal_mV = np.nan_to_num(np.asarray(record.p_signal, np.float32).T)
        if signal_mV.shape[0] == len(LEADS) and signal_mV.shape[1] >= 10 * record.fs:
            found.append((signal_mV, float(record.fs)))
        if len(found) == n:
            break
    return found


def ecg_plot_way(signals: list[tuple[np.ndarray, float]]) -> Callable[[int], Any] | str:
    """Its own 12-lead page, rastered by the library that its `save` uses: twenty times faster than its figures are."""
    try:
        import cairosvg
        import ecg_plot
    except ImportError as error:
        return f"not installed ({error.name})"
    if not hasattr(ecg_plot, "ECGChart"):
        return "a version before 0.3"

    def draw(number: int) -> None:
        signal_mV, fs_hz = signals[number % len(signals)]
        chart = ecg_plot.plot(
            signal_mV[:, : round(10 * fs_hz)], sample_rate=fs_hz, lead_names=list(LEADS), layout="12lead",
            time_mode="sequential", rhythm_lead="II",
        )  # fmt: skip
        cairosvg.svg2png(bytestring=chart.to_svg().encode(), output_width=SIZE_PX[0])

    draw(0)  # it imports as it goes
    return draw


def ecg_image_kit_way(
    signals: list[tuple[np.ndarray, float]], folder: Path | None, work: Path
) -> Callable[[int], Any] | str:
    if folder is None:
        return "no --ecg-image-kit DIR"
    import scipy.stats
    import wfdb

    # its drawing module has the name of the other package
    same = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "ecg_plot"}
    if importlib.util.find_spec("imgaug") is None:  # imported beside the drawing, and not used by it
        sys.modules["imgaug"] = types.ModuleType("imgaug")
        sys.modules["imgaug"].augmenters = None  # type: ignore[attr-defined]
    sys.path.insert(0, str(folder))
    try:
        with _inside(folder):
            kit = importlib.import_module("extract_leads")
            settings = importlib.import_module("helper_functions").read_config_file("config.yaml")
    except ImportError as error:
        return f"it needs {error.name}"
    finally:
        sys.modules.update(same)
    for number, (signal_mV, fs_hz) in enumerate(signals):
        # one sample more than ten seconds: its loop draws a page only where something is left behind it
        seconds = np.concatenate([signal_mV[:, : round(10 * fs_hz)], signal_mV[:, :1]], axis=1)
        wfdb.wrsamp(
            f"record{number}", fs=fs_hz, units=["mV"] * 12, sig_name=list(LEADS), p_signal=seconds.T.astype(float),
            fmt=["16"] * 12, adc_gain=[1000.0] * 12, baseline=[0] * 12, write_dir=str(work),
        )  # fmt: skip
    out = work / "kit"
    out.mkdir()
    always, never = scipy.stats.bernoulli(1), scipy.stats.bernoulli(0)

    def draw(number: int) -> None:
        name = work / f"record{number % len(signals)}"
        with _inside(folder), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = kit.get_paper_ecg(
                input_file=f"{name}.dat", header_file=f"{name}.hea", output_directory=str(out), seed=0,
                add_dc_pulse=always, add_bw=never, show_grid=always, add_print=never, configs=settings,
                resolution=200, pad_inches=0, store_text_bbox=False,
            )  # fmt: skip
        assert len(made) == 1, "it drew nothing"

    draw(0)
    with Image.open(next(out.glob("*.png"))) as image:
        assert image.size == SIZE_PX, image.size
    return draw


@contextlib.contextmanager
def _inside(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(description="Drawing a page beside what others do.")
    parser.add_argument("--wfdb", type=Path, help="folder of WFDB records (default: synthetic ones)")
    parser.add_argument("--ecg-image-kit", type=Path, help="its codes/ecg-image-generator folder")
    parser.add_argument("--records", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=30, help="of the fast ways; slow ones get a third")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    one_thread()
    signals = records(given.wfdb, given.records)
    pages = [render(signal_mV, fs_hz, size_px=SIZE_PX).pixels for signal_mV, fs_hz in signals]
    encoded = []
    for pixels in pages:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        encoded.append(stream.getvalue())

    def pillow(number: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(encoded[number % len(encoded)])).convert("RGB"))

    def opencv(number: int) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(encoded[number % len(encoded)], np.uint8), cv2.IMREAD_COLOR)

    def ours(number: int) -> np.ndarray:
        signal_mV, fs_hz = signals[number % len(signals)]
        return render(signal_mV, fs_hz, size_px=SIZE_PX).pixels

    ways: dict[str, Callable[[int], Any]] = {
        OURS: ours,
        "evlecg, and its PNG encoded": lambda number: cv2.imencode(".png", ours(number)),
        "PNG decoded by Pillow": pillow,
        "PNG decoded by OpenCV": opencv,
    }
    left_out = {}
    with tempfile.TemporaryDirectory() as work:
        peers = {"ecg_plot": lambda: ecg_plot_way(signals),
                 "ecg-image-kit": lambda: ecg_image_kit_way(signals, given.ecg_image_kit, Path(work))}  # fmt: skip
        for name, make in peers.items():
            way = make()
            if isinstance(way, str):
                left_out[name] = way
            else:
                ways[name] = way
        slow = max(3, given.rounds // 3)
        times = timed(ways, {name: slow if name in peers else given.rounds for name in ways})
    rows = told(times, OURS)
    print(f"{SIZE_PX[0]}x{SIZE_PX[1]}, {len(signals)} records of {signals[0][1]:g} Hz, one thread")
    print_table(rows, OURS)
    for name, why in left_out.items():
        print(f"{name}: left out, {why}")
    verdicts = {name: rows[name]["ratio"] >= least for name, least in TARGETS.items() if name in rows}
    for name, met in verdicts.items():
        print(
            f"{'met   ' if met else 'MISSED'}  {name}: {rows[name]['ratio']:.1f} times evlecg, wanted {TARGETS[name]:g}"
        )
    save(given.json, {"size_px": SIZE_PX, "rows": rows, "left_out": left_out, "targets_met": verdicts})


if __name__ == "__main__":
    main()
