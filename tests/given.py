"""What the readers of pages have already: their texts, models and data.

  python -m tests.given PAGE FOLDER

makes it in FOLDER, small. `tests.pages` calls it before the commands of a page
are run.
"""

import gzip
import json
import pathlib
import sys
from pydoc_data import topics


def readme() -> None:
  """Texts, questions, SuperGLUE."""
  documents = list(topics.topics.values())
  texts = pathlib.Path('texts')
  texts.mkdir()
  for name, some in {'0': documents[::2], '1': documents[1::2]}.items():
    with gzip.open(texts / f'train-{name}.jsonl.gz', 'wt') as file:
      file.writelines(json.dumps({'text': text}) + '\n' for text in some)
  (texts / 'valid.txt').write_text('\n\n'.join(documents[:9]))

  asked = [{'inputs': f'{n} and 1?', 'targets': f'{n + 1}'} for n in range(64)]
  rows = '\n'.join(map(json.dumps, asked))
  faq = pathlib.Path('faq')
  faq.mkdir()
  with gzip.open(faq / 'train-0.jsonl.gz', 'wt') as file:
    file.write(rows)
  (faq / 'valid.jsonl').write_text(rows)

  superglue(pathlib.Path('data/superglue'))


def superglue(place: pathlib.Path) -> None:
  """Files of the official form, with the same few rows in every split."""
  said = {'premise': 'Tom heated the cup.', 'hypothesis': 'The cup is hot.'}
  text = 'Tom heated the cup. Then he left.'
  rows = {
    'BoolQ': {'passage': text, 'question': 'is the cup hot', 'label': True},
    'CB': {**said, 'label': 'entailment'},
    'COPA': {
      'premise': 'Tom heated the cup.',
      'choice1': 'It was hot.',
      'choice2': 'It was cold.',
      'question': 'effect',
      'label': 0,
    },
    'MultiRC': {
      'passage': {
        'text': text,
        'questions': [
          {
            'question': 'Who left?',
            'idx': 0,
            'answers': [{'text': 'Tom', 'idx': 0, 'label': 1}],
          }
        ],
      }
    },
    'RTE': {**said, 'label': 'entailment'},
    'WiC': {
      'word': 'cup',
      'sentence1': 'A cup.',
      'sentence2': 'Your cup.',
      'label': True,
    },
    'WSC': {
      'text': text,
      'target': {
        'span1_index': 0,
        'span1_text': 'Tom',
        'span2_index': 5,
        'span2_text': 'he',
      },
      'label': True,
    },
    'ReCoRD': {
      'passage': {'text': text, 'entities': [{'start': 0, 'end': 2}]},
      'qas': [
        {'query': '@placeholder left', 'idx': 0, 'answers': [{'text': 'Tom'}]}
      ],
    },
    'AX-b': {
      'sentence1': said['premise'],
      'sentence2': said['hypothesis'],
      'label': 'entailment',
      'logic': '',
    },
    'AX-g': {**said, 'label': 'entailment', 'pair_id': 0},
  }
  for folder, row in rows.items():
    (place / folder).mkdir(parents=True)
    only = folder.startswith('AX')  # A file without splits.
    for split in (folder,) if only else ('train', 'val', 'test'):
      written = (json.dumps({**row, 'idx': n}) for n in range(8))
      (place / folder / f'{split}.jsonl').write_text('\n'.join(written))


MAKE = {'README.md': readme}


if __name__ == '__main__':
  import os

  page, folder = sys.argv[1:]
  os.chdir(folder)
  MAKE[page]()
