"""Write two splits of a run's training images: each half trains once and is the test part once.

Groups stay whole, as in the run. Started by donors.sh: python donor_splits.py RUN OUT
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from polyseg.config import load_config
from polyseg.data.loading import load_images
from polyseg.data.splits import split_by_settings
from polyseg.runs.run_folder import RunDirectory

run, out = RunDirectory(Path(sys.argv[1])), Path(sys.argv[2])
data = load_config(run.config).data
split, _ = run.read_split()
own = set(split["train"])
members = [replace(one, part=None) for one in load_images(data).members() if one.id in own]
half = {"split": (0.5, 0.0, 0.5), "split_file": None, "fold": None}
halves = split_by_settings(members, data.model_copy(update=half))
for name, train, test in (("a", "train", "test"), ("b", "test", "train")):
    parts = {"train": halves[train], "val": split["val"], "test": halves[test]}
    (out / f"donor-{name}.json").write_text(json.dumps(parts, indent=1))
