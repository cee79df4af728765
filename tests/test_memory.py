"Which images a batch holds, for loaders of all kinds and after a resume; and a memory that is what a loop over the dataset gives"
from functools import partial

import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.data.all import CategoryBlock, DataBlock, Datasets, TfmdDL, ToTensor, Transform
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader, SkipItemException
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.all import ImageBlock, PILImageBW, RandTransform
from fasttransform import Pipeline
from PIL import Image
from torch import nn

from self_supervised import memory
from self_supervised.augmentations import unit_float
from self_supervised.data import image_dls, no_loss, tensor_dls
from self_supervised.memory import EpochIds, check_countable, fill_memory, refresh_memory
from self_supervised.multicrop import multicrop
from self_supervised.replay import batches_after, can_skip
from self_supervised.basics import rng_states
from self_supervised.vision.deepcluster import DeepCluster, create_deepcluster_model

from methods import quiet
from test_swav import corner, images

n = 21
def pixels(): return torch.arange(n).view(n,1,1,1).expand(n,1,4,4)/100 # of image i: i/100

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp('grey')
    for i in range(n): Image.new('L', (4,4), 10*i).save(path/f'{i:02}.png')
    return path

class Flicker(RandTransform):
    "By chance, and so that nobody can leave a batch out in the workers"
    def encodes(self, o:torch.Tensor): return o+torch.rand(1)*.001

items = partial(torch.Tensor.unbind, pixels())
def tensors(drop, **kwargs): return tensor_dls(pixels(), bs=4, drop_last=drop, **kwargs).train
def lists(drop, bs=4, num_workers=0, **kwargs): return TfmdDL([(o,) for o in items()], bs=bs, shuffle=True, drop_last=drop, num_workers=num_workers, **kwargs)
def weighted(drop):          return WeightedDL(Datasets(range(n), [[items().__getitem__]]), bs=4, shuffle=True, drop_last=drop, wgts=range(n), num_workers=0)
def partly(drop, m=10):      return PartialDL(Datasets(range(n), [[items().__getitem__]]), bs=4, shuffle=True, drop_last=drop, partial_n=m, num_workers=0)
def of_files(drop, files, **kwargs): return image_dls(files, size=4, n_in=1, bs=4, drop_last=drop, valid_pct=.2, **kwargs).train
def block(drop, files, **kwargs):
    return DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=lambda p: sorted(p.iterdir()), get_y=lambda p: int(p.stem)%2).dataloaders(
        files, bs=4, drop_last=drop, num_workers=0, **kwargs).train
def dealt(dl, r, ranks):
    "The part of process `r`, as in a distributed fit"
    dl = DistributedDL(dl, r, ranks)
    dl._broadcast = lambda t,rank: t
    return dl

loaders = dict(tensors=lambda d,f: tensors(d), ordered=lambda d,f: tensors(d).new(shuffle=False), lists=lambda d,f: lists(d), plain=lambda d,f: DataLoader(items(), bs=4, shuffle=True, drop_last=d),
               workers=lambda d,f: lists(d, num_workers=2), weighted=lambda d,f: weighted(d), partly=lambda d,f: partly(d), files=lambda d,f: of_files(d, f), file_workers=lambda d,f: of_files(d, f, num_workers=2),
               block=lambda d,f: block(d, f), dealt=lambda d,f: dealt(tensors(d), 1, 2), dealt_3=lambda d,f: dealt(of_files(d, f), 2, 3), dealt_workers=lambda d,f: dealt(lists(d, num_workers=2), 0, 2))

def image(b): return (b[0] if isinstance(b, tuple) else b).as_subclass(torch.Tensor).float()
def item(dl, i):
    o = (dl.dl if isinstance(dl, DistributedDL) else dl).dataset[i]
    o = o[0] if isinstance(o, tuple) else o
    return (o if isinstance(o, torch.Tensor) else ToTensor()(o)).as_subclass(torch.Tensor).float()

def checked(dl, b, ids):
    "Numbers of the images of `b`; the dataset has the same images there"
    x = image(b)
    assert ids.dtype==torch.int64 and len(ids)==len(x)
    want = torch.stack([item(dl, i) for i in ids.tolist()])
    torch.testing.assert_close(x*(255 if x.max()<=1<want.max() else 1), want) # loaders of a `DataBlock` make floats
    return ids.tolist()

