"""What it costs to read images from shards instead of a folder, and to go on in the middle of them. Ten minutes.

- Sources: 6,000 JPEGs of 256×256 pixels (noise with an amplitude of 1/frequency), in the system's cache: as files, as six archives, as six tables.
- images/s: 3,000 of them in batches of 50, decoded whole, nothing trained. limit: their bytes from memory through `open_image`, in one thread. folder: `image_dls` in the main
  process, and with two processes. tars, tables: `stream_dls` with a buffer of 1,000, so that what it takes to fill the first block is in it. Medians, the forms take turns.
- Reading alone: the bytes of all images of the archives in their order, not decoded; and Python's tarfile in a plain loop, without us.
- Going on: 100,000 images of 28×28 pixels in 100 archives, buffer 10,000: seconds to the first batch of a stream that begins, and of one that goes on after 50,000 images;
  and of reading these 50,000, decoded. Opening the shards is in all of them.
- Memory: of a process that reads 20 times a buffer of 1,000 of the JPEGs, the highest resident MiB; and of one that reads twice the buffer.
"""
import itertools, sys, tarfile
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from measure import alone, paired, peak_memory, photograph, save, seconds
from self_supervised.data import image_dls
from self_supervised.image_files import open_image
from self_supervised.shards import open_shards, write_shards
from self_supervised.streams import stream_dls

n,distinct,bs,count = 6000,200,50,3000

def write(path):
    "Files, archives and tables"
    import pyarrow as pa, pyarrow.parquet as pq
    rng,pics = np.random.default_rng(0),[]
    for _ in range(distinct):
        f = BytesIO()
        Image.fromarray(photograph(256, 256, rng)).save(f, 'jpeg', quality=85)
        pics.append(f.getvalue())
    for d in ('files','tables'): (path/d).mkdir()
    for i in range(n): (path/'files'/f'{i:05}.jpg').write_bytes(pics[i%distinct])
    write_shards(path/'files', path/'tars')
    fns = sorted((path/'files').iterdir())
    for k in range(0, n, 1000): pq.write_table(pa.table({'image':[{'bytes':o.read_bytes(), 'path':o.name} for o in fns[k:k+1000]]}), path/'tables'/f'{k}.parquet', row_group_size=100)

def batches(dl):
    def _some():
        for _ in itertools.islice(dl, count//bs): pass
    return _some

def from_memory(pics):
    for o in pics: open_image(BytesIO(o), None)

def reading(folder):
    for s in open_shards(folder):
        for _ in s.samples(): pass

def plain(folder):
    for f in sorted(folder.glob('*.tar')):
        with tarfile.open(f) as tar:
            for m in tar: tar.extractfile(m).read()

def speed(path):
    kw    = dict(bs=bs, device='cpu')
    pics  = [o.read_bytes() for o in sorted((path/'files').iterdir())[:count]]
    forms = {'limit, one thread':partial(from_memory, pics)} | {f'folder, {k} processes':batches(image_dls(path/'files', num_workers=k, **kw).train) for k in (0,2)}
    forms |= {f'{nm}, {k} threads':batches(stream_dls(path/nm, num_workers=k, shuffle=1000, **kw).train.dl) for k in (1,2) for nm in ('tars','tables')}
    s,ratio   = paired(forms, 5)
    raw,ratio2 = paired({'tarfile, plain loop':partial(plain, path/'tars'), 'ours':partial(reading, path/'tars')}, 5)
    return {'Reading and decoding': [{'form':nm, 'images/s':count/s[nm], 'speed / limit':1/ratio[nm], 'speed / folder':ratio['folder, 0 processes']/ratio[nm]} for nm in forms],
            'Reading archives alone': [{'form':nm, 'images/s':n/raw[nm], 'speed / plain loop':1/ratio2[nm]} for nm in raw]}

def going_on(path, total=100_000, per=1000):
    (path/'small').mkdir()
    rng = np.random.default_rng(0)
    for i in range(total):
        f = BytesIO()
        Image.fromarray(rng.integers(0, 255, (28,28), dtype=np.uint8)).save(f, 'png', compress_level=0)
        if i%per==0: tar = tarfile.open(path/'small'/f'{i//per:03}.tar', 'w')
        m = tarfile.TarInfo(f'{i}.png')
        m.size = f.tell()
        f.seek(0)
        tar.addfile(m, f)
        if i%per==per-1: tar.close()
    def stream(): return stream_dls(path/'small', bs=100, n_in=1, device='cpu').train.dl
    first = seconds(lambda: next(iter(stream())))
    half  = stream()
    def read():
        for _ in itertools.islice(half, total//200): pass
    reads = seconds(read)
    def again():
        o = stream()
        o.load_state_dict(half.state_dict())
        next(iter(o))
    return {'Going on after 50,000 of 100,000 images': [{'what':k, 's':v} for k,v in {'a stream begins':first, 'goes on':seconds(again), 'the first half is read':reads}.items()]}

def memory(path, blocks):
    "Highest MiB of a stream of so many blocks"
    dl = stream_dls(path/'tars', bs=bs, shuffle=1000, num_workers=2, device='cpu').train.dl
    def read():
        for _ in itertools.islice(dl, blocks*1000//bs): pass
    return peak_memory(read)/2**20

if __name__=='__main__':
    if sys.argv[1:]: print(memory(Path(sys.argv[1]), int(sys.argv[2]))); sys.exit()
    with TemporaryDirectory() as d:
        path = Path(d)
        write(path)
        tables = speed(path)
        tables['Memory'] = [{'images read':f'{k*1000:,}', 'highest, MiB':alone(__file__, path, k)} for k in (2,20)]
        tables |= going_on(path)
    save('streams', __doc__.partition('\n\n')[2].strip(), tables, ('pillow','pyarrow'))
