"""Classifiers of every kind as one module: heads kept, made and refused; logits that are the plain model's."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close

from evlecg.data.synthetic import generate
from evlecg.errors import EvlecgError
from evlecg.models import load as models
from evlecg.models.classifier import READOUT, label_logits
from evlecg.models.encode import Turn
from evlecg.models.outputs import AnswerHead, forward
from evlecg.models.views import encoder_for
from evlecg.page.render import render
from evlecg.page.trace import trace
from evlecg.recipe import SignalConfig
from tests import tiny_classifiers
from tests.tiny_classifiers import SUPER

NAMES = [*tiny_classifiers.FAMILIES, "hubert_ecg"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    made = {name: tiny_classifiers.write(root / name, name) for name in tiny_classifiers.FAMILIES}
    return made | {"hubert_ecg": tiny_classifiers.hubert_ecg(root / "hubert_ecg")}


@pytest.fixture(scope="module")
def records():
    return list(generate({"test": 2}, seed=0))


def loaded_from(folder, labels=(), signal=None, kind="auto"):
    checkpoint = models.inspect(str(folder), kind=kind, trust_remote_code=True)
    return models.load(checkpoint, labels=labels, signal=signal)


def encoded(loaded, records, *labels):
    encoder = encoder_for(loaded)
    if loaded.form is None:
        views = [render(record.signal_mV, record.fs_hz, size_px=encoder.size_px) for record in records]
    else:
        views = [trace(record.signal_mV, record.fs_hz, loaded.form) for record in records]
    turns = [Turn("Is it there?", "yes" if place % 2 else "no", label=label) for place, label in enumerate(labels)]
    return encoder.encode(views, [turns] * len(records))


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_the_plain_models_logits(folders, records, name):
    import transformers

    loaded = loaded_from(folders[name], labels=("CD",) if name == "hubert_ecg" else ())
    side = encoded(loaded, records, "HYP" if name != "hubert_ecg" else "CD", "CD", "MI")
    with torch.no_grad():
        outputs = forward(loaded, side)
    if name == "hubert_ecg":
        encoder = transformers.AutoModel.from_pretrained(folders[name], trust_remote_code=True).eval()
        with torch.no_grad():
            mean_BC = encoder(**side.inputs).last_hidden_state.mean(1)
        z_BK = F.linear(mean_BC, loaded.model.readout.weight, loaded.model.readout.bias)
        wanted = torch.stack([z_BK[:, 0], z_BK[:, 0]], 1)
        assert bool(outputs.answer_logits_AV[2::3].isnan().all()), "a label that the head does not have is NaN"
    else:
        kind = getattr(transformers, loaded.checkpoint.model_class)
        with torch.no_grad():
            result = kind.from_pretrained(folders[name]).eval()(**side.inputs)
        z_BK = next(result[key] for key in ("logits", "prediction_logits", "prediction_outputs") if key in result)
        wanted = z_BK[:, [SUPER.index("HYP"), SUPER.index("CD")]]
    found_AV = outputs.answer_logits_AV.unflatten(0, (2, 3))
    assert_close(found_AV[:, :2, 0], wanted, atol=1e-6, rtol=1e-5)
    assert_close(found_AV[:, :2, 1], torch.zeros(2, 2))
    assert len(set(wanted.flatten().tolist())) > 1


@pytest.mark.parametrize("name", NAMES)
def test_the_states_that_predict_give_the_logits_and_the_tokens_stand_first(folders, records, name):
    loaded = loaded_from(folders[name], labels=("NORM", "MI"))
    side = encoded(loaded, records, "MI", "NORM")
    outputs = forward(loaded, side)
    facts = loaded.facts
    states_AD = outputs.hidden_BSD[side.answer_A2[:, 0], side.answer_A2[:, 1] - 1]
    assert_close(AnswerHead(loaded)(states_AD, side), outputs.answer_logits_AV, atol=1e-6, rtol=1e-5)
    n = loaded.model.n_tokens
    assert outputs.hidden_BSD.shape == (2, n + 4, facts.width)
    assert outputs.visual_BND.shape == outputs.projected_BND.shape == (2, n, facts.token_width)
    assert_close(outputs.hidden_BSD[:, :n, : facts.token_width], outputs.visual_BND)
    assert not outputs.hidden_BSD[:, :n, facts.token_width :].any()
    assert bool(side.valid_BS.all()) and side.answer_ids_A.tolist() == [1, 0, 1, 0]
    # what stands at an answer has not read it: nothing there may move the student
    at_answers = outputs.hidden_BSD[side.answer_A2[:, 0], side.answer_A2[:, 1]]
    assert_close(at_answers, states_AD)
    weights = list(loaded.model.parameters())

    def moved(states):
        found = torch.autograd.grad(states.sum(), weights, allow_unused=True, retain_graph=True)
        return any(gradient is not None and bool(gradient.any()) for gradient in found)

    assert moved(states_AD) and not moved(at_answers)


def test_cross_entropy_on_the_answer_is_binary_cross_entropy():
    logits_AK = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    label_A = torch.tensor([0, 1, 2, 2, 1, 0])
    answer_A = torch.tensor([0, 1, 1, 0, 0, 1])  # 0 is yes
    pairs_A2 = label_logits(logits_AK, label_A, exclusive=False)
    z_A = logits_AK[torch.arange(6), label_A]
    wanted = F.binary_cross_entropy_with_logits(z_A, 1.0 - answer_A)
    assert_close(F.cross_entropy(pairs_A2, answer_A), wanted)


def test_classes_that_exclude_one_another_keep_their_shares():
    logits_AK = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    label_A = torch.tensor([0, 4, 2, -1])
    share_A = label_logits(logits_AK, label_A, exclusive=True).softmax(-1)[:, 0]
    wanted_A = logits_AK.softmax(-1)[torch.arange(3), label_A[:3]]
    assert_close(share_A[:3], wanted_A)
    assert bool(share_A[3].isnan())


def test_a_head_is_read_as_its_pipeline_reads_it(tmp_path, records):
    """No problem_type and several classes: transformers' image-classification pipeline takes the softmax."""
    folder = tiny_classifiers.write(tmp_path / "vit", "vit")
    config = json.loads((folder / "config.json").read_text())
    config["problem_type"] = None
    (folder / "config.json").write_text(json.dumps(config))
    loaded = loaded_from(folder)
    side = encoded(loaded, records, *SUPER)
    with torch.no_grad():
        outputs = forward(loaded, side)
        logits_BK = loaded.model.model(**side.inputs).logits
    shares_BK = outputs.answer_logits_AV.softmax(-1)[:, 0].unflatten(0, (2, 5))
    assert_close(shares_BK, logits_BK.softmax(-1))
    # such a head cannot say two labels at once: a student gets a new one, although the names fit
    assert loaded_from(folder, labels=SUPER).model.exclusive is False


