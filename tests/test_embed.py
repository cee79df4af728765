"A table of features: the same from files, archives and loaders, resumable, and read by others"
import csv, io, os, sys, warnings

import numpy as np, pytest, torch
from fastai.vision.all import Learner, Normalize, parent_label
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as tv

from self_supervised.data import image_dls, tensor_dls
from self_supervised.embed import embed
from self_supervised.feature_table import features_file, read_features, read_thumbnails
from self_supervised.encoders import create_encoder
from self_supervised.export import export_encoder # noqa: F401 (a method of Learner)
from self_supervised.features import extract_features
from self_supervised.shards import write_shards
from self_supervised.vision.simclr import SimCLR, create_simclr_model, get_simclr_aug_pipelines

pq = pytest.importorskip('pyarrow.parquet')
stats = [.4,.5,.6],[.2,.25,.3]

class Middle(nn.Module):
    "Features by which one sees what was cut out: the image itself, 6×6"
    def __init__(self, n_in=3):
        super().__init__()
        self.body = nn.Conv2d(n_in, n_in, 1, bias=False)
        with torch.no_grad(): self.body.weight.copy_(torch.eye(n_in)[:,:,None,None])
    def forward(self, x): return F.adaptive_avg_pool2d(self.body(x), 6).flatten(1)

def noise(h, w, seed): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h//4+1,w//4+1,3), dtype=np.uint8)).resize((w,h), Image.Resampling.BICUBIC)

shapes = (260,300),(256,256),(200,500),(130,120),(60,80),(256,300),(300,256)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Images of many shapes in two folders, among them a damaged one, an empty one and one on its side"
    top = tmp_path_factory.mktemp('photos')
    for i,(h,w) in enumerate(shapes):
        (top/'ab'[i%2]).mkdir(exist_ok=True)
        noise(h, w, i).save(top/'ab'[i%2]/f'{i}.png')
    exif = Image.Exif(); exif[0x112] = 6
    noise(100, 260, 7).save(top/'a'/'side.jpg', exif=exif)
    (top/'b'/'cut.jpg').write_bytes((top/'a'/'side.jpg').read_bytes()[:900])
    (top/'b'/'empty.png').write_bytes(b'')
    return top

def good(photos): return sorted(o for o in photos.rglob('*.*') if o.stem not in ('cut','empty'))

