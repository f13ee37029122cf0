"""The vocabulary: every label code with its wording, the named label sets, and the datasets' own names for labels.

`labels.py` says how a record gets its labels from these tables; the SNOMED codes of the challenges have a file of their
own (`label_snomed.py`).
"""

from __future__ import annotations

# Each phrase completes "Does this ECG show ...?". The first 71 codes after the superclasses are PTB-XL's statements.
LABELS: dict[str, str] = {
    # PTB-XL's diagnostic superclasses; NORM is a statement, a subclass and a superclass, all three the same
    "NORM": "a normal tracing",
    "MI": "myocardial infarction",
    "STTC": "an ST or T wave change",
    "CD": "a conduction disturbance",
    "HYP": "hypertrophy",
    # infarction and injury
    "IMI": "inferior myocardial infarction",
    "ASMI": "anteroseptal myocardial infarction",
    "AMI": "anterior myocardial infarction",
    "ALMI": "anterolateral myocardial infarction",
    "LMI": "lateral myocardial infarction",
    "PMI": "posterior myocardial infarction",
    "ILMI": "inferolateral myocardial infarction",
    "IPMI": "inferoposterior myocardial infarction",
    "IPLMI": "inferoposterolateral myocardial infarction",
    "INJAS": "subendocardial injury in anteroseptal leads",
    "INJAL": "subendocardial injury in anterolateral leads",
    "INJIN": "subendocardial injury in inferior leads",
    "INJLA": "subendocardial injury in lateral leads",
    "INJIL": "subendocardial injury in inferolateral leads",
    # ischemia, ST segment, T wave and QT interval
    "ISC": "nonspecific ischemic changes",
    "ISCAL": "ischemic changes in anterolateral leads",
    "ISCIN": "ischemic changes in inferior leads",
    "ISCIL": "ischemic changes in inferolateral leads",
    "ISCAS": "ischemic changes in anteroseptal leads",
    "ISCLA": "ischemic changes in lateral leads",
    "ISCAN": "ischemic changes in anterior leads",
    "NDT": "non-diagnostic T wave abnormalities",
    "NST": "nonspecific ST changes",
    "DIG": "a digitalis effect",
    "LNGQT": "a prolonged QT interval",
    "ANEUR": "ST-T changes compatible with a ventricular aneurysm",
    "EL": "changes by an electrolyte disturbance or a drug",
    "STD": "ST depression",
    "STE": "ST elevation",
    "LOWT": "T waves of low amplitude",
    "NT": "nonspecific T wave changes",
    "INVT": "T wave inversion",
    "TAB": "a T wave abnormality",
    # conduction
    "1AVB": "first-degree atrioventricular block",
    "2AVB": "second-degree atrioventricular block",
    "3AVB": "third-degree atrioventricular block",
    "LBBB": "complete left bundle branch block",
    "RBBB": "complete right bundle branch block",
    "ILBBB": "incomplete left bundle branch block",
    "IRBBB": "incomplete right bundle branch block",
    "LAFB": "left anterior fascicular block",
    "LPFB": "left posterior fascicular block",
    "IVCD": "a nonspecific intraventricular conduction delay",
    "WPW": "Wolff-Parkinson-White syndrome",
    "LPR": "a prolonged PR interval",
    # chambers and voltage
    "LVH": "left ventricular hypertrophy",
    "RVH": "right ventricular hypertrophy",
    "SEHYP": "septal hypertrophy",
    "LAE": "left atrial overload or enlargement",
    "RAE": "right atrial overload or enlargement",
    "VCLVH": "voltage criteria for left ventricular hypertrophy",
    "LVOLT": "low QRS voltages",
    "HVOLT": "high QRS voltages",
    "ABQRS": "an abnormal QRS complex",
    "QWAVE": "abnormal Q waves",
    # premature beats
    "PAC": "premature atrial contractions",
    "PVC": "premature ventricular contractions",
    "PRCS": "premature complexes of any origin",
    # rhythm
    "SR": "sinus rhythm",
    "AFIB": "atrial fibrillation",
    "STACH": "sinus tachycardia",
    "SARRH": "sinus arrhythmia",
    "SBRAD": "sinus bradycardia",
    "PACE": "a paced rhythm",
    "SVARR": "a supraventricular arrhythmia",
    "BIGU": "a bigeminal pattern",
    "AFLT": "atrial flutter",
    "SVTAC": "supraventricular tachycardia",
    "PSVT": "paroxysmal supraventricular tachycardia",
    "TRIGU": "a trigeminal pattern",
    # PTB-XL's subclasses, where they are wider than the statement of that name (the others are statements)
    "AMI-any": "infarction or injury of the anterior wall, anteroseptal and anterolateral included",
    "IMI-any": "infarction or injury of the inferior wall, its lateral and posterior extensions included",
    "STTC-other": "a T wave, QT interval, drug or electrolyte change",
    "LFB": "a left fascicular block, anterior or posterior",
    "AVB": "atrioventricular block of any degree",
    "ISCA": "ischemic changes in anterior or lateral leads",
    "ISCI": "ischemic changes in inferior leads, inferolateral included",
    # beyond PTB-XL
    "ABNORMAL": "any abnormality",
    "ISCH": "myocardial ischemia",
    "OLDMI": "an old myocardial infarction",
    "ACUTEMI": "an acute myocardial infarction",
    "NSSTT": "nonspecific ST-T abnormalities",
    "STABN": "an ST segment abnormality",
    "LVSTRAIN": "a left ventricular strain pattern",
    "EREPOL": "early repolarization",
    "BRUGADA": "a Brugada pattern",
    "HIGHT": "tall T waves",
    "UWAVE": "an abnormal U wave",
    "SHORTQT": "a short QT interval",
    "SHORTPR": "a short PR interval",
    "BBB": "an unspecified bundle branch block",
    "SABLOCK": "sinoatrial block",
    "AVDISS": "atrioventricular dissociation",
    "PREEXC": "ventricular preexcitation",
    "FQRS": "a fragmented QRS complex",
    "LAD": "left axis deviation",
    "RAD": "right axis deviation",
    "INDAX": "an indeterminate cardiac axis",
    "CWROT": "clockwise rotation of the heart",
    "CCWROT": "counterclockwise rotation of the heart",
    "PRWP": "poor R wave progression",
    "RABN": "an abnormal R wave",
    "LAABN": "a left atrial abnormality",
    "RAABN": "a right atrial abnormality",
    "TALLP": "tall P waves",
    "LONGP": "a prolonged P wave",
    "PCHANGE": "a P wave change",
    "BRADY": "bradycardia",
    "AFAFL": "atrial fibrillation or flutter",
    "ATACH": "atrial tachycardia",
    "AVNRT": "atrioventricular nodal reentrant tachycardia",
    "AVRT": "atrioventricular reentrant tachycardia",
    "ARHY": "an atrial rhythm",
    "WAP": "a wandering atrial pacemaker",
    "AESC": "atrial escape beats",
    "AAESC": "an accelerated atrial escape rhythm",
    "BPAC": "blocked premature atrial contractions",
    "SARREST": "sinus arrest",
    "JUNC": "a junctional rhythm",
    "AJR": "an accelerated junctional rhythm",
    "JTACH": "junctional tachycardia",
    "JESC": "junctional escape beats",
    "JPC": "premature junctional contractions",
    "VEB": "ventricular ectopic beats",
    "COUPLET": "paired premature ventricular contractions",
    "FUSION": "fusion beats",
    "VESC": "ventricular escape beats",
    "VESCR": "a ventricular escape rhythm",
    "IVR": "an idioventricular rhythm",
    "AIVR": "an accelerated idioventricular rhythm",
    "VTAC": "ventricular tachycardia",
    "VFIB": "ventricular fibrillation",
    "VFLUT": "ventricular flutter",
    "APACE": "atrial pacing",
    "VPACE": "ventricular pacing",
    "ARMREV": "reversed arm leads",
}