def test_a_head_that_knows_the_labels_is_kept_and_another_is_made_from_the_seed(folders):
    kept = loaded_from(folders["vit"], labels=("HYP", "MI")).model
    own = load_file(folders["vit"] / "model.safetensors")["classifier.weight"]
    assert_close(kept.head.weight, own)
    assert kept.rows == {label: row for row, label in enumerate(SUPER)}
    checkpoint = models.inspect(str(folders["vit"]))
    first, again, other = (models.load(checkpoint, labels=("AFIB", "MI"), seed=seed).model for seed in (1, 1, 2))
    assert first.rows == {"AFIB": 0, "MI": 1} and first.head.weight.shape == (2, 24)
    assert_close(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert_close(first.model.vit.embeddings.cls_token, kept.model.vit.embeddings.cls_token)
    assert models.inspect(str(folders["vit"])).config.num_labels == 5, "the checkpoint's own config stays as it is"


def test_a_pretrained_encoder_gets_a_head_and_a_damaged_one_an_error(tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining

    folder = tmp_path / "pretrained"
    config = Wav2Vec2Config(
        **tiny_classifiers.AUDIO, codevector_dim=8, proj_codevector_dim=8, num_codevectors_per_group=4
    )
    Wav2Vec2ForPreTraining(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=100).save_pretrained(folder)
    assert loaded_from(folder, labels=("MI",)).model.rows == {"MI": 0}
    assert loaded_from(folder).model.rows == {}, "as a teacher it knows no label, and its states can be read"
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "encoder.layers.1" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(EvlecgError, match="1 weights are missing"):
        loaded_from(folder, labels=("MI",))
    tensors["wav2vec2.encoder.layers.2.layer_norm.weight"] = torch.ones(24)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvlecgError, match="1 weights are unexpected"):
        loaded_from(folder, labels=("MI",))


def test_a_head_that_was_trained_must_be_there(tmp_path):
    folder = tiny_classifiers.write(tmp_path / "vit", "vit")
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvlecgError, match=r"classifier\.weight"):
        loaded_from(folder)
    assert loaded_from(folder, labels=("AFIB",)).model.rows == {"AFIB": 0}, "a new head needs no old one"


