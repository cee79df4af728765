"The web site: what would be wrong on it ends its build, its pages say what the code says, and a browser is content with each of them"
import enum, functools, http.server, importlib, json, math, re, shutil, threading
from html.parser import HTMLParser

import pytest, torch, yaml
from fastai.vision.core import imagenet_stats
from fastcore.docments import docments
from browser import browser, new_page # noqa: F401 (a fixture)
from conftest import root
from test_sync import dotted, modules, public

from self_supervised import cli
from self_supervised.cli_command import parse

spec  = importlib.util.spec_from_file_location('build', root/'docs/build.py')
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

pytestmark = pytest.mark.slow

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built"
    path = tmp_path_factory.mktemp('site')
    build.build(path)
    return path

@pytest.fixture(scope='module')
def served(site):
    "Address of the site, from a server on this machine"
    class _Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(_Handler, directory=site)) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{s.server_port}'
        s.shutdown()

def nav_pages(nav=None):
    "Files of the pages in the navigation, in its order"
    if nav is None: nav = yaml.safe_load((root/'docs/mkdocs.yml').read_text())['nav']
    return [p for o in nav for v in o.values() for p in (nav_pages(v) if isinstance(v, list) else [v.replace('.md', '.html')])]

# ---- what the pages say

class Text(HTMLParser):
    "The text of a page, and of each entry of the API on it"
    def __init__(self, html):
        super().__init__()
        self.text,self.parts,self.into,self.skip = '',{},None,0
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if tag in ('h2','h3'): self.into = d['id'] if 'api' in d.get('class', '').split() else None
    def handle_data(self, data):
        self.text += data
        if self.into: self.parts[self.into] = self.parts.get(self.into, '')+data

def words(s): return re.sub(r'[\s`]+', '', s)

@pytest.mark.parametrize('module', [dotted(root, m) for m in modules(root)])
def test_entries(site, module):
    "Each public function and class has an entry with its docstring, and each of its parameters, own, inherited or delegated, with its comment"
    nm   = module.removeprefix('self_supervised.').strip('_')
    page = Text((site/f'{nm}.html').read_text(encoding='utf-8'))
    for k,o in public(module).items():
        said = words(page.parts[k.lower()])
        if o.__name__!=k: # another name for it: the entry says so
            assert o.__name__ in said and o.__name__.lower() in page.parts, k
            continue
        if isinstance(o, type) and o.__base__ is tuple: continue # a namedtuple has its definition
        assert words(o.__doc__ or '') in said, k
        if isinstance(o, type) and not any('__init__' in vars(c) for c in o.__mro__ if c.__module__.startswith('self_supervised')): continue
        for p,d in docments(o, full=True, args_kwargs=True).items():
            if p not in ('self', 'return'): assert p in said and words(d.docment or '') in said, (k, p)

def test_delegated_and_inherited(site):
    "Arguments of `get_batch_augs` in the entry of SimCLR's pipelines, and methods of the base class in the entry of SWAV"
    part = Text((site/'vision.simclr.html').read_text(encoding='utf-8')).parts['get_simclr_aug_pipelines']
    from self_supervised.augmentations import get_batch_augs
    comments = [words(o.docment) for k,o in docments(get_batch_augs, full=True).items() if k not in ('size','resize_scale','return')]
    assert len(comments)>10 and all(o in words(part) for o in comments)
    assert 'before_backward' not in Text((site/'watcher.html').read_text(encoding='utf-8')).parts['watcher'] # what fastai's base class takes
    assert 'show(n=1,**kwargs)(ofSSLCallback)' in words(Text((site/'vision.swav.html').read_text(encoding='utf-8')).parts['swav'])

def test_names_are_links(site):
    html = (site/'changelog.html').read_text(encoding='utf-8')
    assert '<a href="vision.swav.html#swav"><code>SWAV</code></a>' in (site/'getting_started.html').read_text(encoding='utf-8')+html
    assert '<a href="vision.simclr.html#simclr"><code>SimCLR</code></a>' in html # the callback, not the module of this name
    assert re.search(r'<a href="https://docs.fast.ai/learner.html#learner"><code>Learner</code></a>', (site/'index.html').read_text(encoding='utf-8'))

