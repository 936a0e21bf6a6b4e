"""The launchers, with stand-ins for gcloud, Slurm, uv and st-moe on PATH.

And what they are launched from, with a stand-in for Python.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import tarfile
import time

import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / 'scripts'
# Two workers: homes under $ROOT. `ssh` gives the command to a login shell, as
# the real one does; the state of the slice is the next line of $ROOT/states.
GCLOUD = r"""
{ printf '%s\n' "$@"; echo; } >>"$ROOT/calls"
worker=all
for word; do
  case $word in
    --worker=*) worker=${word#*=} ;;
    --command=*) command=${word#*=} ;;
  esac
done
case "$3 $4" in
  'queued-resources describe')
    head -n 1 "$ROOT/states"
    sed -i '1{$!d}' "$ROOT/states" ;;
  'queued-resources delete') rm -rf "$ROOT"/worker? ;;
  'queued-resources create') mkdir -p "$ROOT/worker0" "$ROOT/worker1" ;;
  'tpu-vm scp') for home in "$ROOT"/worker?; do cp "$5" "$home"; done ;;
  'tpu-vm ssh')
    [ "$worker" = all ] && worker=[0-9]
    for home in "$ROOT"/worker$worker; do
      (cd "$home" && HOME=$home bash -c "$command") || exit
    done ;;
esac
"""
# Exits with the next line of ~/codes, 0 without; `hang` waits for SIGTERM.
ST_MOE = r"""
trap 'exit 75' TERM
{ printf '%s\n' "$@"; echo; } >>"$HOME/runs"
code=$(head -n 1 "$HOME/codes" 2>/dev/null)
[ -e "$HOME/codes" ] && sed -i 1d "$HOME/codes"
[ "$code" = hang ] || exit ${code:-0}
while :; do /bin/sleep 0.02; done
"""
UV = r"""
echo "$*" >>"$HOME/uv"
[ "$1" = venv ] && mkdir -p .venv/bin && cp "$ROOT/bin/st-moe" .venv/bin &&
  cp "$ROOT/bin/st-moe" .venv/bin/python
exit 0
"""
CRONTAB = r"""
if [ "$1" = -l ]; then cat "$HOME/crontab"; else cat >"$HOME/crontab.new" &&
  mv "$HOME/crontab.new" "$HOME/crontab"; fi