def make(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return read_features(embed(*args, **kwargs))

def plainly(fn, size, share=8/7):
    "The middle of a file as torchvision cuts it"
    im = Image.open(fn)
    from PIL import ImageOps
    x = tv.functional.pil_to_tensor(ImageOps.exif_transpose(im).convert('RGB'))
    return tv.functional.center_crop(tv.functional.resize(x, round(size*share), antialias=True), size).float()/255

# What is in the table

def test_the_table(photos, tmp_path):
    x,df = make(Middle(), photos, tmp_path/'f.parquet', parent_label, size=28, stats=stats, bs=3)
    assert df.path.tolist()==[str(o.relative_to(photos)) for o in good(photos)] and df.label.tolist()==[o.parent.name for o in good(photos)]
    assert x.shape==(8,108) and x.dtype==torch.float32
    sizes = {f'{"ab"[i%2]}/{i}.png':hw for i,hw in enumerate(shapes)} | {'a/side.jpg':(260,100)} # as people see it
    assert {p:(h,w) for p,h,w in zip(df.path, df.height, df.width)}==sizes
    assert df.attrs['root']==str(photos) and df.attrs['size']==[28,28] and df.attrs['normalization']==dict(mean=stats[0], std=stats[1]) and df.attrs['model']=='Middle'
    assert (df.attrs['n'],df.attrs['bad'],df.attrs['features'])==(8,2,108)
    bad = list(csv.DictReader((tmp_path/'f.bad.csv').open()))
    assert [o['path'] for o in bad]==['b/cut.jpg','b/empty.png'] and all(o['reason'] and str(photos) not in o['reason'] for o in bad)
    assert not (tmp_path/'f.parquet.parts').exists()

@pytest.mark.parametrize('size,share', ((28,1), (112,8/7)))
def test_it_is_the_middle(photos, tmp_path, size, share):
    x,df = make(Middle(), photos, tmp_path/'f.parquet', size=size, stats=stats)
    m,s = (torch.tensor(o)[:,None,None] for o in stats)
    for f,p in zip(x, df.path): # a crop's corner falls between pixels: of smooth images the difference is small
        ref = Middle()((plainly(photos/p, size, share)-m)[None]/s)[0].detach()
        assert (f-ref).abs().max()<.25 and F.cosine_similarity(f, ref, dim=0)>.97, p

def test_squares_of_the_right_size_are_exact(tmp_path):
    for i in range(5): noise(256, 256, i).save(tmp_path/f'{i}.png')
    x,_ = make(Middle(), tmp_path, tmp_path/'f.parquet', size=224, stats=stats)
    m,s = (torch.tensor(o)[:,None,None] for o in stats)
    ref = torch.cat([Middle()((plainly(tmp_path/f'{i}.png', 224)-m)[None]/s) for i in range(5)])
    torch.testing.assert_close(x, ref.detach(), atol=1e-5, rtol=1e-5)

def test_it_is_a_plain_file(photos, tmp_path):
    "Any reader of Parquet can use it"
    x,df = make(Middle(), photos, tmp_path/'f.parquet', parent_label, size=28)
    t = pq.read_table(tmp_path/'f.parquet')
    assert t.column_names==['path','label','width','height','thumbnail','feature'] and t.schema.field('feature').type.list_size==108
    assert torch.equal(torch.tensor(t['feature'].to_pylist()), x)
    for o,(h,w) in zip(t['thumbnail'].to_pylist(), zip(df.height, df.width)):
        im = Image.open(io.BytesIO(o))
        assert im.format=='JPEG' and max(im.size)<=96 and im.width/im.height==pytest.approx(w/h, rel=.1)
    half,_ = make(Middle(), photos, tmp_path/'h.parquet', size=28, half=True, thumbnail=0)
    assert half.dtype==torch.float16
    torch.testing.assert_close(half.float(), x, atol=.02, rtol=.02)
    t = pq.read_table(tmp_path/'h.parquet')
    assert t.column_names==['path','width','height','feature'] and str(t.schema.field('feature').type.value_type)=='halffloat'

def test_small_pictures(photos, tmp_path):
    _,df = make(Middle(), photos, tmp_path/'a.parquet', size=28)
    make(Middle(), photos, tmp_path/'b.parquet', size=28, thumbnail=0)
    ids = [5,0,7,0]
    a,b = (read_thumbnails(tmp_path/f'{o}.parquet', ids) for o in 'ab') # of the second they are made from the images
    for i,p,q in zip(ids, a, b):
        p,q = (np.asarray(Image.open(io.BytesIO(o)), float) for o in (p,q))
        assert p.shape==q.shape and abs(p-q).mean()<12
    shown,whole = (np.asarray(o.convert('RGB').resize((5,5), Image.Resampling.BOX), float).ravel() for o in (Image.open(io.BytesIO(a[1])), Image.open(photos/df.path[0])))
    assert np.corrcoef(shown, whole)[0,1]>.95
    for bad in ([8],[-1]):
        with pytest.raises(ValueError, match='from 0 to 7'): read_thumbnails(tmp_path/'a.parquet', bad)

def test_rows_of_many_groups(tmp_path, monkeypatch):
    from self_supervised import feature_table
    monkeypatch.setattr(feature_table, '_rows', 4)
    x,y = torch.randint(0, 256, (30,3,8,8), dtype=torch.uint8),torch.arange(30)%3
    f,df = make(Middle(), tensor_dls((x,y), drop_last=False, vocab=['a','b','c'], bs=7).train, tmp_path/'f.parquet', part=13)
    assert pq.ParquetFile(tmp_path/'f.parquet').num_row_groups>=8
    torch.testing.assert_close(f, Middle()(x/255).detach())
    assert df.label.tolist()==[*'abc'*10] and df.path.tolist()==[str(i) for i in range(30)]
    ids = [29,3,4,17]
    for i,o in zip(ids, read_thumbnails(tmp_path/'f.parquet', ids)): assert abs(np.asarray(Image.open(io.BytesIO(o)), float).mean((0,1))-x[i].float().mean((1,2)).numpy()).max()<12

# Sources

def test_files_archives_and_loaders_alike(photos, tmp_path):
    x,df  = make(Middle(), photos, tmp_path/'a.parquet', parent_label, size=28)
    files = good(photos)
    y,dg  = make(Middle(), files, tmp_path/'b.parquet', parent_label, size=28)
    assert torch.equal(x, y) and dg.path.tolist()==df.path.tolist() and dg.attrs['root']==str(photos)
    write_shards(files, tmp_path/'shards', per_shard=3, label_func=parent_label, seed=None)
    z,dz = make(Middle(), tmp_path/'shards', tmp_path/'c.parquet', size=28, part=4)
    assert torch.equal(x, z) and dz.label.tolist()==df.label.tolist() and (dz.width.tolist(),dz.height.tolist())==(df.width.tolist(),df.height.tolist())
    assert all('shard-' in o for o in dz.path)

def test_a_loader_in_order_with_its_paths(photos, tmp_path):
    dls = image_dls(good(photos), parent_label, size=32, bs=3, drop_last=False, num_workers=0)
    x,df = make(Middle(), dls.train, tmp_path/'a.parquet', stats=stats) # which is shuffled
    assert df.path.tolist()==[str(o) for o in good(photos)] and df.label.tolist()==[o.parent.name for o in good(photos)] and set(df.width)=={32}
    torch.testing.assert_close(x, extract_features(Middle(), dls.train, stats)[0])
    torch.testing.assert_close(x, make(Middle(), dls.train, tmp_path/'p.parquet', stats=stats, part=5)[0])
    for o in ('cut.jpg','empty.png'): (photos/'b'/o).rename(photos/'b'/f'{o}.off')
    try: ds = ImageFolder(photos, tv.Compose([tv.Resize((32,32)), tv.PILToTensor()]))
    finally:
        for o in ('cut.jpg','empty.png'): (photos/'b'/f'{o}.off').rename(photos/'b'/o)
    y,dg = make(Middle(), torch.utils.data.DataLoader(ds, 3, shuffle=True), tmp_path/'b.parquet')
    assert dg.path.tolist()==[o for o,_ in ds.samples] and dg.label.tolist()==[ds.classes[c] for _,c in ds.samples]

def test_pictures_of_a_loader_that_normalises(photos, tmp_path):
    plain,norm = (image_dls(good(photos), size=32, bs=3, drop_last=False, num_workers=0, **o).train for o in ({}, dict(after_batch=Normalize.from_stats(*stats, cuda=False))))
    x,_ = make(Middle(), plain, tmp_path/'a.parquet', stats=stats)
    y,_ = make(Middle(), norm, tmp_path/'b.parquet')
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    for p,q in zip(*(read_thumbnails(tmp_path/f'{o}.parquet', range(8)) for o in 'ab')): assert abs(np.asarray(Image.open(io.BytesIO(p)), float)-np.asarray(Image.open(io.BytesIO(q)), float)).max()<=8

def test_whole_images_of_a_loader(photos, tmp_path):
    dls = image_dls(good(photos), bs=3, short_side=120, drop_last=False, num_workers=0)
    x,df = make(Middle(), dls.train, tmp_path/'a.parquet', size=28)
    torch.testing.assert_close(x, extract_features(Middle(), dls.train, size=28)[0])
    assert len(set(zip(df.width, df.height)))>4
    with pytest.raises(ValueError, match='pass size=224'): embed(Middle(), dls.train, tmp_path/'b.parquet')

def test_a_learner_and_its_file(photos, tmp_path):
    encoder = create_encoder('resnet18', pretrained=False)
    dls   = image_dls(good(photos), size=64, bs=4, num_workers=0)
    learn = Learner(dls, create_simclr_model(encoder, hidden_size=8, projection_size=8), cbs=SimCLR(get_simclr_aug_pipelines(32)))
    x,df  = make(learn, photos, tmp_path/'a.parquet')
    assert df.attrs['size']==[32,32] and df.attrs['normalization']['mean'][0]==pytest.approx(.485)
    (tmp_path/'run').mkdir()
    learn.export_encoder(tmp_path/'run'/'encoder.safetensors')
    for o in (tmp_path/'run', str(tmp_path/'run'/'encoder.safetensors')):
        y,dg = make(o, photos, tmp_path/'b.parquet', overwrite=True)
        torch.testing.assert_close(x, y)
        assert dg.attrs['model']==str(o) and dg.attrs['architecture']=='resnet18' and dg.attrs['normalization']==df.attrs['normalization']

def test_released_weights_by_name(photos, tmp_path, monkeypatch):
    from self_supervised import embed as m
    seen = []
    monkeypatch.setattr(m, 'create_encoder', lambda arch, pretrained: seen.append((arch,pretrained)) or Middle())
    _,df = make('swav_800ep', photos, tmp_path/'a.parquet')
    assert seen==[('resnet50','swav_800ep')] and df.attrs['size']==[224,224] and df.attrs['normalization']['std'][0]==pytest.approx(.229)

def test_one_channel(tmp_path):
    for i in range(3): noise(40, 40, i).convert('L').save(tmp_path/f'{i}.png')
    x,_ = make(Middle(1), tmp_path, tmp_path/'f.parquet', size=40, stats=([.5],[.5]))
    ref = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path/f'{i}.png')))[None]/255. for i in range(3)])
    torch.testing.assert_close(x, Middle(1)((ref-.5)/.5).detach(), atol=1e-5, rtol=1e-5)
    assert Image.open(io.BytesIO(read_thumbnails(tmp_path/'f.parquet', [1])[0])).mode=='L'

