"""GLUE rows as T5 writes them, out of the official .tsv files."""

import re

import pytest

from st_moe.data import glue

MNLI = (
  'index\tpromptID\tpairID\tgenre\tsentence1_binary_parse'
  '\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1'
  '\tsentence2\tlabel1\tgold_label'
)
MNLI_ROW = (
  '5\t1\t1e\tfiction\t( )\t( )\t()\t()\tIt rains.\tIt is wet.\tneutral\t'
)
PAIR = 'index\tsentence1\tsentence2\tlabel'
STSB = (
  'index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1'
  '\tsentence2\tscore'
)
STSB_ROW = '0\tnews\tMSRpar\t2012\t3\tn\tn\tA plane.\tA "jet.\t'


def load(tmp_path, name, content, split='train'):
  path = tmp_path / glue.TASKS[name].files[split][0]
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return glue.TASKS[name].load(split, str(tmp_path))


@pytest.mark.parametrize(
  'name, content, inputs, targets',
  [
    (
      'glue_cola',
      'gj04\t0\t*\tThey "drank the pub.\n',
      'cola sentence: They "drank the pub.',
      'unacceptable',
    ),
    (
      'glue_sst2',
      'sentence\tlabel\na charming journey . \t1\n',
      'sst2 sentence: a charming journey . ',
      'positive',
    ),
    (
      'glue_mrpc',
      '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n'
      '1\t70\t71\tHe said " no .\tHe denied .\n',
      'mrpc sentence1: He said " no . sentence2: He denied .',
      'equivalent',
    ),
    (
      'glue_qqp',
      'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n'
      '3\t1\t2\tWhy?\tWhy not?\t0\n',
      'qqp question1: Why? question2: Why not?',
      'not_duplicate',
    ),
    (
      'glue_stsb',
      f'{STSB}\n{STSB_ROW}3.250\n',
      'stsb sentence1: A plane. sentence2: A "jet.',
      '3.2',
    ),
    (
      'glue_mnli',
      f'{MNLI}\n{MNLI_ROW}entailment\n',
      'mnli hypothesis: It is wet. premise: It rains.',
      'entailment',
    ),
    (
      'glue_qnli',
      'index\tquestion\tsentence\tlabel\n0\tWho?\tBob.\tnot_entailment\n',
      'qnli question: Who? sentence: Bob.',
      'not_entailment',
    ),
    (
      'glue_rte',
      f'{PAIR}\n0\tIt rains.\tIt is wet.\tentailment\n',
      'rte sentence1: It rains. sentence2: It is wet.',
      'entailment',
    ),
    (
      'glue_wnli',
      f'{PAIR}\n0\tI pin it.\tI pin a hat.\t1\n',
      'wnli sentence1: I pin it. sentence2: I pin a hat.',
      'entailment',
    ),
  ],
)
def test_a_row(tmp_path, name, content, inputs, targets):
  expected = {'inputs': inputs, 'targets': targets, 'idx': 0}
  assert load(tmp_path, name, content) == [expected]
  # A file of another system is the same file.
  content = content.replace('\n', '\r\n')
  assert load(tmp_path, name, content) == [expected]


def test_mismatched_is_mnli_of_other_files(tmp_path):
  task = glue.TASKS['glue_mnli_mismatched']
  assert task.splits == ('validation', 'test')
  content = f'{MNLI}\n{MNLI_ROW}contradiction\n'
  name = 'glue_mnli_mismatched'
  assert load(tmp_path, name, content, 'validation') == [
    {
      'inputs': 'mnli hypothesis: It is wet. premise: It rains.',
      'targets': 'contradiction',
      'idx': 0,
    }
  ]
  assert (tmp_path / 'glue' / 'MNLI' / 'dev_mismatched.tsv').exists()


@pytest.mark.parametrize(
  'name, content',
  [
    ('glue_cola', 'index\tsentence\n0\tSo be it.\n'),
    ('glue_rte', 'index\tsentence1\tsentence2\n0\tIt rains.\tIt is wet.\n'),
    ('glue_stsb', f'{STSB[:-6]}\n{STSB_ROW[:-1]}\n'),
  ],
)
def test_a_test_file_has_no_labels(tmp_path, name, content):
  (example,) = load(tmp_path, name, content, 'test')
  assert example['targets'] == '<unk>'


def test_qqp_leaves_torn_rows_out_and_counts_them(tmp_path):
  content = (
    'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n'
    '1\t1\t2\tWhy\n'
    'so?\tWhy?\t0\n'
    '2\t1\t2\tWhy?\tHow?\t\n'
    '\n'
    '3\t1\t2\tWhy?\t\t1\n'
  )
  assert load(tmp_path, 'glue_qqp', content) == [
    {
      'inputs': 'qqp question1: Why? question2: ',
      'targets': 'duplicate',
      'idx': 3,
    }
  ]


