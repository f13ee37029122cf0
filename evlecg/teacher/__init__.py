"""The teacher's signal, live or stored: the losses cannot tell.

`signal` gives it, `store` keeps it, `rows` cuts batches into what is kept, `compress` makes that smaller.
"""

from evlecg.teacher.compress import COMPRESSIONS
from evlecg.teacher.signal import LiveTeacher, StoredSides, StoredTeacher, TeacherSignal
from evlecg.teacher.store import FolderStore, MemoryStore, Store, TeacherFacts

__all__ = [
    "COMPRESSIONS", "FolderStore", "LiveTeacher", "MemoryStore", "Store", "StoredSides", "StoredTeacher",
    "TeacherFacts", "TeacherSignal",
]  # fmt: skip
