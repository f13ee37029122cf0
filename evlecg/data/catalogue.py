"""What can be prepared, and which labels there are: the content of `evlecg prepare --list` and `--list-labels`."""

from __future__ import annotations

from typing import Any

from evlecg.data.labels import EQUIVALENCES, LABEL_SETS, LABELS, SNOMED
from evlecg.data.readers import READERS

PREPARED_BYTES = 12 * 2 * 500 * 10  # a usual record: 12 leads, int16, 500 Hz, 10 s


def datasets() -> dict[str, dict[str, Any]]:
    """Dataset name -> title, records, sizes in GB (1e9 bytes), access, licence, citation, address, commands."""
    return {
        name: {
            "title": reader.title,
            "records": reader.n_records,
            "download_GB": reader.download_GB,
            "prepared_GB": round(reader.n_records * PREPARED_BYTES / 1e9, 1) if reader.n_records else None,
            "access": reader.access,
            "licence": reader.licence,
            "citation": reader.citation,
            "url": reader.url,
            "needs": reader.needs,
            "labels": reader.labels,
            "get": list(reader.get),
        }
        for name, reader in READERS.items()
    }


def labels() -> dict[str, Any]:
    """Label sets, the codes that the challenges count as one, and the SNOMED codes that have no label here.

    Returns:
        `sets`: label set -> code -> the phrase that completes "Does this ECG show ...?"; `equivalences`: label -> the
        names and SNOMED codes that mean it; `without_label`: SNOMED code -> name and reason.
    """
    return {
        "sets": {name: {code: LABELS[code] for code in codes} for name, codes in LABEL_SETS.items()},
        "equivalences": {
            item.label: [f"{name} ({code})" for name, code in zip(item.names, item.codes, strict=True)]
            for item in EQUIVALENCES
        },
        "without_label": {
            code: f"{row.abbreviation}: {row.reason}" for code, row in SNOMED.items() if not row.label and row.reason
        },
    }