def test_16_bits(tmp_path):
    a = np.linspace(0, 4000, 32*32).reshape(32, 32).astype(np.uint16)
    for i in range(3): Image.fromarray(a).save(tmp_path/f'{i}.png')
    x,_ = make(Middle(1), tmp_path, tmp_path/'f.parquet', size=32, max_value=4095)
    torch.testing.assert_close(x[0], Middle(1)(torch.from_numpy(a.astype(np.float32)/4095)[None,None])[0].detach(), atol=1e-4, rtol=1e-4)
    assert np.asarray(Image.open(io.BytesIO(read_thumbnails(tmp_path/'f.parquet', [0])[0]))).max()>220

def test_16_bits_in_shards(tmp_path):
    "They are used if it is said what is white, and listed if not"
    for i in range(4): (noise(40, 40, i).convert('L') if i%2 else Image.fromarray(np.full((40,40), 1000, np.uint16))).save(tmp_path/f'{i}.png')
    write_shards(tmp_path, tmp_path/'shards', seed=None)
    _,df = make(Middle(1), tmp_path/'shards', tmp_path/'a.parquet', size=40)
    assert len(df)==2 and 'more than 8 bits' in (tmp_path/'a.bad.csv').read_text()
    x,_ = make(Middle(1), tmp_path/'shards', tmp_path/'b.parquet', size=40, max_value=4095)
    torch.testing.assert_close(x[0], torch.full((36,), 1000/4095), atol=1e-4, rtol=1e-4)

