"""WFDB records, as they are found in the wild.

Headers are parsed here rather than by `wfdb`, for two reasons: `wfdb` 4.3.1 refuses variants that were published (a
record line that names `E00001.mat`), and takes 3-6 ms a record, most of it in the header, where this takes a tenth.
Signals in format 16 (all datasets of readers.py; the `.mat` files of the challenges are format 16 behind 24 bytes) are
read directly; everything else goes to `wfdb`. The two are compared on real records in the tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from evlecg.data.gates import Unfit, lead_index
from evlecg.data.readers_base import Source
from evlecg.data.store import STEPS_PER_MV

DEFAULT_FS_HZ = 250.0  # the WFDB default
DEFAULT_GAIN = 200.0  # the same, for a gain of 0 or none: uncalibrated
INVALID_16 = -32768  # "no sample" in format 16

_RECORD_LINE = re.compile(
    r"(?P<name>[^\s/]+)(?:/(?P<segments>\d+))?\s+(?P<channels>\d+)"
    r"(?:\s+(?P<fs>[0-9.eE+]+)(?:/\S*)?(?:\s+(?P<samples>\d+))?)?"
)
_FORMAT = re.compile(r"(\d+)(?:x(\d+))?(?::(\d+))?(?:\+(\d+))?")
_GAIN = re.compile(r"(?P<gain>[-+]?[0-9.]+(?:[eE][-+]?\d+)?)(?:\((?P<baseline>-?\d+)\))?(?:/(?P<unit>\S+))?")


@dataclass(frozen=True)
class Channel:
    """One line of a header; `gain` is in steps a unit, None where the header has none."""

    file: str
    format: int
    skipped_bytes: int
    plain: bool  # one sample a frame, no skew
    gain: float | None
    baseline: int
    unit: str
    lead: str


@dataclass(frozen=True)
class Header:
    """A parsed header. `n_samples` is None where the header does not say."""

    stem: str  # path below the source's root, without the suffix
    fs_hz: float
    n_samples: int | None
    channels: tuple[Channel, ...]
    comments: tuple[str, ...]
    repairs: tuple[str, ...] = ()

    def field(self, name: str) -> str:
        """Value of the comment `# name: value`, spaces and case aside; "" where there is none."""
        for comment in self.comments:
            key, colon, value = comment.partition(":")
            if colon and key.strip(" <>").lower() == name.lower():
                return value.strip()
        return ""


@dataclass(frozen=True)
class RawSignal:
    """Channels as recorded: float32 [channels, T] in their units."""

    values: np.ndarray
    leads: tuple[str, ...]
    units: tuple[str, ...]


def read_header(source: Source, relative: str) -> Header:
    """Parses a `.hea` file, mending what `wfdb` refuses.

    Args:
        source: the download.
        relative: path of the header below its root.

    Raises:
        Unfit: it is no WFDB header.
        OSError: it cannot be read.
    """
    lines = [line.strip() for line in source.text(relative).splitlines()]
    comments = tuple(line[1:].strip() for line in lines if line.startswith("#"))
    lines = [line for line in lines if line and not line.startswith("#")]
    match = _RECORD_LINE.match(lines[0]) if lines else None
    if match is None:
        raise Unfit("malformed header: no record line")
    stem = relative.removesuffix(".hea")
    repairs = []
    if match["name"].endswith((".mat", ".dat")):
        repairs.append("record line of the header named a file")
    n_channels = int(match["channels"])
    fs_hz = float(match["fs"]) if match["fs"] else DEFAULT_FS_HZ
    n_samples = int(match["samples"]) if match["samples"] else None
    if match["segments"]:
        return Header(stem, fs_hz, n_samples, (), comments)
    if len(lines) - 1 < n_channels:
        raise Unfit(f"malformed header: {len(lines) - 1} of {n_channels} signal lines")
    channels = tuple(_channel(line) for line in lines[1 : 1 + n_channels])
    return Header(stem, fs_hz, n_samples or None, channels, comments, tuple(repairs))


def _channel(line: str) -> Channel:
    fields = line.split(maxsplit=8)
    form = _FORMAT.fullmatch(fields[1]) if len(fields) > 1 else None
    if form is None:
        raise Unfit("malformed header: a signal line without a format")
    # A description is the ninth field and all before it but the gain are integers: text in the eighth place behind a
    # third field that is a bare integer means that the gain was left out.
    if len(fields) == 8 and fields[2].isdigit() and not fields[7].lstrip("-").isdigit():
        fields.insert(2, "0")
    gain = _GAIN.fullmatch(fields[2]) if len(fields) > 2 else None
    zero = int(fields[4]) if len(fields) > 4 else 0
    value = float(gain["gain"]) if gain else 0.0
    return Channel(
        file=fields[0],
        format=int(form[1]),
        skipped_bytes=int(form[4] or 0),
        plain=int(form[2] or 1) == 1 and int(form[3] or 0) == 0,
        gain=value or None,
        baseline=int(gain["baseline"]) if gain and gain["baseline"] else zero,
        unit=gain["unit"] if gain and gain["unit"] else "mV",
        lead=fields[8] if len(fields) > 8 else "",
    )


def read_signal(source: Source, header: Header) -> RawSignal:
    """Samples of those channels that are among the 12 leads.

    Raises:
        Unfit: a signal file is truncated, or longer than the header says.
        OSError: a signal file is missing or unreadable.
        ValueError: `wfdb` cannot read a format that is not read here.
    """
    if not header.channels or any(channel.format != 16 or not channel.plain for channel in header.channels):
        return _read_through_wfdb(source, header)
    return in_units(*read_steps(source, header))


def read_steps(source: Source, header: Header) -> tuple[np.ndarray, list[Channel]]:
    """Recorded steps, int16 [L, T], of those channels in format 16 that are among the 12 leads, and the channels.

    Raises:
        Unfit, OSError: as in `read_signal`.
    """
    groups: dict[str, list[Channel]] = {}
    for channel in header.channels:
        groups.setdefault(channel.file, []).append(channel)
    values: list[np.ndarray] = []
    kept: list[Channel] = []
    for file, channels in groups.items():
        wanted = [index for index, channel in enumerate(channels) if lead_index(channel.lead) is not None]
        if not wanted:  # extra leads in a file of their own (PTB's .xyz) need not be there
            continue
        steps_CT = _read_format_16(_signal_bytes(source, header, file), channels, header)
        values.append(np.ascontiguousarray(steps_CT[wanted]))
        kept += [channels[index] for index in wanted]
    if not kept:
        raise Unfit("none of the 12 leads is in the header")
    if len({value.shape[1] for value in values}) > 1:
        raise Unfit("wrong length: the signal files differ in length")
    return (values[0] if len(values) == 1 else np.concatenate(values)), kept


def in_units(steps_LT: np.ndarray, channels: list[Channel]) -> RawSignal:
    """Recorded steps in the units of their channels.

    What is no whole number of microvolt is rounded to one here, in double precision and halves away from zero: so the
    challenges made their copies of other databases, hence a record of PTB (2000 steps a mV) gets the same hash as its
    copy there. The prepared folder holds no finer steps anyway.
    """
    gain_L1 = np.array([channel.gain or DEFAULT_GAIN for channel in channels])[:, None]
    zero_L1 = np.array([channel.baseline for channel in channels])[:, None]
    if all(channel.unit.lower() == "mv" for channel in channels) and (STEPS_PER_MV % gain_L1).any():
        lead_LT = (steps_LT - zero_L1.astype(np.float64)) / gain_L1 * STEPS_PER_MV
        lead_LT = np.copysign(np.floor(np.abs(lead_LT) + 0.5), lead_LT).astype(np.float32) / np.float32(STEPS_PER_MV)
    else:
        lead_LT = steps_LT.astype(np.float32) - zero_L1.astype(np.float32)
        lead_LT /= gain_L1.astype(np.float32)
    lead_LT[steps_LT == INVALID_16] = np.nan
    return RawSignal(lead_LT, tuple(channel.lead for channel in channels), tuple(channel.unit for channel in channels))


def _signal_bytes(source: Source, header: Header, file: str) -> bytes:
    """A signal file; where the header names another record's, the one that lies beside the header."""
    folder = header.stem.rpartition("/")[0]
    try:
        return source.read(f"{folder}/{file}" if folder else file)
    except FileNotFoundError:  # no look before the leap: tens of thousands of files are where they should be
        return source.read(header.stem + "." + file.rpartition(".")[2])


