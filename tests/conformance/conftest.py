"""Which methods are tried whole: one by turn, or all of them."""

import datetime

import pytest

from tests.conformance import tables

BY_TURN = 1


def by_turn(day: int) -> list[str]:
  """Methods of a day, others the next."""
  names = [*tables.METHODS]
  first = day * BY_TURN
  return sorted({names[(first + i) % len(names)] for i in range(BY_TURN)})


def pytest_generate_tests(metafunc):
  if 'method' in metafunc.fixturenames:
    every = metafunc.config.getoption('all_methods')
    day = datetime.date.today().toordinal()
    names = [*tables.METHODS] if every else by_turn(day)
    # Of one method all in one process: programs are compiled once.
    marked = [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in names]
    metafunc.parametrize('method', marked, scope='session')