def test_source_links(site):
    "An entry leads to the line of its code"
    to,line = re.search(r'id="swav_loss".*?href="(source/[^"#]+)#__codelineno-0-(\d+)"', (site/'vision.swav.html').read_text(encoding='utf-8'), re.S).groups()
    assert to=='source/self_supervised/vision/swav.py.html'
    assert (root/'self_supervised/vision/swav.py').read_text().splitlines()[int(line)-1].startswith('def swav_loss(')
    assert re.search(rf'id="__codelineno-0-{line}".*?swav_loss', (site/to).read_text(encoding='utf-8'))

def test_formulas(site):
    html = (site/'vision.swav.html').read_text(encoding='utf-8')
    assert '<math' in html and 'arithmatex' not in html

@pytest.mark.parametrize('tex,parts', [
    (r'a = b', ['a=b']),
    (r'a, \qquad b', ['a,', 'b']),
    (r'a \qquad\qquad b', ['a', 'b']),
    ('\na\n+ b\n', ['a', '+b']),
    (r'\text{a \qquad b}', [r'\text{a\qquadb}']),
    (r'\{ a \qquad b', [r'\{a', 'b']),
    (r'\left( a \qquad b\right) \leftarrow c \qquad d', [r'\left(a\qquadb\right)\leftarrowc', 'd']),
    (r'\begin{aligned} a \qquad b \end{aligned}', [r'\begin{aligned}a\qquadb\end{aligned}']),
])
def test_formula_parts(tex, parts):
    "Below each other go what stands side by side, never halves of a bracket"
    assert [re.sub(r'\s', '', o) for o in build.formula_parts(tex)]==parts

class Colour(enum.Enum): red = 1

@pytest.mark.parametrize('v,s', [
    (3/4, '0.75'), (4/3, '4/3'), (-2/3, '-2/3'), (1/97, '1/97'), (.08, '0.08'), (.123456, '0.123456'), (0., '0.0'), (1e-5, '1e-5'), (1.5e-8, '1.5e-8'), (1e16, '1e16'), (math.inf, 'inf'),
    (math.pi, '3.141592653589793'), (1/101, repr(1/101)), # no simple fraction: as it is
    ((3/4, 4/3), '(3/4, 4/3)'), ([0., 1/3, 1], '[0, 1/3, 1]'), ((.08, 1.), '(0.08, 1.0)'), ((1/3, 1e-6), '(1/3, 1e-6)'), ((1,), '(1,)'), ((), '()'), ({'a':1/3}, "{'a': 1/3}"), (((3/4, 4/3), .75), '((3/4, 4/3), 0.75)'),
    (9999, '9999'), (1281167, '1_281_167'), (True, 'True'), (None, 'None'), ('<a>', "'<a>'"),
    (imagenet_stats, 'imagenet_stats'), (Colour.red, 'Colour.red'), (torch.nn.ReLU, 'ReLU'), (shutil.copy, 'copy'), (functools.partial(shutil.copy, follow_symlinks=False), 'partial(copy, follow_symlinks=False)'), (root.relative_to(root)/'a', "Path('a')"), (torch.float32, 'torch.float32'),
])
def test_literal(v, s): assert build.literal(v)==s

@pytest.mark.parametrize('v', [object(), lambda: 0, [lambda: 0]], ids=['object','lambda','in a list'])
def test_no_literal(v):
    with pytest.raises(build.BuildError, match='give it a name'): build.literal(v)

def test_defaults():
    "Those of all signatures are as people write them, and are what the code has"
    seen = 0
    for m in modules(root):
        for nm,o in public(dotted(root, m)).items():
            for k,p in build._docments(o)[0].items():
                s,v = build._default(p),p.default
                assert not re.search(r'\d{7}|\de[+-]?0|<', s), (m, nm, k, s)
                if type(v) in (int, float, tuple, list):
                    seen += 1
                    assert str(eval(s, {**vars(torch), 'imagenet_stats':imagenet_stats}))==str(v), (m, nm, k, s)
    assert seen>500

