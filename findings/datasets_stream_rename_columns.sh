#!/usr/bin/env bash
# datasets: a stream can't give one column the name of another that is renamed too; a data set can.
#
# Expected: `rename_columns({"chosen": "rejected", "rejected": "chosen"})` swaps two columns, and {"a": "b", "b": "c"}
#   moves both along, for a `Dataset` and for the `IterableDataset` that it turns into.
# What happens: a `Dataset` does so. The stream raises when it is read, not when the call is made, and its message
#   names as columns that are "already in the dataset" none at all for the swap, and one that is not to be kept for the
#   chain. `column_names` of the stream has promised the new names before.
# Versions: datasets 5.2.0.
# Output seen: Dataset: rows with the names swapped or moved. IterableDataset: "Error when renaming ['a', 'b'] to
#   ['b', 'a']: columns set() are already in the dataset." and "... to ['b', 'c']: columns {'a'} are already ...".
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install datasets==5.2.0

cd "$folder"
export HF_HUB_OFFLINE=1
"$folder/venv/bin/python" - <<'PYTHON'
from datasets import Dataset


table = Dataset.from_dict({"a": [1, 2], "b": [3, 4]})
for mapping, expected in (
    ({"a": "b", "b": "a"}, [{"b": 1, "a": 3}, {"b": 2, "a": 4}]),
    ({"a": "b", "b": "c"}, [{"b": 1, "c": 3}, {"b": 2, "c": 4}]),
):
    assert list(table.rename_columns(mapping)) == expected
    stream = table.to_iterable_dataset().rename_columns(mapping)
    assert stream.column_names == list(mapping.values())
    try:
        rows = list(stream)
    except ValueError as error:
        print(mapping, "a Dataset:", expected, "- a stream:", error)
        assert "already in the dataset" in str(error)
    else:
        raise AssertionError(f"the stream is renamed now: {rows}")
print("seen: renaming columns in a circle or a chain works for a Dataset and not for its stream")
PYTHON
