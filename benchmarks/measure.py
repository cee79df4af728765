"What the benchmarks share: the highest memory of a call, and a script run again for one of its numbers in a process of its own (Linux)"
import json, os, re, subprocess, sys
from pathlib import Path

def _status(field): return 1024*int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])

def peak_memory(f):
    "Bytes of resident memory during `f()` at its highest point, above those before it"
    Path('/proc/self/clear_refs').write_text('5') # forget the highest point so far
    before = _status('VmRSS')
    f()
    return _status('VmHWM')-before

def alone(file, *args):
    "What script `file` prints, as JSON, when run with `args`; memory that is freed there goes back to the system at once (glibc)"
    return json.loads(subprocess.run([sys.executable, '-W', 'ignore', file, *map(str, args)], env={**os.environ, 'MALLOC_MMAP_THRESHOLD_':'65536'},
                                     check=True, stdout=subprocess.PIPE, text=True).stdout)