@pytest.mark.parametrize('nm', cli.__all__)
def test_defaults_of_commands(nm, capsys):
    with pytest.raises(SystemExit): parse(getattr(cli, nm), ['--help'])
    assert not re.search(r'\d{7}|\de[+-]?0|<\w+ ', said := capsys.readouterr().out), said

def test_readme(): assert (root/'README.md').read_text(encoding='utf-8')==build.readme(), 'README.md is made from nbs/index.ipynb: run make export'

def test_figures_of_performance():
    "Tables that were put on the page are those of the results"
    cells = json.loads((root/'nbs/91_performance.ipynb').read_text(encoding='utf-8'))['cells']
    shown = [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', []) if 'text/markdown' in o['data']]
    rows  = [[c.strip() for c in r.strip('|').split('|')] for t in shown for r in t.splitlines()]
    files = {tuple(c.strip() for c in r.strip('|').split('|')) for f in (root/'benchmarks/results').glob('*.md') for r in f.read_text(encoding='utf-8').splitlines() if r.startswith('|')}
    assert len(shown)>3 and all(any(set(r)<=set(f) for f in files) for r in rows)

# ---- what ends the build, on a small project

def notebook(*cells): return json.dumps(dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5))
def md(src): return dict(cell_type='markdown', metadata={}, source=src)
def code(src, *outputs): return dict(cell_type='code', metadata={}, source=src, outputs=list(outputs), execution_count=None)
def picture(): return dict(output_type='display_data', metadata={}, data={'image/png':'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='})

@pytest.fixture
def small(tmp_path, monkeypatch):
    "A project of two notebooks, one of them of a module, that builds"
    p = tmp_path/'project'
    for d in ('nbs', 'docs', 'benchmarks/results'): (p/d).mkdir(parents=True)
    shutil.copy(root/'docs/site.css', p/'docs')
    for f in ('CHANGELOG.md', 'CONTRIBUTING.md'): (p/f).write_text(f'# {f}\n')
    yml = re.sub(r'^nav:.*', 'nav: [Home: index.md, queue: queue.md, C: changelog.md, D: contributing.md]', (root/'docs/mkdocs.yml').read_text(), flags=re.M|re.S)
    (p/'docs/mkdocs.yml').write_text(yml)
    (p/'self_supervised').mkdir()
    shutil.copy(root/'self_supervised/queue.py', p/'self_supervised')
    (p/'nbs/index.ipynb').write_text(notebook(md('# Home\n\nSee [queue](31_queue.ipynb#featurequeue), `FeatureQueue`, $a^2$.')))
    (p/'nbs/31_queue.ipynb').write_text(notebook(code('#| default_exp queue'), md('# queue'), code('#| export\nclass FeatureQueue: pass'), code('#| fig-alt: A dot\nplot()', picture())))
    monkeypatch.setattr(build, 'root', p)
    monkeypatch.setattr(build, 'source_of', lambda obj, mod: ('self_supervised/queue.py', 1))
    return p

def add(p, *cells):
    nb = json.loads((p/'nbs/index.ipynb').read_text())
    (p/'nbs/index.ipynb').write_text(notebook(*nb['cells'], *cells))

def test_small_builds(small, tmp_path):
    build.build(tmp_path/'site')
    assert 'alt="A dot"' in (tmp_path/'site/queue.html').read_text() and '<math' in (tmp_path/'site/index.html').read_text()

def test_no_other_folder_is_replaced(small):
    with pytest.raises(build.BuildError, match='is no site'): build.build(small)
    assert (small/'nbs/index.ipynb').exists()