# Stopped, and again

class Stop(Exception): pass

@pytest.mark.parametrize('kind', ('files','shards','loader'))
@pytest.mark.parametrize('at', (2, 3, 5, 7))
def test_it_goes_on(photos, tmp_path, kind, at):
    files = good(photos)
    if kind=='shards': write_shards(files, tmp_path/'shards', per_shard=4, seed=None)
    source = dict(files=files, shards=tmp_path/'shards', loader=image_dls(files, size=28, bs=2, drop_last=False, num_workers=0).train if kind=='loader' else None)[kind]
    ref,df = make(Middle(), source, tmp_path/'ref.parquet', size=28)
    class Dies(Middle):
        n = 0
        def forward(self, x):
            type(self).n += len(x)
            if self.n>at: raise Stop
            return super().forward(x)
    with pytest.raises(Stop): embed(Dies(), source, tmp_path/'f.parquet', size=28, part=3, bs=1)
    assert len(list((tmp_path/'f.parquet.parts').glob('*.parquet')))==at//3 and not (tmp_path/'f.parquet').exists()
    with pytest.raises(FileNotFoundError, match='It was begun'): read_features(tmp_path/'f.parquet')
    seen = []
    class Counts(Middle):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)
    x,dg = make(Counts(), source, tmp_path/'f.parquet', size=28, part=3, bs=1)
    assert torch.equal(x, ref) and dg.path.tolist()==df.path.tolist() and sum(seen)==8-at//3*3
    assert os.listdir(tmp_path).count('f.parquet.parts')==0