# A label -> what it is a kind of: who has the first has the second. The first seven rows are PTB-XL's own subclasses.
BROADER: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("AMI", "ASMI", "ALMI", "INJAS", "INJAL", "INJLA"), ("AMI-any",)),
    **dict.fromkeys(("IMI", "ILMI", "IPMI", "IPLMI", "INJIN", "INJIL"), ("IMI-any",)),
    **dict.fromkeys(("NDT", "DIG", "LNGQT", "ANEUR", "EL"), ("STTC-other",)),
    **dict.fromkeys(("1AVB", "2AVB", "3AVB"), ("AVB",)),
    **dict.fromkeys(("LAFB", "LPFB"), ("LFB",)),
    **dict.fromkeys(("ISCAL", "ISCAS", "ISCLA", "ISCAN"), ("ISCA", "ISCH")),
    **dict.fromkeys(("ISCIN", "ISCIL"), ("ISCI", "ISCH")),
    "ISC": ("ISCH",),
    "WPW": ("PREEXC",),
    **dict.fromkeys(("AFIB", "AFLT"), ("AFAFL",)),
    **dict.fromkeys(("PVC", "COUPLET"), ("VEB",)),
    "AJR": ("JUNC",),
    "AIVR": ("IVR",),
}
# Of these, all kinds are listed: who was looked at for every kind and has none does not have it.
COMPLETE = frozenset({"AMI-any", "IMI-any", "STTC-other", "AVB", "LFB", "ISCA", "ISCI", "ISCH", "AFAFL"})

