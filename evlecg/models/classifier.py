"""Classifiers of pages and of signals as one module: hidden tokens, the state that the head reads, a logit a label.

Every classification head of transformers ends in a linear layer that reads one pooled state. What goes into that layer
and what comes out, and the backbone's hidden states, are caught on their way through the ordinary forward call, so no
family needs code of its own. An encoder without such a head (`AutoModel`) gets one: a linear readout of its mean
token, kept beside the backbone in `readout.safetensors` (`weight` [K, D], `bias` [K], in float):

    encoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    readout = load_file(folder / "readout.safetensors")
    logits = encoder(inputs).last_hidden_state.mean(1) @ readout["weight"].T + readout["bias"]

Shape legend: B records, R rows that the backbone reads (12 a record where leads enter apart), N visual tokens of a
record, C their width, P width of the pooled state, D the larger of the two, K labels, A answers, S positions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evlecg.errors import EvlecgError
from evlecg.schema import LEADS, AnswerLogits, ModelFacts, Outputs, Side

READOUT = "readout.safetensors"
MOST_PREFIX = 16  # class, distillation and register tokens in front of a grid


class Classifier(nn.Module):
    """A backbone with a head, whatever the family.

    Args:
        model: transformers' model, with a classification head or without.
        readout: the head of a model that has none of its own.
        labels: label code of each row of the head, None where it is not known.
        exclusive: the head's classes exclude one another (softmax), rather than each being present or not (sigmoid).
        apart: leads enter as rows of their own.
        pictures: reads pages, not signals.

    Attributes:
        n_tokens: visual tokens of a record.
        grid: rows and columns of the tokens on the picture; of a model that reads signals, series and tokens of each.
    """

    def __init__(
        self, model: Any, *, readout: nn.Linear | None, labels: tuple[str | None, ...], exclusive: bool, apart: bool,
        pictures: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.readout = readout
        self.labels = labels
        self.exclusive = exclusive
        self.apart = apart
        self.pictures = pictures
        self.n_tokens, self.grid = 0, (0, 0)
        self._prefix, self._channels_first, self._width = 0, False, 0
        self._base_name = "" if readout is not None else _base_name(model)
        self._head_name = "" if readout is not None else _head_name(model)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def head(self) -> nn.Linear:
        """The last layer: pooled state in, a logit a label out."""
        return self.readout if self.readout is not None else self.model.get_submodule(self._head_name)

    @property
    def rows(self) -> dict[str, int]:
        """Label code -> row of the head."""
        return {label: row for row, label in enumerate(self.labels) if label is not None}

    @property
    def facts(self) -> ModelFacts:
        """What an objective has to know; valid once `measure` has been called."""
        return ModelFacts(max(self._width, self.head.in_features), 2, visual_width=self._width)

    @torch.no_grad()
    def measure(self, inputs: dict[str, Tensor]) -> None:
        """Finds out from one record how this model's hidden states are laid out.

        Args:
            inputs: its keyword arguments, on any device.

        Raises:
            EvlecgError: they are not tokens (one vector a record), or not on a grid that can be told.
        """
        was_training = self.training
        self.eval()
        try:
            device = self.head.weight.device
            state = self._run({name: value.to(device) for name, value in inputs.items()})["states"][-1]
        finally:
            self.train(was_training)
        wanted = self.head.in_features
        name = type(self.model).__name__
        if state.ndim not in (3, 4) or (self.pictures and "pixel_values" not in inputs):
            raise EvlecgError(f"{name} has hidden states of shape {tuple(state.shape)}, not tokens")
        channel_axis = 1 if self.pictures or state.ndim == 3 else -1
        self._channels_first = state.shape[channel_axis] == wanted != state.shape[-1]
        if self.pictures and state.ndim == 4 and state.shape[-1] != wanted:
            self._channels_first = True  # as feature maps are, where neither axis tells
        self._prefix = 0
        if self.pictures and state.ndim == 4:
            rows, columns = state.shape[2:] if self._channels_first else state.shape[1:3]
            self.grid = int(rows), int(columns)
        elif self.pictures:
            found = _grid(state.shape[2 if self._channels_first else 1], inputs["pixel_values"].shape[-2:], self.config)
            if found is None:
                raise EvlecgError(f"cannot tell where the {state.shape[1]} tokens of {name} lie on the page")
            self.grid, self._prefix = found
        else:
            if state.ndim == 4 and getattr(self.config, "use_cls_token", False):
                self._prefix = 1
            series = state.shape[1] if state.ndim == 4 else 1
            each = state.shape[2] if state.ndim == 4 or self._channels_first else state.shape[1]
            self.grid = series * (len(LEADS) if self.apart else 1), int(each) - self._prefix
        tokens_BNC = self._tokens(state)
        self.n_tokens, self._width = tokens_BNC.shape[1], tokens_BNC.shape[2]

    def forward(self, *, visual_layer: int = -1, **inputs: Tensor) -> dict[str, Tensor]:
        """Runs the model.

        Returns:
            `last`, `visual` (of the chosen layer) and `projected` (the first layer whose tokens are the last's: what
            enters a transformer, or a hierarchy's last stage) tokens [B, N, C], `pooled` [B, P], `logits` [B, K].

        Raises:
            EvlecgError: the chosen layer has other tokens than the last one.
        """
        assert self.n_tokens, "measure first"
        seen = self._run(inputs)
        layers = [self._tokens(state) for state in seen["states"] if state.ndim == seen["states"][-1].ndim]
        last_BNC = layers[-1]
        try:
            visual_BNC = layers[visual_layer]
        except IndexError:
            raise EvlecgError(f"a model of {len(layers)} hidden layers has no layer {visual_layer}",
                              where="objective.visual_layer") from None  # fmt: skip
        if visual_BNC.shape != last_BNC.shape:
            raise EvlecgError("the chosen layer of this model has other tokens than its last", hint="-1: the last",
                              where="objective.visual_layer")  # fmt: skip
        projected_BNC = next(layer for layer in layers if layer.shape == last_BNC.shape)
        pooled_BP, logits_BK = seen.get("pooled"), seen.get("logits")
        if pooled_BP is None or logits_BK is None:
            pooled_BP = last_BNC.mean(1)
            logits_BK = self.head(pooled_BP)
        elif self.apart:  # the last layer is affine: the mean of its logits is the logit of the mean state
            pooled_BP, logits_BK = (
                value.unflatten(0, (-1, len(LEADS))).mean(1) for value in (pooled_BP, logits_BK)
            )  # fmt: skip
        return {
            "last": last_BNC, "visual": visual_BNC, "projected": projected_BNC, "pooled": pooled_BP,
            "logits": logits_BK,
        }  # fmt: skip

    def save_pretrained(self, folder: Path, **kwargs: Any) -> None:
        """Writes what transformers loads, and the readout of a model without a head of its own."""
        from safetensors.torch import save_file

        self.model.save_pretrained(folder, **kwargs)
        if self.readout is not None and self.labels:
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.readout.named_parameters()}
            save_file(tensors, Path(folder) / READOUT, metadata={"format": "pt"})

    def _run(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Hidden states of the backbone, and what its head read and said (absent where it has none)."""
        base = self.model.get_submodule(self._base_name)
        with _caught(base, None if self.readout is not None else self.head) as seen:
            self.model(**inputs, output_hidden_states=True, return_dict=True)
        output = seen.pop("base")
        last = output["last_hidden_state"] if "last_hidden_state" in output else output[0]
        hidden = output.get("hidden_states") or (last,)
        seen["states"] = [*hidden[:-1], last]  # the last one behind the final norm
        return seen

    def _tokens(self, state: Tensor) -> Tensor:
        """Hidden states of any layout as tokens [B, N, C]."""
        if self.pictures and state.ndim == 4:
            return state.flatten(2).transpose(1, 2) if self._channels_first else state.flatten(1, 2)
        if self._channels_first and state.ndim == 3:
            state = state.transpose(1, 2)
        state = state[..., self._prefix :, :]
        if state.ndim == 4:  # [R, series, tokens, C]
            state = state.flatten(1, 2)
        return state.unflatten(0, (-1, len(LEADS))).flatten(1, 2) if self.apart else state


class ClassifierHead(nn.Module):
    """Reads answer logits off the states that predict: what the losses see of a classifier's head.

    Args:
        classifier: its last layer is shared, not copied.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.head = classifier.head
        self.exclusive = classifier.exclusive

    def forward(self, states_AD: Tensor, side: Side) -> Tensor:
        """Logits [A, 2] of yes and no."""
        assert side.answer_label_A is not None
        return label_logits(self.head(states_AD[:, : self.head.in_features]), side.answer_label_A, self.exclusive)


def label_logits(logits_AK: Tensor, label_A: Tensor, exclusive: bool) -> Tensor:
    """Logits [A, 2] of yes and no for one label each.

    Independent labels: (z, 0), whose softmax is the sigmoid of z. Exclusive classes: (z, logsumexp of the others),
    whose softmax is the class's share.

    Args:
        logits_AK: a row of the head's logits for each answer.
        label_A: which of them is asked about; -1: the head does not know the label, and the answer is NaN.
        exclusive: whether the classes exclude one another.
    """
    row_A1 = label_A.clamp_min(0)[:, None]
    yes_A = logits_AK.gather(1, row_A1)[:, 0]
    no_A = torch.zeros_like(yes_A)
    if exclusive:
        no_A = logits_AK.scatter(1, row_A1, -math.inf).logsumexp(1)
    return torch.stack([yes_A, no_A], dim=1).masked_fill(label_A[:, None] < 0, math.nan)


def classifier_outputs(classifier: Classifier, side: Side, *, visual_layer: int = -1, model: Any = None) -> Outputs:
    """`models.outputs.forward` for classifiers: tokens at the visual positions, the pooled state at all others."""
    seen = (classifier if model is None else model)(**side.inputs, visual_layer=visual_layer)
    last_BNC, pooled_BP = seen["last"], seen["pooled"]
    width, n_positions = max(last_BNC.shape[2], pooled_BP.shape[1]), side.valid_BS.shape[1]
    pooled_B1D = F.pad(pooled_BP, (0, width - pooled_BP.shape[1]))[:, None].to(last_BNC.dtype)
    predicts_BS = torch.zeros_like(side.valid_BS)
    predicts_BS[side.answer_A2[:, 0], side.answer_A2[:, 1] - 1] = True
    # what stands at an answer has not read it: it says nothing to the student, so nothing may move it
    behind_BSD = torch.where(predicts_BS[..., None], pooled_B1D, pooled_B1D.detach())[:, last_BNC.shape[1] :]
    hidden_BSD = torch.cat([F.pad(last_BNC, (0, width - last_BNC.shape[2])), behind_BSD], dim=1)
    assert hidden_BSD.shape[1] == n_positions and side.answer_label_A is not None
    return Outputs(
        hidden_BSD=hidden_BSD,
        visual_BND=seen["visual"],
        projected_BND=seen["projected"],
        answer_logits=AnswerLogits(
            label_logits(seen["logits"][side.answer_A2[:, 0]], side.answer_label_A, classifier.exclusive)
        ),
        side=side,
    )  # fmt: skip


def is_exclusive(config: Any) -> bool:
    """Whether a checkpoint's classes exclude one another: the rule of transformers' classification pipelines."""
    problem = getattr(config, "problem_type", None)
    return problem == "single_label_classification" or (problem is None and _n_rows(config) > 1)


def load_classifier(checkpoint: Any, *, torch_dtype: Any, seed: int, labels: tuple[str, ...], leads: str) -> Classifier:
    """Loads a classifier or an encoder; every weight of the backbone is accounted for.

    Args:
        checkpoint: a `models.load.Checkpoint` that is not of kind "text".
        torch_dtype: dtype or "auto".
        seed: of a new head, and of all weights of an untrained built-in.
        labels: labels that a student is to tell apart: its head is kept where it knows them all, each by itself;
            otherwise it gets a new one, for these labels. Empty: the head stays what it is.
        leads: how leads enter (`TraceForm.leads`).

    Raises:
        EvlecgError: weights that are missing, left over or of another shape; a head that is not one linear layer.
    """
    from safetensors.torch import load_file
    from transformers import AutoModel

    config = copy.deepcopy(checkpoint.config)
    known = tuple(checkpoint.labels)
    readout_file = Path(checkpoint.source) / READOUT
    own_head = bool(checkpoint.model_class)
    can_keep = bool(labels) and set(labels) <= set(known) and not is_exclusive(config)
    fresh = bool(labels) and not can_keep
    if fresh:
        known = labels
        _name_labels(config, labels)
    kind = _model_class(checkpoint.model_class) if own_head else AutoModel
    remote = {"trust_remote_code": True} if checkpoint.trust_remote_code else {}
    model: Any
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if checkpoint.trained:
            model, info = kind.from_pretrained(
                checkpoint.source, config=config, dtype=torch_dtype, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=fresh, **remote,
            )  # fmt: skip
            untrained = fresh or not any(known)
            _check_keys(info, model, _base_name(model) if own_head else "", untrained, checkpoint.name)
        else:
            model = kind(config) if own_head else AutoModel.from_config(config)
            model.to(model.dtype if torch_dtype == "auto" else torch_dtype)
        readout = None
        if not own_head:
            width = int(getattr(config, "hidden_size", 0) or getattr(config, "hidden_sizes", [0])[-1])
            if not width:
                raise EvlecgError("an encoder without a head must say its width", where=checkpoint.name,
                                  hint="config.hidden_size")  # fmt: skip
            readout = nn.Linear(width, len(known) or 1, dtype=model.dtype)
            nn.init.normal_(readout.weight, std=0.02)
            nn.init.zeros_(readout.bias)
    if readout is not None and not fresh and any(known):
        if not readout_file.is_file():
            raise EvlecgError("the labels of an encoder have no readout", where=readout_file, hint="train it again")
        readout.load_state_dict(load_file(readout_file))
    if hasattr(model.config, "apply_spec_augment"):
        model.config.apply_spec_augment = False  # a token that was masked at random cannot be compared with anything
    pictures = checkpoint.kind == "image"
    classifier = Classifier(
        model, readout=readout, labels=known, exclusive=is_exclusive(config) and own_head, pictures=pictures,
        apart=leads == "apart" and not pictures,
    )  # fmt: skip
    return classifier.eval()


def _model_class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _name_labels(config: Any, labels: tuple[str, ...]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: row for row, label in enumerate(labels)}
    config.problem_type = "multi_label_classification"
    if hasattr(config, "num_targets"):  # the time-series families count their classes there
        config.num_targets = len(labels)


def _n_rows(config: Any) -> int:
    return int(getattr(config, "num_targets", 0) or config.num_labels)


def _check_keys(info: dict[str, Any], model: Any, base_name: str, untrained: bool, where: str) -> None:
    """Weights that do not fit are an error; those of a head that is new, or that nobody asks, are not."""
    base = model.get_submodule(base_name)
    prefix = f"{base_name}." if base_name else ""
    parts = {name for name, _ in base.named_children()} | {name for name, _ in base.named_parameters(recurse=False)}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ())
        if untrained:  # a pre-trained encoder's file also holds heads and poolers, and lacks ours
            keys = [key for key in keys if key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in parts
                    and "pooler" not in key.split(".")]  # fmt: skip
        if keys:
            raise EvlecgError(
                f"{len(keys)} weights are {kind.removesuffix('_keys')}: {', '.join(keys[:3])}"
                + (" ..." if len(keys) > 3 else ""),
                where=where,
                hint="a model with random weights must not pass as trained; check config.json against the weights",
            )


def _base_name(model: Any) -> str:
    """Name of the backbone inside of a model with a head: where transformers names none, its largest part."""
    if model.base_model is not model:
        return model.base_model_prefix
    sizes = {name: sum(value.numel() for value in part.parameters()) for name, part in model.named_children()}
    return max(sizes, key=lambda name: sizes[name])


def _head_name(model: Any) -> str:
    """Name of the one linear layer that tells the classes apart.

    Raises:
        EvlecgError: there are none or several.
    """
    base = set(model.get_submodule(_base_name(model)).modules())
    wanted = _n_rows(model.config)
    found = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == wanted and module not in base
    ]  # fmt: skip
    if len(found) != 1:
        raise EvlecgError(f"the head of {type(model).__name__} is not one linear layer", hint="name another family")
    return found[0]


def _grid(n_tokens: int, pixels: Any, config: Any) -> tuple[tuple[int, int], int] | None:
    """Rows and columns of tokens on a picture, and how many stand in front of them; None where it cannot be told."""
    height, width = int(pixels[0]), int(pixels[1])
    patch = getattr(config, "patch_size", None)
    candidates = []
    if isinstance(patch, int):
        candidates.append((height // patch, width // patch))
    rows = math.isqrt(n_tokens * height // width)
    if rows:
        candidates.append((rows, round(rows * width / height)))
    for rows, columns in candidates:
        if 0 <= n_tokens - rows * columns <= MOST_PREFIX:
            return (rows, columns), n_tokens - rows * columns
    return None


@contextmanager
def _caught(base: nn.Module, head: nn.Module | None) -> Iterator[dict[str, Any]]:
    """What the backbone returns and what the head reads and returns, during the block."""
    seen: dict[str, Any] = {}

    def base_hook(module: nn.Module, arguments: Any, output: Any) -> None:
        seen["base"] = output if isinstance(output, dict) else {"last_hidden_state": output[0]}

    def head_hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
        seen["pooled"], seen["logits"] = arguments[0], output

    handles = [base.register_forward_hook(base_hook)]
    if head is not None:
        handles.append(head.register_forward_hook(head_hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
