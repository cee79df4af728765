"Archives, tables, folders and data sets: what is in them, in order, from any place on; and what damaged ones say"
import io, json, os, pickle, tarfile, warnings
from pathlib import Path

import numpy as np, pytest
from fastai.data.transforms import parent_label
from PIL import Image

from self_supervised.shards import FileShard, ParquetShard, TarShard, open_shards, shard_sizes, write_shards

def png(i, size=20):
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (size,size), dtype=np.uint8)).save(f, 'png')
    return f.getvalue()

def write_tar(path, files, mode='w'):
    with tarfile.open(path, mode) as tar:
        for nm,b in files:
            m = tarfile.TarInfo(nm)
            m.size = len(b)
            tar.addfile(m, io.BytesIO(b))
    return path

def files(n, start=0): return [(f'{i:04}.png', png(i)) for i in range(start, start+n)]

@pytest.mark.parametrize('mode, end', [('w','.tar'), ('w:gz','.tar.gz'), ('w:gz','.tgz')])
def test_tar(tmp_path, mode, end):
    shard, = open_shards(write_tar(tmp_path/f'a{end}', files(10), mode))
    assert isinstance(shard, TarShard) and shard.count()==10
    for start in (0,1,9,10,11): assert [o.image for o in shard.samples(start)]==[png(i) for i in range(start, 10)]

def test_what_belongs_together(tmp_path):
    "files of one name up to the first dot, in one folder, side by side; no folders, links or hidden files"
    path = tmp_path/'a.tar'
    with tarfile.open(path, 'w') as tar:
        def add(nm, b=b'', **kw):
            m = tarfile.TarInfo(nm)
            m.size = len(b)
            for k,v in kw.items(): setattr(m, k, v)
            tar.addfile(m, io.BytesIO(b))
        add('x', type=tarfile.DIRTYPE)
        add('x/1.seg.png', b'mask'); add('x/1.cls', b'3'); add('x/._1.png', b'mac'); add('x/1.jpg', b'picture')
        add('y/1.JPEG', b'other'); add('y/2.png', type=tarfile.SYMTYPE, linkname='/etc/passwd'); add('y/.hidden.png', b'no')
        add('y/3.json', b'{}')
    shard = TarShard(path)
    got = list(shard.samples())
    assert shard.count()==len(got)==3
    assert [(o.image, o.fields) for o in got]==[(b'mask', {'cls':b'3', 'jpg':b'picture'}), (b'other', {}), (None, {'json':b'{}'})]
    assert [o.name for o in got]==[f'{k} in {path}' for k in ('x/1','y/1','y/3')]

def test_nothing_is_unpickled(tmp_path):
    "what is called .pyd, .pickle or .pth stays bytes"
    class Evil:
        def __reduce__(self): return os.mkdir,(str(tmp_path/'evil'),)
    evil = pickle.dumps(Evil())
    path = write_tar(tmp_path/'a.tar', [(f'0.{k}', evil) for k in ('png','pyd','pickle','pkl','pth','npy')])
    sample, = TarShard(path).samples()
    assert sample.fields==dict.fromkeys(('pyd','pickle','pkl','pth','npy'), evil) and not (tmp_path/'evil').exists()

def test_damaged_tars(tmp_path):
    whole = write_tar(tmp_path/'whole.tar', files(6)).read_bytes()
    with tarfile.open(tmp_path/'whole.tar') as t: at = [(m.offset, m.offset_data) for m in t.getmembers()]
    def said(name, b, n):
        (tmp_path/name).write_bytes(b)
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            shard = TarShard(tmp_path/name)
            assert shard.count()==n
            assert not n or len(list(shard.samples()))==n
        return ''.join(sorted({str(o.message) for o in ws}))
    assert 'is damaged or cut off at byte' in said('middle.tar', whole[:at[3][0]]+b'\xff'*512+whole[at[3][1]:], 3)
    assert 'cut off' in said('cut.tar', whole[:at[4][1]+50], 5) # the last picture is cut too, and will not decode
    assert [o.image for o in TarShard(tmp_path/'cut.tar').samples(4)]==[b'']
    assert 'is left out, as it is no tar archive' in said('page.tar', b'<html>not found</html>'*100, 0)
    assert 'is left out, as it is no tar archive' in said('empty.tar', b'', 0)