spoils = [
    ('leads to no file',              lambda p: add(p, md('[gone](99_gone.ipynb)'))),
    ('leads to no file',              lambda p: add(p, md('![a](images/gone.png)'))),
    ('leads to no place',             lambda p: add(p, md('[gone](31_queue.ipynb#gone)'))),
    ('leads to no place',             lambda p: add(p, md('<a href="queue.html#gone">gone</a>'))),
    ('leads nowhere',                 lambda p: add(p, md('<a href="gone.html">gone</a>'))),
    ('leads nowhere',                 lambda p: add(p, code('x', dict(output_type='display_data', metadata={}, data={'text/html':'<img src="gone.png" alt="a">'})))),
    ('a picture without a description', lambda p: add(p, code('plot()', picture()))),
    ('has no description',            lambda p: add(p, md('<img src="site.css">'))),
    ('fetched from elsewhere',        lambda p: add(p, md('<script src="https://example.com/a.js"></script>'))),
    ('fetched from elsewhere',        lambda p: add(p, md('![a](https://example.com/a.png)'))),
    ('two places are called',         lambda p: add(p, md('<a id="a"></a><a id="a"></a>'))),
    ('means nothing here',            lambda p: add(p, code('#| layout-ncol: 2\nx'))),
    ('would be left on the page',     lambda p: add(p, md('::: {.column-margin}\na\n:::'))),
    ('would be left on the page',     lambda p: add(p, md('{{< video a.mp4 >}}'))),
    ('would be left on the page',     lambda p: add(p, md('#| echo: false'))),
    ('a cell failed',                 lambda p: add(p, code('1/0', dict(output_type='error', ename='ZeroDivisionError', evalue='division by zero', traceback=[])))),
    ('not included in the "nav"',     lambda p: (p/'nbs/20_more.ipynb').write_text(notebook(md('# more')))),
    ('two notebooks',                 lambda p: (p/'nbs/20_queue.ipynb').write_text(notebook(md('# queue')))),
    ('No module named',               lambda p: add(p, code('#| default_exp gone'))),
    ("has no attribute 'Gone'",       lambda p: add(p, code('#| default_exp queue'), code('#| export\nclass Gone: pass'))),
]
@pytest.mark.parametrize('says,spoil', spoils, ids=[f'{i}-{s}' for i,(s,_) in enumerate(spoils)])
def test_spoilt(small, tmp_path, says, spoil):
    spoil(small)
    with pytest.raises((build.BuildError, ImportError, AttributeError), match=re.escape(says)): build.build(tmp_path/'site')
    assert not (tmp_path/'site').exists()

# ---- in a browser

@pytest.mark.parametrize('pages', [nav_pages()[i:i+6] for i in range(0, len(nav_pages()), 6)], ids=lambda o: o[0])
def test_pages(browser, served, pages):
    "They open without trouble, with all their pictures, in less than 700 kB each, and are no wider than a phone; a few at a time, as most of it is waiting for what a page might still load"
    with new_page(browser) as first:
        opened = []
        for page in pages:
            p,sizes = first.context.new_page(),{}
            first.troubles.watch(p)
            p.on('response', lambda r, sizes=sizes: sizes.update({r.url:int(r.headers['content-length'])}))
            p.goto(f'{served}/{page}')
            opened.append((page, p, sizes))
        for page,p,sizes in opened:
            p.wait_for_load_state('networkidle')
            assert p.locator('h1').count()==1, page
            assert p.evaluate('[...document.images].filter(o => !o.complete || !o.naturalWidth).map(o => o.src)')==[], page
            p.set_viewport_size(dict(width=390, height=800))
            assert p.evaluate('document.documentElement.scrollWidth')<=390, page
            index = sum(v for k,v in sizes.items() if k.endswith('search_index.json')) # which the browser fetches after the page
            assert 1e5<sum(sizes.values())-index<8e5 and 0<index<8e5, (page, sizes)

def test_front(browser, served):
    "What it is, a picture, the lines for one's own images and the two commands are seen at once"
    with new_page(browser, served+'/index.html') as p:
        parts = [p.locator(f'article > {o}').first for o in ('h1', 'p', 'p:has(img)', '.highlight', 'p:has-text("make demo")')]
        boxes = [o.bounding_box() for o in parts]
        assert 'learn.export_encoder' in parts[3].inner_text() and 'make test' in parts[4].inner_text()
    ends = [o['y']+o['height'] for o in boxes]
    assert all(a<=b['y'] for a,b in zip(ends, boxes[1:])) and ends[-1]<=900, boxes

