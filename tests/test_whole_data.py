"Whole images from files to the optimizer: batches, windows, loaders of one's own, processes, runs that go on"
import copy, io, pickle, shutil
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder # noqa: F401 (patches lr_find into Learner)
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner, Recorder, load_learner
from fastai.callback.progress import ProgressCallback
from fastai.optimizer import SGD
from fastai.torch_core import find_bs, set_seed, to_device
from fasttransform import Pipeline
from PIL import Image
from torch import nn
from torch.utils.data._utils.pin_memory import pin_memory

from self_supervised import packed
from self_supervised.basics import rng_states
from self_supervised.checkpoint import Checkpoint
from self_supervised.data import image_dls, open_image
from self_supervised.packed import PackedImages, pack_images, packed_batch
from self_supervised.vision.swav import SWAV
from self_supervised.whole_images import WholeImageDL

from methods import callback, methods, model, quiet, taken, worst_difference
from processes import on_ranks

# ---- files

photos = [(30,40),(40,30),(24,36),(36,24),(32,32),(30,40)]*4

def picture(h, w, i): return np.random.default_rng(i).integers(0, 256, (h,w,3), dtype=np.uint8)
def strip(h=6, w=200): return np.broadcast_to(np.arange(w, dtype=np.uint8)[None,:,None], (h,w,3)) # the value of a pixel is its place

def write(folder, arrays, classes=2):
    for i,a in enumerate(arrays):
        (folder/f'class{i%classes}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(a)).save(folder/f'class{i%classes}'/f'{i:02}.png')
    return folder

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return write(tmp_path_factory.mktemp('photos'), [picture(*o, i) for i,o in enumerate(photos)])

@pytest.fixture(scope='module')
def long(tmp_path_factory):
    "Photographs and strips, upright and lying"
    return write(tmp_path_factory.mktemp('long'), [strip().swapaxes(0, 1) if i%4==1 else strip() if i%4==3 else picture(30,40,i) for i in range(24)])

def dls_of(folder, *args, **kwargs): return image_dls(folder, *args, **{**dict(bs=8, num_workers=0, seed=0, device='cpu'), **kwargs})

# ---- one file

smooth = np.array(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9,16,3), dtype=np.uint8)).resize((1600,900), Image.Resampling.BICUBIC))
deep   = smooth.astype(np.uint16)*257
kinds  = {'jpeg': ('a.jpg', smooth, {}), 'png': ('a.png', smooth, {}), 'grey': ('a.jpg', smooth[...,0], dict(n_in=1)), 'grey16': ('a.png', deep[...,0], dict(n_in=1, max_value=65535)),
          'turned': ('a.jpg', smooth, {}), 'bands': ('a.tif', np.concatenate([smooth, smooth[...,:2]], 2), dict(n_in=5))}

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('short', [450, 300, 120, 113, 50, 7])
def test_shrunk_files(tmp_path, kind, short):
    "Against the whole file, resized at once by PyTorch"
    nm,a,kwargs = kinds[kind]
    if kind=='bands': pytest.importorskip('tifffile').imwrite(tmp_path/nm, a, photometric='minisblack', planarconfig='contig')
    else:
        exif = Image.Exif()
        if kind=='turned': exif[0x112] = 8
        Image.fromarray(a).save(tmp_path/nm, exif=exif, **(dict(quality=98, subsampling=0) if nm.endswith('jpg') else {}))
    if kind=='turned': a = np.rot90(a)
    x    = open_image(tmp_path/nm, None, short_side=short, **kwargs)
    full = torch.from_numpy(np.ascontiguousarray(a if a.ndim==3 else a[...,None]).astype(np.float32)).permute(2,0,1)/(65535 if kind=='grey16' else 255)
    hw   = x.shape[1:]
    assert min(hw)==short and abs(max(hw)-short*16/9)<=.5 and (hw[0]>hw[1])==(kind=='turned')
    want = torch.nn.functional.interpolate(full[None], hw, mode='bilinear', antialias=True)[0]
    got  = x.as_subclass(torch.Tensor).float()/(255 if x.dtype==torch.uint8 else 1)
    assert (got-want).abs().mean()<1.5/255 and (got-want).abs().max()<12/255

