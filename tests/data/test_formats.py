"""Files: every known form, every kind of malformed row, the published files."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_reasoning.data import formats
from latent_reasoning.data.example import Example, make, number
from latent_reasoning.errors import InputError
from latent_reasoning.eval import answer_matching

GSM8K = {'question': 'Two and\nthree?', 'answer':
         'Add 2 + 3 = <<2+3=5>>5.\nTwice: <<5*2=10>>10 in all.\n#### 1,010'}
ICOT = 'Two and three? || <<2+3=5>> <<5*2=10>> #### 10'
EQUATIONS = ('2+3=5', '5*2=10')


def lines(*rows):
  return '\n'.join(r if isinstance(r, str) else json.dumps(r) for r in rows)


@pytest.fixture
def write(tmp_path):
  """Writes a file whose name says nothing about its form; returns its path."""
  def write(content):
    path = tmp_path / 'file.dat'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
  return write


@pytest.mark.parametrize('content, form, expected', [
    (lines(GSM8K), 'gsm8k', Example('Two and three?', EQUATIONS, '1010')),
    (ICOT, 'icot', Example('Two and three?', EQUATIONS, '10')),
    ('Is it || so?||#### 7', 'icot', Example('Is it || so?', (), '7')),
    (json.dumps([{'question': 'Is A B?', 'steps': ['A is C.', 'C is  B.'],
                  'answer': 'A is B.', 'edges': [[0, 1]]}], indent=2), 'coconut',
     Example('Is A B?', ('A is C.', 'C is B.'), 'A is B.')),
    (json.dumps([{'question': 'q', 'steps': ['<<2+3=5>>', '<<5*2=10>>'],
                  'answer': '10'}]), 'coconut', Example('q', EQUATIONS, '10')),
    (lines({'question': 'q', 'steps': ['2+3=5', 'So ten, 5*2=<<5*2=10>>10.', ' '],
            'answer': 10.0}), 'steps',
     Example('q', ('2+3=5', 'So ten, 5*2=10.'), '10')),
    (lines({'input': 'q', 'code': 'x', 'target': -9867630.0}), 'gsm_hard',
     Example('q', (), '-9867630')),
    (lines({'input': 'q', 'target': '16.50'}), 'gsm_hard', Example('q', (), '16.5')),
    (lines({'input': 'q', 'target': 'a  word'}), 'pairs', Example('q', (), 'a word')),
    (lines({'input': 'q', 'target': ['a', 'b', 3]}), 'pairs',
     Example('q', (), 'a', ('b', '3'))),
    (lines({'ID': 'c', 'Body': 'Two and three', 'Question': 'How many?', 'Answer': 5.0,
            'Equation': '( 2.0 + 3.0 )', 'Type': 'Addition'}), 'svamp',
     Example('Two and three. How many?', (), '5')),
    (lines({'question': ' Two and three?', 'final_ans': '5'}), 'multiarith',
     Example('Two and three?', (), '5')),
    (json.dumps([{'question': 'Two and three?', 'final_ans': '5'}]), 'multiarith',
     Example('Two and three?', (), '5')),
    (lines({'body': 'Nine.', 'question': 'How many?', 'answer': '9 (apples)',
            'formula': '7+2=9'}), 'asdiv', Example('Nine. How many?', (), '9')),
    (lines({'problem': 'p', 'solution': r'So $\boxed{1}$, no, $\boxed{\frac{1}{2}}$.'}),
     'math', Example('p', (), r'\frac{1}{2}')),
    (lines({'problem': 'p', 'solution': r'$\boxed{1}$', 'answer': '2', 'level': 5}), 'math',
     Example('p', (), '2')),
    (lines({'Question': 'q', 'Correct Answer': 'w', 'Incorrect Answer 1': 'x',
            'Incorrect Answer 2': 'y', 'Incorrect Answer 3': 'z'}), 'gpqa',
     Example('q (A) y (B) z (C) x (D) w', (), 'D')),
])
def test_a_form_is_recognised_by_content(write, data_config, content, form, expected):
  path = write(content)
  rule = {'pairs': 'free_text', 'math': 'latex', 'gpqa': 'letter',
          'gsm_hard': 'numeric_close'}.get(form, 'numeric')
  rule = 'text' if expected.answer.startswith('A is') else rule
  assert formats.read(path, data_config) == (
      [expected], {'path': str(path), 'form': form, 'rule': rule, 'read': 1, 'skipped': 0,
                   'first_error': ''})


def test_options_are_lettered_by_the_question_alone(write, data_config):
  rows = [{'Question': f'q{i}', 'Correct Answer': f'right {i}',
           **{f'Incorrect Answer {k}': f'wrong {k}' for k in (1, 2, 3)}} for i in range(400)]
  one, _ = formats.read(write(lines(*rows)), data_config)
  two, _ = formats.read(write(lines(*rows[::-1])), data_config)
  assert one == two[::-1]
  for i, example in enumerate(one):
    assert f'({example.answer}) right {i}' in example.question
  letters = [e.answer for e in one]
  assert all(70 < letters.count(letter) < 130 for letter in 'ABCD')


def test_sentences_are_lines_without_annotations(write, data_config):
  config = dataclasses.replace(data_config, steps='sentences', step_marks=True)
  example, = formats.read(write(lines(GSM8K)), config)[0]
  assert example.steps == ('Add 2 + 3 = 5.', 'Twice: 10 in all.')


@pytest.mark.parametrize('content', [
    lines(GSM8K), ICOT, lines({'question': 'q', 'steps': [*EQUATIONS], 'answer': '1'})])
def test_marks_are_written_around_equations(write, data_config, content):
  config = dataclasses.replace(data_config, step_marks=True)
  example, = formats.read(write(content), config)[0]
  assert example.steps == ('<<2+3=5>>', '<<5*2=10>>')


def test_marks_are_not_written_around_sentences(write, data_config):
  config = dataclasses.replace(data_config, step_marks=True)
  steps = ['A is B.', 'x=y', 'so 2+3=5 now']
  content = lines({'question': 'q', 'steps': steps, 'answer': 'a'})
  assert formats.read(write(content), config)[0][0].steps == tuple(steps)


def test_blank_lines_windows_ends_and_a_byte_order_mark_are_no_matter(
    write, data_config):
  content = b'\xef\xbb\xbf\r\n' + ICOT.encode() + b'\r\n\r\n' + ICOT.encode() + b'\r\n'
  examples, report = formats.read(write(content), data_config)
  assert examples == [Example('Two and three?', EQUATIONS, '10')] * 2
  assert report['read'] == 2


def test_a_line_separator_inside_a_string_ends_no_line(write, data_config):
  row = json.dumps({'input': 'a\u2028b', 'target': 1}, ensure_ascii=False)
  assert formats.read(write(row), data_config)[0] == [Example('a b', (), '1')]


def test_home_directory_is_expanded(write, data_config, monkeypatch):
  monkeypatch.setenv('HOME', str(write(ICOT).parent))
  assert formats.read('~/file.dat', data_config)[1]['read'] == 1


GOOD = lines(GSM8K)
STEPS = lines({'question': 'q', 'steps': [], 'answer': '1'})

# (content with the malformed row on line 3, key phrase of the message)
MALFORMED = {
    'not UTF-8': (f'{ICOT}\n\n'.encode() + b'caf\xe9||#### 1', 'found the byte 0xe9'),
    'not UTF-8, JSON': (f'{GOOD}\n\n'.encode() + b'{"question": "\xff"}',
                        'found the byte 0xff'),
    'invalid JSON': (f'{GOOD}\n\n{{"question": ', 'found invalid JSON'),
    'not an object': (f'{GOOD}\n\n["a"]', 'expected a JSON object'),
    'missing field': (lines(GOOD, '', {'question': 'q'}), "no field 'answer'"),
    'missing steps': (lines(STEPS, '', {'question': 'q', 'answer': '1'}),
                      "no field 'steps'"),
    'missing target': (lines({'input': 'q', 'target': 1}, '', {'input': 'q'}),
                       "no field 'target'"),
    'not a string': (lines(GOOD, '', {'question': 3, 'answer': '#### 1'}),
                     "found 3 as 'question'; expected a string"),
    'not a number': (lines({'input': 'q', 'target': 1}, '',
                           {'input': 'q', 'target': True}), "found True as 'target'"),
    'not finite': (lines({'input': 'q', 'target': 1}, '', '{"input": "q", "target": NaN}'),
                   'expected a finite one'),
    'no hashes': (lines(GOOD, '', {'question': 'q', 'answer': 'It is 7.'}),
                  "answer without '####'"),
    'empty answer': (lines(GOOD, '', {'question': 'q', 'answer': 'x\n#### '}),
                     'empty answer'),
    'empty answer, iCoT': (f'{ICOT}\n\nq||<<1+1=2>> ####', 'empty answer'),
    'empty question': (lines(GOOD, '', {'question': ' \n', 'answer': '#### 7'}),
                       'empty question'),
    'empty question, iCoT': (f'{ICOT}\n\n ||<<1+1=2>> #### 2', 'empty question'),
    'steps no list': (lines(STEPS, '', {'question': 'q', 'steps': 'a', 'answer': '1'}),
                      "found steps 'a'; expected a list of strings"),
    'steps of numbers': (lines(STEPS, '', {'question': 'q', 'steps': [1], 'answer': '1'}),
                         'found steps [1]; expected a list of strings'),
    'no bars': (f'{ICOT}\n\nq <<1+1=2>> #### 2', "without '||'"),
    'no hashes, iCoT': (f'{ICOT}\n\nq||<<1+1=2>> 2', "without '####' after '||'"),
    'text in iCoT': (f'{ICOT}\n\nq||so <<1+1=2>> #### 2', 'text outside << >>'),
    'unclosed': (f'{ICOT}\n\nq||<<1+1=2 #### 2', "found '<<' without its partner"),
    'unclosed before another': (f'{ICOT}\n\nq||<<1+1=2 <<2+1=3>> #### 3',
                                "found '<<' without its partner"),
    'unopened': (lines(GOOD, '', {'question': 'q', 'answer': '1+1=2>> #### 2'}),
                 "found '>>' without its partner"),
    'empty annotation': (f'{ICOT}\n\nq||<< >> #### 2', 'empty <<>>'),
    'surrogate': (GOOD + '\n\n{"question": "\\ud800", "answer": "#### 1"}',
                  'lone surrogate'),
    'no box': (lines({'problem': 'p', 'solution': r'\boxed{1}'}, '',
                     {'problem': 'p', 'solution': 'It is 7.'}), "no '\\boxed{'"),
    'open box': (lines({'problem': 'p', 'solution': r'\boxed{1}'}, '',
                       {'problem': 'p', 'solution': r'\boxed{\frac{1}{2'}),
                 "unclosed '\\boxed{'"),
    'no targets': (lines({'input': 'q', 'target': 'a'}, '', {'input': 'q', 'target': []}),
                   "no 'target' in the list"),
    'item of a list': ('[\n{"question": "q", "steps": [], "answer": "1"},\n3]',
                       'expected a JSON object'),
}


@pytest.mark.parametrize('kind', MALFORMED)
def test_a_malformed_row_is_told_by_file_line_and_remedy(write, data_config, kind):
  content, phrase = MALFORMED[kind]
  path = write(content)
  with pytest.raises(InputError) as error:
    formats.read(path, data_config)
  message = str(error.value)
  assert message.startswith(f'{path}:3: ') and phrase in message
  assert 'found' in message and 'expected' in message and "on_error='skip'" in message
  assert '\n' not in message


@pytest.mark.parametrize('kind', MALFORMED)
def test_a_malformed_row_is_skipped_and_counted(write, data_config, kind):
  content, phrase = MALFORMED[kind]
  path = write(content)
  examples, report = formats.read(path, dataclasses.replace(data_config, on_error='skip'))
  assert len(examples) == report['read'] == report['skipped'] == 1
  assert report['first_error'].startswith(f'{path}:3: ')
  assert phrase in report['first_error']


@pytest.mark.parametrize('content, phrase', [
    ('', 'found an empty file'),
    (' \n\n', 'found an empty file'),
    ('First Citizen:\nSpeak.', "unrecognised form, 'First Citizen:'"),
    ('{"a": 1, "b": 2}', "unrecognised form, JSON with the keys ['a', 'b']"),
    ('{"question": \n', ':1: found invalid JSON'),
    ('[]', 'no usable row'),
    ('[{"question": "q"\n', ':1: found invalid JSON'),
    ('[\n{"question": "q", "steps": [], "answer": "1"}\n{}]', ":3: found '{}]'"),
    ('[{"question": "q", "steps": [], "answer": "1"}]\n\n[]', 'text after the JSON list'),
    (b'[\n"\xff"]', ':2: found the byte 0xff'),
])
@pytest.mark.parametrize('on_error', ['raise', 'skip'])
def test_a_file_that_cannot_be_read_as_a_whole_is_refused(
    write, data_config, content, phrase, on_error):
  path = write(content)
  with pytest.raises(InputError) as error:
    formats.read(path, dataclasses.replace(data_config, on_error=on_error))
  message = str(error.value)
  assert message.startswith(str(path)) and phrase in message and 'expected' in message


def test_missing_file_and_directory(tmp_path, data_config):
  with pytest.raises(InputError, match='absent.txt: found no such file'):
    formats.read(tmp_path / 'absent.txt', data_config)
  with pytest.raises(InputError, match=f'^{tmp_path}: found a directory; expected a file'):
    formats.read(tmp_path, data_config)


def test_a_file_with_nothing_but_malformed_rows_is_refused(write, data_config):
  path = write('q||no hashes\nq no bars ####')
  with pytest.raises(InputError, match=r'no usable row, 2 malformed, the first .*:1: '):
    formats.read(path, dataclasses.replace(data_config, on_error='skip'))


@pytest.mark.parametrize('value, text', [
    (16.0, '16'), ('16.0', '16'), ('1,080', '1080'), ('1,080.50', '1080.5'), (3, '3'),
    (-0.0, '0'), (1.69726e-05, '0.0000169726'), (1e22, '1' + '0' * 22), ('10', '10'),
    ('100', '100'), ('1,2', '1,2'), ('yes', 'yes'), ('$5', '$5'), (1168833.6, '1168833.6')])
def test_numbers_have_one_spelling(value, text):
  assert number(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_spelling_keeps_the_value(value):
  assert float(number(value)) == value and number(number(value)) == number(value)


@given(question=st.text(), steps=st.lists(st.text()), answer=st.text())
def test_an_example_has_no_blank_edges_or_new_lines(question, steps, answer):
  try:
    example = make(question, steps, answer)
  except InputError as e:
    assert not question.strip() or not answer.strip(), e
    return
  for text in (example.question, *example.steps, example.answer):
    assert text == text.strip() != '' and len(text.splitlines()) == 1
  assert make(example.question, example.steps, example.answer) == example


@pytest.mark.integration
@pytest.mark.parametrize('name, form, count, steps, answer', [
    ('gsm8k/train.jsonl', 'gsm8k', 7473, ('48/2=24', '48+24=72'), '72'),
    ('gsm8k/test.jsonl', 'gsm8k', 1319, ('16-3-4=9', '9*2=18'), '18'),
    ('gsm8k/icot_valid.txt', 'icot', 500, ('4-2=2', '2/.5=4', '12/4=3', '100*3=300'),
     '300'),
    ('gsm8k/icot_test.txt', 'icot', 1319, ('16-3-4=9', '9*2=18'), '18'),
    ('gsm_hard/gsmhardv2.jsonl', 'gsm_hard', 1319, (), '-9867630'),
    ('prosqa/valid.json', 'coconut', 300,
     ('Tom is a terpus.', 'Every terpus is a brimpus.', 'Every brimpus is a lempus.'),
     'Tom is a lempus.'),
    ('prosqa/test.json', 'coconut', 500,
     ('Sally is a scrompus.', 'Every scrompus is a rempus.',
      'Every rempus is a sterpus.'), 'Sally is a sterpus.'),
])
def test_published_files(shared_data, data_config, name, form, count, steps, answer):
  examples, report = formats.read(shared_data / name, data_config)
  assert (report['form'], report['read'], report['skipped']) == (form, count, 0)
  assert report['rule'] == {'prosqa': 'text', 'gsm_hard': 'numeric_close'}.get(
      name.partition('/')[0], 'numeric')
  # Every reference is right by its own rule, also as a file of another program spells it.
  for e in examples:
    assert answer_matching.correct(report['rule'], e.answer, [e.answer]), e
    assert answer_matching.correct(report['rule'], f'The answer is {e.answer}', [e.answer]) or (
        report['rule'] == 'text'), e
  assert len(examples) == count
  assert (examples[0].steps, examples[0].answer) == (steps, answer)
  if name.startswith('gsm'):
    assert all(float(e.answer) is not None and ',' not in e.answer for e in examples)


def test_both_forms_of_gsm8k_tell_the_same(shared_data, data_config):
  ours, _ = formats.read(shared_data / 'gsm8k/test.jsonl', data_config)
  theirs, _ = formats.read(shared_data / 'gsm8k/icot_test.txt', data_config)
  assert [(e.steps, e.answer) for e in ours] == [(e.steps, e.answer) for e in theirs]


@pytest.mark.parametrize('answer, expected', [
    ('9 (apples)', '9'), ('-(1/3)', '-(1/3)'), ('16 (red); 21 (blue)', '16 (red); 21 (blue)'),
    ('1/3', '1/3'), ('5(km/h)', '5'), ('3 (2 each)', '3 (2 each)'), ('(4)', '(4)'),
    ('10:30 (AM)', '10:30'), ('0.5 (square feet)', '0.5')])
def test_units_of_asdiv(answer, expected, data_config, tmp_path):
  """A unit in brackets goes; any other bracket is part of the answer."""
  row = {'body': 'b.', 'question': 'q?', 'answer': answer}
  assert formats.from_asdiv(row, data_config).answer == expected
  assert answer_matching.correct('numeric', expected, [expected])


def test_a_list_of_gsm8k_rows(data_config, tmp_path):
  """One JSON list holds what lines hold."""
  rows = [{'question': 'q?', 'answer': '<<1+2=3>>3\n#### 3'}] * 2
  path = tmp_path / 'rows.json'
  path.write_text(json.dumps(rows))
  found, report = formats.read(path, data_config)
  assert report['form'] == 'gsm8k' and found[0] == Example('q?', ('1+2=3',), '3')


@pytest.mark.parametrize('text, message', [
    ('{"question": "q", "answer": "#### 1", "question": "r"}', "key 'question' twice"),
    ('[{"question": "q", "steps": [], "answer": "1", "answer": "2"}]', "key 'answer' twice"),
    ('{"question": ' + '[' * 100_000, 'invalid JSON'), ('[' * 100_000, 'invalid JSON'),
    ('{"a":' * 100_000, 'invalid JSON')])
def test_lines_that_lose_or_nest(data_config, tmp_path, text, message):
  path = tmp_path / 'rows.json'
  path.write_text(text)
  with pytest.raises(InputError, match=message):
    formats.read(path, data_config)


@pytest.mark.parametrize('path, message', [
    ('~nosuchuser/x', 'home directory of nobody'), ('file:///x.jsonl', 'expected a path'),
    ('a\0b', 'null character')])
def test_paths_that_are_none(data_config, path, message):
  with pytest.raises(InputError, match=message):
    formats.read(path, data_config)


def test_records_hold_any_line_separator(data_config, tmp_path):
  """A line ends where JSON lines end, not at U+2028 inside a string."""
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps({'question': 'a\u2028b\x85c', 'steps': [], 'answer': '1'},
                             ensure_ascii=False) + '\n', encoding='utf-8')
  found, _ = formats.read(path, data_config)
  assert [e.question for e in found] == ['a b c']
