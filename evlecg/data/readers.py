"""The datasets that can be prepared: one row each. A new dataset is a row here and, at most, a file for its family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from evlecg.data.readers_base import Reading, ReadOptions, Rejected, Source, levels, locate
from evlecg.data.readers_cinc import is_cinc, is_cohort, is_csn, open_cinc2020, open_cinc2021, open_cohorts
from evlecg.data.readers_code15 import is_code15, open_code15
from evlecg.data.readers_cpsc import is_cpsc2018, open_cpsc2018
from evlecg.data.readers_dicom import is_dicom, open_dicom
from evlecg.data.readers_ecgbench import is_ecgbench, open_ecgbench
from evlecg.data.readers_ecgqa import is_ecgqa, open_ecgqa
from evlecg.data.readers_llava import is_llava, open_llava
from evlecg.data.readers_ludb import is_ludb, open_ludb
from evlecg.data.readers_mimic import is_mimic, open_mimic
from evlecg.data.readers_ptb import is_ptb, open_ptb
from evlecg.data.readers_ptbxl import is_ptbxl, open_ptbxl
from evlecg.data.readers_table import is_wfdb, open_wfdb
from evlecg.errors import EvlecgError
from evlecg.recipe import nearest
from evlecg.schema import Record

__all__ = ["READERS", "ReadOptions", "Reader", "Reading", "Rejected", "Source", "detect", "find_reader", "home_of"]

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
        labels: default label set (or sets, joined by `+`); empty where the dataset brings its own, or questions.
        open: source folder (None for generated data) and options -> `Reading`.
        is_home: whether a folder is its top folder; None where there is no folder.
        merge: its files may be spread over sibling folders.
        any_folder: it takes any folder with files of its kind, at any depth: never looked for below the given one, and
            detected only where nothing else is.
        rates_hz: sampling rates that were published; empty where there is no choice.
        n_records: as published (dialogue items, for dialogue datasets); None where it depends on what the user brings.
        download_GB: about how large it is on disk, unpacked, in 1e9 bytes; None where it depends on the user.
        prepared_GB: about how large the prepared folder of all of it is; None where it depends on the user.
        unlabelled: its records may have no labels, only a report.
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
    any_folder: bool = False
    rates_hz: tuple[int, ...] = ()
    n_records: int | None = None
    download_GB: float | None = None
    prepared_GB: float | None = None
    access: str = "open"
    unlabelled: bool = False

    @property
    def needs_source(self) -> bool:
        return self.is_home is not None


def _open_synthetic(source: None, options: ReadOptions) -> Reading:
    """The built-in generator as a dataset: an entry is a record's split and number."""
    from evlecg.data.synthetic import check_counts, numbered, record_id

    counts = dict(options.counts) or SYNTHETIC_COUNTS
    check_counts(counts, options.seed)
    wanted = set(options.labels)

    def read(entry: tuple[str, int]) -> Record:
        record = numbered(options.seed, *entry)
        return replace(record, labels={code: value for code, value in record.labels.items() if code in wanted})

    entries = [(split, number) for split, count in counts.items() for number in range(count)]
    return Reading(len(entries), entries, lambda entry: record_id(*entry), read)


def _wget(path: str, name: str) -> tuple[str, ...]:
    """Commands that mirror a PhysioNet folder into ./data/NAME."""
    cut = path.strip("/").count("/") + 2
    return (f"wget -r -N -c -np -nH --cut-dirs={cut} -P data/{name} https://physionet.org/files/{path}/",)


_CINC2021 = "Reyna et al., Computing in Cardiology 48, 2021, doi:10.23919/CinC53138.2021.9662687"
_CINC2021_URL = "https://physionet.org/content/challenge-2021/1.0.3/"
_ECGQA = ("git clone --depth 1 https://github.com/Jwoo5/ecg-qa data/ecgqa",)

