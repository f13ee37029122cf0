"""The teacher runs once: what a run reads of it is filled into a store before the first step, or found there.

A store is a folder that runs share (`cache.dir`), or this run's memory (`train.remember_teacher`). Where a folder has
all that a run reads, the teacher is neither loaded nor run. Processes that need the same folder take turns: one fills,
the others wait and read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evlecg.data.store import Prepared
from evlecg.errors import EvlecgError
from evlecg.files import sha256_file, waiting_lock, write_text_atomic
from evlecg.models import load as models
from evlecg.page.render import page_style, render
from evlecg.progress import Progress
from evlecg.recipe import Recipe
from evlecg.schema import LEADS, ModelFacts, Sample
from evlecg.training.step import PROBE_RECORDS

if TYPE_CHECKING:
    from evlecg.models.batch import BatchBuilder
    from evlecg.teacher import FolderStore, LiveTeacher, MemoryStore, StoredTeacher, TeacherFacts

REHEARSED_STEPS = 3  # that a dry run takes, and fills for
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")
PROCESSOR_FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # but for the config and the weights' index
WEIGHTS = "weights.json"  # in the folder: what was hashed, so that no run has to do it again
VOLATILE = ("_name_or_path", "transformers_version")  # of a config: where it lies and who wrote it
SPARE = 1.25  # a run of few steps reads on where a loss was not finite
SPARE_STEPS = 5
HEAD_TOLERANCE = 1e-3  # of the largest logit: what a head may differ by from the model's own


@dataclass
class TeacherCache:
    """The store of a run, and what the run reads of it.

    Attributes:
        recipe, prepared, samples: the run's.
        store: holds the rows.
        needs: what the objective reads.
        facts: of the teacher; None until one has been seen.
        rehearsal: only what a dry run's steps read is filled.
        expected_s: seconds that the teacher still takes, where a dry run left rows out.
        head: the `AnswerHead` of the teacher that filled a store in memory.
        lengths: of the samples' texts, where the run's batches are cut by them.
    """

    recipe: Recipe
    prepared: Prepared
    samples: Sequence[Sample]
    store: FolderStore | MemoryStore
    needs: frozenset[str]
    progress: Progress
    facts: TeacherFacts | None = None
    rehearsal: bool = False
    expected_s: float = 0.0
    head: Any = None
    lengths: tuple[int, ...] | None = None
    _keys: dict[bool, list[tuple[str, ...]]] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """What is read of every row."""
        assert self.facts is not None
        answers = ("answer",) if self.facts.head_reads_states else ("logits",)
        table = {"hidden": ("hidden",), "visual": ("visual",), "projected": ("projected",), "logits": answers,
                 "attention": ("query", "key", "value")}  # fmt: skip
        return tuple(name for need, names in table.items() if need in self.needs for name in names)

    def keys(self, packed: bool) -> list[tuple[str, ...]]:
        """The keys of every sample's rows; of those that a short run does not come to, none."""
        if packed not in self._keys:
            read = self._read()
            self._keys[packed] = [
                row_keys(self.prepared, sample, packed) if read is None or place in read else ()
                for place, sample in enumerate(self.samples)
            ]
        return self._keys[packed]

    def complete(self, packed: bool) -> bool:
        """Whether the teacher is not needed.

        Args:
            packed: all questions of a page in one row.

        Raises:
            EvlecgError: records are there with other questions or answers, and may not be.
        """
        from evlecg.teacher import FolderStore

        if self.facts is None or not isinstance(self.store, FolderStore):
            return False
        packed = packed and self.packs
        if not self.recipe.cache.several_prompts:
            check_prompts(self.store, self.samples, self.keys(packed))
        if not _heads_there(self.store, self.needs, self.facts):
            return False
        return not any(self.store.lacks(key, self.fields) for keys in self.keys(packed) for key in keys)

    def await_writer(self) -> None:
        """Waits while another process fills the folder, and takes in what it wrote."""
        from evlecg.teacher import FolderStore

        if isinstance(self.store, FolderStore) and not self.rehearsal and self.store.path.exists():
            with self._turn():
                self._reopen()

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        def told() -> None:
            self.progress.info(f"teacher cache: another process is filling {folder}; waiting")

        from evlecg.teacher import FolderStore

        if not isinstance(self.store, FolderStore):
            return contextlib.nullcontext()
        folder = self.store.path
        return waiting_lock(folder / ".lock", told)

    def _reopen(self) -> None:
        from evlecg.teacher import FolderStore

        assert isinstance(self.store, FolderStore)
        self.store = FolderStore.open(self.store.path, self.store.made_with, self.store.compression)
        self.facts = self.store.facts

    @property
    def packs(self) -> bool:
        """Whether the teacher that filled it read all questions of a page in one row."""
        return self.facts is not None and self.facts.packs is True

    def model_facts(self, tokens: tuple[bytes | None, ...] = ()) -> ModelFacts:
        """What an objective has to know of a teacher that is not loaded."""
        assert self.facts is not None
        return ModelFacts(self.facts.width, self.facts.vocab_size, self.facts.visual_width, tokens)

    def told(self) -> dict[str, Any]:
        """Where it is and what is in it, for run.json."""
        from evlecg.teacher import FolderStore

        if not isinstance(self.store, FolderStore):
            return {"dir": None, "compression": "none", "bytes": self.store.held_bytes}
        return {"dir": str(self.store.path), "compression": self.store.compression, **self.store.contents()}

    def fill(
        self, live: LiveTeacher, teacher: models.Loaded, builder: BatchBuilder, checks: dict[str, Any], accelerator: Any
    ) -> None:
        """Runs the teacher on what is missing.

        Args:
            live, teacher: the teacher.
            builder: of the run; its teacher's half is what is encoded.
            checks: what the start-up checks found of the teacher.
            accelerator: accelerate's; every process fills its share of a folder, and all of its own memory.
        """
        from evlecg.models.outputs import AnswerHead
        from evlecg.teacher import FolderStore

        shared = isinstance(self.store, FolderStore) and not self.rehearsal
        leads, processes = accelerator.is_main_process, accelerator.num_processes
        with self._turn() if shared and leads else contextlib.nullcontext():
            accelerator.wait_for_everyone()
            if shared:
                assert isinstance(self.store, FolderStore)
                self._reopen()
            facts = self.facts = self.facts or facts_of(teacher, live, builder, checks)
            if shared:
                assert isinstance(self.store, FolderStore)
                if leads:
                    self.store.start(facts)
                accelerator.wait_for_everyone()
                self.store.facts = facts
            elif needs_head(self.needs):
                self.head = AnswerHead(teacher)
            if not self.recipe.cache.several_prompts and isinstance(self.store, FolderStore):
                check_prompts(self.store, self.samples, self.keys(builder.packed))
            if shared and leads:
                _keep_heads(self.store, self.needs, facts, teacher)
            batches = self._missing(builder.packed)
            if shared and processes > 1:
                if leads:
                    self._fill_batches(live, builder, batches, accelerator, fit_only=True)
                accelerator.wait_for_everyone()
                batches = batches[accelerator.process_index :: processes]
            self._fill_batches(live, builder, batches, accelerator)
            accelerator.wait_for_everyone()
            if shared:
                assert isinstance(self.store, FolderStore)
                self.store.rescan()
                if leads:
                    self.store.write_index()
                    tell(self.store, self.progress)

    def _missing(self, packed: bool) -> list[list[int]]:
        """Samples whose rows are not there, in the batches of the run's first epoch."""
        keys = self.keys(packed)
        batches = self._batches(self.recipe.train.batch_size, 0)
        left = [
            [int(index) for index in batch if any(self.store.lacks(key, self.fields) for key in keys[int(index)])]
            for batch in batches
        ]
        return [batch for batch in left if batch]

    def _batches(self, size: int, epoch: int) -> list[Any]:
        """The run's global batches of `size` samples."""
        from evlecg.models.batch import epoch_batches

        recipe = self.recipe
        return epoch_batches(len(self.samples), size, seed=recipe.seed, epoch=epoch, lengths=self.lengths,
                             bucket=recipe.train.bucket)  # fmt: skip

    def _read(self) -> set[int] | None:
        """Samples that a run of few steps, or a dry run, comes to; None: all."""
        from accelerate import PartialState

        train, found, epoch = self.recipe.train, set(range(min(PROBE_RECORDS, len(self.samples)))), 0
        if train.max_steps is None and not self.rehearsal:
            return None
        steps = REHEARSED_STEPS if self.rehearsal else math.ceil(SPARE * (train.max_steps or 0)) + SPARE_STEPS
        left, size = steps * train.accumulation, train.batch_size * PartialState().num_processes
        while left > 0 and epoch < train.epochs:
            batches = self._batches(size, epoch)[:left]
            found |= {int(index) for batch in batches for index in batch}
            left, epoch = left - len(batches), epoch + 1
        return found

    def _fill_batches(
        self, live: LiveTeacher, builder: BatchBuilder, batches: list[list[int]], accelerator: Any, *,
        fit_only: bool = False,
    ) -> None:  # fmt: skip
        import torch
        from torch.utils.data import DataLoader

        from evlecg.models.outputs import to_device
        from evlecg.teacher.rows import split_outputs, split_side
        from evlecg.teacher.store import FIT_ROWS, Entry, FolderStore

        if not batches:
            return
        keys, left = self.keys(builder.packed), sum(map(len, batches))
        alone = _TeacherAlone(dataclasses.replace(builder, augment=None, stored=None))
        workers = self.recipe.train.workers
        every: Any = range(len(self.samples))
        drawn = torch.Generator()  # one of its own: the run's draws stay what they are
        loader = DataLoader(every, batch_sampler=batches, collate_fn=alone, num_workers=workers, generator=drawn)
        begun_s, fitted = time.monotonic(), []
        with self.progress.task("teacher", left) as advance:
            for batch, (side, layouts) in zip(batches, loader, strict=True):
                outputs = live.of(to_device(side, accelerator.device))
                rows = zip(split_side(side, layouts), split_outputs(outputs, self.fields), strict=True)
                names = [key for index in batch for key in keys[index]]
                entries = [Entry(name, *row) for name, row in zip(names, rows, strict=True)]
                if fit_only:
                    fitted += entries
                    if len(fitted) >= FIT_ROWS or batch is batches[-1]:
                        assert isinstance(self.store, FolderStore)
                        self.store.fit_from(fitted)
                        return
                    continue
                left -= len(batch)
                self.store.add(entries, remaining=left * len(entries) // len(batch))
                advance(len(batch))
        self.store.flush()
        if self.rehearsal:
            done = sum(map(len, batches))
            self.expected_s = (time.monotonic() - begun_s) / done * (len(self.samples) - done)

    def read_by(
        self, builder: BatchBuilder, checkpoint: models.Checkpoint, device: Any
    ) -> tuple[BatchBuilder, StoredTeacher, Any]:
        """A run's builder, signal and teacher's head (None where nobody reads it), all out of the store.

        Args:
            builder: of the run.
            checkpoint: the teacher's.
            device: where the head is to be.
        """
        from evlecg.teacher import StoredSides, StoredTeacher

        assert self.facts is not None
        sides = StoredSides(self.store, self.keys(builder.packed), self.facts)
        head = self._head(checkpoint, device) if needs_head(self.needs) else None
        signal = StoredTeacher(self.store, self.fields, self.facts, head)
        stored = dataclasses.replace(builder, teacher=None, stored=sides)
        return stored, signal, head if "heads" in self.needs else None

    def _head(self, checkpoint: models.Checkpoint, device: Any) -> Any:
        from evlecg.models.outputs import AnswerHead
        from evlecg.teacher import FolderStore

        if self.head is not None:
            return self.head
        assert isinstance(self.store, FolderStore)
        head = AnswerHead(models.shapes(checkpoint, dtype=self.recipe.train.teacher_dtype))
        for name, module in head.parts.items():
            if self.store.has_head(name):
                _fill_module(module, self.store.head(name), device)
        return head.requires_grad_(False)


@dataclass(frozen=True)
class _TeacherAlone:
    """The teacher's halves of batches, with the layouts of their rows."""

    builder: BatchBuilder

    def __call__(self, indices: Sequence[int]) -> Any:
        return self.builder.teacher_half(indices)


def cache_of(
    recipe: Recipe,
    prepared: Prepared,
    samples: Sequence[Sample],
    checkpoint: models.Checkpoint,
    size_px: tuple[int, int] | None,
    progress: Progress,
    *,
    rehearsal: bool = False,
    lengths: tuple[int, ...] | None = None,
) -> TeacherCache | None:
    """The store that a recipe asks for; None where its teacher is live.

    Args:
        recipe: the run.
        prepared, samples: what it reads.
        checkpoint: the teacher's.
        size_px: of the teacher's pages; None where its processor decides.
        progress: who listens.
        rehearsal: nothing is written.
        lengths: of the samples' texts, where batches are cut by them.

    Raises:
        EvlecgError: the folder was made with something else (all that differs is named), or pages that differ from
            epoch to epoch.
    """
    from evlecg.losses.objective import needs_of
    from evlecg.teacher import FolderStore, MemoryStore

    config = recipe.cache
    needs = needs_of(recipe.effective_method, recipe.objective)
    if not needs or not (config.dir or recipe.train.remember_teacher):
        return None
    if recipe.augment.teacher and augments(recipe):
        raise EvlecgError("a teacher that is cached or remembered must see the same pages in every epoch",
                          where="augment", hint="augment.teacher=false shows it the clean page")  # fmt: skip
    if not config.dir:
        return TeacherCache(recipe, prepared, samples, MemoryStore(), needs, progress, rehearsal=rehearsal,
                            lengths=lengths)  # fmt: skip
    folder = Path(config.dir)
    made_with = identity(recipe, checkpoint, size_px, memo=None if rehearsal else folder)
    store = FolderStore.open(folder, made_with, config.compression)
    cache = TeacherCache(recipe, prepared, samples, store, needs, progress, store.facts, rehearsal, lengths=lengths)
    if rehearsal and not cache.complete(wants_packing(recipe, samples)):
        return dataclasses.replace(cache, store=MemoryStore(), facts=None)
    return cache


def augments(recipe: Recipe) -> bool:
    """Whether a recipe's pages are disturbed."""
    from evlecg.page.augment import augmenter

    return augmenter(recipe.augment, seed=recipe.seed) is not None


def wants_packing(recipe: Recipe, samples: Sequence[Sample]) -> bool:
    """Whether a run packs questions, if its models can."""
    return recipe.train.packing != "never" and max(len(sample.questions) for sample in samples) > 1


def row_keys(prepared: Prepared, sample: Sample, packed: bool) -> tuple[str, ...]:
    """The keys of a sample's rows, in their order: see `teacher.store`."""
    from evlecg.models.encode import Turn

    row = prepared.row(sample.record_index)
    record = _hash([row["id"], row["sha256"], row["fs_hz"], row["n_bytes"], prepared.manifest["format_version"]])
    turns = [Turn.of(question) for question in sample.questions]

    def key(asked: Sequence[Turn]) -> str:
        questions = _hash([[turn.question, turn.history, turn.label] for turn in asked])
        return f"{record}.{questions}.{_hash([[turn.answer, turn.ends] for turn in asked])}.{len(asked)}"

    return (key(turns),) if packed else tuple(key([turn]) for turn in turns)


def check_prompts(store: FolderStore, samples: Sequence[Sample], keys: Sequence[tuple[str, ...]]) -> None:
    """That records which are there were asked what this run asks.

    Raises:
        EvlecgError: one was not; what differs is named.
    """
    held: dict[str, set[str]] = {}
    for key in store.keys:
        held.setdefault(key.split(".")[0], set()).add(key)
    for sample, wanted in zip(samples, keys, strict=True):
        there = held.get(wanted[0].split(".")[0], set()) if wanted else set()
        if not there or set(wanted) <= there:
            continue
        new = next(key for key in wanted if key not in there).split(".")
        others = [key.split(".") for key in there]
        if not any(other[3] == new[3] for other in others):
            what = f"{others[0][3]} questions a row, not {new[3]}"
        elif any(other[1] == new[1] for other in others):
            what = "other answers"
        else:
            what = f"other questions than {sample.questions[0].text[:60]!r}"
        raise EvlecgError(f"the teacher cache holds record {sample.record_id} with {what}", where=store.path,
                          hint="another --cache folder, or cache.several_prompts=true to hold both")  # fmt: skip


def identity(
    recipe: Recipe, checkpoint: models.Checkpoint, size_px: tuple[int, int] | None, *, memo: Path | None
) -> dict[str, Any]:
    """All that decides what a teacher gives for a record and its questions, in plain words.

    Args:
        recipe: the run.
        checkpoint: the teacher's.
        size_px: of its pages; None where its processor decides.
        memo: folder that remembers the hash of the weights; None: none does.
    """
    config, folder = checkpoint.config, Path(checkpoint.source)
    train = recipe.train
    dtype = train.teacher_dtype if train.teacher_dtype != "auto" else str(config.dtype).removeprefix("torch.")
    about = {key: value for key, value in config.to_dict().items() if key not in VOLATILE}
    found: dict[str, Any] = {
        "teacher": {"revision": _revision(checkpoint, memo), "config": _hash(about), "kind": checkpoint.kind},
        "dtype": {"states": dtype, "bits": train.teacher_bits},
        "layers": {"visual": recipe.objective.visual_layer},
        "processor": _hash_files(folder, PROCESSOR_FILES) if folder.is_dir() else _commit(config),
    }
    if checkpoint.kind == "signal":
        return found | {"signal": dataclasses.asdict(recipe.teacher_signal)}
    style = page_style(recipe.page)
    drawn = render(_probe_signal(), 100.0, size_px=size_px or (400, 300), style=style).pixels
    size = list(size_px) if size_px else None
    return found | {
        "page": dataclasses.asdict(style) | {"size_px": size, "drawn": hashlib.sha256(drawn.tobytes()).hexdigest()}
    }


def _probe_signal() -> np.ndarray:
    """A signal that shows how pages are drawn: [12, 1000], millivolt."""
    time_s_T = np.arange(1000) / 100.0
    return np.stack([np.sin((place + 1) * time_s_T) for place in range(len(LEADS))]).astype(np.float32)


def _revision(checkpoint: models.Checkpoint, memo: Path | None) -> str:
    """SHA-256 of a local checkpoint's weights; the commit of one from the hub."""
    folder = Path(checkpoint.source)
    if not folder.is_dir():
        return _commit(checkpoint.config)
    files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
    stamp = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a memo is worth no error
        if memo is not None and (known := json.loads((memo / WEIGHTS).read_text()))["files"] == stamp:
            return known["sha256"]
    found = _hash([[file.name, sha256_file(file)] for file in files], digits=64)
    if memo is not None and (memo / "cache.json").exists():
        write_text_atomic(memo / WEIGHTS, json.dumps({"files": stamp, "sha256": found}) + "\n")
    return found


def _commit(config: Any) -> str:
    return str(getattr(config, "_commit_hash", None) or "not known")


def _hash_files(folder: Path, patterns: Iterable[str]) -> str:
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    kept = [file for file in files if file.name != "config.json" and not file.name.endswith(".index.json")]
    return _hash([[file.name, sha256_file(file)] for file in kept])


def _hash(value: Any, *, digits: int = 16) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]


