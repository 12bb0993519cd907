"""Limits of kernel resources, and the committed table."""

from dataclasses import replace

import pytest

from hybridmem_kernels.tools.resources import SHARED_LIMITS, TABLE, Resources, Row, problems, read_tables, write_tables

GOOD = Row("sm80", "scan", True, Resources(registers=128, spills=0, shared=1024, tensor_core=8))
COMMITTED = {"sm80": {"scan": GOOD.resources}}


def changed(**changes: int) -> Row:
    return replace(GOOD, resources=replace(GOOD.resources, **changes))


def test_resources_as_committed_pass():
    assert problems([GOOD], COMMITTED) == []
    assert problems([changed(registers=64, shared=0, tensor_core=16)], COMMITTED) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(spills=8), "sm80 scan: spills 8 bytes of registers per thread"),
        (changed(shared=163 * 1024 + 1), "sm80 scan: needs 166913 bytes of shared memory, but 166912 are available"),
        (changed(tensor_core=0), "sm80 scan: multiplies matrices without tensor cores"),
    ],
    ids=["spill", "shared memory", "no tensor cores"],
)
def test_limits_hold_for_every_version_of_triton(row, message):
    assert problems([row], None) == [message]
    assert message in problems([row], COMMITTED)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(registers=129), "registers grew from 128 to 129"),
        (changed(shared=2048), "shared grew from 1024 to 2048"),
        (replace(GOOD, name="new"), "not in resources.json"),
        (replace(GOOD, target="sm90"), "not in resources.json"),
    ],
)
def test_growth_counts_within_one_version(row, message):
    (found,) = problems([row], COMMITTED)
    assert found == f"{row.target} {row.name}: {message}; accept it with --write"
    assert problems([row], None) == []


def test_a_kernel_without_products_needs_no_tensor_cores():
    row = replace(changed(tensor_core=0), has_dots=False)
    assert problems([row], None) == []


def test_a_table_is_read_as_it_was_written(tmp_path):
    tables = {"3.9.0": {"sm80": {"a": GOOD.resources, "b": GOOD.resources}, "gfx942": {"a": GOOD.resources}}}
    write_tables(tables, tmp_path / "table.json")
    assert read_tables(tmp_path / "table.json") == tables
    assert read_tables(tmp_path / "none.json") == {}


def test_the_committed_table_is_within_the_limits_on_every_target():
    tables = read_tables()
    assert tables, f"{TABLE.name} is empty: python -m hybridmem_kernels.tools.aot --write"
    for table in tables.values():
        assert set(table) == set(SHARED_LIMITS)
        rows = [Row(target, name, False, taken) for target, kernels in table.items() for name, taken in kernels.items()]
        assert problems(rows, None) == []
        operators = {name.split(":")[0] for kernels in table.values() for name in kernels}
        assert operators == {"memory_scan", "memory_mlp_scan", "attention_divergence"}