@pytest.mark.parametrize('kind,drop', [(k,d) for k in loaders for d in (True,False) if not ('workers' in k and d)]) # what workers do does not depend on it
def test_ids(kind, drop, files):
    "Of every batch; in two epochs, after one that was broken off, and when somebody looks at a batch in between"
    check_countable(dl := loaders[kind](drop, files))
    def epoch(look=None, stop=None):
        seen = []
        for i,b in enumerate(dl):
            if i==0: ids = EpochIds(dl)
            if i==look: dl.one_batch()
            seen += checked(dl, b, ids[i])
            if i==stop: break
        return seen
    epochs = [epoch(), epoch()]
    epoch(stop=0)
    epochs.append(epoch(look=1))
    if not kind.startswith(('weighted','partly','dealt')): assert all(len(o)==len(set(o)) for o in epochs)
    assert (epochs[0]==epochs[1])==(kind=='ordered')

# those that read everything again; and those whose length is a batch more than they give
resumed = dict(flicker=lambda d,f: lists(d, num_workers=2, after_item=[Flicker()]), dealt_flicker=lambda d,f: dealt(lists(d, num_workers=2, after_item=[Flicker()]), 1, 2),
               partly_8=lambda d,f: partly(d, 8), partly_flicker=lambda d,f: PartialDL([(o,) for o in items()], bs=4, shuffle=True, drop_last=d, partial_n=12, num_workers=2, after_item=[Flicker()]))

@pytest.mark.parametrize('kind,drop,skip', [('tensors',False,True), ('file_workers',False,True), ('dealt',False,True), ('dealt',True,True), ('partly_8',False,True),
    ('workers',False,False), ('flicker',True,False), ('dealt_flicker',True,False), ('partly_flicker',False,False)])
def test_ids_after_resume(kind, drop, skip, files):
    "A loader that leaves the first batches out, and one that cannot: batches and numbers are those of the epoch that was not broken off"
    dl,want = (loaders | resumed)[kind](drop, files),[]
    done = 1 if kind in ('dealt','dealt_flicker','partly_8') else 2
    if not isinstance(dl, DistributedDL): dl.rng.seed(1)
    assert can_skip(dl)==skip
    set_seed(1)
    begin = rng_states([dl])
    for i,b in enumerate(dl):
        if i==0: ids = EpochIds(dl)
        want.append((image(b), ids[i]))
        if i==done-1: now = rng_states([dl])
    set_seed(7)
    got = []
    for i,b in enumerate(batches_after(dl, [dl], done, begin, now), done):
        if i==done: ids = EpochIds(dl)
        got.append((image(b), ids[i]))
    assert len(want)>done and len(got)==len(want)-done
    for (x,a),(y,b) in zip(want[done:], got):
        torch.testing.assert_close(x, y, atol=.0011, rtol=0); assert torch.equal(a, b) and len(a)==len(x)
    for i,b in enumerate(dl): # and again from the start
        if i==0: ids = EpochIds(dl)
        assert len(ids[i])==len(image(b))
    assert i+1==len(want)

class Endless:
    def __getitem__(self, i): return pixels()[i%n]

def test_what_cannot_be_counted():
    torch_dl = torch.utils.data.DataLoader(pixels(), 4)
    with pytest.raises(TypeError, match=r'dls.train is a torch.utils.data.dataloader.DataLoader, .*give a dataset with a length and an index to fastai.data.load.DataLoader'): check_countable(torch_dl)
    for dl in (DataLoader(iter(items()), bs=4), DataLoader(items(), bs=None), DataLoader(items(), bs=4, indexed=False), DataLoader(Endless(), bs=4)):
        with pytest.raises(ValueError, match='have no numbers .*needs a dataset with a length and an index, and a batch size'): check_countable(dl)
    with pytest.raises(ValueError, match='have no numbers'): check_countable(DistributedDL(TfmdDL(iter(items()), bs=4), 0, 2))


# The memory

