"""The documentation site, made from the notebooks: `python docs/build.py [folder]`; README.md, made from nbs/index.ipynb: `python docs/build.py --readme`.

Notebooks become Markdown, their exported cells entries of the API; Material for MkDocs makes pages of it. What would be wrong on the
site ends the build: a module that cannot be imported, a directive left over, a dead link or anchor, a missing picture or one without a
description, a page outside the navigation, anything that a browser would fetch from elsewhere."""
import ast, base64, html, inspect, json, logging, math, os, posixpath, re, shutil, sys, tempfile, textwrap
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from fractions import Fraction
from functools import partial
from html.parser import HTMLParser
from importlib import import_module
from inspect import Parameter
from operator import attrgetter
from pathlib import Path, PurePath
from types import UnionType
from typing import get_args

os.environ.setdefault('NO_MKDOCS_2_WARNING', '1')
from fastai._modidx import d as fastai_index
from fastai.callback.core import event
from fastai.vision.core import imagenet_stats
from fastcore.docments import ann_parts, docments, empty
from fastcore.foundation import L
from latex2mathml.converter import convert
from mkdocs.commands.build import build as mkdocs_build
from mkdocs.config import load_config
from nbdev.config import nbpath2html
from nbdev.doclinks import patch_name

root  = Path(__file__).resolve().parent.parent
pkg   = 'self_supervised'
texts = {'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md'} # pages that are not notebooks, beside benchmarks/results

class BuildError(Exception): pass

class _Lines(logging.Handler):
    "Warnings of the site builder, collected"
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
    def emit(self, record): self.lines.append(record.getMessage())

def _join(s): return ''.join(s) if isinstance(s, list) else s

# ---- Markdown

def _indent(s): return textwrap.indent(s, '    ')
def _out(s): return f'<div class="output" markdown="1">\n\n{s}\n\n</div>'
def _fence(s, lang='text'):
    n = max([2, *map(len, re.findall(r'^`{3,}', s, re.M))]) + 1
    return f'{"`"*n}{lang}\n{s.rstrip()}\n{"`"*n}'

# ---- the API

def _fraction(v):
    "The float `v` as the simplest fraction with a denominator of at most 100, or None"
    return f if math.isfinite(v) and abs((f := Fraction(v).limit_denominator(100))-v)<=1e-12*abs(v) else None

def _is_long(v): return type(v) is float and len(re.sub(r'e.*|^-?0\.0*|\D', '', repr(v)))>6

def literal(v, fraction=False):
    "The value `v` as people write it: 4/3, 1e-6, 10_000, imagenet_stats, the name of a function, a class or a member of an enum; with `fraction` 0.75 is 3/4"
    if v is imagenet_stats: return 'imagenet_stats'
    if isinstance(v, Enum): return f'{type(v).__name__}.{v.name}'
    if isinstance(v, PurePath): return f'Path({str(v)!r})'
    if isinstance(v, partial): return f"partial({', '.join([literal(v.func), *map(literal, v.args), *(f'{k}={literal(o)}' for k,o in v.keywords.items())])})"
    if type(v) in (list, tuple, set) and v:
        a,b = {list:'[]', tuple:('(', ',)' if len(v)==1 else ')'), set:'{}'}[type(v)]
        return a + ', '.join(literal(o, any(_is_long(o) and _fraction(o) for o in v)) for o in v) + b
    if type(v) is dict: return '{' + ', '.join(f'{literal(k)}: {literal(o)}' for k,o in v.items()) + '}'
    if type(v) is float: return str(f) if (fraction or _is_long(v)) and (f := _fraction(v)) is not None else re.sub(r'e(-?)\+?0*', r'e\1', repr(v))
    if type(v) is int and abs(v)>=10_000: return f'{v:_}'
    res = getattr(v, '__name__', repr(v))
    if '<' in res and not isinstance(v, str): raise BuildError(f'the default {res} tells a reader nothing: give it a name')
    return res

def _default(p): return '' if p.default is empty else literal(p.default)

def _docments(obj):
    "Parameters of `obj` but for `self`, and what it returns; a class that is made as another library's base class has none to speak of"
    if inspect.isclass(obj) and not next(c for c in obj.__mro__ if '__init__' in vars(c)).__module__.startswith(pkg): return {},None
    d = docments(obj, full=True, args_kwargs=True)
    for o in fields(obj) if is_dataclass(obj) else ():
        if o.default_factory is not MISSING: d[o.name].default = o.default_factory()
    return {k:v for k,v in d.items() if k not in ('self','return')},d.get('return')

