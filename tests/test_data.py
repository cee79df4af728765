"The embedded sample, the IDX reader, and DataLoaders from tensors, folders and lists of files"
import gc, gzip, hashlib, json, math, pickle, random, re, struct, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from fastai.callback.core import Callback
from fastai.data.transforms import parent_label
from fastai.learner import Learner, load_learner
import fastai.vision.all # noqa: F401 - show_batch of images and progress bars
from PIL import Image, ImageFile
from torch import nn

import self_supervised
from self_supervised.basics import not_finite
from self_supervised import data
from self_supervised.data import fashion_mnist, fashion_mnist_classes, image_dls, no_loss, open_image, tensor_dls
from self_supervised.image_files import ImageFileError
from self_supervised.ranges import raw_batches

datasets = Path(self_supervised.__file__).parent/'datasets'
debian   = Path('/usr/share/datasets/fashion-mnist')

def _hashes(x): return [hashlib.sha256(o.numpy().tobytes()).digest() for o in x]

# --- the sample

def test_sample_is_balanced_disjoint_and_small():
    (x,y),(xt,yt) = fashion_mnist()
    assert x.shape==(5000,1,28,28) and xt.shape==(1000,1,28,28)
    assert x.dtype==xt.dtype==torch.uint8 and y.dtype==yt.dtype==torch.int64
    assert y.bincount().tolist()==[500]*10 and yt.bincount().tolist()==[100]*10
    h,ht = _hashes(x),_hashes(xt)
    assert len(set(h))==5000 and len(set(ht))==1000 and not set(h) & set(ht)
    assert x.amax()==255 and 60<x.float().mean()<90 # the whole set has mean 72.9
    assert len(fashion_mnist_classes)==10
    assert sum(o.stat().st_size for o in datasets.glob('*.npz'))<3_000_000

def test_labels_belong_to_the_images():
    (x,y),(xt,yt) = fashion_mnist()
    means = torch.stack([x[y==c].float().mean(0).flatten() for c in range(10)])
    near  = torch.cdist(xt.flatten(1).float(), means).argmin(1)
    assert (near==yt).float().mean()>0.6 # nearest class mean: 0.68 on the whole set, 0.1 by chance

def test_licence_lies_beside_the_sample():
    s = (datasets/'LICENSE-fashion-mnist').read_text()
    assert 'Copyright (c) 2017 Zalando SE' in s and 'Permission is hereby granted, free of charge' in s