# What of the tracing a label hangs on -> why -> the labels. "several": on more than one of these, so that it says
# nothing about any. Reports group by it, to see whether a student lost one part of the reading more than another.
LABEL_BASIS: dict[str, dict[str, tuple[str, ...]]] = {
    "QRS shape": {
        "a delayed or redirected activation widens or notches the QRS complex": (
            "CD", "LBBB", "RBBB", "ILBBB", "IRBBB", "BBB", "IVCD", "FQRS",
        ),
        "a delta wave slurs the beginning of the QRS complex": ("WPW", "PREEXC"),
        "lost forces show as Q waves or missing R waves": (
            "MI", "IMI", "ASMI", "AMI", "ALMI", "LMI", "PMI", "ILMI", "IPMI", "IPLMI", "AMI-any", "IMI-any", "OLDMI",
            "QWAVE", "PRWP", "RABN",
        ),
        "the shape of the QRS complex itself is what is named": ("ABQRS", "FUSION"),
        "a beat of ventricular origin is told by its wide QRS complex": ("PVC", "VEB", "COUPLET", "VESC"),
    },
    "ST/T": {
        "a shifted ST segment is what is named": (
            "STD", "STE", "NST", "STABN", "EREPOL", "BRUGADA", "ANEUR", "INJAS", "INJAL", "INJIN", "INJLA", "INJIL",
        ),
        "the T or U wave is what is named": ("NDT", "LOWT", "NT", "INVT", "TAB", "HIGHT", "UWAVE"),
        "ischemia is read off the ST segment and the T wave": (
            "STTC", "ISC", "ISCAL", "ISCIN", "ISCIL", "ISCAS", "ISCLA", "ISCAN", "ISCA", "ISCI", "ISCH", "NSSTT",
            "ACUTEMI",
        ),
        "drugs, electrolytes and strain bend ST segment and T wave": ("DIG", "EL", "STTC-other", "LVSTRAIN"),
    },
    "rhythm": {
        "the regularity and the rate of the beats, and what comes before them": (
            "SR", "AFIB", "STACH", "SARRH", "SBRAD", "SVARR", "AFLT", "SVTAC", "PSVT", "AFAFL", "BRADY", "ATACH",
            "AVNRT", "AVRT", "ARHY", "WAP", "JUNC", "AJR", "JTACH", "IVR", "AIVR", "VESCR", "VTAC", "VFIB", "VFLUT",
        ),
        "a beat that comes early, late or not at all": (
            "PAC", "PRCS", "BIGU", "TRIGU", "AESC", "AAESC", "BPAC", "SARREST", "SABLOCK", "JESC", "JPC", "2AVB",
            "3AVB", "AVDISS",
        ),
        "spikes of a pacemaker set the beats": ("PACE", "APACE", "VPACE"),
    },
    "interval": {
        "the time from P wave to QRS complex": ("1AVB", "LPR", "SHORTPR", "AVB"),
        "the time from QRS complex to the end of the T wave": ("LNGQT", "SHORTQT"),
    },
    "voltage": {
        "the height of the QRS complex": ("HYP", "LVH", "RVH", "SEHYP", "VCLVH", "LVOLT", "HVOLT"),
    },
    "P wave": {
        "the height, length or shape of the P wave": ("LAE", "RAE", "LAABN", "RAABN", "TALLP", "LONGP", "PCHANGE"),
    },
    "axis": {
        "the direction of the QRS forces in the limb leads": ("LAD", "RAD", "INDAX", "LAFB", "LPFB", "LFB"),
        "the turn of the QRS forces in the chest leads": ("CWROT", "CCWROT"),
    },
    "several": {
        "it says something of the whole tracing": ("NORM", "ABNORMAL"),
        "it turns P, QRS and T alike": ("ARMREV",),
    },
}  # fmt: skip

SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
SINUS = frozenset({"SR", "SBRAD", "STACH", "SARRH"})  # rhythms that leave a tracing normal

# fmt: off
SCP_DIAGNOSTIC = (
    "NDT", "NST", "DIG", "LNGQT", "NORM", "IMI", "ASMI", "LVH", "LAFB", "ISC", "IRBBB", "1AVB", "IVCD", "ISCAL", "RBBB",
    "LBBB", "ILMI", "LAE", "AMI", "ALMI", "ISCIN", "INJAS", "LMI", "ISCIL", "LPFB", "ISCAS", "INJAL", "ISCLA", "RVH",
    "ANEUR", "RAE", "EL", "WPW", "ILBBB", "IPLMI", "ISCAN", "IPMI", "SEHYP", "INJIN", "INJLA", "PMI", "3AVB", "INJIL",
    "2AVB",
)
SCP_FORM = (
    "NDT", "NST", "DIG", "LNGQT", "ABQRS", "PVC", "STD", "VCLVH", "QWAVE", "LOWT", "NT", "PAC", "LPR", "INVT", "LVOLT",
    "HVOLT", "TAB", "STE", "PRCS",
)
SCP_RHYTHM = ("SR", "AFIB", "STACH", "SARRH", "SBRAD", "PACE", "SVARR", "BIGU", "AFLT", "SVTAC", "PSVT", "TRIGU")
SCP_SUBCLASSES = (
    "NORM", "AMI-any", "IMI-any", "LMI", "PMI", "STTC-other", "NST", "ISC", "ISCA", "ISCI", "LVH", "RVH", "SEHYP",
    "LAE", "RAE", "AVB", "LBBB", "RBBB", "ILBBB", "IRBBB", "LFB", "IVCD", "WPW",
)
_CODE15 = ("1AVB", "RBBB", "LBBB", "SBRAD", "STACH", "AFIB")
# the 27 scored codes of the 2020 challenge in its 24 classes
_CINC2020 = (
    "AFIB", "AFLT", "BRADY", "LBBB", "RBBB", "1AVB", "IRBBB", "LAD", "LAFB", "LVOLT", "IVCD", "SR", "PAC", "PACE",
    "PVC", "LPR", "LNGQT", "QWAVE", "RAD", "SARRH", "SBRAD", "STACH", "TAB", "INVT",
)