"""
QUEUE = 'gcloud compute tpus queued-resources'
VM = 'gcloud compute tpus tpu-vm'
WHERE = ('--name=moe', '--zone=here')
NASTY = """--config.data.mixture={'a b':  1.0, "$HOME": `2`;} & \\n*"""


@pytest.fixture
def root(tmp_path, monkeypatch):
  """A checkout, a slice of two workers, and stand-ins first on PATH."""
  programs = {
    'gcloud': GCLOUD,
    'st-moe': ST_MOE,
    'uv': UV,
    'crontab': CRONTAB,
    'sleep': 'exec /bin/sleep 0.02',
    'srun': '{ printf "%s\\n" "$@"; echo; } >>"$ROOT/calls"; exit $CODE',
    'scontrol': 'echo "scontrol $*" >>"$ROOT/calls"',
  }
  (tmp_path / 'bin').mkdir()
  for name, text in programs.items():
    path = tmp_path / 'bin' / name
    path.write_text(f'#!/bin/bash\n{text}\n')
    path.chmod(0o755)
  shutil.copytree(SCRIPTS, tmp_path / 'checkout' / 'scripts')
  for home in ('worker0', 'worker1'):
    (tmp_path / home).mkdir()
  (tmp_path / 'states').write_text('ACTIVE\n')
  monkeypatch.setenv('ROOT', str(tmp_path))
  monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
  names = 'TPU_NAME', 'ZONE', 'PROJECT', 'TPU_TYPE', 'TPU_RUNTIME', 'EXTRAS'
  for name in (*names, *(n for n in os.environ if n.startswith('SLURM_'))):
    monkeypatch.delenv(name, raising=False)
  return tmp_path


def _run(root, script, *arguments, **env):
  # What env.sh is told of the environment that runs this.
  inherited = {**os.environ}
  for name in ('PYTHON', 'VENV', 'EXTRAS'):
    inherited.pop(name, None)
  return subprocess.run(
    ['bash', root / 'checkout' / 'scripts' / script, *arguments],
    env={**inherited, **env},
    capture_output=True,
    text=True,
    timeout=30,
  )


def _vm(root, *arguments, **env):
  return _run(root, 'tpu_vm.sh', *arguments, **env)


def _calls(path):
  text = path.read_text() if path.exists() else ''
  return [call.splitlines() for call in text.split('\n\n') if call]


def _dry(root, *arguments, **env):
  done = _vm(root, arguments[0], *WHERE, '--dry-run', *arguments[1:], **env)
  assert done.returncode == 0, done.stderr
  assert not (root / 'calls').exists()
  return done.stdout.splitlines()


def _on_workers(root, command):
  """What `tpu_vm.sh setup` leaves on the workers, then a command there."""
  for home in (root / 'worker0', root / 'worker1'):
    shutil.copytree(SCRIPTS, home / 'st_moe' / 'scripts')
    (home / 'st_moe' / '.venv' / 'bin').mkdir(parents=True)
    shutil.copy(root / 'bin' / 'st-moe', home / 'st_moe' / '.venv' / 'bin')
  return command()


def _worker(root, *arguments):
  home = root / 'worker0'
  return subprocess.run(
    ['bash', 'st_moe/scripts/tpu_worker.sh', *arguments],
    cwd=home,
    env={**os.environ, 'HOME': str(home)},
    capture_output=True,
    text=True,
    timeout=30,
  )


def _wait_for(fact):
  for _ in range(500):
    if fact():
      return
    time.sleep(0.02)
  raise AssertionError('Waited for ten seconds.')


def _all_exist(root, name):
  return all((root / home / name).exists() for home in ('worker0', 'worker1'))


@pytest.mark.parametrize(
  'path', sorted(SCRIPTS.glob('*.sh')), ids=lambda p: p.name
)
def test_bash_can_read_it(path):
  subprocess.run(['bash', '-n', path], check=True)


# Cloud TPU, dry.


def test_create_asks_for_a_slice(root):
  create, describe = _dry(root, 'create', '--type=v5litepod-16', '--spot')
  assert create == (
    f'{QUEUE} create moe --node-id=moe --accelerator-type=v5litepod-16'
    ' --runtime-version=v2-alpha-tpuv5-lite --spot --zone=here'
  )
  assert describe.startswith(f'{QUEUE} describe moe ')
  other = _dry(root, 'create', '--type=v4-8', '--project=p', '--runtime=r')[0]
  assert other == (
    f'{QUEUE} create moe --node-id=moe --accelerator-type=v4-8'
    ' --runtime-version=r --zone=here --project=p'
  )


@pytest.mark.parametrize(
  'type, runtime',
  [
    ('v6e-64', 'v2-alpha-tpuv6e'),
    ('v5p-8', 'v2-alpha-tpuv5'),
    ('v4-32', 'tpu-ubuntu2204-base'),
  ],
)
def test_a_type_has_its_image(root, type, runtime):
  assert (
    f'--runtime-version={runtime} ' in _dry(root, 'create', TPU_TYPE=type)[0]
  )


def test_launch_logs_and_stop(root):
  ssh = f'{VM} ssh moe --worker=all'
  start = 'bash st_moe/scripts/tpu_worker.sh start'
  stop = 'bash st_moe/scripts/tpu_worker.sh stop'
  assert _dry(root, 'launch', 'train', '--workdir=gs://b/r') == [
    f"{ssh} '--command={start} train --workdir=gs://b/r' --zone=here"
  ]
  assert _dry(root, 'logs', '--worker=3') == [
    f"{VM} ssh moe --worker=3 '--command=tail -n 100 -F st_moe_run/log'"
    ' --zone=here'
  ]
  assert _dry(root, 'stop', '--delete') == [
    f"{ssh} '--command={stop}' --zone=here",
    f'{QUEUE} delete moe --force --quiet --zone=here',
  ]


def test_a_dry_keep_alive_shows_what_follows_a_preemption(root):
  flags = '--keep-alive', '--type=v6e-16', '--spot'
  lines = _dry(root, 'launch', *flags, 'train', '--workdir=gs://b/r')
  verbs = [line.split()[3:5] for line in lines if line.startswith('gcloud')]
  queue, vm = 'queued-resources', 'tpu-vm'
  assert verbs == [
    [vm, 'ssh'],
    *([queue, verb] for verb in ('describe', 'delete', 'create')),
    *([vm, verb] for verb in ('scp', 'ssh', 'ssh')),
  ]
  assert lines[0] == lines[-1]


def test_a_dry_command_can_be_pasted(root):
  (line,) = _dry(root, 'launch', 'train', NASTY)
  command = shlex.split(line)[7].removeprefix('--command=')
  assert shlex.split(command)[3:] == ['train', NASTY]


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['begin'], "no verb 'begin': create, setup, launch, logs, stop or help."),
    (['setup', '--zone=z'], 'which slice? --name=NAME or TPU_NAME.'),
    (['setup', '--name=n'], 'which zone? --zone=ZONE or ZONE.'),
    (['setup', *WHERE, '--fast'], "no flag '--fast'"),
    (['setup', *WHERE, 'train'], "setup takes flags only, not 'train'."),
    (['setup', '--name', 'moe'], "no flag '--name'"),
    (['create', *WHERE], 'which kind of slice? --type='),
    (['launch', *WHERE], 'launch what?'),
    (
      ['launch', *WHERE, '--keep-alive', '--type=v6e-16', 'train'],
      '--keep-alive without a gs:// path',
    ),
  ],
)
def test_a_mistake_is_one_line(root, arguments, message):
  done = _vm(root, *arguments)
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count('\n') == 1
  assert not (root / 'calls').exists()


def test_without_gcloud_only_a_dry_run_works(root):
  few = root / 'few'
  few.mkdir()
  for name in ('bash', 'dirname'):
    (few / name).symlink_to(shutil.which(name))
  done = _vm(root, 'logs', *WHERE, PATH=str(few))
  assert done.returncode == 2
  assert done.stderr == (
    'tpu_vm.sh: gcloud is missing: https://cloud.google.com/sdk/docs/install\n'
  )
  assert _dry(root, 'logs', PATH=str(few))


def test_usage(root):
  assert _vm(root, 'help').returncode == 0
  assert 'create --type=TYPE' in _vm(root, 'help').stdout
  nothing = _vm(root)
  assert nothing.returncode == 2
  assert 'create --type=TYPE' in nothing.stderr


# Cloud TPU, on stand-ins.


def _git_checkout(root):
  checkout = root / 'checkout'
  git = lambda *words: subprocess.run(['git', *words], cwd=checkout, check=True)
  git('init', '-q')
  (checkout / '.gitignore').write_text('build/\nruns/\n')
  (checkout / 'gone.py').write_text('')
  git('add', '--all')
  (checkout / 'gone.py').unlink()
  (checkout / 'new.py').write_text('')
  (checkout / 'runs').mkdir()
  (checkout / 'runs' / 'big').write_text('')


def test_setup_brings_the_working_tree_as_it_is(root):
  _git_checkout(root)
  (root / 'worker1' / 'crontab').write_text('@daily mine\n')
  for _ in range(2):  # Again, after a change.
    done = _vm(root, 'setup', *WHERE)
    assert done.returncode == 0, done.stderr
  with tarfile.open(root / 'checkout' / 'build' / 'st_moe.tgz') as tar:
    names = tar.getnames()
  assert 'new.py' in names and 'scripts/tpu_worker.sh' in names
  assert not {'gone.py', 'runs/big'} & set(names)
  for home in (root / 'worker0', root / 'worker1'):
    assert (home / 'uv').read_text().splitlines() == [
      'venv --python >=3.11,<3.14 .venv',
      *['pip install --python .venv/bin/python -e .[tpu,gcp]'] * 2,
    ]
    reboot = f'@reboot bash {home}/st_moe/scripts/tpu_worker.sh resume'
    assert (home / 'crontab').read_text().splitlines()[-1] == reboot
  assert len((root / 'worker1' / 'crontab').read_text().splitlines()) == 2


def test_launch_runs_on_every_worker_what_was_typed(root):
  launch = lambda: _vm(root, 'launch', *WHERE, 'train', NASTY)
  done = _on_workers(root, launch)
  assert done.returncode == 0, done.stderr
  _wait_for(lambda: _all_exist(root, 'st_moe_run/code'))
  for home in (root / 'worker0', root / 'worker1'):
    assert _calls(home / 'runs') == [['train', NASTY]]


def test_launch_before_setup_says_so(root):
  _on_workers(root, lambda: None)
  (root / 'worker0' / 'st_moe' / '.venv' / 'bin' / 'st-moe').unlink()
  done = _vm(root, 'launch', *WHERE, 'train')
  assert done.returncode == 1
  assert 'Not set up: scripts/tpu_vm.sh setup.' in done.stderr


def test_stop_waits_for_the_checkpoint_and_for_good(root):
  for home in ('worker0', 'worker1'):
    (root / home / 'codes').write_text('hang\n')
  launch = lambda *words: _vm(root, 'launch', *WHERE, *words)
  assert _on_workers(root, lambda: launch('train')).returncode == 0
  _wait_for(lambda: _all_exist(root, 'runs'))
  assert 'Already running.' in launch('train').stdout
  other = launch('evaluate')
  assert other.returncode == 1
  assert 'Another run is under way' in other.stderr
  assert _vm(root, 'stop', *WHERE).returncode == 0
  assert _worker(root, 'status').stdout == 'ended 75\n'
  assert _worker(root, 'resume').returncode == 0  # As a reboot would.
  assert _calls(root / 'worker0' / 'runs') == [['train']]
  assert 'Nothing runs.' in _vm(root, 'stop', *WHERE).stdout


@pytest.mark.parametrize(
  'codes, runs',
  [
    ('75 75 0', 3),  # Preempted twice.
    ('0', 1),
    ('1', 1),
    ('2', 1),
    ('134 75 134 0', 4),  # Another machine was lost; JAX aborts.
    (' '.join(['137'] * 20), 10),  # Out of memory: not for ever.
  ],
)
def test_what_the_supervisor_starts_again(root, codes, runs):
  _on_workers(root, lambda: None)
  home = root / 'worker0'
  (home / 'codes').write_text(codes.replace(' ', '\n'))
  (home / 'st_moe_run').mkdir()
  (home / 'st_moe_run' / 'args').write_text('train\0--x=a b\0')
  assert _worker(root, 'resume').returncode == 0
  assert _calls(home / 'runs') == [['train', '--x=a b']] * runs
  last = codes.split()[runs - 1]
  assert _worker(root, 'status').stdout == f'ended {last}\n'
  assert f'exit status {last}' in (home / 'st_moe_run' / 'log').read_text()


def test_keep_alive_asks_for_another_slice(root):
  _git_checkout(root)
  states = 'SUSPENDED SUSPENDED WAITING_FOR_RESOURCES ACTIVE'.split()
  (root / 'states').write_text('\n'.join(states) + '\n')
  flags = *WHERE, '--keep-alive', '--type=v6e-16', '--spot'
  done = _vm(root, 'launch', *flags, 'train', '--workdir=gs://b/r')
  assert done.returncode == 0, done.stderr
  assert 'moe was preempted' in done.stdout
  assert done.stdout.endswith('ended 0\n')
  calls = [' '.join(call[2:4]) for call in _calls(root / 'calls')]
  calls = [call for call in calls if not call.endswith('describe')]
  assert calls[:5] == [
    'queued-resources delete',
    'queued-resources create',
    *('tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh'),
  ]
  run = ['train', '--workdir=gs://b/r']
  _wait_for(lambda: _all_exist(root, 'st_moe_run/code'))
  assert _calls(root / 'worker1' / 'runs') == [run]


def test_create_waits_its_turn_and_says_when_there_is_none(root):
  (root / 'states').write_text('WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n')
  done = _vm(root, 'create', *WHERE, '--type=v6e-16')
  assert done.returncode == 0
  assert done.stdout.count('waiting for moe') == 2
  (root / 'states').write_text('FAILED\n')
  done = _vm(root, 'create', *WHERE, '--type=v6e-16')
  assert done.returncode == 2
  assert 'the request for moe has FAILED' in done.stderr


# Slurm.


def _slurm(root, code, *arguments, **env):
  (root / 'checkout' / 'scripts' / 'env.sh').write_text(
    'echo "env $EXTRAS" >>"$ROOT/calls"\n'
  )
  env = {
    'CODE': str(code),
    'SLURM_JOB_ID': '17',
    'SLURM_SUBMIT_DIR': str(root / 'checkout'),
    'SLURM_NTASKS_PER_NODE': '4',
    'SLURM_GPUS_ON_NODE': '4',
    **env,
  }
  # Slurm runs a copy.
  (root / 'checkout' / 'spool').mkdir()
  copy = root / 'checkout' / 'spool' / 'slurm_script'
  shutil.copy(SCRIPTS / 'slurm.sh', copy)
  return _run(root, '../spool/slurm_script', *arguments, **env)


@pytest.mark.parametrize('code', [0, 1, 75, 143])
def test_a_job_queues_itself_again_only_after_75(root, code):
  done = _slurm(root, code, 'train', NASTY, SLURM_CPUS_PER_TASK='3')
  assert done.returncode == code
  calls = (root / 'calls').read_text()
  assert calls.startswith(
    'env cuda\n--cpus-per-task=3\nst-moe\ntrain\n' + NASTY
  )
  assert ('scontrol requeue 17' in calls) == (code == 75)


def test_a_job_wants_a_task_per_gpu(root):
  done = _slurm(root, 0, 'train', SLURM_GPUS_ON_NODE='2')
  assert done.returncode == 2
  assert done.stderr == (
    '4 tasks per node and 2 GPUs; one per GPU:'
    ' sbatch --ntasks-per-node=2 --gres=gpu:2 ...\n'
  )
  assert not (root / 'calls').exists()


def test_a_dry_job_needs_no_slurm(root):
  done = _run(root, 'slurm.sh', '--dry-run', 'train', '--workdir=runs/a')
  assert [line.strip() for line in done.stdout.splitlines()] == [
    'EXTRAS=cuda source scripts/env.sh',
    'srun --cpus-per-task=8 st-moe train --workdir=runs/a',
    '# on exit status 75:',
    'scontrol requeue JOB',
  ]
  assert not (root / 'calls').exists()


def test_a_job_outside_slurm_is_refused(root):
  done = _run(root, 'slurm.sh', 'train')
  assert done.returncode == 2
  assert done.stderr == 'Not a Slurm job: sbatch scripts/slurm.sh ARGS...\n'
  assert 'sbatch --nodes=2' in _run(root, 'slurm.sh').stderr
  assert _run(root, 'slurm.sh').returncode == 2


def test_the_job_is_told_before_its_time_is_up():
  lines = (SCRIPTS / 'slurm.sh').read_text().splitlines()
  options = [line.split()[1] for line in lines if line.startswith('#SBATCH ')]
  # Without B: the signal goes to the tasks; the script outlives it.
  assert '--signal=TERM@120' in options
  assert '--requeue' in options
  assert lines.index('#SBATCH --requeue') < lines.index('set -euo pipefail')


# The environment.

# A Python without ensurepip, as Debian's. Its `-m MODULE` works if $ROOT/has
# lists it; a pip, once in .venv, installs whatever it is asked for, unless
# $ROOT/broken is there: then it dies half way.
PYTHON = r"""
venv=${VENV:-.venv}
has() { grep -qx "$1" "$ROOT/has" 2>/dev/null; }
own() { cp "$ROOT/bin/python3" $venv/bin/python; }
case "$*" in
  '-c '*) ;;
  "-m venv $venv") mkdir -p $venv/bin && own && has ensurepip &&
    touch $venv/pip ;;
  "-m venv --without-pip $venv") has venv && mkdir -p $venv/bin && own ;;
  "-m virtualenv $venv") has virtualenv && mkdir -p $venv/bin && own &&
    touch $venv/pip ;;
  '-m ensurepip') has ensurepip && touch $venv/pip ;;
  '-m pip --python '*) has pip && touch $venv/pip ;;
  '-m pip --version') [ -e $venv/pip ] ;;
  '-m pip install '*)
    [ -e $venv/pip ] || exit 1
    if [ -e "$ROOT/broken" ]; then
      touch $venv/rubbish
      eval "$(cat "$ROOT/broken")"
    fi
    echo "$*" >>$venv/installs
    printf '#!%s/bash\n' "$(dirname "$(command -v bash)")" >$venv/bin/st-moe
    chmod +x $venv/bin/st-moe ;;
  *) exit 1 ;;
