"""Every implementation on every case in every number type: the grid that `make parity` prints. Budget: 150 s."""

import pytest
from parity.cases import CASES
from parity.grid import BACKENDS, CACHED, MODES, PAGE, Grid


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Grid:
    return Grid(tmp_path_factory.mktemp("grid"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cell_is_within_its_limit(grid, backend, mode):
    beyond = {}
    for case in CASES:
        error = grid.error(backend, mode, case)
        if error is None:
            assert (backend, mode) in MODES[mode].absent or case not in CACHED, "a cell that should exist"
        elif not error <= grid.limit(backend, mode):
            beyond[case] = error
    assert not beyond


def test_cells_that_do_not_exist_say_why():
    for mode in MODES.values():
        assert all(reason for reason in mode.absent.values())


def test_the_page_shows_the_grid_of_today():
    """Its rows, columns and limits; the figures are those of the machine that wrote it."""
    text = PAGE.read_text(encoding="utf-8")
    for mode, about in MODES.items():
        section = text.split(f"## {mode}: ")[1].split("\n## ")[0]
        rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
        header, *body = [[cell.strip("| ") for cell in row] for row in rows]
        assert header[1:] == [backend for backend in BACKENDS if (backend, mode) not in about.absent]
        cases = list(CACHED if mode == "cached" else CASES)
        assert [row[0] for row in body] == [*cases, "limit"]
        for row in body[:-1]:
            assert all(float(cell) <= float(limit) for cell, limit in zip(row[1:], body[-1][1:], strict=True))