@pytest.mark.parametrize('hw', [(101,5000), (5000,101), (37,41), (60,60)])
@pytest.mark.parametrize('short', [13, 25, 37, 60, 200, None])
@pytest.mark.parametrize('ext', ['jpg', 'png'])
def test_shape_is_kept(tmp_path, hw, short, ext):
    "To a pixel, also where a draft of a JPEG has none; never enlarged"
    Image.new('RGB', hw[::-1]).save(tmp_path/f'a.{ext}')
    got = open_image(tmp_path/f'a.{ext}', None, short_side=short).shape[1:]
    s   = min(1, (short or min(hw))/min(hw))
    assert all(abs(a-b*s)<=.5 for a,b in zip(got, hw))

# ---- the batch

def test_bytes(folder, tmp_path):
    "Those of the pixels; a panorama adds its window"
    x, = dls_of(folder, bs=24).one_batch()
    assert isinstance(x, PackedImages) and x.dtype==torch.uint8 and x.channels==3
    assert x.nbytes==x.untyped_storage().nbytes()==sum(h*w*3 for h,w in photos) and sorted(map(tuple, x.sizes.tolist()))==sorted(photos)
    write(tmp_path, [*(picture(*o, i) for i,o in enumerate(photos)), picture(30,240,99)])
    y, = dls_of(tmp_path, bs=25).one_batch()
    assert y.nbytes==x.nbytes + 30*90*3

@pytest.mark.parametrize('hw,short,want', [((30,40), 15, (15,20)), ((41,31), 20, (26,20)), ((30,40), 30, (30,40)), ((30,40), 99, (30,40)), ((30,40), None, (30,40)), ((4,90), 3, (3,9))])
def test_short_side(tmp_path, hw, short, want):
    "Shrunk, never enlarged, of its own shape to a pixel"
    x, = dls_of(write(tmp_path, [picture(*hw, 0)]), bs=1, short_side=short).one_batch()
    assert tuple(x.sizes[0].tolist())==want

def test_pixels_labels_names(folder):
    dls = dls_of(folder, parent_label, valid_pct=.25)
    for dl in dls:
        fns,at = dl.items,0
        for x,y in dl.new(shuffle=False, drop_last=False):
            assert len(x)==len(y)==find_bs((x,y))
            for im,t in zip(x, y):
                np.testing.assert_array_equal(im.permute(1,2,0).numpy(), np.array(Image.open(fns[at])))
                assert dls.vocab[t]==fns[at].parent.name
                at += 1
        assert at==len(fns)
    assert dls.vocab==['class0','class1'] and len(dls.valid_ds)==6

@pytest.mark.parametrize('label_func', [None, parent_label])
@pytest.mark.parametrize('how', [dict(valid_pct=.25), dict(splitter=RandomSplitter(.25, seed=1)), 'valid'])
def test_show_batch(folder, long, label_func, how):
    import matplotlib.pyplot as plt
    dls = dls_of(folder, label_func, **(dict(valid=long) if how=='valid' else how))
    for dl in dls:
        plt.close('all')
        dl.show_batch(max_n=4)
        axes = [o for o in plt.gcf().axes if o.images]
        assert len(axes)==4 and all(o.get_title() in ((*dls.vocab,) if label_func else ('',)) for o in axes)
        assert {o.images[0].get_array().shape[:2] for o in axes} <= {*photos, (6,18), (18,6)}
    plt.close('all')

# ---- windows

def starts(dl): return [int(o[0,0,0]) for b in dl for o in b[0] if min(o.shape[1:])==6]

