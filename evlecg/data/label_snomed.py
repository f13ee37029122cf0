"""The SNOMED CT codes of the PhysioNet/CinC challenges of 2020 and 2021: all 133, with a label or a reason for none.

Order, abbreviations and cohorts are those of the challenge's table (dx_mapping_2021.csv), the 30 scored codes first.
A scored label means its scored codes and nothing else, so that `cinc2021-26` is the challenge's task; a code that the
challenge keeps apart although it may mean the same has a label of its own and leaves the scored one open
(`SNOMED_MAYBE`).
"""

from __future__ import annotations

from typing import NamedTuple


class Snomed(NamedTuple):
    """A SNOMED CT code of CinC 2020/2021.

    Attributes:
        abbreviation: the challenge's.
        label: our code, "" where there is none.
        superclass: "" where it belongs to none.
        cohorts: letters of the cohorts that use it (`COHORTS`): the others did not assess it.
        reason: why it has no label.
    """

    abbreviation: str
    label: str
    superclass: str
    cohorts: str
    reason: str = ""


class Equivalence(NamedTuple):
    """Codes that the challenge scores as one diagnosis."""

    label: str
    codes: tuple[str, ...]
    names: tuple[str, ...]


COHORTS = {
    "cpsc_2018": "A",
    "cpsc_2018_extra": "Q",
    "st_petersburg_incart": "I",
    "ptb": "S",
    "ptb-xl": "P",
    "georgia": "E",
    "chapman_shaoxing": "C",
    "ningbo": "N",
}
COHORTS_2020 = "AQISPE"

SINUS_RHYTHM = "426783006"

EQUIVALENCES: tuple[Equivalence, ...] = (
    Equivalence("LBBB", ("733534002", "164909002"), ("CLBBB", "LBBB")),
    Equivalence("RBBB", ("713427006", "59118001"), ("CRBBB", "RBBB")),
    Equivalence("PAC", ("284470004", "63593006"), ("PAC", "SVPB")),
    Equivalence("PVC", ("427172004", "17338001"), ("PVC", "VPB")),
)

