"""SIGKILL at any moment costs time, never a bit."""

from tests import kill_and_resume
from tests.flags import IN_HASTE


def test_three_kills_change_no_bit(tmp_path, monkeypatch):
  # One device, not eight: starting up is most of the time.
  monkeypatch.setenv('XLA_FLAGS', IN_HASTE)
  kills, runs = kill_and_resume.run(
    tmp_path,
    kills=3,
    config='configs/st_moe_tiny.py:runlocal',
    flags=kill_and_resume.flags_for(40),
  )
  assert len(kills) == 3
  assert any(kill.after > 0 for kill in kills), kills
  for broken in runs:
    assert kill_and_resume.differences(tmp_path / 'unbroken', broken) == []
