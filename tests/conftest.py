"What all tests share: quiet threads, no windows, a fixed seed, and copies of this project to spoil"
import os
os.environ.setdefault('MPLBACKEND', 'Agg')
if not os.path.exists('/dev/nvidiactl'): os.environ.setdefault('TRITON_INTERPRET', '1') # without a card, kernels run on the CPU; Triton asks when they are defined

import inspect, shutil, subprocess, sys
from pathlib import Path

import pytest

import processes # noqa: F401 (here, so that the workers of pytest-xdist share its parent)

root = Path(__file__).resolve().parent.parent
_machinery = {'.git', '.venv', '__pycache__', '.ipynb_checkpoints', '.pytest_cache', '.ruff_cache', 'build', 'dist', 'demo'}

def tree_files(path):
    "The files of the project at `path`, relative: those git tracks or would add, or all of them where git is not used"
    r = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=path, capture_output=True, text=True)
    fs = [Path(o) for o in r.stdout.split('\0') if o] if r.returncode==0 else [o.relative_to(path) for o in Path(path).rglob('*')]
    return sorted({f for f in fs if (path/f).is_file() and not _machinery & set(f.parts)})

@pytest.fixture(scope='session')
def project(): return root

@pytest.fixture(scope='session')
def files(): return tree_files(root)

@pytest.fixture
def copy(tmp_path, files):
    "A copy of the project that a test may change"
    for f in files:
        (tmp_path/'copy'/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/f, tmp_path/'copy'/f)
    return tmp_path/'copy'

@pytest.fixture(scope='session', autouse=True)
def quiet_threads():
    import torch # here, not above: pytest-xdist's first process, which runs no tests, need not wait for it
    torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seed():
    from fastai.torch_core import set_seed
    set_seed(42)

# ---- which tests start processes: it is seen in their code, in that of their fixtures, and in what these call in tests/

def _codes(code): return [code, *(o for c in code.co_consts if inspect.iscode(c) for o in _codes(c))]
def _is_ours(o): return (inspect.isfunction(o) or inspect.isclass(o)) and Path(getattr(sys.modules.get(o.__module__), '__file__', None) or '').parent==Path(__file__).parent and o.__module__!='conftest'

def _starts(f, seen):
    "Does the function or class `f` of a test file, or one that it names, use `subprocess`, `multiprocessing` or `processes`?"
    if f in seen: return False
    seen.add(f)
    if inspect.isclass(f): return any(_starts(o, seen) for o in vars(f).values() if inspect.isfunction(o))
    named = [f.__globals__.get(nm) for nm in {n for c in _codes(f.__code__) for n in c.co_names}]
    homes = {o.__name__ if inspect.ismodule(o) else getattr(o, '__module__', None) for o in named}
    return bool(homes & {'subprocess', 'multiprocessing', 'torch.multiprocessing', 'processes'}) or any(_starts(o, seen) for o in named if _is_ours(o))

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Mark what starts processes or a browser; files with most of what takes long come first, so that none of them is left for the end when two workers share the files"
    known,weight = {},{}
    for o in items:
        fs = [o.function, *(ds[-1].func for ds in o._fixtureinfo.name2fixturedefs.values()), *getattr(getattr(o, 'callspec', None), 'params', {}).values()]
        if any(known.setdefault(f, _starts(f, set())) for f in fs if inspect.isfunction(f) and _is_ours(f)): o.add_marker('process')
        if 'browser' in o.fixturenames: o.add_marker('browser')
        weight[o.path] = weight.get(o.path, 0) + (100 if any(map(o.get_closest_marker, ('process', 'browser', 'slow'))) else 1)
    items.sort(key=lambda o: (-weight[o.path], o.path))
