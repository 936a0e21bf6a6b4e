"""Runs the commands and programs of the pages, as a reader would.

  python -m tests.pages [PAGE ...]

From the wheel of this tree, in a fresh folder a page, with an empty home and an
empty environment; the README in a fresh clone. A page that says "After the
[tutorial]" begins in the folder that the tutorial leaves. What runs:

* a block of `bash`, or of no language that has a command of ours, in one shell
  a page that stops where a command fails;
* a block of `python`, as a program; below "Save this as `FILE`:" it is saved.

What cannot run everywhere says so where its reader sees it: a command that ends
in `# needs a TPU` (or whatever it needs, or `# takes an hour`) is left out, and
so are all commands of a block below such a comment on a line of its own. Files
that a reader has and a page does not make are made by `tests.given`.
"""

import argparse
import dataclasses
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

from tests import given, wheel

ROOT = pathlib.Path(__file__).parents[1]
TUTORIAL = 'docs/tutorial.md'
FROM_CLONE = ('README.md',)

# A command that is left out says what it would take.
_MARK = re.compile(r'(^|\s)# (needs|takes) \S.*$')
_COMMAND = re.compile(r'(^|\s)(st-moe|bash|python|pip|\$vm|sbatch) ', re.M)
_FENCE = re.compile(r'^```(\S*)[^\n]*\n(.*?)^```', re.DOTALL | re.MULTILINE)
_SAVED = re.compile(r'Save this as `([^`]+)`:\s*$')

# Of commands of the README: what is written otherwise here, and why.
CHANGES = (
  (
    r'^bash scripts/quickstart\.sh\b.*',
    'bash scripts/quickstart.sh runs/quickstart runlocal',
    'nine minutes',
  ),
  (
    r'^bash scripts/test\.sh\b.*',
    'bash scripts/test.sh tests/test_readme.py',
    'the whole suite has a run of its own',
  ),
  (
    r'(configs/(st_moe_tiny|finetune|finetune_superglue)\.py):?(?=\s|$|mixture)',
    r'\1:runlocal,',
    'steps enough to see that they are taken',
  ),
)


def pages() -> list[str]:
  """Every page there is, the tutorial first."""
  found = [p.relative_to(ROOT).as_posix() for p in ROOT.glob('docs/**/*.md')]
  found = [name for name in found if not name.startswith('docs/_build')]
  return [TUTORIAL, *sorted({*found, *FROM_CLONE} - {TUTORIAL})]


# Reading a page.


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block of a page."""

  language: str
  code: str
  line: int  # Of its fence, from 1.
  saved: str = ''  # The file in which its reader puts it.

  @property
  def is_shell(self) -> bool:
    is_tree = not _COMMAND.search(self.code)
    return self.language == 'bash' or (not self.language and not is_tree)


def blocks(text: str) -> list[Block]:
  """The fenced blocks of a page, in order."""
  found = []
  for match in _FENCE.finditer(text):
    saved = _SAVED.search(text[: match.start()])
    line = text.count('\n', 0, match.start()) + 1
    found.append(Block(match[1], match[2], line, saved[1] if saved else ''))
  return found


def spans(text: str) -> list[str]:
  """Code in passing, between single backticks."""
  prose = _FENCE.sub('', text)
  return [' '.join(span.split()) for span in re.findall('`([^`]+)`', prose)]


def lines(text: str) -> list[str]:
  """What a reader types, a command a line."""
  typed = [
    line.strip()
    for block in blocks(text)
    if block.is_shell
    for line in block.code.replace('\\\n', ' ').splitlines()
  ]
  return [' '.join(line.split()) for line in typed if line]


def commands(line: str) -> list[list[str]]:
  """The words of each command of a line, without comments."""
  found, words = [], shlex.shlex(line, posix=True, punctuation_chars=';&|')
  words.whitespace_split = True
  command = []
  for word in [*words, ';']:
    if not set(word) <= set(';&|'):
      command.append(word)
    elif command:
      found.append(command)
      command = []
  return found


# Running it.


def runs(block: Block) -> str:
  """What of a block is run, as a shell's; '' if nothing is."""
  if block.saved:
    return f'cat > {block.saved} <<"END"\n{block.code}END\n'
  if block.language == 'python':
    return f'python - <<"END"\n{block.code}END\n'
  code = ''.join(_parted(block)[0])
  return code if re.search(r'^\s*[^\s#]', code, re.M) else ''


def _parted(block: Block) -> tuple[list[str], list[str]]:
  """The lines of a shell's block that are run, and those left out."""
  if not block.is_shell:
    return [], []
  run, left, here = [], [], True
  for line in re.findall(r'(?:.*\\\n)*.*\n', block.code):
    here &= not _MARK.match(line.strip())
    (run if here and not _MARK.search(line.rstrip('\n')) else left).append(line)
  return run, left