def facts_of(teacher: models.Loaded, live: LiveTeacher, builder: BatchBuilder, checks: dict[str, Any]) -> TeacherFacts:
    """What has to be known of a teacher once it is gone: its own account, and the first record's outputs."""
    from evlecg.models.outputs import AnswerHead, to_device
    from evlecg.teacher import TeacherFacts

    side, _ = builder.teacher_half([0])
    outputs = live.of(to_device(side, teacher.model.device))
    reads = False
    if teacher.checkpoint.kind == "text":
        head = AnswerHead(teacher)
        whole = all(p.is_floating_point() for part in head.parts.values() for p in part.parameters())
        logits_AV = outputs.answer_logits_AV.float()
        again_AV = head(outputs.side.before_answers(outputs.hidden_BSD), outputs.side).float()
        finite = logits_AV > -1e30  # models rule answers out by the least number there is
        apart = (again_AV - logits_AV)[finite].abs().max() if again_AV.shape == logits_AV.shape else float("inf")
        reads = whole and bool(apart <= HEAD_TOLERANCE * logits_AV[finite].abs().max())
    facts = teacher.facts
    return TeacherFacts(
        width=facts.width, vocab_size=facts.vocab_size, visual_width=facts.visual_width,
        dtype=str(outputs.hidden_BSD.dtype).removeprefix("torch."), frame=side.frame,
        window_s=teacher.form.window_s if teacher.form is not None else None, head_reads_states=reads,
        packs=checks["packing"] == "yes" if "packing" in checks else None, checks=checks,
    )  # fmt: skip