@pytest.mark.skipif(not debian.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_sample_can_be_drawn_again_by_the_notebook(tmp_path):
    nb   = json.loads((Path(__file__).parents[1]/'nbs'/'10_data.ipynb').read_text())
    code = next(''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code' and 'def make_sample' in ''.join(c['source']))
    env  = {'np':np, 'fashion_mnist':fashion_mnist}
    exec(code, env)
    env['make_sample'](tmp_path/'s.npz')
    with np.load(tmp_path/'s.npz') as a, np.load(datasets/'fashion_mnist_sample.npz') as b:
        assert sorted(a.files)==sorted(b.files)
        for k in a.files: np.testing.assert_array_equal(a[k], b[k])

# --- the whole set

def _idx(x): return b'\0\0\x08' + bytes([x.ndim]) + struct.pack(f'>{x.ndim}I', *x.shape) + x.tobytes()

@pytest.fixture
def idx_arrays():
    rng = np.random.default_rng(0)
    return {f'{s}-{k}-ubyte': rng.integers(0, 256 if d else 10, (n,*d), dtype=np.uint8)
            for s,n in (('train',7),('t10k',3)) for k,d in (('images-idx3',(28,28)),('labels-idx1',()))}

@pytest.mark.parametrize('sub', ['', 'FashionMNIST/raw'])
@pytest.mark.parametrize('gz', [True, False])
def test_full_set_reads_idx(tmp_path, idx_arrays, sub, gz):
    d = tmp_path/sub; d.mkdir(parents=True, exist_ok=True)
    for k,v in idx_arrays.items(): (d/(f'{k}.gz' if gz else k)).write_bytes(gzip.compress(_idx(v)) if gz else _idx(v))
    for s,(x,y) in zip(('train','t10k'), fashion_mnist(full=True, path=str(tmp_path))):
        assert x.dtype==torch.uint8 and y.dtype==torch.int64 and x.shape[1]==1
        np.testing.assert_array_equal(x[:,0].numpy(), idx_arrays[f'{s}-images-idx3-ubyte'])
        np.testing.assert_array_equal(y.numpy(),      idx_arrays[f'{s}-labels-idx1-ubyte'])

@pytest.mark.parametrize('spoil,msg', [
    (lambda b: gzip.compress(b[:-100]),            'truncated'),
    (lambda b: gzip.compress(b[:6]),               'truncated'),
    (lambda b: gzip.compress(b)[:-200],            'damaged'),
    (lambda b: b'<html>not found</html>',          'damaged'),
    (lambda b: gzip.compress(b'\0\0\x0d'+b[3:]),   'not an IDX file of bytes'),
    (lambda b: gzip.compress(_idx(np.zeros((5,28,28), np.uint8))), '5 train images but 7 labels'),
])
def test_spoilt_idx_is_named(tmp_path, idx_arrays, spoil, msg):
    for k,v in idx_arrays.items(): (tmp_path/f'{k}.gz').write_bytes(gzip.compress(_idx(v)))
    fn = tmp_path/'train-images-idx3-ubyte.gz'
    fn.write_bytes(spoil(_idx(idx_arrays['train-images-idx3-ubyte'])))
    with pytest.raises(ValueError, match=msg) as e: fashion_mnist(full=True, path=tmp_path)
    assert str(tmp_path) in str(e.value)

def test_missing_set_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data, '_debian', tmp_path/'nowhere')
    for kw in ({}, {'path':tmp_path}):
        with pytest.raises(FileNotFoundError, match='apt-get install dataset-fashion-mnist.*torchvision.*download=True'): fashion_mnist(full=True, **kw)
    with pytest.raises(ValueError, match='full=True'): fashion_mnist(path=tmp_path)

@pytest.mark.skipif(not debian.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_sample_is_part_of_the_full_set():
    (x,y),(xt,yt) = fashion_mnist(full=True)
    assert x.shape==(60000,1,28,28) and xt.shape==(10000,1,28,28) and y.bincount().tolist()==[6000]*10
    for (a,b),(sa,sb) in zip(((x,y),(xt,yt)), fashion_mnist()):
        known = dict(zip(_hashes(a), b.tolist()))
        assert [known[h] for h in _hashes(sa)]==sb.tolist()

# --- tensors: image i is filled with the value i

def _numbered(n, c=1, h=6, w=5): return torch.arange(n, dtype=torch.uint8).view(n,1,1,1).repeat(1,c,h,w)
def _order(dl): return [(b[0][:,0,0,0]*255).round().int().tolist() for b in dl]

def test_tensor_dls_order_and_coverage():
    dls = tensor_dls(_numbered(50), _numbered(21), bs=8, device='cpu')
    a,b = _order(dls.train),_order(dls.train)
    assert [len(o) for o in a]==[8]*6 and len(dls.train)==6
    assert len(set(sum(a, [])))==48 and sum(a, [])!=sum(b, [])
    assert sum(a, [])!=sorted(sum(a, []))
    assert [len(o) for o in _order(dls.valid)]==[8,8,5] and sum(_order(dls.valid), [])==list(range(21))
    assert sorted(sum(_order(tensor_dls(_numbered(50), bs=8, drop_last=False, device='cpu').train), []))==list(range(50))

@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize('c', [1,3,13])
def test_tensor_dls_batches(dtype, c):
    x,y = _numbered(20, c),torch.arange(20)%7
    x,want = (x,torch.float32) if dtype==torch.uint8 else ((x/255).to(dtype),dtype)
    dls = tensor_dls(x, bs=4, device='cpu')
    b = dls.one_batch()
    assert isinstance(b, tuple) and len(b)==1 and b[0].dtype==want and b[0].shape==(4,c,6,5)
    with raw_batches(dls.train): assert dls.one_batch()[0].dtype==dtype
    xb,yb = tensor_dls((x,y), bs=4, device='cpu').one_batch()
    assert yb.dtype==torch.int64 and ((xb[:,c-1,5,3]*255).round().long()%7).tolist()==yb.tolist()

def test_tensor_dls_seed():
    def f(seed):
        dls = tensor_dls(_numbered(40), bs=8, seed=seed, device='cpu')
        return _order(dls.train)+_order(dls.train)
    random.seed(1); a,n = f(3),f(None)
    random.seed(2); b,m = f(3),f(None)
    assert a==b and a!=f(4) and n!=m
    random.seed(1); f(3); assert f(None)==n

def test_tensor_dls_keeps_other_targets():
    y = torch.rand(20,2)
    dls = tensor_dls((_numbered(20),y), bs=4, device='cpu')
    xb,yb = dls.one_batch()
    assert torch.equal(yb, y[(xb[:,0,0,0]*255).round().long()]) and dls.train_ds.loss_func is no_loss

def test_items_are_fetched_by_the_batch(monkeypatch):
    seen,get = [],data.ImageTensors.__getitem__
    monkeypatch.setattr(data.ImageTensors, '__getitem__', lambda self,i: (seen.append(i), get(self, i))[1])
    dl = tensor_dls(_numbered(40), bs=8, device='cpu').train
    seen.clear(); list(dl)
    assert [len(o) for o in seen]==[8]*5

x20 = _numbered(20)
@pytest.mark.parametrize('args,kw,err,msg', [
    ((x20[:,0],),              {}, ValueError, r'train must have the shape \(B,C,H,W\).*\(20, 6, 5\).*x\[:,None\]'),
    ((torch.rand(20,8,8,3),),  {}, ValueError, r'train.*\(20, 8, 8, 3\).*x.permute\(0,3,1,2\)'),
    ((x20,torch.rand(5,8,8,3)),{'bs':4}, ValueError, r'valid.*x.permute\(0,3,1,2\)'),
    ((x20.short()*200,),       {}, ValueError, r'train are torch.int16 with values up to 3800.*x.float\(\)/4095'),
    ((x20.numpy(),),           {}, TypeError,  'ndarray: torch.as_tensor'),
    ((x20.int(),),             {}, ValueError, 'train are torch.int32.*make them uint8'),
    ((x20,),       {'bs':4, 'vocab':['a']}, ValueError, 'vocab names labels, and there are none'),
    (((x20,x20[:,0,0,0]%2),), {'bs':4, 'vocab':['a','a']}, ValueError, 'same name twice'),
    (((x20,torch.arange(5)),), {}, ValueError, 'train: 20 images but 5 labels'),
    ((x20,(x20,torch.arange(20))), {'bs':4}, ValueError, 'both have labels or both have none'),
    ((x20,x20.repeat(1,3,1,1)),    {'bs':4}, ValueError, 'train has 1 channels, valid has 3'),
    ((x20,),            {'bs':21}, ValueError, 'bs=21.*20 training images.*at most 20.*drop_last=False'),
    ((x20,),            {'bs':0},  ValueError, 'bs=0'),
    ((x20[:0],),        {'drop_last':False}, ValueError, 'no training images'),
    (((x20,torch.arange(20)),), {'bs':4, 'vocab':['a','b']}, ValueError, 'label 19.*vocab has 2 classes'),
    (((x20,torch.arange(20)),(x20,torch.arange(20)+3)), {'bs':4}, ValueError, 'label 22.*vocab has 20 classes'),
])
def test_tensor_dls_wrong_use(args, kw, err, msg):
    with pytest.raises(err, match=msg): tensor_dls(*args, device='cpu', **kw)

# --- image files

def _photo(h, w, seed=0, n=6):
    "A smooth colour picture with something in every one of its n×n parts"
    g = torch.rand(3, n, n, generator=torch.Generator().manual_seed(seed))
    x = nn.functional.interpolate(g[None], (h,w), mode='bicubic', align_corners=False)[0].clamp(0,1)
    return Image.fromarray((x*255).round().byte().permute(1,2,0).numpy())

@pytest.fixture
def folder(tmp_path):
    "24 images in two classes, of all sizes, kinds and depths of folder"
    for c in ('cat','dog'):
        (tmp_path/'in'/c).mkdir(parents=True)
        for i in range(12):
            im = _photo(30+7*i, 90-5*i, i)
            if i%4==3: im = im.convert('L')
            if i%4==2: im = im.convert('RGBA')
            im.save(tmp_path/'in'/c/f'{i:02}.{"jpg" if i%2==0 and im.mode!="RGBA" else "png"}')
    return tmp_path/'in'

def _spoil(folder):
    "Cut a JPEG and a PNG short, and write a text file named .jpg"
    fns = [folder/'cat'/'04.jpg', folder/'dog'/'05.png', folder/'dog'/'page.jpg']
    for o in fns[:2]: o.write_bytes(o.read_bytes()[:o.stat().st_size*2//3])
    fns[2].write_text('<html>404 not found</html>')
    return fns

@pytest.mark.parametrize('n_in', [1,3])
@pytest.mark.parametrize('hw,size', [((60,90),(20,30)), ((60,90),20), ((90,60),20), ((40,40),(80,80)), ((64,200),(32,16)), ((51,50),(25,50)), ((50,50),(25,50)), ((28,28),28)])
def test_open_image_against_torchvision(tmp_path, n_in, hw, size):
    im = _photo(*hw); im.save(tmp_path/'a.png')
    (H,W),(h,w) = hw,(size if isinstance(size, tuple) else (size,size))
    s = min(H/h, W/w)
    ref = F.resize(F.pil_to_tensor(im.convert('L' if n_in==1 else 'RGB')), [round(H/s),round(W/s)], antialias=True)
    t,l = (ref.shape[1]-h)//2,(ref.shape[2]-w)//2
    ref = ref[:,t:t+h,l:l+w]
    x = open_image(tmp_path/'a.png', size, n_in)
    assert x.dtype==torch.uint8 and x.shape==(n_in,h,w) and x.is_contiguous()
    assert (torch.Tensor(x.float())-ref).abs().max()<=2

def test_large_jpeg_is_as_good_when_decoded_small(tmp_path):
    _photo(600, 800, n=40).save(tmp_path/'a.jpg', quality=95)
    Image.open(tmp_path/'a.jpg').save(tmp_path/'a.png')
    d = (open_image(tmp_path/'a.jpg', 64).float()-open_image(tmp_path/'a.png', 64).float()).abs()
    assert d.max()<=4 and d.mean()<1

def test_exif_orientation(tmp_path):
    im,ex = _photo(40,60),Image.Exif()
    ex[0x112] = 6 # the camera lay on its side
    im.save(tmp_path/'turned.png', exif=ex)
    im.transpose(Image.Transpose.ROTATE_270).save(tmp_path/'upright.png')
    im.save(tmp_path/'plain.png')
    a,b,c = (open_image(tmp_path/f'{o}.png', (30,20)) for o in ('turned','upright','plain'))
    assert torch.equal(a, b) and not torch.equal(a, c)

@pytest.mark.parametrize('mode', ['1','P','LA','RGBA','CMYK','L'])
@pytest.mark.parametrize('n_in', [1,3])
def test_open_image_modes(tmp_path, mode, n_in):
    _photo(30,30).convert(mode).save(tmp_path/'a.tif')
    assert open_image(tmp_path/'a.tif', 16, n_in).shape==(n_in,16,16)

@pytest.mark.parametrize('n_in', [1,3])
@pytest.mark.parametrize('size', [16,(12,20)])
def test_folder_without_labels(folder, n_in, size):
    dls = image_dls(folder, size=size, bs=5, n_in=n_in, device='cpu')
    hw  = size if isinstance(size, tuple) else (size,size)
    assert dls.n_inp==1 and len(dls.valid)==0
    bs = list(dls.train)
    assert len(bs)==24//5 and all(isinstance(b, tuple) and len(b)==1 and b[0].shape==(5,n_in,*hw) and b[0].dtype==torch.float32 for b in bs)
    with raw_batches(dls.train): assert all(b[0].dtype==torch.uint8 for b in dls.train)
    assert sum(len(b[0]) for b in image_dls(folder, size=size, bs=5, n_in=n_in, drop_last=False, device='cpu').train)==24

def test_folder_with_labels(folder):
    dls = image_dls(str(folder), label_func=parent_label, size=16, bs=4, valid_pct=0.25, device='cpu')
    assert list(dls.vocab)==['cat','dog'] and dls.n_inp==1
    assert len(dls.train_ds)==18 and len(dls.valid_ds)==6
    assert not set(dls.train_ds.items) & set(dls.valid_ds.items) and len(set(dls.train_ds.items)|set(dls.valid_ds.items))==24
    for i,(x,y) in enumerate(dls.valid_ds):
        fn = dls.valid_ds.items[i]
        assert dls.vocab[int(y)]==fn.parent.name and torch.equal(torch.Tensor(x.float()), torch.Tensor(open_image(fn, 16).float()))
    assert sorted(y for _,yb in dls.valid for y in yb.tolist())==sorted(dls.vocab.o2i[o.parent.name] for o in dls.valid_ds.items)

def test_rare_class_in_validation_only(folder):
    fns = sorted(folder.rglob('*.*'))
    with pytest.warns(UserWarning, match='only validation images have the classes cat/.*count as wrong'):
        dls = image_dls(fns, label_func=lambda o: f'{o.parent.name}/{o.name}', size=16, bs=4, valid_pct=0.25, device='cpu') # each file a class of its own
    assert len(list(dls.valid))==2 and len(dls.vocab)==24

def test_list_of_files(folder):
    fns = [str(o) for o in folder.rglob('*.png')]
    assert {Path(o) for o in image_dls(fns, size=16, bs=4, device='cpu').train_ds.items}=={Path(o) for o in fns}

def test_image_dls_is_deterministic(folder):
    def f(seed):
        dls = image_dls(folder, size=16, bs=4, valid_pct=0.25, seed=seed, device='cpu')
        return dls.valid_ds.items,torch.cat([b[0].float() for dl in dls for b in dl])
    (va,a),(vb,b),(vc,_) = f(3),f(3),f(4)
    assert va==vb and va!=vc and torch.equal(a, b)
    assert f(None)[0]==f(None)[0]
    state = torch.get_rng_state()
    image_dls(folder, size=16, bs=4, valid_pct=0.25, seed=3, device='cpu')
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize('num_workers,which', [(0,slice(3)),(1,slice(1))])
def test_bad_file_is_named(folder, num_workers, which, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, 'MP_STATUS_CHECK_INTERVAL', .2) # torch waits 5 s for a worker that failed, here or in a later test
    for fn in _spoil(folder)[which]:
        good = [o for o in sorted(folder.rglob('*.*')) if o.suffix=='.png' and 'dog/05' not in o.as_posix()][:6]
        dls = image_dls(good+[fn], size=16, bs=7, num_workers=num_workers, device='cpu')
        with pytest.raises(ImageFileError, match='^cannot read the image '+re.escape(str(fn))+'.*delete it.*skip_bad=True to image_dls$') as info: list(dls.train)
        assert '\n' not in str(info.value) # the traceback of a worker is text, of 120 lines
        if num_workers: gc.collect()

def test_skip_bad_drops_and_warns(folder):
    bad = _spoil(folder)
    with pytest.warns(UserWarning, match='skipped 3 of 25 files') as w: dls = image_dls(folder, size=16, bs=22, skip_bad=True, device='cpu')
    assert w[0].filename==__file__
    assert all(str(o) in str(w[0].message) for o in bad)
    assert dls.one_batch()[0].shape==(22,3,16,16) and not set(dls.train_ds.items) & set(bad)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False

def test_skip_bad_is_quiet_when_all_is_well(folder):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(image_dls(folder, size=16, bs=4, skip_bad=True, device='cpu').train_ds)==24

def test_skip_bad_names_ten_and_counts_the_rest(folder):
    for i in range(13): (folder/f'x{i:02}.jpg').write_text('no image')
    with pytest.warns(UserWarning, match='skipped 13 of 37.*x09.jpg.*and 3 more$') as w: image_dls(folder, size=16, bs=4, skip_bad=True, device='cpu')
    assert 'x10.jpg' not in str(w[0].message)
    with pytest.raises(ValueError, match='none of the 13 files.*x00.jpg.*UnidentifiedImageError'):
        image_dls(sorted(folder.glob('x*.jpg')), size=16, bs=4, skip_bad=True)

@pytest.mark.parametrize('kw,msg', [
    ({'n_in':4},        'n_in=4.*TIFF.*n_in=3.*tensor_dls'),
    ({'size':0},        'size=0'),
    ({'size':(3,4,5)},  r'size=\(3, 4, 5\).*height, width'),
    ({'valid_pct':1.},  'valid_pct=1.0'),
    ({'bs':25},         'bs=25.*24 training images'),
    ({'bs':20, 'valid_pct':.5}, 'bs=20.*12 training images'),
])
def test_image_dls_wrong_use(folder, kw, msg):
    with pytest.raises(ValueError, match=msg): image_dls(folder, **kw)
    if 'bs' not in kw and 'valid_pct' not in kw:
        with pytest.raises(ValueError, match=msg): open_image(next(folder.rglob('*.png')), **kw)

def test_no_images(tmp_path):
    (tmp_path/'notes.txt').write_text('')
    with pytest.raises(ValueError, match=f'no image in the folder {tmp_path}.*[.]jpg.*[.]png'): image_dls(tmp_path)
    with pytest.raises(ValueError, match=f'{tmp_path}/gone.*not a folder.*nothing there'):   image_dls(tmp_path/'gone')
    with pytest.raises(ValueError, match='notes.txt.*not a folder.*list of files'):          image_dls(tmp_path/'notes.txt')
    with pytest.raises(ValueError, match='empty list'):                                      image_dls([])

def test_number_of_workers(folder):
    fns = list(folder.rglob('*.png'))
    def n(fns, **kw): return image_dls(fns, size=8, bs=4, device='cpu', **kw).train.fake_l.num_workers
    assert n(fns)==0 and n(fns*40)>0 and n(fns, num_workers=1)==1

# --- with a Learner

class Reconstruct(Callback):
    "The mean of an image as its target; counts batches"
    def before_fit(self): self.n = [0,0]
    def before_batch(self):
        self.n[not self.training] += 1
        self.learn.yb = (self.x.as_subclass(torch.Tensor).mean((1,2,3))[:,None],)

def _net(c, h, w): return nn.Sequential(nn.Flatten(), nn.Linear(c*h*w, 1))
def _both(folder, **kw): return [tensor_dls(_numbered(24, 3, 8, 8), _numbered(6, 3, 8, 8) if kw else None, bs=4, device='cpu'),
                                 image_dls(folder, size=8, bs=4, device='cpu', **kw)]

def test_learner_fits_without_labels(folder):
    for dls in _both(folder):
        learn = Learner(dls, _net(3,8,8), loss_func=nn.MSELoss(), cbs=Reconstruct())
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            warnings.filterwarnings('ignore', 'Your generator is empty', module='fastprogress') # pytest forgets the filter of the module
            with learn.no_logging(): learn.fit(2, 1e-3)
        assert learn.reconstruct.n==[12,0] and all(math.isfinite(o[0]) and o[1] is None for o in learn.recorder.values)

def test_learner_validates_when_there_is_a_set(folder):
    for dls in _both(folder, valid_pct=0.25):
        learn = Learner(dls, _net(3,8,8), loss_func=nn.MSELoss(), cbs=Reconstruct())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        assert learn.reconstruct.n[1]==2 and math.isfinite(learn.recorder.values[0][1])

def test_unlabelled_learner_needs_no_loss(folder):
    for dls in _both(folder):
        learn = Learner(dls, _net(3,8,8))
        learn._split(dls.one_batch())
        assert len(learn.xb)==1 and learn.yb==()
        assert pickle.loads(pickle.dumps(learn.loss_func)) is no_loss
        with pytest.raises(ValueError, match='self-supervised callback such as SWAV.*loss_func'): learn.loss_func(torch.zeros(1), torch.zeros(1))

def test_labelled_learner_infers_cross_entropy(folder):
    for dls in (tensor_dls((x20,torch.arange(20)%4), bs=4, device='cpu'), image_dls(folder, parent_label, size=8, bs=4, device='cpu')):
        n = dls.c; p,y = torch.randn(4,n),torch.arange(4)%n
        assert n==len(dls.vocab)
        torch.testing.assert_close(Learner(dls, nn.Flatten()).loss_func(p, y), nn.functional.cross_entropy(p, y))

def test_predictions_cover_every_image_in_order():
    dls = tensor_dls((_numbered(22)/255,torch.arange(22)), bs=4, device='cpu')
    net = nn.Linear(30, 1)
    nn.init.constant_(net.weight, 1/30); nn.init.zeros_(net.bias)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), net), loss_func=lambda p,y: p.mean())
    with learn.no_bar(): p,y = learn.get_preds(0)
    assert y.tolist()==list(range(22)) and (p[:,0]*255).round().tolist()==list(range(22))

def test_emptied_labelled_tensors():
    dls = tensor_dls((x20,torch.arange(20)), bs=4, device='cpu').new_empty()
    assert len(dls.train_ds)==len(dls.train_ds.y)==0 and dls.c==20

@pytest.mark.filterwarnings('ignore:.*pickle')
def test_learner_exports(folder, tmp_path):
    for dls in _both(folder, valid_pct=0.25):
        learn = Learner(dls, _net(3,8,8))
        learn.export(tmp_path/'l.pkl')
        new = load_learner(tmp_path/'l.pkl')
        assert len(new.dls.train_ds)==0 and new.loss_func is no_loss
        torch.testing.assert_close(new.model(torch.ones(1,3,8,8)), learn.model(torch.ones(1,3,8,8)))

@pytest.mark.filterwarnings('ignore:__array__ implementation')
def test_show_batch(folder):
    import matplotlib.pyplot as plt
    for dls in (tensor_dls((x20,torch.zeros(20).long()), bs=4, vocab=['hat'], device='cpu'), tensor_dls(x20, bs=4, device='cpu'),
                image_dls(folder, size=8, bs=4, device='cpu')):
        dls.show_batch(max_n=3)
        axs = plt.gcf().axes
        assert sum(len(o.images) for o in axs)==3 and {o.get_title() for o in axs if o.images}=={'hat' if len(dls.train_ds[0])==2 else ''}
        plt.close('all')

def test_a_model_is_asked_once_whether_it_is_finite(monkeypatch):
    m = torch.nn.Sequential(torch.nn.Linear(2,2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2,2))
    monkeypatch.setattr(torch.Tensor, '__bool__', lambda o: pytest.fail('a value was read'))
    assert not_finite(m)==[]
    m[0].bias.data[1],m[1].running_var[0],m[1].running_mean[0],m[2].weight.data[0,0] = torch.inf,torch.inf,torch.nan,torch.nan
    assert not_finite(m)==['0.bias','2.weight','1.running_mean']

@pytest.mark.parametrize('cores,ranks,device,want', [(16,None,'cpu',8), (16,None,'cuda',16), (64,8,'cuda',8), (64,4,'cuda',16), (64,32,'cpu',2), (4,8,'cuda',1), (2,1,'cpu',2)])
def test_workers_of_a_process(monkeypatch, cores, ranks, device, want):
    "Its share of the cores that are there for all that torchrun has started"
    from fastcore.basics import defaults
    monkeypatch.setattr(defaults, 'cpus', cores)
    if ranks: monkeypatch.setenv('LOCAL_WORLD_SIZE', str(ranks))
    else: monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    assert data.workers_for(device)==want
    monkeypatch.setattr(data, 'default_device', lambda: torch.device(device))
    assert data.workers_for()==want

def test_memory_is_pinned_for_a_gpu(tmp_path, monkeypatch):
    "Of images in memory too; whoever says otherwise is heard. The GPU is pretended"
    x = torch.zeros(4,3,8,8, dtype=torch.uint8)
    monkeypatch.setattr(data, '_is_gpu', lambda device: True)
    for kw,want in (({}, True), (dict(pin_memory=False), False)): assert [o.fake_l.pin_memory for o in tensor_dls(x, x, bs=2, device='cpu', **kw)]==[want]*2
    monkeypatch.undo()
    assert not tensor_dls(x, bs=2, device='cpu').train.fake_l.pin_memory

def test_image_files_get_these_workers(tmp_path, monkeypatch):
    from PIL import Image
    Image.new('RGB', (8,8)).save(tmp_path/'a.png')
    monkeypatch.setattr(data, 'list_images', lambda o: [tmp_path/'a.png']*500)
    monkeypatch.setattr(data, 'workers_for', lambda device: 3)
    assert image_dls(tmp_path, size=8, bs=4, device='cpu').train.fake_l.num_workers==3
    monkeypatch.setattr(data, 'list_images', lambda o: [tmp_path/'a.png']*499)
    assert image_dls(tmp_path, size=8, bs=4, device='cpu').train.fake_l.num_workers==0