SNOMED: dict[str, Snomed] = {
    "164889003": Snomed("AF", "AFIB", "", "AQISPEC"),
    "164890007": Snomed("AFL", "AFLT", "", "QSPECN"),
    "6374002": Snomed("BBB", "BBB", "CD", "ISEN"),
    "426627000": Snomed("Brady", "BRADY", "", "QIEN"),
    "733534002": Snomed("CLBBB", "LBBB", "CD", "N"),
    "713427006": Snomed("CRBBB", "RBBB", "CD", "QPEN"),
    "270492004": Snomed("IAVB", "1AVB", "CD", "AQPECN"),
    "713426002": Snomed("IRBBB", "IRBBB", "CD", "QPEN"),
    "39732003": Snomed("LAD", "LAD", "", "PECN"),
    "445118002": Snomed("LAnFB", "LAFB", "CD", "PEN"),
    "164909002": Snomed("LBBB", "LBBB", "CD", "AQPECN"),
    "251146004": Snomed("LQRSV", "LVOLT", "", "PECN"),
    "698252002": Snomed("NSIVCB", "IVCD", "CD", "QIPECN"),
    "426783006": Snomed("NSR", "SR", "", "AQSPECN"),
    "284470004": Snomed("PAC", "PAC", "", "AQIPECN"),
    "10370003": Snomed("PR", "PACE", "", "QPN"),
    "365413008": Snomed("PRWP", "PRWP", "", "N"),
    "427172004": Snomed("PVC", "PVC", "", "QN"),
    "164947007": Snomed("LPR", "LPR", "", "PCN"),
    "111975006": Snomed("LQT", "LNGQT", "STTC", "QPECN"),
    "164917005": Snomed("QAb", "QWAVE", "", "QPECN"),
    "47665007": Snomed("RAD", "RAD", "", "QPECN"),
    "59118001": Snomed("RBBB", "RBBB", "CD", "AQIECN"),
    "427393009": Snomed("SA", "SARRH", "", "QIPEN"),
    "426177001": Snomed("SB", "SBRAD", "", "QPECN"),
    "427084000": Snomed("STach", "STACH", "", "QISPECN"),
    "63593006": Snomed("SVPB", "PAC", "", "QIPEN"),
    "164934002": Snomed("TAb", "TAB", "STTC", "QPECN"),
    "59931005": Snomed("TInv", "INVT", "STTC", "QIPECN"),
    "17338001": Snomed("VPB", "PVC", "", "QEC"),
    "233892002": Snomed("AAR", "AAESC", "", "N"),
    "164951009": Snomed("abQRS", "ABQRS", "", "P"),
    "251187003": Snomed("AED", "AESC", "", "N"),
    "61277005": Snomed("AIVR", "AIVR", "", "N"),
    "426664006": Snomed("AJR", "AJR", "", "EN"),
    "251139008": Snomed("ALR", "ARMREV", "", "E"),
    "57054005": Snomed("AMI", "ACUTEMI", "MI", "IN"),
    "413444003": Snomed("AMIs", "ISCH", "STTC", "QE"),
    "426434006": Snomed("AnMIs", "ISCAN", "STTC", "PE"),
    "54329005": Snomed("AnMI", "AMI", "MI", "QPN"),
    "251173003": Snomed("AB", "BIGU", "", "IC"),
    "195080001": Snomed("AFAFL", "AFAFL", "", "QE"),
    "195126007": Snomed("AH", "HYP", "HYP", "QE"),
    "251268003": Snomed("AP", "APACE", "", "E"),
    "106068003": Snomed("ARH", "ARHY", "", "N"),
    "713422000": Snomed("ATach", "ATACH", "", "QECN"),
    "233917008": Snomed("AVB", "AVB", "CD", "QECN"),
    "50799005": Snomed("AVD", "AVDISS", "", "N"),
    "29320008": Snomed("AVJR", "JUNC", "", "QN"),
    "251166008": Snomed("AVNRT", "AVNRT", "", "C"),
    "233897008": Snomed("AVRT", "AVRT", "", "CN"),
    "251170000": Snomed("BPAC", "BPAC", "", "QIN"),
    "418818005": Snomed("BRU", "BRUGADA", "", "N"),
    "74615001": Snomed("BTS", "", "", "QI", "a syndrome that shows over time, not in one tracing"),
    "426749004": Snomed("CAF", "AFAFL", "", "Q"),
    "251199005": Snomed("CCR", "CCWROT", "", "C"),
    "61721007": Snomed("CVCL/CCVCL", "", "", "N", "one code for two opposite findings"),
    "698247007": Snomed("CD", "", "", "S", "says of no rhythm which it is"),
    "27885002": Snomed("CHB", "3AVB", "CD", "QPECN"),
    "204384007": Snomed("CIAHB", "AVB", "CD", "S"),
    "53741008": Snomed("CHD", "", "", "IS", "a disease of the patient, which a tracing does not show"),
    "413844008": Snomed("CMI", "ISCH", "STTC", "Q"),
    "251198002": Snomed("CR", "CWROT", "", "C"),
    "82226007": Snomed("DIB", "CD", "CD", "Q"),
    "428417006": Snomed("ERe", "EREPOL", "", "ECN"),
    "13640000": Snomed("FB", "FUSION", "", "ICN"),
    "164942001": Snomed("FQRS", "FQRS", "", "C"),
    "84114007": Snomed("HF", "", "", "S", "a disease of the patient, which a tracing does not show"),
    "368009": Snomed("HVD", "", "", "S", "a disease of the patient, which a tracing does not show"),
    "251259000": Snomed("HTV", "HIGHT", "STTC", "Q"),
    "251200008": Snomed("ICA", "INDAX", "", "P"),
    "195042002": Snomed("IIAVB", "2AVB", "CD", "QPECN"),
    "426183003": Snomed("IIAVBII", "2AVB", "CD", "N"),
    "425419005": Snomed("IIs", "ISCIN", "STTC", "PE"),
    "251120003": Snomed("ILBBB", "ILBBB", "CD", "QPEN"),
    "704997005": Snomed("ISTD", "STD", "STTC", "Q"),
    "49260003": Snomed("IR", "IVR", "", "I"),
    "426995002": Snomed("JE", "JESC", "", "QECN"),
    "251164006": Snomed("JPC", "JPC", "", "QCN"),
    "426648003": Snomed("JTach", "JTACH", "", "QEN"),
    "253352002": Snomed("LAA", "LAABN", "", "E"),
    "67741000119109": Snomed("LAE", "LAE", "HYP", "QPEN"),
    "446813000": Snomed("LAH", "LAE", "HYP", "QN"),
    "425623009": Snomed("LIs", "ISCLA", "STTC", "PE"),
    "445211001": Snomed("LPFB", "LPFB", "CD", "PEN"),
    "164873001": Snomed("LVH", "LVH", "HYP", "QIPECN"),
    "55827005": Snomed("LVHV", "VCLVH", "", "CN"),
    "370365005": Snomed("LVS", "LVSTRAIN", "STTC", "Q"),
    "164865005": Snomed("MI", "MI", "MI", "QISPECN"),
    "164861001": Snomed("MIs", "ISCH", "STTC", "QP"),
    "54016002": Snomed("MoI", "2AVB", "CD", "ICN"),
    "428750005": Snomed("NSSTTA", "NSSTT", "STTC", "QPEC"),
    "164867002": Snomed("OldMI", "OLDMI", "MI", "Q"),
    "282825002": Snomed("PAF", "AFAFL", "", "IS"),
    "251205003": Snomed("PPW", "LONGP", "", "N"),
    "67198005": Snomed("PSVT", "PSVT", "", "IP"),
    "425856008": Snomed("PVT", "VTAC", "", "IN"),
    "164912004": Snomed("PWC", "PCHANGE", "", "CN"),
    "253339007": Snomed("RAAb", "RAABN", "", "E"),
    "164921003": Snomed("RAb", "RABN", "", "QE"),
    "446358003": Snomed("RAH", "RAE", "HYP", "QPCN"),
    "67751000119106": Snomed("RAHV", "TALLP", "", "CN"),
    "314208002": Snomed("RAF", "AFAFL", "", "S"),
    "89792004": Snomed("RVH", "RVH", "HYP", "QPECN"),
    "17366009": Snomed("SAAWR", "WAP", "", "C"),
    "65778007": Snomed("SAB", "SABLOCK", "CD", "QN"),
    "5609005": Snomed("SARR", "SARREST", "", "N"),
    "60423000": Snomed("SND", "", "", "I", "a syndrome that shows over time, not in one tracing"),
    "49578007": Snomed("SPRI", "SHORTPR", "", "QEN"),
    "77867006": Snomed("SQT", "SHORTQT", "STTC", "QN"),
    "55930002": Snomed("STC", "NST", "STTC", "QPEN"),
    "429622005": Snomed("STD", "STD", "STTC", "AQIPECN"),
    "164931005": Snomed("STE", "STE", "STTC", "AQIPEC"),
    "164930006": Snomed("STIAb", "STABN", "STTC", "QIECN"),
    "251168009": Snomed("SVB", "BIGU", "", "I"),
    "426761007": Snomed("SVT", "SVTAC", "", "QIPECN"),
    "266257000": Snomed("TIA", "", "", "I", "a disease of the patient, which a tracing does not show"),
    "251223006": Snomed("TPW", "TALLP", "", "N"),
    "164937009": Snomed("UAb", "UWAVE", "", "QCN"),
    "11157007": Snomed("VBig", "BIGU", "", "QIPEC"),
    "164884008": Snomed("VEB", "VEB", "", "AIPE"),
    "75532003": Snomed("VEsB", "VESC", "", "QICN"),
    "81898007": Snomed("VEsR", "VESCR", "", "QEN"),
    "164896001": Snomed("VF", "VFIB", "", "QSEN"),
    "111288001": Snomed("VFL", "VFLUT", "", "QN"),
    "266249003": Snomed("VH", "HYP", "HYP", "QSPE"),
    "195060002": Snomed("VPEx", "PREEXC", "CD", "QEC"),
    "251266004": Snomed("VPP", "VPACE", "", "E"),
    "251182009": Snomed("VPVC", "COUPLET", "", "I"),
    "164895002": Snomed("VTach", "VTAC", "", "QIS"),
    "251180001": Snomed("VTrig", "TRIGU", "", "QIPEC"),
    "195101003": Snomed("WAP", "WAP", "", "EC"),
    "74390002": Snomed("WPW", "WPW", "CD", "ISPECN"),
}
# Codes of the Chapman-Shaoxing-Ningbo release (ConditionNames_SNOMED-CT.csv) that are not among the 133.
SNOMED_CSN: dict[str, Snomed] = {
    "28189009": Snomed("2AVB2", "2AVB", "CD", "CN"),
    "233896004": Snomed("AVNRT", "AVNRT", "", "CN"),
    "251147008": Snomed("LVQRSLL", "LVOLT", "", "CN"),
    "251148003": Snomed("LVQRSCL", "LVOLT", "", "CN"),
}