def test_other_images_or_settings_do_not_go_on(photos, tmp_path):
    files = good(photos)
    def begin():
        def label(o):
            if o==files[5]: raise Stop
            return 'a'
        with pytest.raises(Stop): embed(Middle(), files, tmp_path/'f.parquet', label, size=28, part=3)
    begin()
    for kw,what in ((dict(size=32),'size'), (dict(stats=stats),'normalization'), (dict(part=2),'part'), (dict(thumbnail=0),'thumbnail'), (dict(half=True),'half')):
        with pytest.raises(ValueError, match=f'begun with other {what}: delete it'): embed(Middle(), files, tmp_path/'f.parquet', **{'size':28, 'part':3, **kw})
    with pytest.raises(ValueError, match='other images'): embed(Middle(), files[1:], tmp_path/'f.parquet', size=28, part=3)
    other = Middle()
    with torch.no_grad(): other.body.weight.mul_(2)
    with pytest.raises(ValueError, match='other weights'): embed(other, files, tmp_path/'f.parquet', size=28, part=3)

# Mistakes

def test_mistakes(photos, tmp_path, monkeypatch):
    out = tmp_path/'f.parquet'
    with pytest.raises(ValueError, match='none of the 2 images can be used, the first: cut.jpg'): embed(Middle(), [photos/'b'/'cut.jpg', photos/'b'/'empty.png'], out, size=28, max_value=255)
    for kw,says in ((dict(bs=0),'bs=0'), (dict(part=0),'part=0'), (dict(thumbnail=-1),'thumbnail=-1'), (dict(size=0),'size=0')):
        with pytest.raises(ValueError, match=says): embed(Middle(), photos, tmp_path/'g.parquet', **{'size':28, **kw})
    with pytest.raises(TypeError, match='encoder is a int'): embed(3, photos, tmp_path/'g.parquet')
    make(Middle(), photos, tmp_path/'g.parquet', size=28)
    with pytest.raises(ValueError, match='overwrite=True'): embed(Middle(), photos, tmp_path/'g.parquet', size=28)
    make(Middle(), good(photos)[:3], tmp_path/'g.parquet', size=28, overwrite=True)
    assert len(read_features(tmp_path/'g.parquet')[0])==3 and not (tmp_path/'g.bad.csv').exists()
    dl = tensor_dls(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), bs=2).train
    for kw in (dict(label_func=parent_label), dict(max_value=255)):
        with pytest.raises(ValueError, match=f'{next(iter(kw))} is for files and shards'): embed(Middle(), dl, tmp_path/'h.parquet', **kw)
    import pyarrow as pa
    pq.write_table(pa.table({'a':[1]}), tmp_path/'other.parquet')
    with pytest.raises(ValueError, match='is a table, but not one of embed'): read_features(tmp_path/'other.parquet')
    with pytest.raises(FileNotFoundError, match='make it with ssl_embed'): features_file(tmp_path)
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ImportError, match=r"pip install 'self_supervised\[embed\]'"): read_features(tmp_path/'g.parquet')

@pytest.mark.parametrize('half,there,want', [(None,True,True), (None,False,False), (False,True,False), (True,False,True)])
def test_half_on_a_gpu(photos, tmp_path, monkeypatch, half, there, want):
    "Unless it is told otherwise; the GPU is pretended"
    seen,module = [],sys.modules['self_supervised.embed']
    class Card(nn.Parameter): is_cuda = there
    def features(model, batches, stats, half, **kw):
        seen.append(half)
        return torch.zeros(sum(map(len, batches)), 2, dtype=torch.float16 if half else torch.float32),None
    monkeypatch.setattr(module, 'extract_features', features)
    m = Middle(); m.body.weight = Card(m.body.weight.data)
    make(m, photos, tmp_path/'f.parquet', size=28, **({} if half is None else dict(half=half)))
    assert set(seen)=={want} and features_file(tmp_path/'f.parquet') and read_features(tmp_path/'f.parquet')[1].attrs['half'] is want