def test_another_window_in_each_epoch(long):
    "From end to end, all of them alike; and in validation the middle"
    dls = dls_of(long, valid=write(long.parent/'valid', [strip(), strip()]))
    epochs = [starts(dls.train) for _ in range(60)]
    seen = np.array(epochs).flatten()                                  # 12 strips of 200 pixels: their windows of 18 begin at 0 to 182
    assert all(len(o)==12 and len(set(o))>3 for o in epochs) and len(set(map(tuple, epochs)))==60
    assert seen.min()<=1 and seen.max()>=181 and abs(seen.mean()-91)<6 and abs(seen.std()-183/12**.5)<4
    assert all(starts(dls.valid)==[91,91] for _ in range(2))
    assert starts(dls.test_dl(dls.train.items[-8:]))==[91]*8

def test_windows_do_not_depend_on_workers(long):
    def _epochs(workers): return [[o.clone() for x, in dl for o in x] for dl in [dls_of(long, num_workers=workers, seed=3).train] for _ in range(2)]
    for a,b in zip(_epochs(0), _epochs(2)): assert len(a)==24 and all(map(torch.equal, a, b))

def test_windows_leave_the_order_alone(long):
    "Nothing is drawn from the generator that shuffles"
    whole,squares = dls_of(long, parent_label).train,dls_of(long, parent_label, size=8).train
    for _ in range(2): assert [y.tolist() for _,y in whole]==[y.tolist() for _,y in squares]

def test_no_windows(long): assert dls_of(long, bs=24, max_aspect=None).one_batch()[0].sizes.amax()==200

# ---- mistakes

@pytest.mark.parametrize('kwargs,says', [
    (dict(batch_tfms=[lambda x: x]), 'batch_tfms and after_batch work on images of one size.*pass size, such as size=256'),
    (dict(after_batch=[lambda x: x]), 'pass size, such as size=256'),
    (dict(short_side=0), 'short_side=0 must be a whole number of pixels.*512 for 224.*None'), (dict(short_side=(300,400)), r'short_side=\(300, 400\)'), (dict(short_side=.5), 'short_side=0.5'),
    (dict(max_aspect=.5), r'max_aspect=0.5 .*1 \(squares\) or more, or None'),
    (dict(size=32, short_side=64), 'short_side=64 .*whole images, and size=32 cuts.*leave them out, or size'), (dict(size=32, max_aspect=2), 'max_aspect=2 .*leave them out, or size'),
    (dict(item_tfms=[lambda o: o], short_side=64), 'item_tfms get .*leave them out, or item_tfms')])
def test_mistakes(folder, kwargs, says):
    with pytest.raises(ValueError, match=says): image_dls(folder, **kwargs)

