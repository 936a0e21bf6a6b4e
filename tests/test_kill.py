"""A run killed three times ends with the bits of one that was not."""

from tests import kill_and_resume


def test_three_kills_change_no_bit(tmp_path):
  # For twenty kills: python -m tests.kill_and_resume --directory=DIR
  flags = [
    '--config.total_steps=150',
    '--config.checkpoint.every=3',
    '--config.evaluate.every=0',
    '--config.data.vocabulary=bytes',
    f'--config.data.cache_dir={tmp_path}/cache',
  ]
  moments = kill_and_resume.run(
    tmp_path,
    kills=3,
    config='configs/st_moe_tiny.py:runlocal',
    flags=flags,
    seed=1,
  )
  assert len(moments) == 3
  assert kill_and_resume.newest(tmp_path / 'broken') == 150
  assert not kill_and_resume.differences(tmp_path)