def signature(nm, obj):
    "`nm(…)` as the reader would call it, delegated arguments included, in lines that fit a page"
    stars = {Parameter.VAR_POSITIONAL:'*', Parameter.VAR_KEYWORD:'**'}
    args  = [stars.get(p.kind, '') + k + (f'={d}' if (d := _default(p)) else '') for k,p in _docments(obj)[0].items()]
    one   = f"{nm}({', '.join(args)})"
    return one if len(one)<=80 else f'{nm}(\n' + textwrap.fill(', '.join(a.replace(' ', '\0') for a in args), 78, initial_indent='    ', subsequent_indent='    ').replace('\0', ' ') + ')'

def _type(o):
    "An annotation by short names"
    if o is empty: return ''
    o = ann_parts(o)[0]
    return ' or '.join(f"`{getattr(a, '__name__', str(a)).split('.')[-1].replace('NoneType', 'None')}`" for a in (get_args(o) if isinstance(o, UnionType) else [o]))

def _plain(s): return f'<code>{html.escape(s)}</code>' if s else '' # code that is not looked up: a parameter may be called as a function is
def _row(*cells): return '| ' + ' | '.join(c.replace('|', '\\|').replace('\n', '<br>') for c in cells) + ' |'

def _unsearched(cell): return cell and f'{cell} {{: data-search-exclude}}' # types and defaults would bury names and comments

def parameters(obj):
    "Table of what `obj` takes and returns, those of base classes and of functions it delegates to included, from the comments beside them"
    d,ret = _docments(obj)
    rows = [_row(_plain(k), _unsearched(_type(v.anno)), _unsearched(_plain(_default(v))), v.docment or '') for k,v in d.items()]
    if ret and not inspect.isclass(obj) and (ret.docment or ret.anno is not empty): rows.append(_row('**returns**', _unsearched(_type(ret.anno)), '', ret.docment or ''))
    return '\n'.join(['<div class="parameters" markdown="1">\n', _row('', *map(_unsearched, ('type', 'default')), ''), '|---|---|---|---|', *rows, '\n</div>']) if rows else ''

def methods(cls):
    "List of the documented methods of `cls`, and of our classes that it builds on but for their answers to events; what a patch has added has entries of its own"
    res = {}
    for c in (o for o in cls.__mro__ if o.__module__.startswith(pkg)):
        body = {t.name for t in ast.parse(textwrap.dedent(inspect.getsource(c))).body[0].body if isinstance(t, ast.FunctionDef)}
        for nm,o in vars(c).items():
            f = o.fget if isinstance(o, property) else inspect.unwrap(getattr(o, '__func__', o)) if callable(o) else None
            if not inspect.isfunction(f) or nm[0]=='_' or not f.__doc__ or nm in res or (nm in vars(event) if c is not cls else nm not in body | set(vars(event))): continue
            call = nm if isinstance(o, property) else re.sub(r'\s+', ' ', signature(nm, f))
            res[nm] = f'- `{call}`' + (f'{{#{c.__name__}.{nm}}}'.lower() if c is cls else f' (of `{c.__name__}`)') + f': {inspect.getdoc(f)}'
    return '\n'.join(res.values())

def source_of(obj, mod):
    "File and line of the code of `obj`"
    return Path(mod.__file__).relative_to(root).as_posix(),inspect.getsourcelines(obj.fget if isinstance(obj, property) else inspect.unwrap(obj))[1]

def heading(nm): return f'### <code>{nm}</code> {{#{nm.lower()} .api}}'

def entry(nm, mod):
    "The entry of the public `nm` of module `mod`: heading, link to its source, signature, docstring, parameters, methods"
    obj = attrgetter(nm)(mod)
    res = [heading(nm), '[source](/{}#L{}){{.source}}'.format(*source_of(obj, mod))]
    if not isinstance(obj, property): res += [f'```python\n{signature(nm, obj)}\n```']
    return '\n\n'.join(filter(None, [*res, inspect.getdoc(obj), '' if isinstance(obj, property) else parameters(obj), methods(obj) if inspect.isclass(obj) else '']))