def test_an_encoder_without_a_head_keeps_its_readout_beside_it(folders, records, tmp_path):
    loaded = loaded_from(folders["hubert_ecg"], labels=("AFIB", "MI"))
    with torch.no_grad():
        loaded.model.readout.bias.copy_(torch.tensor([3.0, -2.0]))
        wanted = forward(loaded, encoded(loaded, records, "MI", "AFIB")).answer_logits_AV
    loaded.model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "hubert_ecg.py").is_file(), "its own code goes with it"
    again = loaded_from(tmp_path / "saved")
    with torch.no_grad():
        found = forward(again, encoded(again, records, "MI", "AFIB")).answer_logits_AV
    assert_close(found, wanted)
    (tmp_path / "saved" / READOUT).unlink()
    with pytest.raises(EvlecgError, match="no readout"):
        loaded_from(tmp_path / "saved")


def test_leads_apart_are_rows_of_their_own_whose_logits_are_averaged(folders, records):
    loaded = loaded_from(folders["wav2vec2"], signal=SignalConfig(leads="apart", window_s=2.0))
    side = encoded(loaded, records, "MI")
    assert side.inputs["input_values"].shape == (24, 200)
    assert side.visual_BS.sum(1).tolist() == [12 * 9, 12 * 9]
    with torch.no_grad():
        outputs = forward(loaded, side)
        logits_RK = loaded.model.model(**side.inputs).logits
    assert_close(outputs.answer_logits_AV[:, 0], logits_RK.unflatten(0, (2, 12)).mean(1)[:, SUPER.index("MI")])
    with torch.no_grad():  # tokens of one lead do not depend on another lead
        changed = {"input_values": side.inputs["input_values"].clone()}
        changed["input_values"][3] += 1.0
        moved_BNC = loaded.model(**changed)["last"] - outputs.visual_BND
    moved_LN = moved_BNC[0].abs().amax(1).unflatten(0, (12, 9))
    assert bool((moved_LN[3] > 0).all()) and moved_LN.sum(1).nonzero().flatten().tolist() == [3]


def test_layers_with_other_tokens_are_refused(folders, records):
    loaded = loaded_from(folders["swin"])
    side = encoded(loaded, records, "MI")
    forward(loaded, side, visual_layer=-2)
    with pytest.raises(EvlecgError, match="other tokens"):
        forward(loaded, side, visual_layer=0)
    with pytest.raises(EvlecgError, match="no layer 17"):
        forward(loaded, side, visual_layer=17)


def test_a_backbone_that_has_no_name_of_its_own(tmp_path, records):
    """CLIP's classifier has no base model by transformers' count, and its checkpoints hold a text tower too."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 50}, vision_config=small | {"image_size": 56, "patch_size": 14}
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(
        tmp_path / "clip"
    )
    loaded = loaded_from(tmp_path / "clip", labels=("MI", "CD"))
    side = encoded(loaded, records, "CD", "MI")
    with torch.no_grad():
        outputs, result = forward(loaded, side), loaded.model.model(**side.inputs)
    assert side.visual_BS.sum(1).tolist() == [16, 16]
    assert_close(outputs.answer_logits_AV[:, 0].unflatten(0, (2, 2)), result.logits[:, [1, 0]])
    box_N4 = side.visual_box_BN4[0]
    assert_close(box_N4[-1], torch.tensor([0.75, 0.75, 1, 1]), atol=0.005, rtol=0)  # nothing of the page is cropped
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    lost = {name: value for name, value in tensors.items() if "vision_model.encoder.layers.1.mlp" not in name}
    save_file(lost, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvlecgError, match="weights are missing"):
        loaded_from(tmp_path / "clip", labels=("MI", "CD"))