LABEL_SETS: dict[str, tuple[str, ...]] = {
    "ptbxl-super": SUPERCLASSES,
    "ptbxl-sub": SCP_SUBCLASSES,
    "ptbxl-diag": SCP_DIAGNOSTIC,
    "ptbxl-form": SCP_FORM,
    "ptbxl-rhythm": SCP_RHYTHM,
    "ptbxl-all": tuple(dict.fromkeys(SCP_DIAGNOSTIC + SCP_FORM + SCP_RHYTHM)),
    "cpsc9": ("NORM", "AFIB", "1AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE"),
    "cinc2020-24": _CINC2020,
    # the 30 scored codes of the 2021 challenge in its 26 classes
    "cinc2021-26": (*_CINC2020, "BBB", "PRWP"),
    "code15-6": _CODE15,
    # ECGBench asks for the six and NORM; what is neither it calls ABNORMAL, which is not NORM
    "code15-7": (*_CODE15, "NORM"),
    # what the cart's own statements of MIMIC-IV-ECG decide: a machine's labels, not a reader's
    "mimic-machine": (
        *SUPERCLASSES, "SR", "AFIB", "AFLT", "SBRAD", "STACH", "SARRH", "PACE", "SVTAC", "PAC", "PVC", "BIGU", "TRIGU",
        "1AVB", "2AVB", "3AVB", "LBBB", "RBBB", "ILBBB", "IRBBB", "LAFB", "LPFB", "IVCD", "WPW", "LVH", "RVH", "LAE",
        "RAE", "LAD", "RAD", "LVOLT", "STD", "STE", "TAB", "PRWP", "LNGQT",
    ),
    "ludb": (
        *SUPERCLASSES, "SR", "AFIB", "AFLT", "SBRAD", "STACH", "SARRH", "PACE", "PAC", "PVC", "1AVB", "3AVB", "LBBB",
        "RBBB", "ILBBB", "IRBBB", "LAFB", "IVCD", "LVH", "RVH", "LAE", "RAE", "LAD", "RAD",
    ),
}

# PTB-XL code -> label, where the two differ.
SCP_ALIASES = {
    "CLBBB": "LBBB", "CRBBB": "RBBB", "STD_": "STD", "STE_": "STE", "TAB_": "TAB", "LAO/LAE": "LAE", "RAO/RAE": "RAE",
    "NST_": "NST", "NT_": "NT", "ISC_": "ISC", "PRC(S)": "PRCS",
}
# PTB-XL subclass -> label, where the two differ: three subclasses bear the name of one of their statements (AMI, IMI)
# or of their superclass (STTC), and mean more than it or less.
SUBCLASS_ALIASES = {
    **{code: label for code, label in SCP_ALIASES.items() if label in SCP_SUBCLASSES},
    "AMI": "AMI-any", "IMI": "IMI-any", "STTC": "STTC-other", "_AVB": "AVB", "LAFB/LPFB": "LFB",
}

CPSC_NAMES = {
    "Normal": "NORM", "AF": "AFIB", "I-AVB": "1AVB", "LBBB": "LBBB", "RBBB": "RBBB", "PAC": "PAC", "PVC": "PVC",
    "STD": "STD", "STE": "STE",
}
CPSC_NUMBERS = {str(number): label for number, label in enumerate(CPSC_NAMES.values(), start=1)}  # of REFERENCE.csv
# CPSC2018 in the challenge's form: the same nine classes under SNOMED codes, which mean what CPSC meant by them.
CPSC_SNOMED = {
    "426783006": "NORM", "164889003": "AFIB", "270492004": "1AVB", "164909002": "LBBB", "59118001": "RBBB",
    "284470004": "PAC", "164884008": "PVC", "429622005": "STD", "164931005": "STE",
}
CPSC_SUPERCLASS = {
    "NORM": "NORM", "1AVB": "CD", "LBBB": "CD", "RBBB": "CD", "STD": "STTC", "STE": "STTC",
    "AFIB": "", "PAC": "", "PVC": "",
}
# fmt: on
CPSC_ASSESSED = frozenset(CPSC_NAMES.values()) | {"CD", "STTC"}