def _read_format_16(data: bytes, channels: list[Channel], header: Header) -> np.ndarray:
    """int16 [channels, T] of one interleaved little-endian file."""
    start, width = channels[0].skipped_bytes, 2 * len(channels)
    held = max(len(data) - start, 0) // width
    said = held if header.n_samples is None else header.n_samples
    if held < said:
        raise Unfit(f"truncated: the signal file holds {held} of {said} samples a lead")
    if held > said:
        raise Unfit(f"wrong length: the signal file holds {held} samples a lead, the header says {said}")
    return np.frombuffer(data, "<i2", count=held * len(channels), offset=start).reshape(held, len(channels)).T


def _read_through_wfdb(source: Source, header: Header) -> RawSignal:
    import wfdb

    for file in {channel.file for channel in header.channels}:
        _signal_bytes(source, header, file)  # hashed; these formats are rare enough to be read twice
    record = cast(wfdb.Record, wfdb.rdrecord(str(source.path(header.stem))))  # m2s: one record, not its segments
    values = np.asarray(record.p_signal, np.float32).T
    return RawSignal(values, tuple(record.sig_name or ()), tuple(record.units or ()))


def with_gain(header: Header, wrong: frozenset[float | None], gain: float) -> Header:
    """The header with wrong gains replaced, and said so; the same header where none is wrong."""
    found = {channel.gain for channel in header.channels} & wrong
    if not found:
        return header
    channels = tuple(replace(channel, gain=gain) if channel.gain in wrong else channel for channel in header.channels)
    said = ", ".join("none" if value is None else f"{value:g}" for value in sorted(found, key=lambda value: value or 0))
    return replace(header, channels=channels, repairs=(*header.repairs, f"gain {said} read as {gain:g} a mV"))
