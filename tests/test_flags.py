"""Flags: read alike by all verbs, each with its rule."""

import pytest

from st_moe import verbs

CONFIG = '--config=configs/st_moe_tiny.py'


def _read(verb, *argv):
  return verbs.parser()[1][verb].read(argv)


@pytest.mark.parametrize('verb', ['train', 'grid', 'prepare', 'plan', 'config'])
def test_fields_are_set_alike_everywhere(verb):
  needed = {'train': ['--workdir=w'], 'grid': ['--workdir=w', '--vary=seed=0']}
  argv = [CONFIG, *needed.get(verb, [])]
  mixture = "{'mine': 1.0}"
  wanted = {'seed': '7', 'data.mixture': mixture}
  joined = ['--config.seed=7', f'--config.data.mixture={mixture}']
  apart = ['--config.seed', '7', '--config.data.mixture', mixture]
  for fields in (joined, apart):
    assert _read(verb, *argv, *fields)[1] == wanted
    assert _read(verb, *fields, *argv)[1] == wanted


def test_before_and_behind_what_is_no_flag():
  flags, overrides = _read('prepare', '--config.seed', '7', 'superglue')
  assert flags.what == 'superglue' and overrides == {'seed': '7'}
  flags, _ = _read(
    *('generate', 'a', '--checkpoint', 'w', '--temperature', '0.5', 'b'),
    *('--stop', '-x', '-3 degrees', '--', '--config.seed=3', '-y'),
  )
  assert flags.prompts == ['a', 'b', '-3 degrees', '--config.seed=3', '-y']
  assert (flags.checkpoint, flags.temperature) == ('w', 0.5)
  assert flags.stop == ['-x'] and flags.forbid == []
  flags, _ = _read('config', 'diff', 'A', 'B')
  assert flags.files == ['diff', 'A', 'B']


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ('train --workdr=w', "Unknown flag '--workdr'. Did you mean '--workdir'"),
    ('train --stop=x', "Unknown flag '--stop'."),  # Of another verb.
    ('train --total-steps=3', "Did you mean '--config.total_steps'"),
    ('train --learning_rate 3', "'--config.optimizer.learning_rate'"),
    ('train -w x', "Unknown flag '-w'"),
    ('train --workdir=a w', "Unknown flag 'w'"),
    ('train --workdir=', "--workdir = '' should be a str, not empty"),
    ('train --workdir=a --workdir=b', "--workdir is given twice, as 'a' and"),
    ('train --config.seed=1 --config.seed 2', "seed is given twice, as '1' "),
    ('train --config.seed', '--config.seed needs a value'),
    ('train --config.seed --workdir=a', '--config.seed needs a value'),
    ('train --processes=0', '--processes = 0 should be a int, at least 1'),
    ('train --process=-1', '--process = -1 should be a int, at least 0'),
    ('train --process=one', "--process = 'one' should be a int"),
    ('plan --devices=1000000007', 'at most 16,777,216'),
    ('evaluate --checkpoint=', "--checkpoint = ''"),
    ('evaluate --output=', "--output = ''"),
    ('generate --temperature=-1', '--temperature = -1.0 should be a float, at'),
    ('generate --temperature=inf', '--temperature = inf should be'),
    ('generate --temperature=nan', '--temperature = nan should be'),
    ('generate --contrast=nan', '--contrast = nan should be'),
    ('generate --length_penalty=nan', '--length_penalty = nan should be'),
    ('generate --num_beams=0', '--num_beams = 0 should be a int, at least 1'),
    ('generate --num_beams=1.5', "--num_beams = '1.5' should be a int"),
    ('generate --max_length=1000000000', '--max_length = 1000000000 should'),
    (f'generate --seed={10**20}', '--seed = 100000000000000000000 should be'),
    (f'generate --seed={"9" * 5000}', "--seed = '99999"),
    ('generate --stop=', "--stop = '' should be a str, not empty"),
    ('generate --top_p=0', '--top_p = 0.0 should be a float, above 0 and at'),
  ],
)
def test_what_is_refused(argv, message):
  with pytest.raises(ValueError) as e:
    _read(*argv.split(' '))
  assert message in str(e.value) and len(str(e.value)) < 600


def test_what_may_be_given_twice():
  flags, _ = _read('train', '--workdir=a', '--workdir=a', '--module_import=x')
  assert flags.workdir == 'a' and flags.module_import == ['x']
  ask = ('generate', '--checkpoint=w', '--stop=a', '--stop=b', '--vocabulary=')
  flags, _ = _read(*ask)
  assert flags.stop == ['a', 'b'] and flags.vocabulary == ''