# LUDB: column of ludb.csv -> (how a phrase begins, in lower case; labels that it means; labels that it may mean).
# The first beginning that fits decides. A phrase that fits none is a finding without a label of ours.
LUDB_PHRASES: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    "Rhythms": (
        ("sinus rhythm", ("SR",), ()),
        ("sinus bradycardia", ("SBRAD",), ()),
        ("sinus tachycardia", ("STACH",), ()),
        ("sinus arrhythmia", ("SARRH",), ()),
        ("irregular sinus rhythm", ("SARRH",), ()),
        ("atrial fibrillation", ("AFIB",), ()),
        ("atrial flutter", ("AFLT",), ()),
    ),
    "Electric axis of the heart": (
        ("electric axis of the heart: left axis deviation", ("LAD",), ()),
        ("electric axis of the heart: right axis deviation", ("RAD",), ()),
        (
            "electric axis of the heart: horizontal",
            (),
            ("LAD",),
        ),  # on the way to the left; where it ends is not defined
        ("electric axis of the heart: vertical", (), ("RAD",)),
    ),
    "Conduction abnormalities": (
        ("i degree av", ("1AVB", "CD"), ()),
        ("iii degree av", ("3AVB", "CD"), ()),
        ("complete left bundle", ("LBBB", "CD"), ()),
        ("complete right bundle", ("RBBB", "CD"), ()),
        ("incomplete left bundle", ("ILBBB", "CD"), ()),
        ("incomplete right bundle", ("IRBBB", "CD"), ()),
        ("left anterior hemiblock", ("LAFB", "CD"), ()),
        ("non-specific intrav", ("IVCD", "CD"), ()),
        ("", ("CD",), ()),
    ),
    "Extrasystolies": (
        ("atrial extrasystole", ("PAC",), ()),
        ("ventricular extrasystole", ("PVC",), ()),
    ),
    "Hypertrophies": (
        ("left ventricular hypertrophy", ("LVH", "HYP"), ()),
        ("right ventricular hypertrophy", ("RVH", "HYP"), ()),
        ("left atrial", ("LAE", "HYP"), ()),  # hypertrophy and overload: one statement in PTB-XL
        ("right atrial", ("RAE", "HYP"), ()),
        ("", ("HYP",), ()),
    ),
    "Cardiac pacing": (("", ("PACE",), ()),),
    "Ischemia": (
        ("stemi", ("MI",), ()),
        ("scar formation", ("MI",), ()),
        ("ischemia", ("STTC",), ()),
        ("undefined ischemia", (), ("MI", "STTC")),
    ),
    "Non-specific repolarization abnormalities": (("", ("STTC",), ()),),
    "Other states": (),
}

# PTB Diagnostic ECG Database: how a reason for admission begins -> labels. An admission says what the patient has; the
# other reasons (heart failure, valves, angina, dysrhythmia, ...) say nothing of the tracing.
PTB_REASONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("myocardial infarction", ("MI",)),
    ("healthy control", ("NORM",)),
    ("bundle branch block", ("BBB", "CD")),
    ("hypertrophy", ("HYP",)),
    ("myocardial hypertrophy", ("HYP",)),
)
# The walls that its infarct localization names -> label; other combinations are an infarction without a place.
PTB_WALLS: dict[frozenset[str], str] = {
    frozenset({"anterior"}): "AMI",
    frozenset({"anterior", "septal"}): "ASMI",
    frozenset({"anterior", "lateral"}): "ALMI",
    frozenset({"anterior", "septal", "lateral"}): "AMI-any",
    frozenset({"inferior"}): "IMI",
    frozenset({"inferior", "lateral"}): "ILMI",
    frozenset({"inferior", "posterior"}): "IPMI",
    frozenset({"inferior", "posterior", "lateral"}): "IPLMI",
    frozenset({"lateral"}): "LMI",
    frozenset({"posterior"}): "PMI",
}
