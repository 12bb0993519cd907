"""Format of results.json."""

import json

from hybridmem.compare.results import as_json


def test_a_point_is_a_line_and_nothing_changes():
    held = {
        "curves": {"val/bits_at/[0,64)": [[1, 0.5], [2, 0.25]]},
        "name": "brackets [\n1,\n2] in words",
        "none": [],
        "list": ["a [\n", "b"],
        "last": {"a": 1, "b": None},
    }
    written = as_json(held)
    assert json.loads(written) == held
    assert list(json.loads(written)) == list(held)
    assert "   [ 1, 0.5 ],\n   [ 2, 0.25 ]\n" in written
    assert written.endswith("}\n")