def left_out(text: str) -> list[str]:
  """Commands of a page that are not run, a command a line."""
  found = [line for block in blocks(text) for line in _parted(block)[1]]
  return [' '.join(line.replace('\\\n', ' ').split()) for line in found]


def changed(code: str) -> str:
  """Code of the README as it is run here."""
  code = code.replace('\\\n', ' ')
  for pattern, instead, _ in CHANGES:
    code = re.sub(pattern, instead, code, flags=re.MULTILINE)
  return code


def script(page: str, text: str) -> tuple[str, list[Block]]:
  """All of a page for one shell, which tells where it is; and what it runs."""
  typed, ran = ['set -eo pipefail'], []
  for block in blocks(text):
    code = runs(block)
    code = changed(code) if page in FROM_CLONE else code
    if code:
      typed.append(f'echo "@@ {len(ran)}"\n{code}')
      ran.append(block)
  return '\n'.join([*typed, f'echo "@@ {len(ran)}"']), ran


def run(page: str, folder: pathlib.Path, env: dict) -> bool:
  """Runs a page, tells the seconds of each block, and why it failed."""
  text = (ROOT / page).read_text()
  code, ran = script(page, text)
  if not ran:
    return True
  at, said, began = -1, [], time.monotonic()
  with subprocess.Popen(
    ['bash', '-c', code],
    cwd=folder,
    env=env,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as process:
    for line in process.stdout:
      if not line.startswith('@@ '):
        said.append(line)
        continue
      if at >= 0:
        seconds = time.monotonic() - began
        print(f'{page}:{ran[at].line}  {seconds:.1f} s', flush=True)
      at, said, began = int(line.split()[1]), [], time.monotonic()
  if process.returncode == 0:
    return True
  print(f'{page}:{ran[at].line} failed:\n{ran[at].code}\nIt said:')
  print(''.join(said))
  return False


def install(folder: pathlib.Path) -> pathlib.Path:
  """A virtual environment with the wheel of this tree, and what it needs.

  The needs are those of the Python that runs this: no network.
  """
  built, venv = wheel.build(folder), folder / 'venv'
  python, pip = sys.executable, [sys.executable, '-m', 'pip', '--quiet']
  quiet = dict(check=True, stderr=subprocess.DEVNULL)
  subprocess.run([python, '-m', 'venv', '--without-pip', venv], **quiet)
  (site,) = venv.glob('lib/python*/site-packages')
  (site / 'needs.pth').write_text(sysconfig.get_path('purelib'))
  subprocess.run(
    [*pip, f'--python={venv}/bin/python', 'install', '--no-deps', str(built)],
    **quiet,
  )
  shutil.copy(ROOT / 'setup.py', venv / 'installed-dev')  # For scripts/env.sh.
  return venv


def clone(folder: pathlib.Path, venv: pathlib.Path) -> None:
  """What is committed, with an environment."""
  subprocess.run(['git', 'clone', '-q', ROOT, folder], check=True)
  (folder / '.venv').symlink_to(venv)


def prepare(page: str, work: pathlib.Path, env: dict) -> pathlib.Path:
  """The folder in which a page's reader sits."""
  folder = work / re.sub(r'\W+', '_', page)
  tutorial = work / re.sub(r'\W+', '_', TUTORIAL)
  if page in FROM_CLONE:
    clone(folder, work / 'venv')
  elif re.search(r'^After the \[tutorial\]', (ROOT / page).read_text(), re.M):
    shutil.copytree(tutorial, folder)
  else:
    folder.mkdir()
  if page in given.MAKE:
    subprocess.run(
      ['python', '-m', 'tests.given', page, str(folder)],
      cwd=ROOT,
      env=env,
      check=True,
    )
  return folder


def main(argv=None) -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('pages', nargs='*', metavar='PAGE')
  asked = parser.parse_args(argv).pages or pages()
  with tempfile.TemporaryDirectory() as directory:
    work = pathlib.Path(directory)
    began = time.monotonic()
    venv = install(work)
    print(f'the wheel  {time.monotonic() - began:.1f} s', flush=True)
    (work / 'home').mkdir()
    env = wheel.surroundings(work / 'home', venv)
    # Others go on from its folder.
    for page in dict.fromkeys([TUTORIAL, *asked]):
      if not run(page, prepare(page, work, env), env):
        return 1
    print(f'all  {time.monotonic() - began:.0f} s')
  return 0


if __name__ == '__main__':
  sys.exit(main())