# Code -> labels that it neither affirms nor denies: it is wider than they are, or the challenge does not score it as
# what it may well be (ventricular ectopics 164884008 are not scored as PVC). A record with such a code says nothing of
# the label, unless another code says it.
SNOMED_MAYBE: dict[str, tuple[str, ...]] = {
    "6374002": ("LBBB", "RBBB", "ILBBB", "IRBBB"),  # bundle branch block
    "426627000": ("SBRAD",),  # bradycardia
    "82226007": ("IVCD",),  # diffuse intraventricular block
    "233917008": ("1AVB", "2AVB", "3AVB"),  # AV block
    "204384007": ("1AVB", "2AVB"),  # incomplete AV block
    "195060002": ("WPW",),  # preexcitation
    "195080001": ("AFIB", "AFLT"),  # fibrillation and flutter
    "426749004": ("AFIB",),  # chronic fibrillation
    "282825002": ("AFIB",),  # paroxysmal fibrillation
    "314208002": ("AFIB",),  # rapid fibrillation
    "164884008": ("PVC",),  # ventricular ectopics
    "251182009": ("PVC",),  # paired premature ventricular complexes
    "11157007": ("PVC",),  # ventricular bigeminy
    "251180001": ("PVC",),  # ventricular trigeminy
    "251173003": ("PAC",),  # atrial bigeminy
    "251168009": ("PAC",),  # supraventricular bigeminy
    "251170000": ("PAC",),  # blocked premature atrial contraction
    "251266004": ("PACE",),  # ventricular pacing pattern
    "251268003": ("PACE",),  # atrial pacing pattern
    "164865005": ("AMI", "OLDMI", "ACUTEMI"),  # infarction
    "164867002": ("AMI",),  # old infarction
    "57054005": ("AMI",),  # acute infarction
    "54329005": ("OLDMI", "ACUTEMI"),  # anterior infarction
    "164861001": ("ISCAN", "ISCIN", "ISCLA"),  # ischemia
    "413444003": ("ISCAN", "ISCIN", "ISCLA"),  # acute ischemia
    "413844008": ("ISCAN", "ISCIN", "ISCLA"),  # chronic ischemia
    "253352002": ("LAE", "HYP"),  # left atrial abnormality
    "253339007": ("RAE", "HYP"),  # right atrial abnormality
    "67751000119106": ("RAE", "HYP"),  # right atrial high voltage
    "195126007": ("LAE", "RAE"),  # atrial hypertrophy
    "266249003": ("LVH", "RVH"),  # ventricular hypertrophy
}

# Names that labels.csv sidecars use beside the challenge's abbreviations -> SNOMED code.
_SIDECAR_ALIASES = {
    "Normal": SINUS_RHYTHM,
    "NORM": SINUS_RHYTHM,
    "SR": SINUS_RHYTHM,
    "I-AVB": "270492004",
    "SBRAD": "426177001",
    "LNGQT": "111975006",
    "LVOLT": "251146004",
    "IMI": "164865005",
    "VPC": "17338001",
}
SIDECAR_NAMES = {row.abbreviation.casefold(): code for code, row in SNOMED.items()} | {
    name.casefold(): code for name, code in _SIDECAR_ALIASES.items()
}