def test_formulas_fit(browser, site, served):
    "No formula has a bar to scroll where there is room; on a phone all of a wide one can be reached, sideways"
    pages = [f.name for f in sorted(site.glob('*.html')) if 'class="math"' in f.read_text(encoding='utf-8')]
    assert len(pages)>20
    sizes = "[...document.querySelectorAll('.math')].map(o => [o.scrollWidth-o.clientWidth, o.scrollHeight-o.clientHeight])"
    ends  = "[...document.querySelectorAll('.math')].map(o => {o.scrollLeft = 1e6; const b = o.getBoundingClientRect(), m = [...o.children].map(c => c.getBoundingClientRect()), l = o.scrollLeft; return [Math.max(...m.map(c => c.right))-b.right, b.left-Math.min(...m.map(c => c.left))-l]})"
    with new_page(browser) as p:
        for page in pages:
            p.set_viewport_size(dict(width=1400, height=900))
            p.goto(f'{served}/{page}')
            assert not [o for o in p.evaluate(sizes) if max(o)>0], page
            p.set_viewport_size(dict(width=390, height=844))
            assert not [o for o in p.evaluate(sizes) if o[1]>0] and not [o for o in p.evaluate(ends) if max(o)>1], page

def test_navigation(browser, served):
    "The pages that the tests go through are those that the navigation offers"
    with new_page(browser, served+'/index.html') as p:
        links = p.locator('.md-sidebar--primary a.md-nav__link[href]').evaluate_all('os => os.map(o => o.getAttribute("href"))')
    assert [o for o in dict.fromkeys(links) if '#' not in o and o!='./' and o!='.']==[o for o in nav_pages() if o in links] and set(nav_pages())-set(links) <= {'index.html'}

def test_index_of_the_search(site):
    "Code, tables of results and what has changed are not in it: they have pages of their own, and would bury what explains them"
    docs = json.loads((site/'search/search_index.json').read_text(encoding='utf-8'))['docs']
    assert len(docs)>300 and not [o['location'] for o in docs if o['location'].startswith(('source/', 'results/', 'changelog')) or '<' in o['text']]

def test_search(browser, served):
    with new_page(browser, served+'/index.html') as p:
        p.keyboard.press('/')
        p.keyboard.type('SWAV')
        p.locator('.md-search-result__link').first.wait_for()
        found = p.locator('.md-search-result__link').evaluate_all('os => os.map(o => o.href)')
        assert any('vision.swav.html' in o for o in found[:5]), found

def test_copy(browser, served):
    with new_page(browser, served+'/getting_started.html', permissions=['clipboard-read', 'clipboard-write']) as p:
        block = p.locator('.highlight', has=p.get_by_text('fashion_mnist')).first
        block.hover()
        block.locator('.md-code__button, .md-clipboard').first.click()
        copied = p.evaluate('navigator.clipboard.readText()')
    assert copied.strip()==block_source().strip()

def block_source():
    return next(''.join(c['source']) for c in json.loads((root/'nbs/75_getting_started.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code' and 'fashion_mnist()' in ''.join(c['source']))

def test_dark_mode(browser, served):
    "By the system's wish, and by the button, which is remembered"
    def scheme(p): return p.locator('body').get_attribute('data-md-color-scheme')
    def light(p): return p.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0,3).every(o => o>200)")
    with new_page(browser, served+'/faq.html', color_scheme='dark') as p: assert scheme(p)=='slate' and not light(p)
    with new_page(browser, served+'/faq.html', color_scheme='light') as p:
        assert scheme(p)=='default' and light(p)
        p.locator('label[for^="__palette"]:visible').click()
        assert scheme(p)=='slate' and not light(p)
        p.goto(served+'/index.html')
        assert scheme(p)=='slate'