def test_memory_of_a_long_archive(tmp_path):
    "the members that were seen are forgotten"
    shard = TarShard(write_tar(tmp_path/'a.tar', [(f'{i}.txt', b'') for i in range(3000)]))
    with open(shard.path, 'rb') as f:
        for tar,*_ in shard._groups(f): assert len(tar.members)<=1

pa = pytest.importorskip('pyarrow')
import pyarrow.parquet as pq # noqa: E402

@pytest.mark.parametrize('nested', [True, False])
@pytest.mark.parametrize('group', [4, 100])
def test_parquet(tmp_path, nested, group):
    pics = [{'bytes':png(i), 'path':f'{i}.png'} for i in range(10)] if nested else [png(i) for i in range(10)]
    pq.write_table(pa.table({'label':list(range(10)), 'image':pics}), tmp_path/'a.parquet', row_group_size=group)
    shard, = open_shards(tmp_path/'a.parquet')
    assert isinstance(shard, ParquetShard) and shard.count()==10
    for start in (0,3,4,9,10): assert [(o.image, o.fields) for o in shard.samples(start)]==[(png(i), {'label':i}) for i in range(start, 10)]

def test_parquet_of_paths(tmp_path):
    "a row may name a file in place of its bytes"
    (tmp_path/'0.png').write_bytes(png(0))
    rows = pa.array([{'bytes':None, 'path':str(tmp_path/'0.png')}, {'bytes':None, 'path':str(tmp_path/'1.png')}, None], pa.struct([('bytes', pa.binary()), ('path', pa.string())]))
    pq.write_table(pa.table({'image':rows}), tmp_path/'a.parquet')
    assert [o.image for o in ParquetShard(tmp_path/'a.parquet').samples()]==[png(0), None, None]

@pytest.mark.parametrize('columns, says', [({'a':[1]}, 'no column of pictures among a'), ({'a':[b'x'], 'b':[b'x']}, r'2 columns that may be pictures \(a,b\)')])
def test_parquet_without_a_picture(tmp_path, columns, says):
    pq.write_table(pa.table(columns), tmp_path/'a.parquet')
    with pytest.raises(ValueError, match=says): next(ParquetShard(tmp_path/'a.parquet').samples())

def test_data_sets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip('datasets')
    for j in range(3): pq.write_table(pa.table({'image':[{'bytes':png(i), 'path':None} for i in range(5*j, 5*j+5)], 'label':list(range(5*j, 5*j+5))}), tmp_path/f'{j}.parquet')
    ds = datasets.load_dataset('parquet', data_files=[str(tmp_path/f'{j}.parquet') for j in range(3)], split='train', streaming=True)
    with pytest.raises(ValueError, match='no column of pictures'): open_shards(ds)
    ds = ds.cast_column('image', datasets.Image())
    shards = open_shards(ds)
    assert shard_sizes(shards)==[5,5,5]
    assert [o.image for s in shards for o in s.samples()]==[png(i) for i in range(15)]
    assert [(o.image, o.fields) for o in shards[1].samples(3)]==[(png(8), {'label':8}), (png(9), {'label':9})]

class Table:
    "What of a data set of Hugging Face is called here"
    num_shards = 2
    def __init__(self, rows, features): self.rows,self.features = rows,features
    def cast_column(self, *_): return self
    def shard(self, n, i): return Table(self.rows[i::n], self.features)
    def skip(self, n): return Table(self.rows[n:], self.features)
    def __iter__(self): return iter(self.rows)

def test_what_is_like_such_a_data_set(monkeypatch):
    class datasets:
        class Image:
            def __init__(self, decode): assert not decode
    monkeypatch.setitem(__import__('sys').modules, 'datasets', datasets)
    shards = open_shards(Table([{'picture':{'bytes':png(i), 'path':None}} for i in range(5)], {'picture':datasets.Image(False)}))
    assert shard_sizes(shards)==[3,2] and [o.image for o in shards[0].samples(1)]==[png(2), png(4)]

def test_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
    with pytest.raises(ImportError, match=r"pip install 'self_supervised\[stream\]'"): open_shards('somebody/photos')

def test_folders_and_lists(tmp_path):
    (tmp_path/'photos').mkdir()
    for nm,b in files(5): (tmp_path/'photos'/nm).write_bytes(b)
    write_tar(tmp_path/'a.tar', files(3, 10))
    fns = sorted((tmp_path/'photos').iterdir())
    for source in (tmp_path/'photos', fns, [tmp_path/'photos']): assert [o.image for s in open_shards(source) for o in s.samples()]==[png(i) for i in range(5)]
    assert [o.image for s in open_shards([tmp_path/'a.tar', *fns]) for o in s.samples()]==[png(i) for i in (10,11,12,0,1,2,3,4)]
    shard = FileShard(fns, 'these')
    fns[3].unlink()
    assert [o.image for o in shard.samples(2)]==[png(2), None, png(4)]