def entries(src, mod):
    "Entries of what the exported cell `src` of module `mod` defines for the public; a callback's answers to events are listed with it"
    for t in ast.parse(src).body:
        if isinstance(t, (ast.FunctionDef, ast.ClassDef)):
            for nm in L(patch_name(t)):
                if not re.search(r'(^|\.)_', nm) and nm.split('.')[-1] not in vars(event): yield entry(nm, mod)
        elif isinstance(t, ast.Assign):
            for nm in (o.id for o in t.targets if isinstance(o, ast.Name) and o.id[0]!='_'): yield f'{heading(nm)}\n\n{_fence(ast.unparse(t), "python")}'

# ---- notebooks as Markdown

def output(o, file, alt, imgs):
    "Markdown of a cell's output `o`; a picture goes to `imgs`, under the name `file`"
    if o['output_type']=='stream': return _out(_fence(re.sub(r'(\d\.\d{4})\d{3,}', r'\1', _join(o['text'])))) # four decimals are enough
    if o['output_type']=='error': raise BuildError(f"a cell failed: {o['ename']}: {o['evalue']}")
    d = {k:_join(v) for k,v in o['data'].items()}
    if 'text/markdown' in d: return _out(d['text/markdown'])
    for mime,ext in ('image/png', 'png'), ('image/jpeg', 'jpg'):
        if mime in d:
            if not alt: raise BuildError('a picture without a description: begin its cell with #| fig-alt: …')
            imgs[f'{file}.{ext}'] = base64.b64decode(d[mime])
            return _out(f'![{alt}]({file}.{ext})')
    if 'text/html' in d: return f'<div class="output">{d["text/html"]}</div>'
    return _out(_fence(d['text/plain']))

def markdown(src):
    "Markdown as the site builder reads it: callouts, and a blank line before a list or table"
    src = re.sub(r'^::: *\{\.callout-(\w+)[^}]*\}\n(?:#+ ([^\n]+)\n)?(.*?)\n:::$', lambda m: f'!!! {m[1]} "{m[2] or m[1].title()}"\n\n{_indent(m[3].strip())}', src, flags=re.M|re.S)
    return re.sub(r'^(?![ \t]*(?:[-*+]|\d+\.) |\||[ \t]*$|    )(.+)\n(?=(?:[-*+]|\d+\.) |\|)', r'\1\n\n', src, flags=re.M)

_option = re.compile(r'^#\| *([\w-]+) *:? *(.*)\n?')
def cells(path, stem, imgs):
    "Markdown of the notebook at `path`, cell by cell"
    mod = None
    for i,c in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        src,opts = _join(c['source']),{}
        if c['cell_type']=='markdown':
            yield markdown(src)
            continue
        while m := _option.match(src): opts[m[1]],src = m[2].strip('"'),src[m.end():]
        if 'default_exp' in opts: mod = import_module(f"{pkg}.{opts['default_exp']}")
        if 'export' in opts: yield from entries(src, mod)
        if opts.keys() & {'default_exp', 'hide', 'export', 'exporti'}: continue
        if unknown := opts.keys() - {'fig-alt', 'echo', 'eval', 'slow'}: raise BuildError(f'{path.name}: the directive #| {min(unknown)} means nothing here')
        if src.strip() and opts.get('echo')!='false': yield _fence(src, 'python')
        for j,o in enumerate(c['outputs']):
            try: yield output(o, f'{stem}_files/{i}_{j}', opts.get('fig-alt'), imgs)
            except BuildError as e: raise BuildError(f'{path.name}: {e}') from None

# ---- links

def page_of(file):
    "The page, as its Markdown file, that shows `file` of the repository"
    if file in texts: return texts[file]
    if file.endswith('.ipynb'): return nbpath2html(Path(file)).with_suffix('.md').name
    return file.replace('benchmarks/', '', 1) if file.startswith('benchmarks/results/') else f'source/{file}.md'

_code = r'^(?P<fence>`{3,}).*?^(?P=fence)`*$|(?<!`)`[^`\n]+`(?!`)' # what is no prose: blocks and spans of code
def prose(f, md): return re.sub(rf'(?P<code>{_code})|\]\(<?(?P<link>[^)\s>]+)>?(?=[\s)])', f, md, flags=re.M|re.S)

