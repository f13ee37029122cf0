"""The datasets that can be prepared: one row each. A new dataset is a row here and, at most, a file for its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from evlecg.data.readers_base import Reading, ReadOptions, Rejected, Source, locate
from evlecg.data.readers_cinc import is_cinc2021, is_cpsc2018, open_cinc2021, open_cpsc2018
from evlecg.data.readers_ecgbench import is_ecgbench, open_ecgbench
from evlecg.data.readers_ecgqa import is_ecgqa, open_ecgqa
from evlecg.data.readers_llava import is_llava, open_llava
from evlecg.data.readers_ludb import is_ludb, open_ludb
from evlecg.data.readers_ptbxl import is_ptbxl, open_ptbxl
from evlecg.errors import EvlecgError
from evlecg.recipe import nearest
from evlecg.schema import Record

__all__ = ["READERS", "ReadOptions", "Reader", "Reading", "Rejected", "Source", "find_reader", "home_of"]

SYNTHETIC_COUNTS = {"train": 1000, "val": 300, "test": 500}


@dataclass(frozen=True)
class Reader:
    """One dataset.

    Attributes:
        title: its name, with the version that was read.
        licence: of the data.
        citation: what to cite, short.
        url: where it is described.
        get: shell commands that put it into ./data/NAME; empty where nothing has to be fetched.
        needs: what its top folder must hold, for an error message.
        labels: default label set (or sets, joined by `+`); empty for dialogue datasets, which bring questions.
        open: source folder (None for generated data) and options -> `Reading`.
        is_home: whether a folder is its top folder; None where there is no folder.
        merge: its files may be spread over sibling folders.
        rates_hz: sampling rates that were published; empty where there is no choice.
        n_records: as published (dialogue items, for dialogue datasets); None where it depends on what the user brings.
        download_GB: size of the download, 1e9 bytes; None where it depends on the user.
        access: "open", or what a reader has to do first ("PhysioNet credentialed", ...).
    """

    title: str
    licence: str
    citation: str
    url: str
    get: tuple[str, ...]
    needs: str
    labels: str
    open: Callable[[Source, ReadOptions], Reading] | Callable[[None, ReadOptions], Reading]
    is_home: Callable[[Path], bool] | None
    merge: bool = False
    rates_hz: tuple[int, ...] = ()
    n_records: int | None = None
    download_GB: float | None = None
    access: str = "open"

    @property
    def needs_source(self) -> bool:
        return self.is_home is not None


def _open_synthetic(source: None, options: ReadOptions) -> Reading:
    """The built-in generator as a dataset: its entries are the records."""
    from evlecg.data.synthetic import generate

    counts = dict(options.counts) or SYNTHETIC_COUNTS
    wanted = set(options.labels)

    def read(record: Record) -> Record:
        return replace(record, labels={code: value for code, value in record.labels.items() if code in wanted})

    entries: Iterator[Record] = generate(counts, options.seed)
    return Reading(sum(counts.values()), entries, lambda record: record.id, read)


def _wget(path: str, name: str) -> tuple[str, ...]:
    """Commands that mirror a PhysioNet folder into ./data/NAME."""
    cut = path.strip("/").count("/") + 2
    return (f"wget -r -N -c -np -nH --cut-dirs={cut} -P data/{name} https://physionet.org/files/{path}/",)


_ECGQA = ("git clone --depth 1 https://github.com/Jwoo5/ecg-qa data/ecgqa",)

READERS: dict[str, Reader] = {
    "synthetic": Reader(
        title="evlecg synthetic 12-lead set",
        licence="Apache-2.0 (generated)",
        citation="evlecg",
        url="",
        get=(),
        needs="",
        labels="super+rhythm",
        open=_open_synthetic,
        is_home=None,
    ),
    "ludb": Reader(
        title="LUDB 1.0.1",
        licence="ODC-By 1.0",
        citation="Kalyakulina et al., IEEE Access 8, 2020, doi:10.1109/ACCESS.2020.3029211",
        url="https://physionet.org/content/ludb/1.0.1/",
        get=_wget("ludb/1.0.1", "ludb"),
        needs="ludb.csv and data/1.hea",
        labels="ludb",
        open=open_ludb,
        is_home=is_ludb,
    ),
    "ptbxl": Reader(
        title="PTB-XL 1.0.3",
        licence="CC BY 4.0",
        citation="Wagner et al., Scientific Data 7:154, 2020, doi:10.1038/s41597-020-0495-6",
        url="https://physionet.org/content/ptb-xl/1.0.3/",
        get=_wget("ptb-xl/1.0.3", "ptbxl"),
        needs="ptbxl_database.csv, scp_statements.csv and records500/ (or records100/)",
        labels="super",
        open=open_ptbxl,
        is_home=is_ptbxl,
        rates_hz=(500, 100),
    ),
    "cpsc2018": Reader(
        title="CPSC 2018 (PhysioNet/CinC form)",
        licence="CC BY 4.0",
        citation="Liu et al., J. Medical Imaging and Health Informatics 8, 2018, doi:10.1166/jmihi.2018.2442",
        url="https://physionet.org/content/challenge-2020/1.0.2/",
        get=_wget("challenge-2020/1.0.2/training/cpsc_2018", "cpsc2018"),
        needs="headers and signals A0001.hea, A0001.mat, ... (folders below are searched)",
        labels="cpsc9",
        open=open_cpsc2018,
        is_home=is_cpsc2018,
        merge=True,
    ),
    "cinc2021": Reader(
        title="PhysioNet/CinC Challenge 2021 1.0.3",
        licence="CC BY 4.0",
        citation="Reyna et al., Computing in Cardiology 48, 2021, doi:10.23919/CinC53138.2021.9662687",
        url="https://physionet.org/content/challenge-2021/1.0.3/",
        get=_wget("challenge-2021/1.0.3/training", "cinc2021/training"),
        needs="training/COHORT/..., or headers with their .mat files (folders below are searched)",
        labels="cinc2021-26",
        open=open_cinc2021,
        is_home=is_cinc2021,
        merge=True,
    ),
    "ecgqa": Reader(
        title="ECG-QA 1.0.2, paraphrased",
        licence="CC BY 4.0 (questions; signals of PTB-XL and MIMIC-IV-ECG under their own)",
        citation="Oh et al., NeurIPS Datasets and Benchmarks, 2023, arXiv:2306.15681",
        url="https://github.com/Jwoo5/ecg-qa",
        get=_ECGQA,
        needs="ptbxl/paraphrased/{train,valid,test}/*.json or mimic-iv-ecg/..., and --signals ptb-xl=DIR or mimic=DIR",
        labels="",
        open=partial(open_ecgqa, wording="paraphrased"),
        is_home=partial(is_ecgqa, wording="paraphrased"),
    ),
    "ecgqa-template": Reader(
        title="ECG-QA 1.0.2, template wording",
        licence="CC BY 4.0 (questions; signals of PTB-XL and MIMIC-IV-ECG under their own)",
        citation="Oh et al., NeurIPS Datasets and Benchmarks, 2023, arXiv:2306.15681",
        url="https://github.com/Jwoo5/ecg-qa",
        get=tuple(command.replace("data/ecgqa", "data/ecgqa-template") for command in _ECGQA),
        needs="ptbxl/template/{train,valid,test}/*.json or mimic-iv-ecg/..., and --signals ptb-xl=DIR or mimic=DIR",
        labels="",
        open=partial(open_ecgqa, wording="template"),
        is_home=partial(is_ecgqa, wording="template"),
    ),
    "ecginstruct": Reader(
        title="ECGInstruct",
        licence="as its card says; made from MIMIC-IV-ECG, PTB-XL and CODE-15%",
        citation="Liu et al., Teach Multimodal LLMs to Comprehend Electrocardiographic Images, 2024, arXiv:2410.19008",
        url="https://huggingface.co/datasets/PULSE-ECG/ECGInstruct",
        get=(
            "hf download PULSE-ECG/ECGInstruct --repo-type dataset --local-dir data/ecginstruct",
            "cat data/ecginstruct/shard_*.tar.gz | tar -xzif - -C data/ecginstruct",
        ),
        needs="a JSON list of {id, image, conversations}, and the pictures (or --signals ptb-xl=DIR, mimic=DIR)",
        labels="",
        open=partial(open_llava, dataset="ecginstruct"),
        is_home=partial(is_llava, dataset="ecginstruct"),
        n_records=1_156_110,
        download_GB=41.3,
    ),
    "ecg-grounding": Reader(
        title="ECG-Grounding",
        licence="as its card says; made from MIMIC-IV-ECG and PULSE's data",
        citation="Lan et al., GEM, NeurIPS 2025, arXiv:2503.06073",
        url="https://huggingface.co/datasets/LANSG/ECG-Grounding",
        get=("hf download LANSG/ECG-Grounding --repo-type dataset --local-dir data/ecg-grounding",),
        needs="JSON lists of {id, image, ecg, conversations}, and signals (--signals mimic=DIR) or pictures",
        labels="",
        open=partial(open_llava, dataset="ecg-grounding"),
        is_home=partial(is_llava, dataset="ecg-grounding"),
    ),
    "ecg-r1": Reader(
        title="ECG-R1 (Protocol-Guided Grounding CoT)",
        licence="as its card says; made from MIMIC-IV-ECG and PULSE's data",
        citation="Jin et al., ECG-R1, 2026",
        url="https://huggingface.co/datasets/PKUDigitalHealth/ECG-Protocol-Guided-Grounding-CoT",
        get=(
            "hf download PKUDigitalHealth/ECG-Protocol-Guided-Grounding-CoT"
            " --repo-type dataset --local-dir data/ecg-r1",
        ),
        needs="files of {messages, images, objects}, one a line, and signals (--signals mimic=DIR) or pictures",
        labels="",
        open=partial(open_llava, dataset="ecg-r1"),
        is_home=partial(is_llava, dataset="ecg-r1"),
    ),
    "ecgbench": Reader(
        title="ECGBench",
        licence="as its card says; made from PTB-XL, CPSC 2018, CSN, G12EC, CODE-15% and published pictures",
        citation="Liu et al., Teach Multimodal LLMs to Comprehend Electrocardiographic Images, 2024, arXiv:2410.19008",
        url="https://huggingface.co/datasets/PULSE-ECG/ECGBench",
        get=("hf download PULSE-ECG/ECGBench --repo-type dataset --local-dir data/ecgbench",),
        needs="SUBSET/test-*.parquet, or SUBSET.json with images/ (subsets: ptb-test, cpsc-test, ecgqa-test, ...)",
        labels="",
        open=open_ecgbench,
        is_home=is_ecgbench,
        n_records=11_247,
    ),
}


def find_reader(name: str) -> Reader:
    """A row of `READERS`.

    Raises:
        EvlecgError: no such dataset, naming the nearest.
    """
    if name not in READERS:
        raise EvlecgError(f"unknown dataset {name!r}", hint=nearest(name, READERS))
    return READERS[name]


def home_of(name: str, folder: Path) -> Path | None:
    """Top folder of dataset `name` at or below `folder`; None where it does not lie there."""
    is_home = READERS[name].is_home
    if is_home is None or not folder.is_dir():
        return None
    return locate(folder, is_home, merge=READERS[name].merge)