def learner(x, bs, bn=False, dls=None, views=(corner(0,8), corner(2,8), corner(1,5)), ids=(0,1)):
    enc = nn.Sequential(nn.Conv2d(1,6,3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model = create_deepcluster_model(enc, 8, 5, n_protos=1, bn=bn, n_heads=1)
    return Learner(tensor_dls(x, bs=bs, drop_last=False) if dls is None else dls, model, loss_func=no_loss, cbs=DeepCluster(list(views), ids))

@pytest.mark.parametrize('N,bs', [(22,6), (25,6), (4,6), (1,6), (5,1)])
def test_fill_equals_loop(N, bs):
    "In the order of the dataset, with a short last batch, a single image in it, one short batch only"
    learn,x = learner(images(N), bs),images(N)
    m,cb = learn.model,learn.deep_cluster
    before = learn.dls.train.n, learn.dls.train.shuffle
    got = fill_memory(cb, [2,0])
    want = [[nn.functional.normalize(m.projector(multicrop(m.encoder, [cb.aug_pipelines[v](x[i:i+1])])), dim=1)[0] for i in range(N)] for v in (2,0)]
    torch.testing.assert_close(got, torch.stack([torch.stack(o) for o in want]).detach())
    assert got.is_contiguous() and not got.requires_grad and (learn.dls.train.n, learn.dls.train.shuffle)==before

class HalfOnCPU(MixedPrecision):
    "fastai's means a GPU"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', torch.bfloat16)

@pytest.mark.filterwarnings('ignore::UserWarning')
def test_fill_in_the_precision_of_the_training():
    "And of float32 what remains: scores, memory and views"
    learn,seen,filled = learner(images(22), 6),[],[]
    m,cb = learn.model,learn.deep_cluster
    m.encoder.register_forward_hook(lambda m,xs,out: seen.append((xs[0].dtype, out.dtype)))
    m.projector.register_forward_hook(lambda m,xs,out: seen.append(out.dtype))
    class Stop(Callback):
        order = MixedPrecision.order+1
        def after_pred(self): filled.extend([len(seen), cb.memory.clone(), self.pred])
        def after_loss(self): raise CancelFitException
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[HalfOnCPU(AMPMode.BF16), Stop()])
    n,memory,pred = filled
    assert n>4 and set(seen)=={(torch.float32,torch.bfloat16), torch.bfloat16} and memory.dtype==torch.float32 and {o.dtype for o in pred}=={torch.float32}
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad(): want = m([p(images(22)) for p in cb.aug_pipelines[:2]])[0]
    torch.testing.assert_close(memory, want.unflatten(0, (2,-1)), atol=.02, rtol=.02)
    assert not torch.allclose(memory, fill_memory(cb, [0,1]), atol=1e-6) # which is in float32 once the fit is over

@pytest.mark.parametrize('N', [13, 7, 1])
def test_batch_norm_never_meets_one_image(N):
    learn = learner(images(N), 6, bn=True)
    learn.model.train()
    assert fill_memory(learn.deep_cluster, [0,1]).shape==(2,N,5)

@pytest.mark.parametrize('N', [13, 22, 2])
def test_parts_of_processes(monkeypatch, N):
    "Three processes project as many images each, with a batch norm that never meets one, and together all of them"
    learn,parts = learner(images(N), 4),[]
    want,each = fill_memory(learn.deep_cluster, [1,0]),-(-N//3)
    monkeypatch.setattr(memory, 'world_size', lambda: 3)
    monkeypatch.setattr(memory, 'all_gather', lambda t,sizes: parts.append(t) or (t if sizes==[each]*3 else None))
    for r in range(3):
        monkeypatch.setattr(memory, 'rank', lambda: r)
        fill_memory(learn.deep_cluster, [1,0])
    assert [o.shape for o in parts]==[(each,2,5)]*3
    torch.testing.assert_close(torch.cat(parts)[:N].transpose(0,1), want)

@pytest.mark.parametrize('kind', ['weighted', 'partly', 'lists', 'workers', 'file_workers'])
def test_fill_through_other_loaders(kind, files):
    "A loader that shuffles, draws with weights or leaves out: the memory is that of all images, in their order"
    dls = DataLoaders(loaders[kind](True, files), [])
    learn = learner(None, None, dls=dls, views=(corner(0,4), corner(0,3)))
    x = torch.stack([item(dls.train, i) for i in range(dls.train.n)])
    if kind=='file_workers': x,learn.deep_cluster.aug_pipelines = x/255,[Pipeline([unit_float, *p.fs], split_idx=0) for p in learn.deep_cluster.aug_pipelines]
    want = learn.model([p(x) for p in learn.deep_cluster.aug_pipelines])[0].detach().unflatten(0, (2,-1))
    torch.testing.assert_close(fill_memory(learn.deep_cluster, [0,1]), want)

def test_images_that_are_left_out():
    class Skips(Transform):
        def encodes(self, o:torch.Tensor):
            if o.mean()>.105: raise SkipItemException()
            return o
    learn = learner(None, None, dls=DataLoaders(lists(False, bs=6, after_item=[Skips()]), []), views=(corner(0,4), corner(0,3)))
    with pytest.raises(ValueError, match='11 of 21 images came .*leave those that cannot be read out of the dataset'): quiet(learn, 1)

def test_refresh():
    m = torch.zeros(2,5,3)
    z = torch.arange(12.).view(2,2,3)+1
    refresh_memory(m, torch.tensor([3,1]), z.double())
    assert torch.equal(m[:,[3,1]].double(), z.double()) and not m[:,[0,2,4]].any() and m.dtype==torch.float32
