"""What the benchmarks share: pictures, runs that take turns, the highest memory of a call or of a script with all its workers, and results as files.

Times of one machine drift by a factor of two between minutes, so only forms that were timed in turns are compared, and ratios are those of neighbours.
"""
import ctypes, gc, json, os, platform, re, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

here = Path(__file__).parent

def pictures(n, size):
    "`n` random images, uint8 (n,3,size,size), about as smooth as photographs: noise of all scales, coarse scales stronger, mostly grey"
    sides = [2**i for i in range(1, size.bit_length())]
    def _one():
        x = sum(F.interpolate(torch.randn(1,3,o,o), size, mode='bilinear')/o**.3 for o in sides)
        x = x + 2*x.mean(1, keepdim=True)
        return (x/x.std()*56+115).clamp(0, 255).byte()
    return torch.cat([_one() for _ in range(n)])

def photograph(height, width, rng):
    "Noise as grainy as a photograph, mostly grey, uint8 (height,width,3): the amplitude falls as 1/frequency"
    f = np.hypot(np.fft.fftfreq(height)[:,None], np.fft.rfftfreq(width))[...,None]
    f[0,0] = np.inf
    grey,color = rng.standard_normal((height,width,1)),rng.standard_normal((height,width,3))
    x = np.fft.irfft2(np.fft.rfft2(2*grey+color, axes=(0,1))/f, (height,width), axes=(0,1))
    return (x/x.std()*56+115).clip(0, 255).astype(np.uint8)

def seconds(f):
    "Wall time of one call"
    t = time.perf_counter(); f()
    return time.perf_counter()-t

def paired(forms, rounds=7, clock=seconds):
    "Median of `clock(f)` for each of `forms` ({name: f}), and of its ratio to the first; they take turns, each round begins with another"
    for f in forms.values(): f()
    names,rows = list(forms),[]
    for i in range(rounds):
        k,row = i%len(names),{}
        for nm in names[k:]+names[:k]: row[nm] = clock(forms[nm])
        rows.append(row)
    return {nm: median(r[nm] for r in rows) for nm in names}, {nm: median(r[nm]/r[names[0]] for r in rows) for nm in names}

def _status(field): return 1024*int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])

def peak_memory(f):
    "Bytes of resident memory during `f()` at its highest point, above those before it (Linux)"
    gc.collect(); ctypes.CDLL(None).malloc_trim(0) # what was freed goes back to the system, or `f` would take it from there
    Path('/proc/self/clear_refs').write_text('5') # forget the highest point so far
    before = _status('VmRSS')
    f()
    return _status('VmHWM')-before

def alone(file, *args):
    "What script `file` prints, as JSON, when run with `args`; memory that is freed there goes back to the system at once (glibc)"
    return json.loads(subprocess.run([sys.executable, '-W', 'ignore', file, *map(str, args)], env={**os.environ, 'MALLOC_MMAP_THRESHOLD_':'65536'},
                                     check=True, stdout=subprocess.PIPE, text=True).stdout)

def _tree(pid):
    "Process `pid` and all below it"
    parents = {}
    for f in Path('/proc').glob('[0-9]*/stat'):
        try: parents[int(f.parent.name)] = int(f.read_text().rpartition(')')[2].split()[1])
        except (FileNotFoundError, ProcessLookupError): pass # ended meanwhile
    below = lambda p: [p, *(o for c,up in parents.items() if up==p for o in below(c))]
    return below(pid)

def _memory(pid):
    "Bytes of process `pid`: its part of the memory that it shares with its like, and its files, such as libraries"
    try: roll,status = (Path(f'/proc/{pid}/{o}').read_text() for o in ('smaps_rollup','status'))
    except (FileNotFoundError, ProcessLookupError): return 0,0 # ended meanwhile
    kb = lambda field,s: sum(1024*int(o) for o in re.findall(rf'^{field}:\s+(\d+) kB', s, re.M))
    return kb('Pss_(?:Anon|Shmem)', roll), kb('RssFile', status)

def tree_memory(file, *args):
    "Highest memory in bytes of script `file` run with `args`, and of all processes it starts; what they share counts once (Linux, sampled)"
    p,top = subprocess.Popen([sys.executable, '-W', 'ignore', file, *map(str, args)]),0
    while p.poll() is None:
        own,files = zip(*map(_memory, _tree(p.pid)))
        top = max(top, sum(own)+max(files)) # forks map the files that their parent has mapped
        time.sleep(.02)
    if p.returncode: raise RuntimeError(f'{file} {args} ended with {p.returncode}')
    return top

def card():
    "Name, driver and CUDA of the card, or nothing"
    if not torch.cuda.is_available(): return ''
    driver = subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], capture_output=True, text=True, check=True).stdout.split()[0]
    return f'{torch.cuda.get_device_name()} (driver {driver}, CUDA {torch.version.cuda}), '

def machine(packages=()):
    "Card, processor, system and versions, in a line"
    cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    pkgs = ('torch','torchvision','fastai','self_supervised',*packages)
    return f"{card()}{os.cpu_count()} × {cpu[1] if cpu else platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {platform.system()}, " \
           f"Python {platform.python_version()}, {', '.join(f'{o} {version(o)}' for o in pkgs)}"

def table(rows):
    "Rows ({column: value}) as Markdown; floats with three digits"
    fmt = lambda o: f'{o:.3g}' if isinstance(o, float) and abs(o)<1000 else f'{o:.0f}' if isinstance(o, float) else str(o)
    cols = list(rows[0])
    return '\n'.join(f"| {' | '.join(o)} |" for o in (cols, ['---']*len(cols), *([fmt(r[c]) for c in cols] for r in rows)))

def save(name, intro, tables, packages=()):
    "Print `tables` ({heading: rows}) and write them to results/`name`.md and .json"
    cmd,mach = f'make bench-{name}',machine(packages)
    md = '\n\n'.join([f'# {name}', f'`{cmd}` on {mach}.', intro, *(f'## {h}\n\n{table(rows)}' for h,rows in tables.items())])+'\n'
    print(md)
    (here/'results').mkdir(exist_ok=True)
    (here/'results'/f'{name}.md').write_text(md)
    (here/'results'/f'{name}.json').write_text(json.dumps(dict(command=cmd, machine=mach, tables=tables), indent=1)+'\n')