def relink(md, file, page, wanted):
    "Links between files of the repository, in `file`, as links between the pages of the site; what has no page of its own goes to `wanted`"
    def _f(m):
        l = m['link']
        if l is None or re.match(r'\w+:|#', l): return m[0]
        to,_,anchor = l.partition('#')
        to = to[1:] if to[0]=='/' else posixpath.normpath(posixpath.join(posixpath.dirname(file), to))
        if to.startswith(f'nbs/{Path(page).stem}_files/'): return m[0] # a picture of this notebook
        if not (root/to).is_file(): raise BuildError(f'{file}: the link {l} leads to no file')
        to_page = to.removeprefix('nbs/') if to.endswith(('.png', '.jpg', '.svg')) else page_of(to)
        wanted[to] = to_page
        anchor = re.sub(r'^L(\d+)$', r'__codelineno-0-\1', anchor)
        return f"]({posixpath.relpath(to_page, posixpath.dirname(page) or '.')}{'#'+anchor if anchor else ''}"
    return prose(_f, md)

def linkify(md, names, page):
    "Public names between backticks, in the Markdown of `page`, as links to where they are explained; headings, links and blocks of code stay as they are"
    up = '../'*page.count('/')
    def _f(m):
        to = names.get(m[0].strip('`').removesuffix('()'))
        return f"[{m[0]}]({to if '://' in to else up+to})" if to and m[0][0]=='`' and m[0][:3]!='```' else m[0]
    return re.sub(rf'^#[^\n]*|^\[source\][^\n]*|\[[^]\n]*\]\([^)\n]*\)|{_code}', _f, md, flags=re.M|re.S)

def public_names(md):
    "Where each public name is explained in the pages `md`: our names in the order of the notebooks, then the classes of fastai on its own site"
    res = {}
    for page,s in md.items():
        for nm in re.findall(r'^### <code>(.+)</code> \{#', s, re.M): res.setdefault(nm, f'{page}#{nm.lower()}')
    for mod,d in fastai_index['syms'].items():
        for k,(to,_) in d.items():
            if (nm := k.removeprefix(f'{mod}.'))[0].isupper(): res.setdefault(nm, f"{fastai_index['settings']['doc_host']}/{to}")
    return res

# ---- the site

def pages():
    "Markdown of all pages by their file, and the pictures of notebooks"
    res,imgs,wanted = {},{},{}
    files = [f'nbs/{f.name}' for f in sorted((root/'nbs').glob('*.ipynb'))] + [*texts] + [f'benchmarks/results/{f.name}' for f in sorted((root/'benchmarks/results').glob('*.md'))]
    for file in files:
        page,path = page_of(file),root/file
        if page in res: raise BuildError(f'{file}: two notebooks make the page {page}')
        body = '\n\n'.join(cells(path, Path(page).stem, imgs)) if file.endswith('.ipynb') else markdown(path.read_text(encoding='utf-8'))
        md = relink(body, file, page, wanted)
        left = re.search(r'^(:::.*|#\|.*|\{\{<.*)', re.sub(_code, '', md, flags=re.M|re.S), re.M)
        if left: raise BuildError(f'{file}: {left[0]} would be left on the page')
        res[page] = md
    names = public_names(res)
    inner = {f'{o}.md' for o in ('changelog','contributing','main','cli_log','cli_command','run_settings','state','replay')} # read by those who work on them
    def front(page, md): return f"---\nsearch: {{{'exclude: true' if page.startswith('results/') or page in inner else 'boost: 2' if ' .api}' in md else 'boost: 1'}}}\n---\n" # entries are found first
    res = {page: front(page, md) + linkify(md, names, page) for page,md in res.items()}
    for file,page in wanted.items():
        if page.startswith('source/'):
            lang = Path(file).suffix[1:] or 'text'
            res[page] = f"---\nsearch: {{exclude: true}}\nhide: [navigation, toc]\n---\n# {file}\n\n" + _fence((root/file).read_text(encoding='utf-8'), f'{{.{dict(sbatch="bash").get(lang, lang)} linenums="1"}}')
        elif page not in res: imgs[page] = (root/file).read_bytes()
    return res,imgs

def formula_parts(tex):
    r"Parts of a formula that may stand below each other where a line is too short for all: \qquad, or the end of a line, is between them"
    res,pairs = [''],[(r'(?<!\\)\{', r'(?<!\\)\}'), (r'\\left(?![a-z])', r'\\right(?![a-z])'), (r'\\begin', r'\\end')]
    for o in re.split(r'\\qquad|\n', tex):
        if any(len(re.findall(a, res[-1]))!=len(re.findall(b, res[-1])) for a,b in pairs): res[-1] += rf'\qquad {o}'
        else: res.append(o)
    return [o for o in res if o.strip()]

