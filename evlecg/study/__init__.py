"""A study: pairs x methods x training sizes x seeds, tuned on validation records and told on test records.

Every cell is an ordinary run of `evlecg distill` in a process of its own, so a study can be killed and repeated: cells
that are done are read, cells that were stopped go on, and methods, seeds, sizes and pairs can be added later. What a
teacher gives is computed once a pair (`OUT/caches`). Two stages. *Tune*: every method tries its own grid, no more than
`budget` configurations, and is judged by macro AUC on the validation split. *Final*: the best configuration of every
method is trained with every seed and scored on the test split, which nothing has seen before. `results.json` holds
every cell, the failed ones too, and is all that the table is made from.
"""

from evlecg.study.plan import Cell, Method, Study, check_grown, choose, final_cells, find_study, load_study, tune_cells
from evlecg.study.run import run_study
from evlecg.study.table import study_figures, study_summary, study_table, write_rows
from evlecg.study.tell import tell, write_told

__all__ = [
    "Cell", "Method", "Study", "check_grown", "choose", "final_cells", "find_study", "load_study", "run_study",
    "study_figures", "study_summary", "study_table", "tell", "tune_cells", "write_rows", "write_told",
]  # fmt: skip