def test_a_classifier_is_told_what_to_load(folder):
    learn = Learner(dls_of(folder, parent_label), nn.Sequential(nn.Conv2d(3,2,3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(ValueError, match=r'conv2d needs images of one size.*image_dls\(…, size=256\) loads squares'): quiet(learn, 1)

# ---- training

def learner(name, dls, cbs=(), aug=None, n_in=3, **kwargs): return Learner(dls, model(name, n_in), cbs=[callback(name, aug), *cbs], **kwargs)

@pytest.mark.parametrize('name', methods)
def test_every_method_trains(long, name):
    "With what it keeps of former batches: queue and memory"
    learn = learner(name, dls_of(long, parent_label, valid_pct=.25))
    before = [o.clone() for o in learn.model.parameters()]
    quiet(learn, 2, 1e-2)
    assert all(o[0]==o[0] and o[1]==o[1] for o in learn.recorder.values) and len(learn.recorder.losses)==4
    assert any(not torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))
    for buffer in learn.model.buffers(): assert buffer.isfinite().all()

def of_block(folder, **kwargs):
    return DataBlock((TransformBlock(type_tfms=partial(open_image, size=None, short_side=20)), CategoryBlock), get_items=get_image_files, get_y=parent_label,
                     splitter=RandomSplitter(.25, seed=0), **kwargs).dataloaders(folder, bs=6, create_batch=packed_batch, device='cpu')

def test_datablock(long):
    dls = of_block(long)
    x,y = dls.one_batch()
    assert isinstance(x, PackedImages) and len(x)==len(y)==6 and sorted(x.sizes.amax(1).tolist())[-1]==200
    quiet(learner('swav', dls), 1)
    dls.show_batch(max_n=2)
    dls = of_block(long, dl_type=WholeImageDL)                          # with windows
    assert dls.one_batch()[0].sizes.amax()<=30 and isinstance(dls.train, WholeImageDL)
    quiet(learner('swav', dls), 1)

class Files(torch.utils.data.Dataset):
    def __init__(self, folder): self.fns = get_image_files(folder)
    def __len__(self): return len(self.fns)
    def __getitem__(self, i): return open_image(self.fns[i], None),i%2

class Named(Files):
    def __getitem__(self, i): return dict(zip(('image','label','name'), (*super().__getitem__(i), self.fns[i].name)))

@pytest.mark.parametrize('cls', [Files, Named])
@pytest.mark.parametrize('workers', [0, 2])
def test_loader_of_pytorch(folder, cls, workers):
    dl = torch.utils.data.DataLoader(cls(folder), 6, collate_fn=packed_batch, num_workers=workers)
    b = next(iter(dl))
    x,y,*_ = b.values() if cls is Named else b
    for i,o in enumerate(x): assert o.equal(cls(folder).fns and open_image(dl.dataset.fns[i], None))
    assert y.tolist()==[0,1]*3 and (cls is Files or b['name']==[o.name for o in dl.dataset.fns[:6]])
    assert x.pixels.is_shared()==(workers>0)
    if not workers: quiet(learner('swav', DataLoaders(dl, []), loss_func=nn.MSELoss()), 1)

def test_two_inputs(folder):
    "A second input or other images beside the first are packed as well"
    b = packed_batch([(open_image(o, None), open_image(o, None, short_side=10), torch.ones(2), 'word', 3) for o in get_image_files(folder)[:3]])
    assert [type(o).__name__ for o in b]==['PackedImages','PackedImages','Tensor','tuple','Tensor'] or [len(o) for o in b]==[3]*5
    assert b[1].sizes.amin(1).tolist()==[10]*3 and b[2].shape==(3,2)

def test_lr_find_leaves_no_trace(long):
    learn = learner('swav', dls_of(long))
    before,rng = copy.deepcopy(learn.model.state_dict()),str(rng_states(learn.dls))
    with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and str(rng_states(learn.dls))==rng

def test_export(long, tmp_path):
    learn = learner('swav', dls_of(long, parent_label), path=tmp_path)
    learn.remove_cbs(learn.cbs.filter(lambda o: isinstance(o, SWAV)))
    learn.export('whole.pkl')
    dls = load_learner(tmp_path/'whole.pkl').dls
    dl  = dls.test_dl(get_image_files(long)[:4])
    assert len(dl.one_batch()[0])==4 and dl.max_aspect==3 and dls.vocab==['class0','class1']

# ---- two processes

def _cut(i, size, x): return torch.stack([o.as_subclass(torch.Tensor)[:,i:i+size,i//2:i//2+size] for o in x]).double()/255
def corner(i, size):
    "The same part of each image, with nothing random"
    def _corner(x) -> None: return _cut(i, size, x)
    return Pipeline([_corner], split_idx=0)

class Record(Callback):
    "Loss and all gradients of every step, as the optimizer gets them"
    order = 60
    def before_fit(self): self.steps = []
    def before_step(self): self.steps.append(dict(loss=self.learn.loss.detach(), **{n.removeprefix('module.'):p.grad.clone() for n,p in self.learn.model.named_parameters() if p.grad is not None}))

def steps_of(name, bs, order, folder):
    set_seed(7)
    dls = dls_of(folder/'long', parent_label, bs=bs, shuffle=False, drop_last=False)
    if order: dls.train.get_idxs = lambda: order
    enc = nn.Sequential(nn.Conv2d(3,6,3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    m   = model(name, 3, enc=enc, **taken(methods[name].create_model, bn=False)).double()
    learn = Learner(dls, m, opt_func=SGD, path=folder, cbs=[callback(name, [corner(i, o) for i,o in enumerate((5,5,4))]), Record()])
    learn.remove_cbs([Recorder, ProgressCallback]) # fastai's Recorder cannot average losses in float64
    with learn.distrib_ctx(): learn.fit(2, lr=.1, wd=0.)
    return learn.record.steps,learn.model.state_dict()

@pytest.mark.parametrize('name', methods)
def test_two_processes_equal_one(tmp_path, name):
    "22 images: 4+4+3 on each process, with windows of strips; the same steps on one, with the batches joined"
    write(tmp_path/'long', [strip(8) if i%3==1 else picture(12,10+i%4,i) for i in range(22)])
    ids   = torch.arange(22).chunk(2)
    order = torch.cat([o for batches in zip(*(o.split(4) for o in ids)) for o in batches]).tolist()
    steps,state = steps_of(name, 8, order, tmp_path)
    assert len(steps)==6
    for many,weights in on_ranks(partial(steps_of, name, 4, None), tmp_path, 2): assert worst_difference([*many, weights], [*steps, state])<1e-8

# ---- runs that go on

class Die(Callback):
    "Raise in the `nth` batch"
    is_setting = False
    def __init__(self, nth): self.nth = nth
    def after_backward(self):
        self.nth -= 1
        if not self.nth: raise KeyboardInterrupt

def run_of(folder, source, seed=42, cbs=(), name='swav', **kwargs):
    set_seed(seed)
    return learner(name, dls_of(source, parent_label, valid_pct=.2, **{'bs':4, 'seed':None, **kwargs}), [Checkpoint(folder, minutes=None, steps=1), *cbs], path=folder)

def outcome(learn): return [*learn.model.state_dict().values(), torch.stack(list(learn.recorder.losses)), torch.tensor([o[1] for o in learn.recorder.values])]

@pytest.mark.parametrize('name,workers', [('swav',0), ('swav',2), ('deepcluster',0)])
def test_goes_on_exactly(tmp_path, long, name, workers):
    "In the middle of an epoch, to the bit: order, windows, boxes, queue or memory"
    kwargs = dict(num_workers=workers, name=name)
    quiet(whole := run_of(tmp_path/'whole', long, **kwargs), 3, 1e-2)
    dying = run_of(tmp_path/'run', long, cbs=[Die(8)], **kwargs)         # 5 batches an epoch
    with pytest.raises(KeyboardInterrupt): quiet(dying, 3, 1e-2)
    again = run_of(tmp_path/'run', long, seed=7, **kwargs)
    again.resume()
    quiet(again, 3, 1e-2)
    for a,b in zip(outcome(whole), outcome(again), strict=True): assert torch.equal(a, b)

@pytest.fixture(scope='module')
def cut_short(tmp_path_factory, long):
    path = tmp_path_factory.mktemp('cut')
    with pytest.raises(KeyboardInterrupt): quiet(run_of(path, long, cbs=[Die(2)]), 1)
    return path

@pytest.mark.parametrize('kwargs,says,names', [
    (dict(short_side=400), ['opened.short_side: 512 → 400'], ['opened']), # no image here is so large
    (dict(max_aspect=2.), ['opened.max_aspect: 3.0 → 2.0'], ['opened']), (dict(max_aspect=None), ['opened.max_aspect: 3.0 → None'], ['opened']),
    (dict(background='black'), ['opened.background[0]: 255 → 0'], ['opened']),
    (dict(size=20), ['opened.size: None → [20, 20]', 'opened.short_side: 512 → None', 'loader[0]: WholeImageDL → ImageDL'], ['opened','item','loader'])])
def test_other_settings(cut_short, long, kwargs, says, names):
    learn = run_of(cut_short, long, **kwargs)
    learn.resume()
    with pytest.raises(ValueError) as e: quiet(learn, 1)
    for o in says: assert o in str(e.value)
    assert f'override={names}' in str(e.value)

def test_other_images(cut_short, folder, tmp_path):
    "Who allows other images allows images of other sizes"
    shutil.copytree(cut_short, tmp_path/'run')
    learn = run_of(tmp_path/'run', folder)
    learn.resume('data')
    quiet(learn, 1)
    assert learn.epoch==0 and len(learn.recorder.losses)==6 # one of the old epoch, and a whole new one

# ---- what else is done with a batch

@pytest.fixture
def batch(): return pack_images([torch.from_numpy(picture(h, w, i)).permute(2,0,1) for i,(h,w) in enumerate(((5,7),(7,5),(3,20)))])

def through_file(x):
    torch.save(x, f := io.BytesIO())
    f.seek(0)
    return torch.load(f, weights_only=False)

@pytest.mark.parametrize('f', [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_file, torch.Tensor.share_memory_, lambda x: x.detach().cpu().clone(), lambda x: x.data,
                               lambda x: to_device({'x':[x]}, 'cpu')['x'][0], lambda x: copy.deepcopy([x,x])[1]], ids='copy deepcopy pickle file shared clone data device list'.split())
@pytest.mark.parametrize('n', [3, 0])
def test_stays_what_it_is(batch, f, n):
    x = batch[:n]
    y = f(x)
    assert type(y) is PackedImages and y.sizes.dtype==torch.int64 and y.sizes.equal(x.sizes) and y.channels==3 and y.pixels.equal(x.pixels)
    assert [o.shape for o in y]==[o.shape for o in x] and find_bs((y,))==n

def test_pinned_by_torch(batch, monkeypatch):
    "What pins is asked once, for the row of numbers, and the batch keeps its form"
    asked = []
    def fake(self, *args): asked.append(self.numel()); return torch.Tensor.clone(self)
    monkeypatch.setattr(torch.Tensor, 'pin_memory', fake)
    monkeypatch.setattr(packed, '_moving', {*packed._moving, fake})
    x,y = pin_memory((batch, torch.arange(3)))
    assert type(x) is PackedImages and x.sizes is batch.sizes and asked==[batch.numel(), 3]

def test_picks(batch):
    for i in (1, np.int64(1), torch.tensor(1), -2): assert batch[i].shape==(3,7,5)
    for i in ([0,2], torch.tensor([0,2]), np.array([0,2]), torch.tensor([True,False,True]), [True,False,True], slice(0,3,2)):
        assert batch[i].sizes.tolist()==[[5,7],[3,20]] and batch[i][1].equal(batch[2])
    for i in (3, (0,1), None):
        with pytest.raises(IndexError): batch[i]

@pytest.mark.parametrize('f', [lambda x: x/255, lambda x: x+x, lambda x: x==x, lambda x: x.float(), lambda x: x.mean(), lambda x: torch.stack([x,x]), lambda x: torch.cat([x,x]), lambda x: x.numpy(), bool])
def test_refuses_what_needs_one_size(batch, f):
    with pytest.raises(ValueError, match='needs images of one size.*views are cut from them first.*size=256'): f(batch)

def test_a_worker_packs_where_others_can_read(batch, monkeypatch):
    "So that nothing is copied on the way to the main process"
    assert not pack_images(list(batch)).pixels.is_shared()
    monkeypatch.setattr(packed, 'get_worker_info', lambda: 'a worker')
    x = pack_images(list(batch))
    assert x.pixels.is_shared() and x.pixels.equal(batch.pixels)

def test_others_may_follow_it(batch):
    assert torch.ones(2).to(batch).dtype==torch.uint8 and f'{batch}'==repr(batch) and 'sizes [[5, 7], [7, 5], [3, 20]]' in str(batch)
