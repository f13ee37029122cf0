"""What a checkpoint is, from its config alone."""

from __future__ import annotations

import json

import pytest

from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.models.kinds import kind_of, signal_config, signal_form
from evlecg.models.labels import label_codes
from evlecg.models.trained import TrainedWith, trained_with
from evlecg.recipe import SignalConfig
from tests import tiny_classifiers


class Config:
    """As much of a transformers config as a form is made from."""

    def __init__(self, model_type="hubert", **more):
        self.model_type = model_type
        self.__dict__.update(more)


class Extractor:
    def __init__(self, sampling_rate=16000, do_normalize=True):
        self.sampling_rate, self.do_normalize = sampling_rate, do_normalize


@pytest.mark.parametrize(
    ("family", "kind", "model_class"),
    [
        ("llava", "text", ""),
        ("vit", "image", "ViTForImageClassification"),
        ("convnextv2", "image", "ConvNextV2ForImageClassification"),
        ("deit", "image", "DeiTForImageClassification"),
        ("wavlm", "signal", "WavLMForSequenceClassification"),
        ("patchtst", "signal", "PatchTSTForClassification"),
        ("hubert_ecg", "signal", ""),
        ("no_such_family", "text", ""),  # whose error is that of language models
    ],
)
def test_the_family_decides(family, kind, model_class, tmp_path):
    found = kind_of(str(tmp_path), {"model_type": family}, "auto", where="X")
    assert (found.name, found.model_class) == (kind, model_class)


def test_a_saved_student_says_its_kind_and_a_user_overrules_all(tmp_path):
    config = {"model_type": "vit"}
    TrainedWith(kind="signal").write(tmp_path)
    assert kind_of(str(tmp_path), config, "auto", where="X").name == "signal"
    assert kind_of(str(tmp_path), config, "image", where="X").name == "image"
    (tmp_path / "evlecg.json").write_text("{")
    assert kind_of(str(tmp_path), config, "auto", where="X").name == "image"


def test_spectrograms_and_unknown_remote_code_are_refused(tmp_path):
    with pytest.raises(EvlecgError, match="spectrograms"):
        kind_of(str(tmp_path), {"model_type": "whisper"}, "auto", where="X")
    remote = {"model_type": "mystery", "auto_map": {"AutoModel": "m.M"}}
    with pytest.raises(EvlecgError, match="student_kind"):
        kind_of(str(tmp_path), remote, "auto", where="X")
    assert kind_of(str(tmp_path), remote, "signal", where="X").model_class == ""
    remote["auto_map"]["AutoModelForAudioClassification"] = "m.C"
    found = kind_of(str(tmp_path), remote, "auto", where="X")
    assert (found.name, found.model_class) == ("signal", "AutoModelForAudioClassification")


def test_code_that_is_not_trusted_does_not_run(tmp_path):
    folder = tiny_classifiers.hubert_ecg(tmp_path / "remote")
    trap = tmp_path / "it-ran"
    code = (folder / "hubert_ecg.py").read_text()
    (folder / "hubert_ecg.py").write_text(f"open({str(trap)!r}, 'w').close()\n" + code)
    with pytest.raises(EvlecgError, match="trust-remote-code"):
        models.inspect(str(folder))
    assert not trap.exists()
    checkpoint = models.inspect(str(folder), trust_remote_code=True)
    assert trap.exists() and checkpoint.kind == "signal" and checkpoint.trust_remote_code


def test_who_says_the_form_of_a_signal():
    def form(config, extractor=None, *asked):
        return signal_form(config, extractor, asked, where="X")

    ours = form(Config("hubert_ecg"))
    assert (ours.fs_hz, ours.n_samples, ours.leads, ours.scale, ours.band_hz) == (
        100.0, 500, "flattened", "range", (0.05, 47.0),
    )  # fmt: skip
    audio = form(Config(), Extractor())
    assert (audio.fs_hz, audio.n_samples, audio.scale, audio.leads) == (16000, 160000, "standard", "flattened")
    asked = SignalConfig(fs_hz=100, window_s=4, leads="apart", scale="none")
    told = form(Config("hubert_ecg"), Extractor(), asked)
    assert (told.fs_hz, told.n_samples, told.leads, told.scale) == (100, 400, "apart", "none")
    assert told.band_hz == (0.05, 47.0), "what is not asked for stays the family's"
    unfiltered = form(Config("hubert_ecg"), None, SignalConfig(low_hz=0, high_hz=0))
    assert unfiltered.band_hz == (0.0, 0.0)
    again = form(Config(), None, SignalConfig(), signal_config(told))
    assert again == told, "evlecg.json holds all of it"
    patches = form(Config("patchtst", context_length=1000, num_input_channels=12))
    assert (patches.fs_hz, patches.n_samples, patches.leads) == (100.0, 1000, "channels")
    apart = form(Config("patchtst", context_length=500, num_input_channels=1), None, SignalConfig(fs_hz=250))
    assert (apart.fs_hz, apart.n_samples, apart.window_s, apart.leads) == (250, 500, 2.0, "apart")


def test_forms_that_cannot_be():
    with pytest.raises(EvlecgError, match="sampling rate"):
        signal_form(Config(), None, (), where="X")
    with pytest.raises(EvlecgError, match="7 channels"):
        signal_form(Config("patchtst", context_length=500, num_input_channels=7), None, (), where="X")
    twelve = Config("patchtst", context_length=500, num_input_channels=12)
    with pytest.raises(EvlecgError, match="takes leads channels"):
        signal_form(twelve, None, (SignalConfig(leads="flattened"),), where="X")


def test_evlecg_json_keeps_kind_and_form(tmp_path):
    written = TrainedWith(kind="signal", signal=SignalConfig(100.0, 5.0, "apart", "range", 0.05, 47.0))
    written.write(tmp_path)
    assert trained_with(tmp_path) == written
    tree = json.loads((tmp_path / "evlecg.json").read_text())
    del tree["kind"], tree["signal"]  # as written before there were other kinds
    (tmp_path / "evlecg.json").write_text(json.dumps(tree))
    assert trained_with(tmp_path) == TrainedWith()


def test_class_names_become_label_codes():
    names = (
        "NORM", "atrial fibrillation", "I-AVB", "goldfish", "left_bundle_branch_block", "LABEL_5", "59118001",
        "Sinus Bradycardia", "complete left bundle branch block", "norm", "VPB",
    )  # fmt: skip
    assert label_codes(dict(enumerate(names))) == (
        "NORM", "AFIB", "1AVB", None, None, None, "RBBB", "SBRAD", "LBBB", None, "PVC",
    )  # fmt: skip
    assert label_codes({0: "goldfish", 1: "MI"}, own={"goldfish": "a fish"}) == ("goldfish", "MI")
