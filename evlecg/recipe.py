"""The recipe: everything that decides a run, as strict YAML and frozen dataclasses.

Unknown keys are errors that name the nearest key; `--set a.b=1` sets existing keys only; a run keeps the resolved
recipe, so that it can be repeated from its own folder. Field documentation lives in `metadata["help"]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from evlecg.errors import EvlecgError

METHOD_NAMES = (
    "evl", "ce", "seqkd", "kl", "rkl", "jsd", "uld", "multilevel_ot", "dskd", "minilm", "rkd", "feature", "em_kd",
)  # fmt: skip
# text: a page in, words out; image: a page in, a logit a label out; signal: a signal in, a logit a label out
KINDS = ("auto", "text", "image", "signal")


def _key(default: Any, help: str, *, choices: tuple[Any, ...] = (), low: float | None = None) -> Any:
    """A recipe key: its default, what it means, and what it may be (`low` is the smallest allowed number)."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low})


def _section(kind: type) -> Any:
    return field(default_factory=kind)


DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class DataConfig:
    """Which prepared folder is read, and what is asked about it."""

    dir: str | None = _key(None, "prepared folder or dataset name; null: the newest in ./data, else synthetic")
    labels: tuple[str, ...] = _key((), "label codes to ask about; empty: all that the folder assessed")
    tasks: tuple[str, ...] = _key(
        (), "yes_no, choose_all, multiple_choice, report, dialogue; empty: yes_no and dialogue as far as there are any"
    )
    question: str = _key("Does this ECG show {description}?", "wording of the yes/no question about one label")
    wording: str = _key(
        "plain",
        "of all questions: one, several of which one is drawn, or ECGBench's",
        choices=("plain", "varied", "ecgbench"),
    )
    choices: int = _key(4, "choices of a multiple-choice question", low=2)
    max_questions: int | None = _key(None, "draw at most so many questions a record", low=1)
    max_train: int | None = _key(None, "use the first N training records only (learning curves)", low=1)
    synthetic_train: int = _key(1000, "training records made when the synthetic set has to be made", low=1)
    synthetic_val: int = _key(300, "validation records made when the synthetic set has to be made", low=1)
    synthetic_test: int = _key(500, "test records made when the synthetic set has to be made", low=1)


@dataclass(frozen=True)
class PageConfig:
    """How signals become pages. Sizes are (width, height) in pixels; null means: what the processor wants."""

    layout: str = _key("3x4+1", "lead arrangement")
    speed_mm_s: float = _key(25.0, "paper speed", low=1)
    gain_mm_mV: float = _key(10.0, "height of a millivolt", low=0.1)
    grid: str = _key("pink", "grid colour", choices=("pink", "blue", "grey", "none"))
    paper: str = _key("auto", "paper colour; auto: what goes with the grid", choices=("auto", "white", "cream", "grey"))
    trace: str = _key("black", "colour of the trace", choices=("black", "blue", "red"))
    line_width_mm: float = _key(0.3, "width of the trace (never under one pixel)", low=0.05)
    lead_names: str = _key(
        "plain",
        "how leads are named: not at all, in grey, or on a patch without grid",
        choices=("none", "plain", "boxed"),
    )
    student_size: tuple[int, ...] | None = _key(None, "page size for the student [width, height]")
    teacher_size: tuple[int, ...] | None = _key(None, "page size for the teacher [width, height]")


def page_size(size: tuple[int, ...] | None) -> tuple[int, int] | None:
    """A page size of a recipe; None where the processor decides."""
    if size is None:
        return None
    if len(size) != 2 or min(size) < 16:
        raise EvlecgError(f"a page size is [width, height] in pixels, not {list(size)}", where="page")
    return size[0], size[1]


@dataclass(frozen=True)
class SignalConfig:
    """How a signal enters a model that reads signals. Null and auto: what the checkpoint, or its family, says."""

    fs_hz: float | None = _key(None, "sampling rate; null: the feature extractor's, or context over window", low=1)
    window_s: float | None = _key(None, "seconds that it sees; null: ten, or what the family was made for", low=0.1)
    leads: str = _key(
        "auto",
        "one after the other in one series, each in a series of its own, or all at once as channels",
        choices=("auto", "flattened", "apart", "channels"),
    )
    scale: str = _key(
        "auto",
        "millivolt as they are, zero mean and unit variance over all leads, or every lead from -1 to 1",
        choices=("auto", "none", "standard", "range"),
    )
    low_hz: float | None = _key(None, "lower edge of the band-pass filter; 0: none", low=0)
    high_hz: float | None = _key(None, "upper edge of the band-pass filter; 0: none", low=0)