esac || { echo "No module named ${2:-}" >&2; exit 1; }
"""


@pytest.fixture
def bare(root):
  """A checkout on a machine that has a Python, and no .venv yet."""
  path = root / 'bin' / 'python3'
  path.write_text(f'#!/bin/bash\n{PYTHON}\n')
  path.chmod(0o755)
  (root / 'bin' / 'uv').unlink()
  (root / 'checkout' / 'setup.py').write_text('')
  return root


def _has(root, *modules):
  (root / 'has').write_text('\n'.join(modules) + '\n')


def _installed(root):
  path = root / 'checkout' / '.venv' / 'installs'
  return path.exists() and 'install --quiet -e .[dev]' in path.read_text()


@pytest.mark.parametrize(
  'modules', [('venv', 'ensurepip'), ('venv', 'pip'), ('virtualenv',)]
)
def test_an_environment_is_made_with_what_there_is(bare, modules):
  _has(bare, *modules)
  done = _run(bare, 'env.sh')
  assert done.returncode == 0, done.stderr
  assert _installed(bare) and 'source .venv/bin/activate' in done.stdout
  again = _run(bare, 'env.sh')
  assert again.returncode == 0 and again.stdout + again.stderr == ''


def test_each_python_may_have_an_environment_of_its_own(bare):
  _has(bare, 'venv', 'ensurepip')
  other = {'PYTHON': str(bare / 'bin' / 'python3'), 'VENV': '.venv-3.13'}
  done = _run(bare, 'env.sh', **other)
  assert 'source .venv-3.13/bin/activate' in done.stdout, done.stderr
  assert (bare / 'checkout' / '.venv-3.13' / 'installs').exists()
  assert not (bare / 'checkout' / '.venv').exists()


@pytest.mark.parametrize('modules', [('venv',), ()])
def test_without_pip_nothing_is_left_behind(bare, modules):
  _has(bare, *modules)
  done = _run(bare, 'env.sh')
  assert done.returncode == 1
  assert 'sudo apt install python3-venv' in done.stderr
  assert not (bare / 'checkout' / '.venv').exists()
  _has(bare, 'venv', 'ensurepip')  # The advice was taken.
  assert _run(bare, 'env.sh').returncode == 0 and _installed(bare)


@pytest.mark.parametrize('end', ['exit 1', 'kill -9 $PPID; exit 1'])
def test_an_install_cut_short_is_begun_anew(bare, end):
  _has(bare, 'venv', 'ensurepip')
  (bare / 'broken').write_text(end)
  assert _run(bare, 'env.sh').returncode != 0
  venv = bare / 'checkout' / '.venv'
  assert venv.exists() == end.startswith('kill')  # Else cleared away.
  (bare / 'broken').unlink()
  assert _run(bare, 'env.sh').returncode == 0 and _installed(bare)
  assert not (venv / 'rubbish').exists()


def test_a_venv_without_pip_gets_one(bare):
  # Of `uv venv`, or of a Python that had no ensurepip then.
  _has(bare, 'venv', 'ensurepip')
  venv = bare / 'checkout' / '.venv'
  (venv / 'bin').mkdir(parents=True)
  shutil.copy(bare / 'bin' / 'python3', venv / 'bin' / 'python')
  (venv / 'mine').touch()
  assert _run(bare, 'env.sh').returncode == 0 and _installed(bare)
  assert (venv / 'mine').exists()


def test_an_environment_that_was_moved_is_installed_again(bare):
  _has(bare, 'venv', 'ensurepip')
  assert _run(bare, 'env.sh').returncode == 0
  # Its scripts name the interpreter by the path where it was.
  script = bare / 'checkout' / '.venv' / 'bin' / 'st-moe'
  script.write_text('#!/where/it/was/.venv/bin/python\n')
  done = _run(bare, 'env.sh')
  assert done.returncode == 0 and 'Installed into .venv' in done.stdout
  assert subprocess.run([script]).returncode == 0


def test_the_quickstart_ends_with_what_to_type_next(root):
  (root / 'checkout' / 'scripts' / 'env.sh').write_text('set -e\n')
  done = _run(root, 'quickstart.sh', HOME=str(root / 'worker0'))
  assert done.returncode == 0, done.stderr
  assert [words[0] for words in _calls(root / 'worker0' / 'runs')] == [
    *['train'] * 3,
    'report',
  ]
  assert 'source .venv/bin/activate' in done.stdout.splitlines()[-1]


def test_a_quickstart_of_seconds(root):
  (root / 'checkout' / 'scripts' / 'env.sh').write_text('set -e\n')
  home = root / 'worker0'
  done = _run(root, 'quickstart.sh', 'here', 'runlocal', HOME=str(home))
  assert done.returncode == 0, done.stderr
  calls = _calls(home / 'runs')
  assert [words[1].partition(':')[2] for words in calls[:3]] == [
    *('runlocal', 'runlocal', 'scratch,runlocal'),
  ]
  assert calls[3][1:] == ['here/pretrain', 'here/finetune'] + [
    '--baseline=here/scratch'
  ]


def _t5x(root, *words, **variables):
  (root / 'checkout' / 'scripts' / 'env.sh').write_text('touch sourced\n')
  return _run(root, 'install_t5x.sh', *words, **variables)


def test_t5x_comes_from_its_repository_or_a_checkout(root):
  done = _t5x(root, '--dry-run')
  assert done.returncode == 0, done.stderr
  steps = [line for line in done.stdout.splitlines() if line.startswith('+ ')]
  assert all(step.startswith('+ .venv/bin/python') for step in steps)
  assert 'jestimator tensorboard' in steps[0] and 'aqtp' not in steps[0]
  url = 'git+https://github.com/google-research/t5x'
  assert steps[1].endswith(f'pip install --quiet --no-deps {url}')
  assert 'import_t5x' in steps[2]
  for name in ('t5x', 'flaxformer'):
    (root / 'there' / name / name).mkdir(parents=True)
  place = lambda name: f'{root}/there/{name}'
  there = {name.upper(): place(name) for name in ('t5x', 'flaxformer')}
  done = _t5x(root, '--dry-run', **there)
  assert done.returncode == 0 and 'git+' not in done.stdout
  assert f'{place("t5x")} {place("flaxformer")}' in done.stdout
  assert 'tensorboard aqtp' in done.stdout
  assert not (root / 'checkout' / 'sourced').exists()  # Nothing was made.


def test_t5x_of_what_is_no_checkout_is_refused(root):
  done = _t5x(root, '--dry-run', T5X='/nowhere')
  assert done.returncode == 1 and done.stdout == ''
  assert '/nowhere is no checkout of t5x: there is no folder' in done.stderr
  assert _t5x(root, '--try').returncode == 2