def test_shards_among_images(tmp_path):
    "a table beside photographs tells of them, and holds none"
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos/0.png').write_bytes(png(0))
    write_tar(tmp_path/'more.tar', files(1))
    with pytest.raises(ValueError, match='holds shards, such as .*more.tar, and images, such as .*0.png: name those that are meant'): open_shards(tmp_path)

def test_patterns(tmp_path, monkeypatch):
    for i in (8,9,10,11): write_tar(tmp_path/f's-{i:03}.tar', files(1))
    def names(o): return [Path(s.name).name for s in open_shards(o)]
    assert names(f'{tmp_path}/s-0*.tar')==names(f'{tmp_path}/s-{{008..011}}.tar')==names(tmp_path)==[f's-{i:03}.tar' for i in (8,9,10,11)]
    monkeypatch.setenv('HOME', str(tmp_path))
    assert names('~/s-008.tar')==['s-008.tar']
    write_tar(tmp_path/'[a].tar', files(1))
    assert names(tmp_path/'[a].tar')==['[a].tar'] # a file that there is, is no pattern
    for o,says in ((f'{tmp_path}/s-{{000..011}}.tar', 'nor 7 more'), (tmp_path/'no.tar', 'there is no'), (tmp_path/'*.zip', 'is no archive'), ('no/such folder', 'is no archive')):
        with pytest.raises(FileNotFoundError, match=says): open_shards(o)
    with pytest.raises(TypeError, match='loader_dls'): open_shards(iter([]))

def test_addresses(tmp_path):
    "anything that fsspec opens"
    import fsspec
    fs = fsspec.filesystem('memory')
    with fs.open('/bucket/a.tar', 'wb') as f: f.write(write_tar(tmp_path/'a.tar', files(4)).read_bytes())
    with fs.open('/bucket/sizes.json', 'wb') as f: f.write(b'{"a.tar": 4, "b.tar": 9}')
    shard, = open_shards('memory://bucket/a.tar')
    assert shard_sizes([shard])==[4] and [o.image for o in shard.samples(2)]==[png(2), png(3)]
    (tmp_path/'b.tar').write_bytes((tmp_path/'a.tar').read_bytes())
    for bad in ('[1]', '{"b.tar": null}', 'x'):
        (tmp_path/'sizes.json').write_text(bad)
        assert shard_sizes(open_shards(tmp_path/'b.tar'))==[4]

@pytest.mark.parametrize('seed', [0, None])
def test_write(tmp_path, seed):
    "every file once, with its name and label; the order is that of chance, and always the same"
    src = tmp_path/'in'
    for i in range(23):
        (src/f'c{i%3}').mkdir(parents=True, exist_ok=True)
        (src/f'c{i%3}'/f'{i%4}.v{i}.png').write_bytes(png(i))
    (src/'c0/dog.png').write_bytes(png(100)); (src/'c0/dog.jpg').write_bytes(png(101)) # one name, two images
    paths = write_shards(src, tmp_path/'out', 10, parent_label, seed)
    assert [o.name for o in paths]==[f'shard-{i:06}.tar' for i in range(3)]
    assert json.loads((tmp_path/'out/sizes.json').read_text())=={'shard-000000.tar':10, 'shard-000001.tar':10, 'shard-000002.tar':5}
    got = [o for s in open_shards(tmp_path/'out') for o in s.samples()]
    assert [s.count() for s in open_shards(tmp_path/'out')]==[10,10,5]
    fns = sorted(src.rglob('*.*'))
    assert sorted((o.image, o.fields['cls'].decode()) for o in got)==sorted((o.read_bytes(), o.parent.name) for o in fns)
    assert ([o.image for o in got]==[o.read_bytes() for o in fns])==(seed is None)
    again = write_shards(src, tmp_path/'again', 10, parent_label, seed)
    assert [o.read_bytes() for o in paths]==[o.read_bytes() for o in again]
    with pytest.raises(ValueError, match='is not empty'): write_shards(src, tmp_path/'out')
    with pytest.raises(ValueError, match='per_shard=0'): write_shards(src, tmp_path/'x', 0)