@dataclass(frozen=True)
class AugmentConfig:
    """What disturbs training signals and pages. Keys are the most that can happen; null: what the level says.

    Every page draws its own amounts, between nothing and the most; a page without a disturbance is drawn as it is.
    """

    level: str = _key("none", "where the keys start from", choices=("none", "light", "photo"))
    share: float = _key(0.5, "share of the pages on which a disturbance appears, each by itself", low=0)
    teacher: bool = _key(True, "the teacher sees the same disturbed page; false: the clean one")
    wander_mV: float | None = _key(None, "baseline wander (0.05-0.5 Hz), largest excursion", low=0)
    mains_mV: float | None = _key(None, "mains hum (50 or 60 Hz), amplitude", low=0)
    muscle_mV: float | None = _key(None, "muscle noise, root mean square", low=0)
    scale: float | None = _key(None, "relative change of all amplitudes", low=0)
    start_s: float | None = _key(None, "latest second with which the page begins", low=0)
    flat_leads: int | None = _key(None, "leads that read nothing", low=0)
    swap: float | None = _key(None, "share of pages with two exchanged electrodes (changes what labels mean)", low=0)
    rotate_deg: float | None = _key(None, "rotation", low=0)
    shift: float | None = _key(None, "shift, as a share of the page; what leaves the page is cropped", low=0)
    zoom: float | None = _key(None, "relative change of the paper's size on the page", low=0)
    perspective: float | None = _key(None, "how far corners move, as a share of the page", low=0)
    creases: int | None = _key(None, "folds across the paper", low=0)
    tint: float | None = _key(None, "discolouration of the paper, in shares of white", low=0)
    shadow: float | None = _key(None, "darkening by shadows and uneven light, in shares of white", low=0)
    brightness: float | None = _key(None, "change of brightness, in shares of white", low=0)
    contrast: float | None = _key(None, "relative change of contrast", low=0)
    blur_mm: float | None = _key(None, "blur, standard deviation on the paper", low=0)
    noise: float | None = _key(None, "noise of print and sensor, standard deviation in shares of white", low=0)
    jpeg: int | None = _key(None, "loss of JPEG quality (60: down to quality 40)", low=0)


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    epochs: int = _key(3, "passes over the training records", low=1)
    max_steps: int | None = _key(None, "stop after this many optimizer steps", low=1)
    batch_size: int = _key(16, "records a step on each process", low=1)
    accumulation: int = _key(1, "batches summed into one optimizer step", low=1)
    lr: float = _key(2e-5, "peak learning rate of the student", low=0)
    aligner_lr: float | None = _key(None, "peak learning rate of aligner and projections; null: as the student's")
    weight_decay: float = _key(0.01, "AdamW weight decay", low=0)
    warmup: float = _key(0.03, "share of the steps in which the learning rate rises", low=0)
    schedule: str = _key("cosine", "what follows the warm-up", choices=("cosine", "linear", "constant"))
    clip: float = _key(1.0, "largest gradient norm; 0 switches clipping off", low=0)
    mixed_precision: str = _key("no", "autocast", choices=("no", "bf16", "fp16"))
    dtype: str = _key("float32", "dtype the student is loaded in; auto: as stored", choices=DTYPES)
    teacher_dtype: str = _key("float32", "dtype the teacher is loaded in; auto: as stored", choices=DTYPES)
    teacher_bits: int | None = _key(
        None, "bits of the linear layers of the teacher's language model (bitsandbytes, or torchao)", choices=(8, 4)
    )
    teacher_device_map: str | None = _key(
        None,
        "where accelerate puts the teacher's layers; null: all on the run's device",
        choices=("auto", "balanced", "balanced_low_0", "sequential", "cpu"),
    )
    gradient_checkpointing: bool = _key(False, "recompute the student's activations: less memory, more time")
    freeze_vision: bool = _key(False, "leave the student's vision tower as it is; short for train.freeze=[vision]")
    freeze: tuple[str, ...] = _key(
        (), "parts of the student left as they are: vision, projector, language, or module names (globs, re:REGEX)"
    )
    train_only: tuple[str, ...] = _key((), "the only parts of the student that are trained; empty: all")
    packing: str = _key(
        "auto",
        "all questions about a page in one sequence (auto: if proven equal at start)",
        choices=("auto", "always", "never"),
    )
    remember_teacher: bool = _key(
        False, "run the teacher once a record and keep its outputs in memory: a cache that ends with the run"
    )
    workers: int = _key(0, "loader processes", low=0)
    bucket: int = _key(
        50, "batches whose records are sorted by length before they are cut, against padding; 1: no sorting", low=1
    )
    compile: bool = _key(False, "torch.compile the layers of student and teacher: a minute at start for faster steps")
    most_bad: int = _key(5, "steps in a row without a finite loss and gradient (each is skipped) that end a run", low=1)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of full training (Hu et al. 2022). Parts are named as in train.freeze."""

    rank: int = _key(0, "rank of the adapters; 0: no adapters, everything is trained", low=0)
    alpha: float = _key(16.0, "adapters are scaled by alpha / rank", low=0)
    dropout: float = _key(0.05, "dropout before the adapters", low=0)
    targets: tuple[str, ...] = _key(("language",), "parts whose linear layers get adapters")
    full: tuple[str, ...] = _key(("projector",), "parts trained fully beside the adapters")
    rslora: bool = _key(False, "scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    dora: bool = _key(False, "learn magnitude and direction apart (DoRA, Liu et al. 2024)")


@dataclass(frozen=True)
class AlignmentConfig:
    """Multi-head cross-attention alignment (the paper's first term) beyond its equation."""

    heads: int = _key(4, "attention heads", low=1)
    detach_query: bool = _key(True, "the aligned state cannot be bent by moving its query")
    anchor: float = _key(1.0, "weight of the answer cross-entropy that ties the aligned state to the task", low=0)
    normalise: bool = _key(True, "layer-normalise both sides before comparing")
    causal: bool = _key(True, "a position sees the teacher's answer only up to its own byte offset")
    position_bias: float = _key(1.0, "attention bias against visual tokens far away on the page", low=0)
    scope: str = _key("all", "which student positions are aligned", choices=("all", "visual", "answer"))
    features: str = _key(
        "states",
        "what is aligned: every position's last state; or visual tokens alone, of objective.visual_layer or projected",
        choices=("states", "last", "projected"),
    )
    centred: bool = _key(
        False, "compare what differs between the records of a batch (scope: answer, or features of visual tokens)"
    )


@dataclass(frozen=True)
class TransportConfig:
    """Optimal-transport matching of visual tokens (the paper's second term) beyond its equation."""

    epsilon: float = _key(0.05, "entropic regularisation, as a share of the mean cost", low=1e-4)
    steps: int = _key(50, "Sinkhorn iterations", low=1)
    features: str = _key("last", "which visual tokens are matched", choices=("last", "projected"))
    position: float = _key(1.0, "cost of a squared page distance of 1, in mean costs; steers the plan only", low=0)
    lead: float = _key(0.5, "cost of leaving the lead, in mean costs; steers the plan only", low=0)
    normalise: bool = _key(True, "layer-normalise both sides before comparing")
    marginals: str = _key(
        "uniform", "mass of the tokens: all the same, or every lead the same", choices=("uniform", "lead")
    )
    relax: float | None = _key(None, "cost of departing from the marginals, in mean costs; null: they hold", low=1e-3)
    solver: str = _key(
        "sinkhorn",
        "entropic transport, or fused Gromov-Wasserstein through POT (slow; an experiment)",
        choices=("sinkhorn", "fused_gromov"),
    )
    structure: float = _key(0.5, "fused_gromov: share of the distances within each side", low=0)


@dataclass(frozen=True)
class RelationConfig:
    """Geometric relation matching (the paper's third term) beyond its equation."""

    source: str = _key(
        "teacher",
        "whose relations are the target: the teacher's own, or the aligned states'",
        choices=("teacher", "aligned"),
    )
    features: str = _key("last", "which visual tokens are compared", choices=("last", "projected"))
    cells: str = _key(
        "page", "what tokens are pooled into: a page grid, or lead x time cells", choices=("page", "lead_time")
    )
    grid: int = _key(6, "cells a side of the page grid", low=1)
    distance: float = _key(0.5, "weight of the distance relation", low=0)
    cosine: float = _key(0.5, "weight of the cosine relation", low=0)


@dataclass(frozen=True)
class RecordsConfig:
    """Relations among records, beyond the paper: the same question, the same place of the page."""

    least: int = _key(
        16,
        "a batch of fewer records is related with all of its step (accumulation, processes; not where weights are "
        "sharded), for one more forward pass of the student; 0: never",
        low=0,
    )  # fmt: skip
    answers: float = _key(1.0, "weight of the states that are about to answer the same question", low=0)
    visual: float = _key(1.0, "weight of the visual tokens at the same cell (see objective.relation.cells)", low=0)
    features: str = _key("last", "which visual tokens are compared", choices=("last", "projected"))
    distance: float = _key(0.5, "weight of the distance relation", low=0)
    cosine: float = _key(0.5, "weight of the cosine relation", low=0)


@dataclass(frozen=True)
class BaselineConfig:
    """The methods beside EVL-ECG: one distillation term, whose share is `objective.alpha`."""

    weight: float = _key(1.0, "weight of the term", low=0)
    temperature: float = _key(1.0, "softmax temperature (kl, rkl, jsd, uld, multilevel_ot)", low=0.01)
    beta: float = _key(0.5, "teacher's share of the mixture (jsd)", low=0.01)
    top_k: int = _key(50, "ranks that are compared (multilevel_ot)", low=1)
    log_weight: float = _key(0.1, "weight of the log part (multilevel_ot)", low=0)
    sinkhorn_weight: float = _key(0.1, "weight of the Sinkhorn part (multilevel_ot)", low=0)
    relation_heads: int = _key(4, "parts of a query, key or value that relate by themselves (minilm)", low=1)
    grid: int = _key(6, "cells a side of the page grid (minilm)", low=1)


@dataclass(frozen=True)
class ObjectiveConfig:
    """L = (1 - alpha) L_CE + alpha (lambda_m L_mhca + lambda_r L_rel + lambda_ot L_ot + lambda_rec L_rec)."""

    strict: bool = _key(False, "the three terms exactly as published, without the guards below")
    alpha: float = _key(0.5, "share of the distillation terms", low=0)
    lambda_m: float = _key(0.0, "weight of cross-attention alignment", low=0)
    lambda_r: float = _key(0.0, "weight of geometric relations", low=0)
    lambda_ot: float = _key(0.0, "weight of optimal transport", low=0)
    lambda_rec: float = _key(10.0, "weight of relations among records (not with strict)", low=0)
    warmup: float = _key(0.0, "share of the steps in which the distillation terms ramp up", low=0)
    balance: str = _key(
        "none",
        "gradnorm: a term's weight is the size of its gradient on the student, relative to that of cross-entropy",
        choices=("none", "gradnorm"),
    )
    balance_every: int = _key(20, "steps between two measurements of the gradients that are balanced", low=1)
    visual_layer: int = _key(-1, "hidden layer whose visual tokens are compared (-1: the last)")
    align: AlignmentConfig = _section(AlignmentConfig)
    transport: TransportConfig = _section(TransportConfig)
    relation: RelationConfig = _section(RelationConfig)
    records: RecordsConfig = _section(RecordsConfig)
    baseline: BaselineConfig = _section(BaselineConfig)


@dataclass(frozen=True)
class LogConfig:
    """What metrics.jsonl holds and how often."""

    every: int = _key(10, "steps between log lines", low=1)
    gradients_every: int = _key(
        50, "steps between gradient norms of every term; 0 never (nor where weights are sharded)", low=0
    )
    figures: bool = _key(True, "draw transport plan, singular values and curves into RUN/figures")


@dataclass(frozen=True)
class CheckpointConfig:
    """Training state on disk, from which --resume goes on to the bit."""

    every: int | None = _key(None, "steps between checkpoints; null: one an epoch", low=1)
    keep_last: int = _key(1, "how many are kept, beside the best validated one", low=1)


@dataclass(frozen=True)
class EvaluateConfig:
    """Macro AUC on validation records while training."""

    every: int = _key(0, "steps between evaluations (the last step has one, too); 0: none", low=0)
    max_records: int | None = _key(None, "the first N validation records only", low=1)
    patience: int = _key(0, "stop after so many evaluations without a better AUC; 0: never", low=0)
    keep: str = _key(
        "best", "which student is saved where there are evaluations: the one with the best AUC, or the last",
        choices=("best", "last"),
    )  # fmt: skip


@dataclass(frozen=True)
class CacheConfig:
    """The teacher cache: a folder that holds what the losses read of a teacher, which then runs once for all runs."""

    dir: str | None = _key(None, "folder of the cache; null: none. Runs that share it may run at the same time")
    compression: str = _key(
        "low_rank",
        "none (as computed), bf16, int8 (a scale a token), low_rank (principal directions as int8: a quarter of fp16)",
        choices=("none", "bf16", "int8", "low_rank"),
    )
    several_prompts: bool = _key(
        False, "a record may be held with several sets of questions; false: other questions than held are an error"
    )


@dataclass(frozen=True)
class FinishConfig:
    """What happens once the student is trained."""

    control: bool = _key(False, "also train the SFT-only student: same data, steps and seed")
    eval_split: str = _key("test", "split of the AUC report; none: no report", choices=("val", "test", "none"))
    teacher: bool = _key(True, "report the teacher beside the student")
    thresholds_from: str = _key(
        "val", "score validation too, for thresholds and a temperature; none: do not", choices=("val", "none")
    )
    export: bool = _key(True, "export the student into RUN/export")


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str = _key("custom", "what the run is called")
    teacher: str = _key("builtin:teacher", "teacher checkpoint: path, hub id, builtin:NAME, or none")
    student: str = _key("builtin:student", "student checkpoint: path, hub id or builtin:NAME")
    student_config: tuple[str, ...] = _key(
        (), "KEY=VALUE of the student's config.json to set (text_config.num_hidden_layers=2): it starts untrained"
    )
    teacher_kind: str = _key("auto", "what the teacher reads and answers; auto: its config tells", choices=KINDS)
    student_kind: str = _key("auto", "what the student reads and answers; auto: its config tells", choices=KINDS)
    method: str = _key("evl", "what the student learns from", choices=METHOD_NAMES)
    seed: int = _key(0, "seeds weights, order and augmentation", low=0)
    threads: int | None = _key(None, "torch threads; null: leave as they are", low=1)
    trust_remote_code: bool = _key(False, "run the Python code that a checkpoint brings along")
    allow_pickle: bool = _key(False, "read a checkpoint's pickled weights (.bin) where it has no safetensors")
    data: DataConfig = _section(DataConfig)
    page: PageConfig = _section(PageConfig)
    teacher_signal: SignalConfig = _section(SignalConfig)
    student_signal: SignalConfig = _section(SignalConfig)
    augment: AugmentConfig = _section(AugmentConfig)
    train: TrainConfig = _section(TrainConfig)
    lora: LoraConfig = _section(LoraConfig)
    objective: ObjectiveConfig = _section(ObjectiveConfig)
    log: LogConfig = _section(LogConfig)
    checkpoint: CheckpointConfig = _section(CheckpointConfig)
    evaluate: EvaluateConfig = _section(EvaluateConfig)
    track: tuple[str, ...] = _key(
        (), "trackers that follow the run, by accelerate's names: tensorboard, wandb, mlflow, ..."
    )
    cache: CacheConfig = _section(CacheConfig)
    finish: FinishConfig = _section(FinishConfig)

    @property
    def effective_method(self) -> str:
        """The method, or `ce` where there is no teacher to learn from."""
        return "ce" if self.teacher == "none" else self.method

    @property
    def needs_teacher(self) -> bool:
        return self.effective_method != "ce"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict (tuples as lists): what YAML and JSON hold."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, as `--set` names them."""
        return _flat(self.to_dict())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def fingerprint(self) -> str:
        """Twelve hex digits that change with any key."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


# what a run may be resumed with otherwise than it was begun: nothing of it decides which step comes next
FREE_ON_RESUME = (
    "name", "threads", "trust_remote_code", "allow_pickle", "train.workers", "train.most_bad", "log", "checkpoint",
    "evaluate", "track", "finish",
)  # fmt: skip


def check_resumed(recipe: Recipe, begun: Recipe, *, where: object) -> None:
    """A run goes on as it was begun.

    Args:
        recipe: what it is to go on with.
        begun: what it was begun with.
        where: the run, for the error.

    Raises:
        EvlecgError: a key that decides its steps differs.
    """
    old, new = begun.flat(), recipe.flat()
    for key, value in new.items():
        free = any(key == name or key.startswith(f"{name}.") for name in FREE_ON_RESUME)
        if value != old[key] and not free:
            raise EvlecgError(f"the run was begun with {key}={old[key]}, not {value}", where=where,
                              hint="leave it out to go on, or start another run with another --out")  # fmt: skip


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def load_recipe(name_or_path: str | None, overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        name_or_path: a shipped recipe's name, a YAML file, or None for the defaults.
        overrides: dotted key -> value; strings are read as YAML, None values are skipped.

    Raises:
        EvlecgError: unknown recipe, unknown key (naming the nearest), wrong type or value.
    """
    tree: dict[str, Any] = {}
    where = "recipe"
    if name_or_path is not None:
        where, text = _find(name_or_path)
        try:
            loaded = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise EvlecgError("a recipe is not valid YAML", where=where, hint=str(error).replace("\n", " ")) from error
        if loaded is not None and not isinstance(loaded, dict):
            raise EvlecgError("a recipe must be a mapping of keys to values", where=where)
        tree = loaded or {}
    for dotted, value in (overrides or {}).items():
        if value is not None:
            assign(tree, dotted, value)
    return _build(Recipe, tree, where=where, prefix="")


def section(kind: type, tree: dict[str, Any], *, where: str) -> Any:
    """One section of a recipe (`PageConfig`, ...) from plain values, as strictly as a whole recipe."""
    return _build(kind, tree, where=where, prefix="")


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """`["train.lr=1e-4"]` -> `{"train.lr": 1e-4}`; the value is read as YAML."""
    parsed = (parse_assignment(assignment, "--set", "train.lr=1e-4") for assignment in assignments)
    return {key: _Null if value is None else value for key, value in parsed}


def parse_assignment(assignment: str, option: str, example: str) -> tuple[str, Any]:
    """`train.lr=1e-4` -> key and value, which is read as YAML.

    Args:
        assignment: the text.
        option, example: where it stands, and what would be right, for messages.
    """
    key, equals, value = assignment.partition("=")
    if not equals:
        raise EvlecgError(f"{option} needs key=value", where=assignment, hint=f"for example {option} {example}")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise EvlecgError(f"{option} has a value that is not YAML", where=assignment) from error


class _Null:
    """An explicit null of `--set key=null`, told apart from a flag that was not given."""


def recipe_folder() -> Path:
    """Where the shipped recipes and studies lie."""
    folder = Path(str(resources.files("evlecg"))) / "recipes"
    if not folder.is_dir():  # a source checkout: the wheel maps ../recipes to evlecg/recipes
        folder = Path(__file__).resolve().parent.parent / "recipes"
    return folder


def shipped_recipes() -> dict[str, Any]:
    """Name -> readable file of every recipe inside the package."""
    return {item.name.removesuffix(".yaml"): item for item in recipe_folder().iterdir() if item.name.endswith(".yaml")}


def nearest(word: str, known: typing.Iterable[Any]) -> str:
    """A hint that names the nearest known word, or all of them."""
    known = [str(item) for item in known]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _find(name_or_path: str) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.is_file():
        return str(path), path.read_text(encoding="utf-8")
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return name_or_path, shipped[name_or_path].read_text(encoding="utf-8")
    raise EvlecgError(f"unknown recipe {name_or_path!r}", hint=nearest(name_or_path, shipped))


def assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets a dotted key of a nested tree; sections that are missing are made."""
    *parents, last = dotted.split(".")
    for name in parents:
        node = tree.setdefault(name, {})
        if not isinstance(node, dict):
            raise EvlecgError(f"{name!r} is not a section", where=dotted)
        tree = node
    tree[last] = None if value is _Null else value


def _build(kind: type, tree: Any, *, where: str, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise EvlecgError(f"{prefix.rstrip('.') or 'the recipe'} must be a section with keys", where=where)
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in fields:
            raise EvlecgError(f"unknown key {prefix}{name}", where=where, hint=nearest(str(name), fields))
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(typing.cast(type, hints[name]), value, where=where, prefix=f"{prefix}{name}.")
        else:
            values[name] = _check(value, hints[name], fields[name].metadata, where=where, key=f"{prefix}{name}")
    return kind(**values)


def _check(value: Any, hint: Any, meta: typing.Mapping[str, Any], *, where: str, key: str) -> Any:
    """The value as the key's type, or one clear error."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    origin = typing.get_origin(wanted)
    if origin is tuple:
        item = typing.get_args(wanted)[0]
        if isinstance(value, (list, tuple)) and all(isinstance(entry, item) for entry in value):
            return tuple(value)
        raise EvlecgError(f"{key} must be a list of {item.__name__}, not {value!r}", where=where)
    if wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-4 as a string
    if type(value) is not wanted:
        raise EvlecgError(f"{key} must be {wanted.__name__}, not {value!r}", where=where)
    if meta["choices"] and value not in meta["choices"]:
        raise EvlecgError(f"{key} cannot be {value!r}", where=where, hint=nearest(str(value), meta["choices"]))
    if meta["low"] is not None and not value >= meta["low"]:
        raise EvlecgError(f"{key} must be at least {meta['low']}, not {value!r}", where=where)
    return value