def mathml(doc):
    "Formulas as MathML, which browsers show with no script or font to fetch"
    def _f(m):
        tex = html.unescape(m[2])
        if m[1]=='(': return convert(tex)
        return '<div class="math">' + ''.join(convert(o, display='block') for o in formula_parts(tex)) + '</div>'
    return re.sub(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', _f, doc, flags=re.S)

class _Page(HTMLParser):
    "What a page names, links to and loads"
    def __init__(self, text):
        super().__init__()
        self.ids,self.links,self.loads,self.bare = [],[],[],[]
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if 'id' in d: self.ids.append(d['id'])
        if tag=='a' and 'href' in d: self.links.append(d['href'])
        if 'src' in d: self.loads.append(d['src'])
        if tag=='link' and d.get('rel') in ('stylesheet', 'icon', 'preload'): self.loads.append(d['href'])
        if tag=='img' and not d.get('alt'): self.bare.append(d.get('src'))

def check(site):
    "What is wrong with the pages of the folder `site`"
    docs = {f.relative_to(site).as_posix():_Page(f.read_text(encoding='utf-8')) for f in sorted(site.rglob('*.html'))}
    res  = []
    for page,d in docs.items():
        res += [f'{page}: two places are called {o}' for o in sorted({o for o in d.ids if d.ids.count(o)>1})]
        res += [f'{page}: the picture {o} has no description' for o in d.bare]
        res += [f'{page}: {o} would be fetched from elsewhere' for o in d.loads if re.match(r'(\w+:)?//', o)]
        for l in d.links+d.loads:
            if re.match(r'(\w+:|//)', l): continue
            to,_,anchor = l.partition('#')
            to = to[1:] if to.startswith('/') else posixpath.normpath(posixpath.join(posixpath.dirname(page), to)) if to else page
            if to=='.': to = 'index.html'
            if not (site/to).is_file(): res.append(f'{page}: {l} leads nowhere')
            elif anchor and to in docs and anchor not in docs[to].ids: res.append(f'{page}: {l} leads to no place on its page')
    return res

def build(site):
    "Make the site in the folder `site`, or raise `BuildError`"
    site = Path(site).resolve()
    if site.exists() and any(site.iterdir()) and not (site/'search/search_index.json').exists(): raise BuildError(f'{site} is no site, and would be replaced by one: name an empty folder, or a new one')
    md,imgs = pages()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        for nm,o in {**{k:v.encode() for k,v in md.items()}, **imgs}.items():
            (tmp/'src'/nm).parent.mkdir(parents=True, exist_ok=True)
            (tmp/'src'/nm).write_bytes(o)
        shutil.copy(root/'docs/site.css', tmp/'src')
        logging.getLogger('mkdocs').addHandler(said := _Lines())
        try: mkdocs_build(load_config(str(root/'docs/mkdocs.yml'), docs_dir=str(tmp/'src'), site_dir=str(tmp/'site')))
        finally: logging.getLogger('mkdocs').removeHandler(said)
        if said.lines: raise BuildError('\n'.join(said.lines))
        for f in (tmp/'site').rglob('*.html'): f.write_text(mathml(f.read_text(encoding='utf-8')), encoding='utf-8')
        found = json.loads((index := tmp/'site/search/search_index.json').read_text(encoding='utf-8'))
        for o in found['docs']: o['text'] = ' '.join(re.sub(r'<pre>.*?</pre>|<[^>]+>', '', o['text'], flags=re.S).split()) # prose is searched, and half as much to fetch
        index.write_text(json.dumps(found, ensure_ascii=False, separators=(',',':')), encoding='utf-8')
        if wrong := check(tmp/'site'): raise BuildError('\n'.join(wrong))
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(tmp/'site', site)

def readme():
    "README.md: the Markdown of nbs/index.ipynb, with links from the root of the repository"
    cs = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    def _f(m): return m[0] if m['link'] is None or re.match(r'\w+:|#', m['link']) else f"]({posixpath.normpath(posixpath.join('nbs', m['link']))}"
    return prose(_f, '\n\n'.join(_join(c['source']) for c in cs)) + '\n'

if __name__=='__main__':
    try:
        if '--readme' in sys.argv: (root/'README.md').write_text(readme(), encoding='utf-8')
        else: build(sys.argv[1] if len(sys.argv)>1 else root/'_docs')
    except BuildError as e: sys.exit(f'docs: {e}')
