"""What can be prepared, and which labels there are: the content of `evlecg prepare --list` and `--list-labels`."""

from __future__ import annotations

from typing import Any

from evlecg.data.labels import EQUIVALENCES, LABEL_SETS, LABELS, SNOMED
from evlecg.data.readers import READERS


def datasets() -> dict[str, dict[str, Any]]:
    """Dataset name -> title, records, sizes in GB (1e9 bytes), access, licence, citation, address, commands."""
    return {
        name: {
            "title": reader.title,
            "records": reader.n_records,
            "download_GB": reader.download_GB,
            "prepared_GB": reader.prepared_GB,
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
