"What all tests share: quiet threads, no windows, a fixed seed, and copies of this project to spoil"
import os
os.environ.setdefault('MPLBACKEND', 'Agg')

import shutil, subprocess
from pathlib import Path

import pytest, torch
from fastai.torch_core import set_seed

torch.set_num_threads(1)
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

@pytest.fixture(autouse=True)
def seed(): set_seed(42)
