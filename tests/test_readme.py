"""What the README says works: its Python runs as written, from top to bottom, its commands are the few that are promised, its links lead somewhere.

Two things are arranged: `path/to/images` and `path/to/labelled`, which stand for the reader's own folders, have small JPEGs, wide ones and upright ones, and a fit lasts one epoch."""
import re, shlex

import pytest, yaml
from fastai.learner import Learner
from PIL import Image

from self_supervised import cli
from self_supervised.cli_command import parse

placeholder,labelled,n_images = 'path/to/images','path/to/labelled',64

def blocks(text):
    "Fenced blocks of a Markdown text, as (language, code)"
    return re.findall(r'^```[ ]*(\w*)[^\n]*\n(.*?)^```', text, re.M|re.S)

def prose(text): return re.sub(r'^```.*?^```', '', text, flags=re.M|re.S)
def commands(text): return [l.removeprefix('$ ').strip() for lang,code in blocks(text) if lang in ('sh', 'bash', 'shell', 'console') for l in code.splitlines() if l.strip()]

commands_of_ours = cli.__all__

def parses(nm, *words):
    try: return bool(parse(getattr(cli, nm), words))
    except SystemExit: return False

def bad_commands(text, targets):
    "Commands that are none of: git clone URL, cd DIR, make TARGET (with variables, perhaps), pip install ..., or one of ours with flags that it has"
    def _ok(words):
        while words and re.fullmatch(r'[A-Z]+=\S+', words[0]): words = words[1:]
        if words[:2]==['git', 'clone']: return len(words)==3
        if words[:1]==['cd']: return len(words)==2
        if words and words[0] in commands_of_ours: return parses(*words)
        if words[:1]==['make']: return len(words)==2 and words[1] in targets
        return words[:2]==['pip', 'install']
    return [c for c in commands(text) for part in c.split('&&') if not _ok(shlex.split(part, comments=True))]

def bad_links(text, files):
    "Relative links and pictures that are not in the repository, and links to headings that are not there"
    slugs = {re.sub(r'[^\w -]', '', h.lower()).strip().replace(' ', '-') for h in re.findall(r'^#+ +(.+)$', prose(text), re.M)}
    there = {o.as_posix() for f in files for o in (f, *f.parents)}
    links = re.findall(r'\]\(\s*<?([^)\s>]+)', prose(text)) + re.findall(r'''(?:src|href)=["']([^"']+)''', prose(text))
    def _ok(l):
        if re.match(r'https?://|mailto:', l): return True
        file,_,anchor = l.partition('#')
        return file.rstrip('/') in there if file else anchor in slugs
    return [l for l in links if not _ok(l)]

@pytest.fixture
def readme(project): return (project/'README.md').read_text(encoding='utf-8')

@pytest.fixture
def targets(project): return set(re.findall(r'^([a-z-]+):.*##', (project/'Makefile').read_text(), re.M))

def test_languages(readme):
    "A block in another language would escape the tests below"
    assert {lang for lang,_ in blocks(readme)} <= {'python', 'sh', 'bash', 'console', 'text', 'bibtex'}
    assert readme.count('```')==2*len(blocks(readme))

@pytest.mark.slow
@pytest.mark.notebook
def test_python(readme, tmp_path, monkeypatch):
    codes = [code for lang,code in blocks(readme) if lang=='python']
    assert codes and any(placeholder in c for c in codes), 'the README shows no Python for a folder of images'
    folders = [placeholder, *(f'{labelled}/{o}' for o in 'abc')]
    for o in folders: (tmp_path/o).mkdir(parents=True)
    for i in range(n_images*3):
        small = Image.effect_noise((6+i%3, 6), 90).convert('RGB')
        small.resize(((140,105),(105,140),(230,105))[i%3]).save(tmp_path/folders[0 if i<n_images else 1+i%3]/f'{i}.jpg')
    monkeypatch.chdir(tmp_path)
    fit = Learner.fit
    monkeypatch.setattr(Learner, 'fit', lambda self, n_epoch, *args, **kwargs: fit(self, 1, *args, **kwargs))
    ns = dict(__name__='readme')
    for i,c in enumerate(codes): exec(compile(c, f'README.md, Python block {i+1}', 'exec'), ns)

def test_commands(readme, targets):
    assert {'make demo', 'make test'} <= set(commands(readme))
    assert bad_commands(readme, targets)==[]

def test_links(readme, files): assert bad_links(readme, files)==[]

def test_contributing(project, files, targets):
    "Under a page, and held to the same"
    text = (project/'CONTRIBUTING.md').read_text(encoding='utf-8')
    assert len(text.splitlines())<=60
    assert bad_links(text, files)==[]
    assert set(re.findall(r'`make ([a-z-]+)`', text)) <= targets

def test_templates(project, targets):
    "What a contributor is asked for can be done"
    text = (project/'.github/pull_request_template.md').read_text(encoding='utf-8')
    asked = {t for o in re.findall(r'`make ([a-zA-Z -]+)`', text) for t in o.split()}
    assert asked-{'bench-NAME'} <= targets and 'test' in asked
    for f in sorted((project/'.github/ISSUE_TEMPLATE').glob('*.yml')):
        form = yaml.safe_load(f.read_text(encoding='utf-8'))
        if f.stem!='config': assert form['name'] and form['description'] and all(o['attributes']['label'] for o in form['body'])

def test_citation(project):
    cff = yaml.safe_load((project/'CITATION.cff').read_text(encoding='utf-8'))
    assert {'cff-version', 'message', 'title', 'authors', 'version', 'license'} <= set(cff)
    assert all(o['authors'] and o['title'] and o['url'].startswith('https://') for o in cff['references'])

def test_bad_is_seen(files, targets):
    text = '''# A title
```sh
$ git clone https://example.com/a.git && cd a
make demo
make dmeo
VENV=env make test
sudo make test
curl https://example.com
ssl_knn run labelled --k 5
ssl_knn run labelled --neighbours 5
```
[in page](#a-title) [nowhere](#nowhere) [folder](tests/) [web](https://example.com) ![gone](images/gone.png) <img src="gone.svg">
'''
    assert bad_commands(text, targets)==['make dmeo', 'sudo make test', 'curl https://example.com', 'ssl_knn run labelled --neighbours 5']
    assert bad_links(text, files)==['#nowhere', 'images/gone.png', 'gone.svg']