def needs_head(needs: frozenset[str]) -> bool:
    """Whether a run reads the teacher's output head, be it for logits."""
    return bool(needs & {"logits", "heads"})


def _heads_there(store: FolderStore, needs: frozenset[str], facts: TeacherFacts) -> bool:
    return all(store.has_head(name) for name in _head_parts(needs, facts))


def _head_parts(needs: frozenset[str], facts: TeacherFacts) -> list[str]:
    """Of a head, what a run reads: the head itself, and the word embeddings."""
    parts = ["head"] if facts.head_reads_states and needs_head(needs) else []
    return [*parts, "words"] if "heads" in needs else parts


def _keep_heads(store: Any, needs: frozenset[str], facts: TeacherFacts, teacher: models.Loaded) -> None:
    from evlecg.models.outputs import AnswerHead

    for name in _head_parts(needs, facts):
        if not store.has_head(name):
            module = AnswerHead(teacher).parts[name]
            tensors = {key: value.detach().cpu().clone() for key, value in _named(module)}
            store.save_head(name, tensors)


def _named(module: Any) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters()
    yield from module.named_buffers()  # those that are not saved with a model, too


def _fill_module(module: Any, tensors: dict[str, Any], device: Any) -> None:
    """Gives a module without weights those that it had, on a device."""
    from torch import nn

    for name, stored in tensors.items():
        tensor = stored.to(device)
        path, _, last = name.rpartition(".")
        part = module.get_submodule(path)
        if last in part._parameters:
            part._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            part._buffers[last] = tensor


def tell(store: FolderStore, progress: Progress) -> None:
    """What a cache holds and what compression cost, as a table."""
    held = store.contents()
    rows = []
    for name, told in held["fields"].items():
        kind = (
            f"rank {told['rank']}, int8"
            if told["rank"]
            else {"low_rank": "int8"}.get(store.compression, store.compression)
        )
        rows.append([
            name, kind, f"{told['bytes'] / 2**20:.2f} MiB", f"{told['bytes'] / told['fp16_bytes']:.3f}",
            "-" if told["relative_error"] is None else f"{told['relative_error']:.2%}",
            "-" if told["lost_variance"] is None else f"{told['lost_variance']:.3%}",
        ])  # fmt: skip
    share = held["share_of_fp16"]
    rows.append(
        ["all", store.compression, f"{held['bytes'] / 2**20:.2f} MiB", "-" if share is None else f"{share:.3f}", "", ""]
    )
    title = f"teacher cache {store.path}: {held['rows']} rows of {held['records']} records"
    progress.table(title, ["field", "kept as", "bytes", "of fp16", "error", "variance lost"], rows)
