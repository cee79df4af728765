"The sdist and the wheel hold all that a stranger's empty environment needs"
import re, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from email.parser import BytesParser

import pytest
from packaging.requirements import Requirement

def run(*cmd, **kw):
    r = subprocess.run([str(o) for o in cmd], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)
    assert r.returncode==0, r.stdout
    return r.stdout

@pytest.fixture(scope='module')
def built(project, files, tmp_path_factory):
    "The sdist, and the wheel built from it, of a clean copy: leftovers of earlier builds in the tree cannot help"
    src = tmp_path_factory.mktemp('src')
    for f in files:
        (src/f).parent.mkdir(parents=True, exist_ok=True)
        (src/f).write_bytes((project/f).read_bytes())
    dist = src/'dist'
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, cwd=src)
    return next(dist.glob('*.tar.gz')),next(dist.glob('*.whl'))

@pytest.fixture(scope='module')
def settings(project):
    ini = ConfigParser(delimiters=['='])
    ini.read(project/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

@pytest.fixture(scope='module')
def metadata(built):
    with zipfile.ZipFile(built[1]) as z: return BytesParser().parsebytes(z.read(next(n for n in z.namelist() if n.endswith('/METADATA'))))

def test_metadata(metadata, settings):
    assert metadata['Name']==settings['lib_name']
    assert metadata['Version']==settings['version']
    assert metadata['Summary']==settings['description']
    assert metadata['License-Expression']==settings['license']
    assert metadata['Requires-Python']==f">={settings['min_python']}"
    assert metadata['Keywords'].split(',')==settings['keywords'].split()
    assert metadata['Description-Content-Type']=='text/markdown'

def test_requirements(metadata, settings):
    reqs = [Requirement(o) for o in metadata.get_all('Requires-Dist')]
    def _have(extra): return {f'{r.name}{r.specifier}' for r in reqs if (r.marker is None if extra is None else str(r.marker)==f'extra == "{extra}"')}
    extras = [k.removesuffix('_requirements') for k in settings if k.endswith('_requirements')]
    assert 'dev' in extras and metadata.get_all('Provides-Extra')==extras
    assert _have(None)==set(settings['requirements'].split())
    for e in extras: assert _have(e)==set(settings[f'{e}_requirements'].split())

def test_constraints_pin_requirements(project, settings):
    "Each requirement has a tested version, one that its own range allows"
    pins = dict(re.findall(r'^([\w.-]+)==([^;\s]+)', (project/'constraints.txt').read_text(), re.M))
    canon = lambda s: re.sub(r'[-_.]+', '-', s).lower()
    pins = {canon(k):v for k,v in pins.items()}
    for r in map(Requirement, f"{settings['requirements']} {settings['dev_requirements']}".split()):
        assert canon(r.name) in pins, r
        assert r.specifier.contains(pins[canon(r.name)]), r

def test_sdist(built):
    with tarfile.open(built[0]) as t: names = {n.split('/', 1)[-1] for n in t.getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE', 'README.md', 'CHANGELOG.md'} <= names

def test_wheel_holds_the_package(built, files):
    "Every file of the package that the tree has, code, data and licences, and no other top-level name"
    with zipfile.ZipFile(built[1]) as z: names = set(z.namelist())
    want = {f.as_posix() for f in files if f.parts[0]=='self_supervised'}
    assert any(n.endswith('.npz') for n in want)
    assert {n for n in names if '.dist-info/' not in n}==want
    assert {n.split('/', 1)[1] for n in names if '.dist-info/licenses/' in n}=={'licenses/LICENSE', 'licenses/self_supervised/datasets/LICENSE-fashion-mnist'}

def test_install(built, settings, tmp_path):
    "In an empty environment, away from the tree, the wheel is what gets imported, and the data came with it"
    env,away = tmp_path/'env',tmp_path/'away'
    away.mkdir()
    run(sys.executable, '-m', 'venv', '--without-pip', env)
    py = env/'bin/python'
    run(sys.executable, '-m', 'pip', '--python', py, 'install', '--no-deps', '--no-index', '--disable-pip-version-check', built[1])
    site = run(py, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    # what it depends on is borrowed from this environment; a .pth file there, such as that of the editable install, is not read
    deps = [p for p in sys.path if p.endswith(('site-packages', 'dist-packages'))]
    with open(f'{site}/deps.pth', 'w') as f: f.write('\n'.join(deps))
    code = '''
from self_supervised.all import *
import self_supervised
from importlib.metadata import version
(x,y),(xt,yt) = fashion_mnist()
print(self_supervised.__file__, self_supervised.__version__, version('self_supervised'), [tuple(o.shape) for o in (x,y,xt,yt)], sep=chr(10))'''
    out = run(py, '-I', '-c', code, cwd=away).splitlines()[-4:]
    assert out[0].startswith(site), out
    assert out[1]==out[2]==settings['version']
    assert out[3]=='[(5000, 1, 28, 28), (5000,), (1000, 1, 28, 28), (1000,)]'