@pytest.mark.parametrize(
  'score, expected',
  # Half way between two, the one that is an even number of fifths.
  [('0', '0.0'), ('5.000', '5.0'), ('3.250', '3.2'), ('3.333', '3.4')]
  + [('0.1', '0.0'), ('0.3', '0.4'), ('0.7', '0.8'), ('4.9', '4.8')],
)
def test_a_score_becomes_a_word(tmp_path, score, expected):
  content = f'{STSB}\n{STSB_ROW}{score}\n'
  (example,) = load(tmp_path, 'glue_stsb', content)
  assert example['targets'] == expected


@pytest.mark.parametrize(
  'name, content, expected',
  [
    (
      'glue_rte',
      f'{PAIR}\n0\ta\tb\tentailment\n1\ta\n',
      ", line 3: 'sentence2' is None; it must be text",
    ),
    (
      'glue_rte',
      f'{PAIR}\n0\ta\tb\tyes\n',
      ", line 2: label 'yes' is none of 'entailment', 'not_entailment'",
    ),
    ('glue_rte', f'{PAIR}\n0\ta\tb\n', ', line 2: label None is none of'),
    ('glue_rte', 'index\ts1\n0\ta\n', ", line 2: no field 'sentence1'"),
    ('glue_cola', 'gj04\t2\t\tOh.\n', ', line 1: label 2 is none of'),
    ('glue_mnli', f'{MNLI}\n{MNLI_ROW}-\n', ", line 2: gold_label '-' is none"),
    (
      'glue_stsb',
      f'{STSB}\n{STSB_ROW}high\n',
      ", line 2: 'score' is 'high'; it must be a number from 0 to 5",
    ),
    ('glue_stsb', f'{STSB}\n{STSB_ROW}5.2\n', ", line 2: 'score' is '5.2'"),
    ('glue_stsb', f'{STSB}\n{STSB_ROW}nan\n', ", line 2: 'score' is 'nan'"),
    (
      'glue_sst2',
      b'sentence\tlabel\nok\t1\n\xff\t0\n',
      ', line 3 is not UTF-8',
    ),
    ('glue_sst2', 'sentence\tlabel\n', ': no rows'),
    ('glue_cola', '', ': no rows'),
  ],
)
def test_a_wrong_file_names_itself_line_and_field(
  tmp_path, name, content, expected
):
  path = tmp_path / glue.TASKS[name].files['train'][0]
  with pytest.raises(ValueError, match=re.escape(f'{path}{expected}')):
    load(tmp_path, name, content)


def test_a_missing_file_is_named():
  with pytest.raises(ValueError, match='nowhere.tsv: no such file'):
    list(glue.read_tsv('nowhere.tsv'))


# ---- Scores -----------------------------------------------------------------


def scores(name, targets, said):
  task = glue.TASKS[name]
  value, found = task.comparable(), {}
  for metric in task.metrics:
    found |= metric([value(t) for t in targets], [value(s) for s in said])
  return found


def test_scores_of_cola():
  # Yes: 1 true, 0 false; no: 2 true, 1 false. (1 * 2 - 0 * 1) over the root of
  # 1 * 2 * 2 * 3: of those said to be yes, those that are, and so for no.
  yes, no = 'acceptable', 'unacceptable'
  assert scores('glue_cola', [yes, yes, no, no], [yes, no, no, no]) == {
    'matthews_corrcoef': pytest.approx(100 * 2 / 12**0.5)
  }


@pytest.mark.parametrize(
  'name, no, yes',
  [
    ('glue_mrpc', 'not_equivalent', 'equivalent'),
    ('glue_qqp', 'not_duplicate', 'duplicate'),
  ],
)
def test_scores_of_paraphrases(name, no, yes):
  # 2 of 3 right; 1 of 2 paraphrases found: precision 1, recall 1/2.
  assert scores(name, [yes, yes, no], [yes, 'what?', no]) == {
    'f1': pytest.approx(200 / 3),
    'accuracy': pytest.approx(200 / 3),
  }


def test_scores_of_stsb():
  # Ranks 1 2 3 and 1 3 2, of values as even: 1 of 2, both times.
  both = 'pearson_corrcoef', 'spearman_corrcoef'
  found = scores('glue_stsb', ['1.0', '2.0', '3.0'], ['1.2', '3.2', '2.2'])
  assert found == {name: pytest.approx(50) for name in both}
  # What is no number is -1, so the least: ranks 2 1 3 and 1 2 3.
  found = scores('glue_stsb', ['1.0', '0.0', '3.0'], ['much', '1.0', '4.0'])
  assert found['spearman_corrcoef'] == pytest.approx(50)
  # One answer to everything is like nothing.
  found = scores('glue_stsb', ['1.0', '2.0'], ['3.0', '3.0'])
  assert found == dict.fromkeys(both, 0.0)
  with pytest.raises(ValueError, match='2 targets and 1 predictions'):
    scores('glue_stsb', ['1.0', '2.0'], ['3.0'])


@pytest.mark.parametrize('name', ['mnli', 'qnli', 'rte', 'sst2', 'wnli'])
def test_scores_of_the_others(name):
  first, second, *_ = glue.TASKS[f'glue_{name}'].labels
  found = scores(f'glue_{name}', [first] * 4, [first, second, 'what?', first])
  assert found == {'accuracy': 50.0}