READERS: dict[str, Reader] = {
    "synthetic": Reader(
        title="evlecg synthetic 12-lead set",
        licence="Apache-2.0 (generated)",
        citation="evlecg",
        url="",
        get=(),
        needs="",
        labels="ptbxl-super+ptbxl-rhythm",
        open=_open_synthetic,
        is_home=None,
        prepared_GB=0.2,
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
        n_records=200,
        download_GB=0.03,
        prepared_GB=0.03,
    ),
    "ptbxl": Reader(
        title="PTB-XL 1.0.3",
        licence="CC BY 4.0",
        citation="Wagner et al., Scientific Data 7:154, 2020, doi:10.1038/s41597-020-0495-6",
        url="https://physionet.org/content/ptb-xl/1.0.3/",
        get=_wget("ptb-xl/1.0.3", "ptbxl"),
        needs="ptbxl_database.csv, scp_statements.csv and records500/ (or records100/)",
        labels="ptbxl-super",
        open=open_ptbxl,
        is_home=is_ptbxl,
        rates_hz=(500, 100),
        n_records=21799,
        download_GB=3.1,
        prepared_GB=2.7,
    ),
    "cpsc2018": Reader(
        title="CPSC 2018",
        licence="CC BY 4.0",
        citation="Liu et al., J. Medical Imaging and Health Informatics 8, 2018, doi:10.1166/jmihi.2018.2442",
        url="https://physionet.org/content/challenge-2020/1.0.2/",
        get=_wget("challenge-2020/1.0.2/training/cpsc_2018", "cpsc2018"),
        needs="A0001.hea and A0001.mat, ..., or A0001.mat, ... with REFERENCE.csv (folders below are searched)",
        labels="cpsc9",
        open=open_cpsc2018,
        is_home=is_cpsc2018,
        merge=True,
        n_records=6877,
        download_GB=1.3,
        prepared_GB=1.3,
    ),
    "cpsc2018-extra": Reader(
        title="CPSC 2018 Extra (PhysioNet/CinC 2021 1.0.3)",
        licence="CC BY 4.0",
        citation=_CINC2021,
        url=_CINC2021_URL,
        get=_wget("challenge-2021/1.0.3/training/cpsc_2018_extra", "cpsc2018-extra"),
        needs="Q0001.hea and Q0001.mat, ... (folders below are searched)",
        labels="cinc2021-26",
        open=partial(open_cohorts, "Q"),
        is_home=partial(is_cohort, "Q"),
        merge=True,
        n_records=3453,
        download_GB=0.7,
        prepared_GB=0.7,
    ),
    "georgia": Reader(
        title="Georgia 12-lead challenge database (PhysioNet/CinC 2021 1.0.3)",
        licence="CC BY 4.0",
        citation=_CINC2021,
        url=_CINC2021_URL,
        get=_wget("challenge-2021/1.0.3/training/georgia", "georgia"),
        needs="E00001.hea and E00001.mat, ... (folders below are searched)",
        labels="cinc2021-26",
        open=partial(open_cohorts, "E"),
        is_home=partial(is_cohort, "E"),
        merge=True,
        n_records=10344,
        download_GB=1.3,
        prepared_GB=1.2,
    ),
    "chapman-ningbo": Reader(
        title="Chapman-Shaoxing and Ningbo 12-lead ECGs (ecg-arrhythmia 1.0.0)",
        licence="CC BY 4.0",
        citation="Zheng et al., Scientific Data 7:48, 2020, doi:10.1038/s41597-020-0386-x",
        url="https://physionet.org/content/ecg-arrhythmia/1.0.0/",
        get=_wget("ecg-arrhythmia/1.0.0", "chapman-ningbo"),
        needs="WFDBRecords/01/010/JS00001.hea, ..., or the challenge's folders chapman_shaoxing and ningbo",
        labels="cinc2021-26",
        open=partial(open_cohorts, "CN"),
        is_home=is_csn,
        merge=True,
        n_records=45152,
        download_GB=5.5,
        prepared_GB=5.4,
    ),
    "ptb": Reader(
        title="PTB Diagnostic ECG Database 1.0.0",
        licence="ODC-By 1.0",
        citation="Bousseljot et al., Biomedizinische Technik 40(S1):317, 1995, doi:10.1515/bmte.1995.40.s1.317",
        url="https://physionet.org/content/ptbdb/1.0.0/",
        get=_wget("ptbdb/1.0.0", "ptb"),
        needs="patient001/s0010_re.hea, ..., or the challenge's S0001.hea, ... (folders below are searched)",
        labels="ptbxl-super",
        open=open_ptb,
        is_home=is_ptb,
        merge=True,
        n_records=549,
        download_GB=1.7,
        prepared_GB=1.4,
    ),
    "incart": Reader(
        title="St Petersburg INCART 12-lead database (PhysioNet/CinC 2021 1.0.3)",
        licence="CC BY 4.0",
        citation=_CINC2021,
        url=_CINC2021_URL,
        get=_wget("challenge-2021/1.0.3/training/st_petersburg_incart", "incart"),
        needs="I0001.hea and I0001.mat, ... (folders below are searched)",
        labels="cinc2021-26",
        open=partial(open_cohorts, "I"),
        is_home=partial(is_cohort, "I"),
        merge=True,
        n_records=74,
        download_GB=0.8,
        prepared_GB=0.8,
    ),
    "cinc2021": Reader(
        title="PhysioNet/CinC Challenge 2021 1.0.3",
        licence="CC BY 4.0",
        citation=_CINC2021,
        url=_CINC2021_URL,
        get=_wget("challenge-2021/1.0.3/training", "cinc2021/training"),
        needs="training/COHORT/..., or headers with their .mat files (folders below are searched); "
        "with --signals ptb-xl=DIR, PTB-XL's patients and folds are used",
        labels="cinc2021-26",
        open=open_cinc2021,
        is_home=is_cinc,
        merge=True,
        n_records=88253,
        download_GB=13.5,
        prepared_GB=13.4,
    ),
    "cinc2020": Reader(
        title="PhysioNet/CinC Challenge 2020 1.0.2",
        licence="CC BY 4.0",
        citation="Perez Alday et al., Physiological Measurement 41:124003, 2020, doi:10.1088/1361-6579/abc960",
        url="https://physionet.org/content/challenge-2020/1.0.2/",
        get=_wget("challenge-2020/1.0.2/training", "cinc2020/training"),
        needs="training/COHORT/..., or headers with their .mat files (folders below are searched); "
        "with --signals ptb-xl=DIR, PTB-XL's patients and folds are used",
        labels="cinc2020-24",
        open=open_cinc2020,
        is_home=is_cinc,
        merge=True,
        n_records=43101,
        download_GB=8.0,
        prepared_GB=8.0,
    ),
    "code15": Reader(
        title="CODE-15% 1.0.0",
        licence="CC BY 4.0",
        citation="Ribeiro et al., Zenodo, 2021, doi:10.5281/zenodo.4916206",
        url="https://zenodo.org/records/4916206",
        get=(
            "wget -c -P data/code15 https://zenodo.org/records/4916206/files/exams.csv",
            "for k in $(seq 0 17); do wget -c -P data/code15 https://zenodo.org/records/4916206/files/exams_part$k.zip"
            " && unzip -n data/code15/exams_part$k.zip -d data/code15; done",
        ),
        needs="exams.csv and any of exams_part0.hdf5 to exams_part17.hdf5 (unpacked; folders below are searched)",
        labels="code15-6",
        open=open_code15,
        is_home=is_code15,
        n_records=345_779,
        download_GB=68.0,
        prepared_GB=34,
    ),
    "mimic-iv-ecg": Reader(
        title="MIMIC-IV-ECG 1.0 (labels: the cart's own statements)",
        licence="ODbL 1.0",
        citation="Gow et al., PhysioNet, 2023, doi:10.13026/4nqg-sb35",
        url="https://physionet.org/content/mimic-iv-ecg/1.0/",
        get=_wget("mimic-iv-ecg/1.0", "mimic-iv-ecg"),
        needs="record_list.csv, machine_measurements.csv and files/pNNNN/pNNNNNNNN/sNNNNNNNN/ (any of them)",
        labels="mimic-machine",
        open=open_mimic,
        is_home=is_mimic,
        n_records=800_035,
        download_GB=96.0,
        prepared_GB=97,
        unlabelled=True,
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
        licence="Apache-2.0 (dialogues; pictures of MIMIC-IV-ECG, PTB-XL and CODE-15% under their own)",
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
        prepared_GB=40,
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
        licence="none in its card; made from PTB-XL, CPSC 2018, CSN, G12EC, CODE-15% and published pictures",
        citation="Liu et al., Teach Multimodal LLMs to Comprehend Electrocardiographic Images, 2024, arXiv:2410.19008",
        url="https://huggingface.co/datasets/PULSE-ECG/ECGBench",
        get=("hf download PULSE-ECG/ECGBench --repo-type dataset --local-dir data/ecgbench",),
        needs="SUBSET/test-*.parquet, or SUBSET.json with images/ (subsets: ptb-test, cpsc-test, ecgqa-test, ...)",
        labels="",
        open=open_ecgbench,
        is_home=is_ecgbench,
        n_records=11_247,
        download_GB=14.4,
        prepared_GB=14.4,
    ),
    "dicom": Reader(
        title="a folder of DICOM ECG waveforms",
        licence="the owner's",
        citation="",
        url="",
        get=("put the .dcm files into data/dicom, and a table labels.csv beside them where there are labels",),
        needs=".dcm files (folders below are searched)",
        labels="",
        open=open_dicom,
        is_home=is_dicom,
        any_folder=True,
        unlabelled=True,
    ),
    "wfdb": Reader(
        title="a folder of WFDB records with a label table",
        licence="the owner's",
        citation="",
        url="",
        get=("put the records into data/wfdb, and a table labels.csv beside them (or name one with --table)",),
        needs=".hea files (folders below are searched), and labels.csv or --table FILE",
        labels="",
        open=open_wfdb,
        is_home=is_wfdb,
        any_folder=True,
        unlabelled=True,
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
    if READERS[name].any_folder:
        return folder if is_home(folder) else None
    return locate(folder, is_home, merge=READERS[name].merge)


def detect(folder: Path) -> str | None:
    """Name of the dataset that lies in a folder, or just below it; None where none is found.

    The nearest level decides, so that the tree of a challenge is not taken for one of its cohorts; on one level, the
    first row.
    """
    for level in levels(folder) if folder.is_dir() else ():
        for name, reader in READERS.items():
            if reader.is_home is not None and not reader.any_folder:
                homes = sum(map(reader.is_home, level))
                if homes == 1 or (homes and reader.merge):
                    return name
    kinds = (
        name for name, reader in READERS.items() if reader.any_folder and reader.is_home and reader.is_home(folder)
    )
    return next(kinds, None)
